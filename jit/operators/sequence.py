"""Sequences and optionals: host operators on Python lists, arrays and None.

A value of these types has no shape that the compiler could follow, so their results are opaque
(see `OPAQUE`) unless they are plain tensors of known rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxjit.codegen.kernel import TensorType
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw

OPAQUE = TensorType("object", ())
"""The type of a value that may be anything: a tensor of unknown rank, a sequence, an optional."""

OPAQUE_OPERATORS = frozenset(
    """SequenceConstruct SequenceEmpty SequenceAt SequenceInsert SequenceErase SequenceLength
    ConcatFromSequence SplitToSequence Optional OptionalGetElement OptionalHasElement""".split()
)
"""Operators whose inputs may be opaque."""


def _opaque(*tensors: Any, **attrs: Any) -> list[TensorType]:
    return [OPAQUE]


def _scalar(dtype: str) -> Any:
    return lambda *tensors, **attrs: [TensorType(dtype, ())]


def kept(item: Any) -> Any:
    """An item that outlives this step: an argument may be a view of memory that is reused."""
    return item.copy() if isinstance(item, np.ndarray) else item


def position(index: Any, length: int) -> int:
    """A position in a sequence of `length` items; negative ones count from the end."""
    k = int(np.asarray(index).reshape(()))
    if not -length <= k < max(length, 1):
        raise IndexError(f"position {k} is outside of a sequence of {length}")
    return k + length if k < 0 else k


@operator("SequenceConstruct", since=11, host=True, infer=_opaque)
def sequence_construct(*items: Any) -> list[Any]:
    return [kept(item) for item in items]


@operator("SequenceEmpty", since=11, host=True, infer=_opaque)
def sequence_empty(*, dtype: int = 1) -> list[Any]:
    return []


@operator("SequenceAt", since=11, host=True, infer=_opaque)
def sequence_at(items: list[Any], index: Any) -> Any:
    return kept(items[position(index, len(items))])


@operator("SequenceInsert", since=11, host=True, infer=_opaque)
def sequence_insert(items: list[Any], item: Any, index: Any = None) -> list[Any]:
    k = len(items) if index is None else int(np.asarray(index).reshape(()))
    if not -len(items) <= k <= len(items):
        raise IndexError(f"position {k} is outside of a sequence of {len(items)}")
    k += len(items) if k < 0 else 0
    return [*items[:k], kept(item), *items[k:]]


@operator("SequenceErase", since=11, host=True, infer=_opaque)
def sequence_erase(items: list[Any], index: Any = None) -> list[Any]:
    k = len(items) - 1 if index is None else position(index, len(items))
    return [*items[:k], *items[k + 1 :]]


@operator("SequenceLength", since=11, host=True, infer=_scalar("int64"))
def sequence_length(items: list[Any]) -> np.ndarray:
    return np.asarray(len(items), np.int64)


@operator("ConcatFromSequence", since=11, host=True, infer=_opaque)
def concat_from_sequence(items: list[Any], *, axis: int, new_axis: int = 0) -> np.ndarray:
    return np.stack(items, axis) if new_axis else np.concatenate(items, axis)


@operator("SplitToSequence", since=11, host=True, infer=_opaque)
def split_to_sequence(
    x: np.ndarray, split: Any = None, *, axis: int = 0, keepdims: int = 1
) -> list[np.ndarray]:
    length = x.shape[axis]
    if split is None:
        parts = [np.take(x, [k], axis) for k in range(length)]
        return [np.squeeze(p, axis) for p in parts] if not keepdims else parts
    sizes = np.asarray(split)
    if sizes.ndim == 0:
        ends = list(range(int(sizes), length, int(sizes)))
    else:
        if int(sizes.sum()) != length or (sizes < 0).any():
            raise ValueError(f"cannot split {length} elements into {sizes.tolist()}")
        ends = np.cumsum(sizes)[:-1].tolist()
    return [p.copy() for p in np.split(x, ends, axis)]


@operator("Optional", since=15, host=True, infer=_opaque)
def optional(value: Any = None, *, type: Any = None) -> Any:
    return kept(value)


@operator("OptionalGetElement", since=15, host=True, infer=_opaque)
def optional_get_element(value: Any) -> Any:
    if value is None:
        raise ValueError("an empty optional has no element")
    return kept(value)


@operator("OptionalHasElement", since=15, host=True, infer=_scalar("bool"), cases=[
    Case(draw("float32[2,3]")),
])  # fmt: skip
def optional_has_element(value: Any = None) -> np.ndarray:
    return np.asarray(value is not None)


@operator("ZipMap", since=1, domain="ai.onnx.ml", host=True, infer=_opaque)
def zip_map(
    x: np.ndarray,
    *,
    classlabels_int64s: Sequence[int] = (),
    classlabels_strings: Sequence[str] = (),
) -> list[dict[Any, float]]:
    """One dictionary for each row: label -> value."""
    labels: list[Any] = [*classlabels_strings] or [*classlabels_int64s]
    rows = x.reshape(-1, x.shape[-1]) if x.size else x.reshape(0, len(labels))
    return [dict(zip(labels, row.tolist(), strict=True)) for row in rows]
