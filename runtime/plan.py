"""The compiled model as data: sizes, buffers, steps. Goes through JSON; constants live beside it.

An expression is an `int` or a string of integer arithmetic over the generated names d0, d1, ...
(`+ - * // % ( ) , min max`). Labels are for messages only and are never evaluated.
"""

# Annotations are no strings here: each would be compiled at every start, for `NamedTuple`.
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

Expression = int | str
FORMAT = 3
NO_FAULT = -(1 << 63)
"""The answer to a question to the data when nothing is wrong."""

KINDS = ("constant", "input", "output", "arena", "host")

_ARRAY, _BYTES = "$array", "$bytes"
_EXPRESSION = re.compile(r"(?:d\d+|\d+|min\(|max\(|//|[-+*%(), ])*")
_NAME = re.compile(r"d\d+")


class PlanError(ValueError):
    """A plan that does not make sense: a defect of whoever wrote it, not of the caller's inputs."""


class Source(NamedTuple):
    """Where a size is read: `shape[axis] == factor * d + offset` of a buffer's array.

    `buffer` is of kind input or host. With `axis` None the size is element `element` (in flat
    order) of the integer array itself, for host buffers alone.
    """

    buffer: int
    axis: int | None
    factor: int = 1
    offset: int = 0
    element: int = 0


class Dim(NamedTuple):
    """A symbolic size. `name` is d0, d1, ... in order; `label` is shown to people."""

    name: str
    source: Source
    label: str = ""
    minimum: int = 0
    maximum: int | None = None


class Check(NamedTuple):
    """A condition on sizes: `left relation right`, relation one of == != <= < >= >.

    Else `message`. With `assumed`, the code was made under this condition but the model allows
    sizes that break it: then it has to be compiled again for those sizes.
    """

    left: Expression
    relation: str
    right: Expression
    message: str
    assumed: bool = False


class Alias(NamedTuple):
    """Storage shared with `buffer` from byte `offset` on (views, slices, in-place results)."""

    buffer: int
    offset: Expression = 0


class Buffer(NamedTuple):
    """Memory that steps read and write.

    kind: "constant" (the k-th constant buffer is the k-th array given to the executor), "input"
    (the caller's array, C-contiguous), "output" (a new array per run), "arena" (planned memory;
    lifetimes follow from the steps), "host" (the array that a host step returned). dtype: NumPy's
    name, or "string" (object array) or "object" (any Python value; host steps only). nbytes: size
    in bytes; may exceed that of `shape` (padding, blocked layouts). shape: needed for input and
    output and for whatever a host step reads.
    """

    kind: str
    dtype: str
    nbytes: Expression
    shape: tuple[Expression, ...] | None = None
    alias: Alias | None = None
    label: str = ""


class Step(NamedTuple):
    """One kernel over tiles [0, tiles): `kernel(ptrs, ints, scratch, begin, end)`.

    kernel: symbol. buffers: ids behind ptrs. scratch: bytes per thread. rounds: the tiles are that
    many equal parts, and each is finished before the next one begins (steps of a recurrence). flops
    and bytes (whole step) size the chunks and feed the profile; both 0 means unknown, and then a
    tile counts as a microsecond of work.
    """

    kernel: str
    buffers: tuple[int, ...]
    ints: tuple[Expression, ...] = ()
    tiles: Expression = 1
    scratch: Expression = 0
    rounds: Expression = 1
    flops: Expression = 0
    bytes: Expression = 0
    name: str = ""


class HostStep(NamedTuple):
    """A Python callable between native steps: `function(arrays, attributes) -> results`.

    `function` is a key of the executor's host table; it gets None where `inputs` has -1. Results
    fill the buffers `outputs` (kind host) and may define sizes (a `Dim` whose source is one of
    them).
    """

    function: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attributes: Mapping[str, Any] = {}
    name: str = ""


