"""Exceptions of the public interface; every one is an `OnnxJitError`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class OnnxJitError(Exception):
    """Base class of the errors that onnxjit raises on purpose."""


class ModelError(OnnxJitError):
    """The model cannot be used: not a model, truncated, inconsistent, external data missing."""


class NotAModelError(ModelError):
    """The bytes are not an ONNX model."""


class GraphError(OnnxJitError):
    """A graph breaks its own rules (see `Graph.verify`): a defect of onnxjit, not of the model."""


class DeviceError(OnnxJitError):
    """The device that was asked for is not there, or this version cannot run on it."""


class InputError(OnnxJitError, ValueError):
    """The inputs of a call do not fit the model: which one, what was expected, what came."""


class UnsupportedNode(NamedTuple):
    """One node that has no implementation, and why."""

    name: str
    domain: str
    op: str
    version: int
    reason: str

    def __str__(self) -> str:
        domain = f"{self.domain}::" if self.domain else ""
        return (
            f"{domain}{self.op} (since version {self.version}) of node {self.name!r}: {self.reason}"
        )


class UnsupportedOperators(ModelError):
    """The model holds nodes that have no implementation; `nodes` lists every one of them."""

    def __init__(self, nodes: Iterable[UnsupportedNode]) -> None:
        self.nodes: tuple[UnsupportedNode, ...] = tuple(nodes)
        lines = "".join(f"\n  {node}" for node in self.nodes)
        super().__init__(f"the model has {len(self.nodes)} unsupported node(s):{lines}")

    def __reduce__(self) -> tuple[type[UnsupportedOperators], tuple[tuple[UnsupportedNode, ...]]]:
        return type(self), (self.nodes,)


class KernelSourceError(OnnxJitError):
    """An edited kernel source that cannot be built: where it is outside of the kernel dialect."""


class KernelMismatch(OnnxJitError):
    """An edited kernel source computes something else than the kernel's definition."""
