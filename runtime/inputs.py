"""Checks the caller's arrays against a plan and reads the sizes off them; errors name the input."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxjit.runtime.plan import Dim, Expression, Plan, dtype_of

RELATIONS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}


class InputError(ValueError):
    """The inputs of a run do not fit the model: which one, what was expected, what came."""


class AssumptionError(InputError):
    """Sizes that the model allows break an assumption of this plan (see `Check.assumed`)."""


class InputReader:
    """Turns arguments into plain C-contiguous arrays and values of the sizes read from inputs."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._labels = {d.name: d.label or d.name for d in plan.dims}
        self._buffers = [plan.buffers[b] for b in plan.inputs]
        self._position = {b: i for i, b in enumerate(plan.inputs)}
        self._dims = [d for d in plan.dims if d.source.buffer in self._position]

    def read(self, inputs: Sequence[Any]) -> tuple[list[Any], tuple[int, ...]]:
        """Arrays as the kernels want them (copied where they must be) and the sizes, in order."""
        if len(inputs) != len(self._buffers):
            names = ", ".join(self._name(i) for i in range(len(self._buffers)))
            raise InputError(f"expected {len(self._buffers)} inputs ({names}), got {len(inputs)}")
        arrays = [self._array(i, value) for i, value in enumerate(inputs)]
        return arrays, tuple(self._size(d, arrays[self._position[d.source.buffer]])
                             for d in self._dims)  # fmt: skip

    def match(self, arrays: Sequence[Any], shapes: Mapping[int, tuple[int, ...]]) -> None:
        """Compare with the shapes that the sizes imply. Raises `InputError`."""
        for i, (b, array) in enumerate(zip(self._plan.inputs, arrays, strict=True)):
            buffer = self._buffers[i]
            if buffer.dtype == "object" or array.shape == shapes[b]:
                continue
            assert buffer.shape is not None
            for axis, (want, got) in enumerate(zip(shapes[b], array.shape, strict=True)):
                if want != got:
                    raise InputError(
                        f"{self._name(i)}: axis {axis} must be {want}"
                        f"{self._origin(buffer.shape[axis])}, got {got}; "
                        f"expected shape {self.spell(buffer.shape)}, got {array.shape}"
                    )

    def spell(self, shape: Sequence[Expression]) -> str:
        """A shape with the model's names for its sizes."""
        parts = [self._spell(e) for e in shape]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"

    def _spell(self, expression: Expression) -> str:
        return re.sub(r"d\d+", lambda m: self._labels.get(m[0], m[0]), str(expression))

    def _origin(self, expression: Expression) -> str:
        if isinstance(expression, int):
            return ""
        sources = [
            f"{self._labels[d.name]} is read from {self._name(self._position[d.source.buffer])} "
            f"axis {d.source.axis}"
            for d in self._dims
            if re.search(rf"\b{d.name}\b", expression)
        ]
        return f" ({self._spell(expression)}; {', '.join(sources)})"

    def _name(self, position: int) -> str:
        label = self._buffers[position].label
        return f"input {label!r}" if label else f"input {position}"

    def _array(self, position: int, value: Any) -> Any:
        buffer = self._buffers[position]
        if buffer.dtype == "object":
            return value
        if not isinstance(value, np.ndarray):
            if not isinstance(value, np.generic) and not hasattr(value, "__array__"):
                raise InputError(
                    f"{self._name(position)}: expected a NumPy array, got {type(value).__name__}"
                )
            value = np.asarray(value)
        dtype = dtype_of(buffer.dtype)
        if buffer.dtype == "string":
            if value.dtype.kind not in "OUST":
                raise InputError(f"{self._name(position)}: expected strings, got {value.dtype}")
        elif value.dtype != dtype and value.dtype.newbyteorder("=") != dtype:
            raise InputError(f"{self._name(position)}: expected {dtype}, got {value.dtype}")
        assert buffer.shape is not None
        if value.ndim != len(buffer.shape):
            raise InputError(
                f"{self._name(position)}: expected {len(buffer.shape)} axes, shape "
                f"{self.spell(buffer.shape)}, got {value.ndim}, shape {value.shape}"
            )
        # Rank 0 stays rank 0 here, unlike with np.ascontiguousarray.
        array = np.asarray(value, dtype=dtype, order="C")
        if not (array.flags.c_contiguous and array.flags.aligned):
            array = np.array(array, order="C")
        return array.view(np.ndarray) if type(array) is not np.ndarray else array

    def _size(self, dim: Dim, array: np.ndarray) -> int:
        assert dim.source.axis is not None
        return self.size(
            dim,
            array.shape[dim.source.axis],
            f"{self._name(self._position[dim.source.buffer])}: axis {dim.source.axis}",
        )

    def size(self, dim: Dim, extent: int, where: str) -> int:
        """Solve `extent == factor * size + offset` within the size's range.

        `where` names the extent.
        """
        source = dim.source
        label = dim.label or dim.name
        size, rest = divmod(extent - source.offset, source.factor)
        if rest:
            form = f"{source.factor}*{label}" + (f" + {source.offset}" if source.offset else "")
            raise InputError(f"{where} must be {form}, got {extent}")
        if size < dim.minimum or (dim.maximum is not None and size > dim.maximum):
            most = "" if dim.maximum is None else f" and at most {dim.maximum}"
            raise InputError(
                f"{where} gives {label} = {size}; it must be at least {dim.minimum}{most}"
            )
        return size