class Plan(NamedTuple):
    """A compiled model: `steps` run in order; `inputs` and `outputs` are buffer ids.

    An output may be any buffer and may repeat: whatever is not a plain output buffer is copied. The
    last outputs are for the executor, one for each of `faults`: an int64 scalar that is `NO_FAULT`,
    or else what the text complains of.
    """

    buffers: tuple[Buffer, ...]
    steps: tuple[Step | HostStep, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dims: tuple[Dim, ...] = ()
    checks: tuple[Check, ...] = ()
    faults: tuple[str, ...] = ()

    @property
    def results(self) -> tuple[int, ...]:
        """The outputs that a run returns."""
        return self.outputs[: len(self.outputs) - len(self.faults)]

    def constants(self) -> list[int]:
        """Ids of the constant buffers, in the order in which the executor wants their arrays."""
        return [i for i, b in enumerate(self.buffers) if b.kind == "constant" and b.alias is None]

    def kernels(self) -> list[str]:
        """Distinct kernel symbols, in order of first use."""
        return list(dict.fromkeys(s.kernel for s in self.steps if isinstance(s, Step)))

    def to_json(self) -> str:
        """Text that `from_json` turns into an equal plan; `TypeError` for attributes JSON lacks."""
        return json.dumps(
            {
                "format": FORMAT,
                "buffers": [
                    [b.kind, b.dtype, b.nbytes, b.shape, _row(b.alias), b.label]
                    for b in self.buffers
                ],
                "steps": [
                    ["step", *_fields(s)] if isinstance(s, Step) else ["host", *_fields(s)]
                    for s in self.steps
                ],
                "inputs": self.inputs,
                "outputs": self.outputs,
                "dims": [
                    [d.name, _row(d.source), d.label, d.minimum, d.maximum] for d in self.dims
                ],
                "checks": [_row(c) for c in self.checks],
                "faults": self.faults,
            },
            separators=(",", ":"),
            default=_encoded,
        )

    @staticmethod
    def from_json(text: str) -> "Plan":
        """The inverse of `to_json`. Raises `PlanError` for another format."""
        data = json.loads(text, object_hook=_decoded)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError("not a plan of this version")
        return Plan(
            buffers=tuple(
                Buffer(
                    kind,
                    dtype,
                    nbytes,
                    None if shape is None else tuple(shape),
                    None if alias is None else Alias(*alias),
                    label,
                )
                for kind, dtype, nbytes, shape, alias, label in data["buffers"]
            ),
            steps=tuple(_step(*row) for row in data["steps"]),
            inputs=tuple(data["inputs"]),
            outputs=tuple(data["outputs"]),
            dims=tuple(
                Dim(name, Source(*source), label, minimum, maximum)
                for name, source, label, minimum, maximum in data["dims"]
            ),
            checks=tuple(Check(*row) for row in data["checks"]),
            faults=tuple(data["faults"]),
        )


def _encoded(value: Any) -> Any:
    """Attributes of host steps that JSON lacks: arrays of numbers and strings, and bytes."""
    if isinstance(value, np.generic) and value.dtype.kind in "biufUS":
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufO":
        return {_ARRAY: [value.dtype.name, value.shape, value.ravel().tolist()]}
    if isinstance(value, bytes):
        return {_BYTES: value.hex()}
    raise TypeError(f"a plan cannot hold a {type(value).__name__}")


def _decoded(data: dict[str, Any]) -> Any:
    if _ARRAY in data:
        name, shape, values = data[_ARRAY]
        return np.array(values, np.dtype(name)).reshape(shape)
    if _BYTES in data:
        return bytes.fromhex(data[_BYTES])
    return data


def _fields(item: Any) -> list[Any]:
    return [getattr(item, name) for name in item._fields]


def _row(item: Any) -> list[Any] | None:
    return None if item is None else _fields(item)


def _step(tag: str, *row: Any) -> Step | HostStep:
    if tag == "host":
        function, inputs, outputs, attributes, name = row
        return HostStep(function, tuple(inputs), tuple(outputs), attributes, name)
    kernel, buffers, ints, *rest = row
    return Step(kernel, tuple(buffers), tuple(ints), *rest)


def names_of(expression: Expression) -> set[str]:
    """The sizes an expression reads. Raises `PlanError` for text that is not such an expression."""
    if isinstance(expression, int):
        return set()
    if not _EXPRESSION.fullmatch(expression) or not expression.strip():
        raise PlanError(f"not an expression over sizes: {expression!r}")
    return set(_NAME.findall(expression))


@cache
def dtype_of(name: str) -> np.dtype:
    """NumPy's dtype object of a name; bfloat16 and the small types come from ml_dtypes."""
    if name in ("string", "object"):
        return np.dtype(object)
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
