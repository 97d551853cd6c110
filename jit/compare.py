"""Compares a compiled model with a reference, value by value, and finds where they part.

The model is compiled twice. As it is, its outputs are compared: that tests everything, fusion
included. Then a copy whose every intermediate value is an output is compared value by value, in the
order of the nodes: the first value that differs names the node that is wrong. Where only the first
comparison fails, each node alone is right and what combines them (fusion, layouts, memory) is not.
Values inside the bodies of control flow and of functions are not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxjit.errors import ModelError, OnnxJitError

if TYPE_CHECKING:
    from onnx import ModelProto

    from onnxjit.compiled import CompiledModel

Feeds = Mapping[str, np.ndarray]


class ReferenceFailed(OnnxJitError):
    """The reference that a model is compared with cannot run it, or is not installed."""


TOLERANCES = {"float64": 1e-7, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
REFERENCES = ("onnx", "onnxruntime")
_LARGEST_MESSAGE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Row:
    """One value: the node that makes it, how far it is from the reference, and whether that is
    within the tolerance. `note` says what is different when no distance can be told."""

    name: str
    node: str
    dtype: str
    shape: tuple[int, ...]
    error: float
    same: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """`outputs` are of the model as it is, `values` of the copy with every value exposed."""

    outputs: tuple[Row, ...]
    values: tuple[Row, ...]

    @property
    def first(self) -> Row | None:
        """The first value, in the order of the nodes, that is not the same."""
        return next((row for row in self.values if not row.same), None)

    @property
    def same(self) -> bool:
        return all(row.same for row in (*self.outputs, *self.values))


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value of `want`; infinite where NaN or
    infinity do not stand in the same places. Arrays of the same shape; strings differ by 0 or 1."""
    if want.size == 0:
        return 0.0
    if want.dtype.kind in "OUST":
        return float(not np.array_equal(got.astype(str), want.astype(str)))
    if want.dtype.kind not in "biu":
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        odd = ~np.isfinite(want)
        if (
            not np.array_equal(got[odd], want[odd], equal_nan=True)
            or not np.isfinite(got[~odd]).all()
        ):
            return float("inf")
        got, want = got[~odd], want[~odd]
        if want.size == 0:
            return 0.0
    distance = np.abs(got.astype(np.float64) - want.astype(np.float64)).max()
    return float(distance / max(np.abs(want.astype(np.float64)).max(), 1e-30))


def compare_value(name: str, node: str, got: Any, want: Any, tolerance: float | None) -> Row:
    """The row of one value; without a `tolerance`, that of its dtype (integers: none)."""
    want = np.asarray(want)
    if not isinstance(got, np.ndarray):
        got = np.asarray(got)
    shape = tuple(want.shape)
    if got.shape != want.shape:
        note = f"shape {tuple(got.shape)}, the reference has {shape}"
        return Row(name, node, want.dtype.name, shape, float("inf"), False, note)
    note = "" if got.dtype == want.dtype else f"dtype {got.dtype}, the reference has {want.dtype}"
    limit = TOLERANCES.get(want.dtype.name, 0.0) if tolerance is None else tolerance
    error = difference(got, want)
    return Row(name, node, want.dtype.name, shape, error, error <= limit and not note, note)


def load_model(model: Any) -> ModelProto:
    """A ModelProto with its external data, from a path or a ModelProto."""
    import onnx

    if isinstance(model, (str, os.PathLike)):
        try:
            return onnx.load(os.fspath(model))
        except Exception as error:  # protobuf's own error types differ between its versions
            raise ModelError(f"cannot read {os.fspath(model)!r}: {error}") from error
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def expose(model: ModelProto) -> dict[str, str]:
    """Makes every tensor that a node of the main graph computes an output of `model`, in place.

    Returns the names of all outputs, in the order of the nodes, with a description of their node.
    """
    from onnx import NodeProto, ValueInfoProto, shape_inference

    graph = model.graph
    known = {v.name: v for v in graph.value_info}
    if model.ByteSize() < _LARGEST_MESSAGE:
        inferred = shape_inference.infer_shapes(model).graph.value_info
        known.update((v.name, v) for v in inferred)

    def describe(node: NodeProto) -> str:
        return f"{node.op_type} {node.name!r}" if node.name else node.op_type

    made = {name: describe(node) for node in graph.node for name in node.output if name}
    listed = {v.name for v in graph.output}
    for name in made:
        if name in listed:
            continue
        info = known.get(name)
        if info is not None and info.HasField("type") and not info.type.HasField("tensor_type"):
            continue
        # Without a type where inference knew none: a wrong one would be worse.
        graph.output.append(info if info is not None else ValueInfoProto(name=name))
    outputs = {v.name for v in graph.output}
    return {name: node for name, node in made.items() if name in outputs}


def compare(
    model: Any,
    feeds: Feeds,
    against: str = "onnx",
    tolerance: float | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compares a model (path or ModelProto) with ONNX's reference evaluator or onnxruntime.

    `tolerance` bounds `difference`; by default `TOLERANCES` of each value's dtype.
    Raises ValueError for an unknown reference and `ReferenceFailed` where it cannot run the model.
    """
    import onnxjit

    if against not in REFERENCES:
        raise ValueError(f"cannot compare against {against!r}: it is {' or '.join(REFERENCES)}")
    proto = load_model(model)
    compiled = onnxjit.compile(proto, threads=threads, progress=progress)
    got = dict(zip((v.name for v in compiled.outputs), _run(compiled, feeds), strict=True))
    interface = list(got)
    nodes = expose(proto)
    names = [v.name for v in proto.graph.output]
    exposed = onnxjit.compile(proto, threads=threads, cache=False, progress=progress)
    values = dict(zip(names, _run(exposed, feeds), strict=True))
    reference = _reference(proto, feeds, against, names)

    def row(name: str, found: Mapping[str, Any]) -> Row:
        return compare_value(
            name, nodes.get(name, "the model's input"), found[name], reference[name], tolerance
        )

    return Comparison(
        tuple(row(name, got) for name in interface),
        tuple(row(name, values) for name in nodes if _is_tensor(reference[name])),
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (np.ndarray, np.generic))


def _run(compiled: CompiledModel, feeds: Feeds) -> Sequence[Any]:
    return compiled.run([feeds[v.name] for v in compiled.inputs])


def _reference(
    proto: ModelProto, feeds: Feeds, against: str, names: Sequence[str]
) -> dict[str, Any]:
    run = _run_onnxruntime if against == "onnxruntime" else _run_onnx
    try:
        return dict(zip(names, run(proto, feeds, names), strict=True))
    except Exception as error:  # whatever an engine raises that is not ours
        raise ReferenceFailed(f"{against} cannot run the model: {error}") from error


def _run_onnxruntime(proto: ModelProto, feeds: Feeds, names: Sequence[str]) -> Sequence[Any]:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Fused operators would leave no intermediate values to compare with.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(list(names), dict(feeds))


def _run_onnx(proto: ModelProto, feeds: Feeds, names: Sequence[str]) -> Sequence[Any]:
    from onnx.reference import ReferenceEvaluator

    return list(ReferenceEvaluator(proto).run(list(names), dict(feeds)))
