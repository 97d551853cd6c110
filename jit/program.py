"""The lowered model: calls of kernels and host functions over typed values, in execution order.

Value ids are generated here (v0, v1, …); the model's own names live in `labels` for messages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxjit.codegen.expr import Expr
from onnxjit.codegen.kernel import Kernel, TensorType
from onnxjit.codegen.layout import Layout


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One kernel; its buffer names are value ids. `origin` lists the ONNX nodes it computes."""

    kernel: Kernel
    origin: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.kernel.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.kernel.outputs


@dataclass(frozen=True, slots=True)
class HostCall:
    """A function that NumPy computes between kernels. "" among inputs is an omitted optional."""

    operator: tuple[str, str, int]
    attrs: Mapping[str, Any] = field(hash=False)
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    origin: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JoinCall:
    """A concatenation that is done when its parts are: each was stored in its place (see
    `Program.places`), so there is nothing to run. `origin` is empty where a kernel makes a part."""

    inputs: tuple[str, ...]
    output: str
    origin: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.output,)


Call = KernelCall | HostCall | JoinCall


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value lies that is part of another one: from element `offset` of `base` on, which is
    itself no part of anything. The value's layout has the strides."""

    base: str
    offset: Expr


@dataclass(frozen=True, slots=True)
class DimSource:
    """A symbolic size and where it is read: an axis of an input, as `factor * dim + offset`, or
    an axis of a host call's result."""

    name: str
    value: str
    axis: int
    factor: int = 1
    offset: int = 0
    label: str = ""


@dataclass(frozen=True, slots=True)
class Guard:
    """Two sizes that must be equal: `assumed` by definitions, or else declared by the model."""

    left: Expr
    right: Expr
    message: str
    assumed: bool = True


@dataclass(frozen=True, slots=True)
class Program:
    """`layouts` says where the elements of values lie that are not row-major, `places` which values
    are stored inside of another one. The last outputs are what `faults` tell of, each an int64
    scalar that is `NO_FAULT` when all is well."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    calls: tuple[Call, ...]
    types: Mapping[str, TensorType]
    constants: Mapping[str, np.ndarray]
    labels: Mapping[str, str]
    dims: tuple[DimSource, ...] = ()
    guards: tuple[Guard, ...] = ()
    faults: tuple[str, ...] = ()
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)

    def replace(self, **changes: Any) -> Program:
        return replace(self, **changes)

    def fresh(self) -> Iterator[str]:
        """Ids that no value has, one after the other."""
        numbers = (int(v[1:]) for v in {**self.types, **self.constants} if v[1:].isdigit())
        return (f"v{n}" for n in itertools.count(max(numbers, default=0) + 1))

    def uses(self) -> dict[str, int]:
        """How many calls read each value; being an output counts as a use."""
        count: dict[str, int] = dict.fromkeys(self.outputs, 1)
        for c in self.calls:
            for v in dict.fromkeys(c.inputs):
                if v:
                    count[v] = count.get(v, 0) + 1
        return count

    def kernels(self) -> Iterator[KernelCall]:
        return (c for c in self.calls if isinstance(c, KernelCall))

    def verify(self) -> None:
        """Every value is defined once, before it is used, and has a type."""
        known = {*self.inputs, *self.constants}
        for c in self.calls:
            for v in c.inputs:
                assert not v or v in known, f"{v} is read before it is made"
            for v in c.outputs:
                assert v not in known, f"{v} is made twice"
                assert v in self.types, f"{v} has no type"
            known |= set(c.outputs)
        for v, place in self.places.items():
            assert place.base in known and place.base not in self.places, f"{v} has no memory"
        missing = [v for v in self.outputs if v not in known]
        assert not missing, f"outputs {missing} are never made"

    def __str__(self) -> str:
        lines = [f"program({', '.join(f'{v}: {self.types[v]}' for v in self.inputs)})"]
        for c in self.calls:
            if isinstance(c, KernelCall):
                lines.append("  " + str(c.kernel).replace("\n", "\n  "))
            elif isinstance(c, JoinCall):
                lines.append(f"  join {', '.join(c.inputs)} -> {c.output}: {self.types[c.output]}")
            else:
                lines.append(f"  host {c.operator[1]}({', '.join(c.inputs)}) -> {c.outputs}")
        lines.append(f"  return {', '.join(self.outputs)}")
        return "\n".join(lines)
