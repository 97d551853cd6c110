"""Operators whose results are found by searching or sorting; they run on the host with NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxjit.codegen.expr import INDEX, Const, Expr
from onnxjit.codegen.kernel import TensorType
from onnxjit.codegen.tensor import DefinitionError, NeedsValue, Tensor
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import FLOATS, draw
from onnxjit.operators.sizes import normal_axis, size_list


def host_type(dtype: str, shape: Any) -> TensorType:
    """The type of a host operator's output; None stands for a size that depends on data."""
    return TensorType(dtype, tuple(shape))


def sortable(x: np.ndarray) -> np.ndarray:
    """`x` in a dtype that NumPy sorts and compares natively, in the same order."""
    return x.astype(np.float32) if x.dtype.name in ("bfloat16", "float16") else x


# --- TopK --------------------------------------------------------------------------------------


def _top_types(x: Tensor, k: Any, axis: int, outputs: int) -> list[TensorType]:
    shape: list[Any] = list(x.shape)
    shape[normal_axis(axis, x.rank)] = k
    return [host_type(x.dtype, shape), host_type(INDEX, shape)][:outputs]


FOLDED = 8
"""Lines that a row is cut into. Of the best of each column the k-th bounds the k-th of all, and
what lies beyond is dropped before the rest is sorted: the 50 largest of 50257 take 0.15 ms for 5.8.
"""

FEWEST = 64
"""Columns from which that is worth while."""


def _sorted(keys: np.ndarray, largest: int) -> np.ndarray:
    """The order of the last axis; of equal elements, lower indices come first."""
    if not largest:
        return np.argsort(keys, axis=-1, kind="stable")
    # A stable ascending sort of the reversed row, read backwards, puts lower indices first.
    order = np.argsort(keys[..., ::-1], axis=-1, kind="stable")[..., ::-1]
    return keys.shape[-1] - 1 - order


def _top(x: np.ndarray, k: int, axis: int, largest: int, outputs: int) -> Any:
    axis = normal_axis(axis, x.ndim)
    if not 0 <= k <= x.shape[axis]:
        raise DefinitionError(f"TopK: {k} of {x.shape[axis]} elements")
    keys = np.moveaxis(sortable(x), axis, -1)
    columns = keys.shape[-1] // FOLDED
    if 0 < k <= columns // 2 and columns >= FEWEST:
        order = np.empty((*keys.shape[:-1], k), np.int64)
        folded = keys[..., : columns * FOLDED].reshape(*keys.shape[:-1], FOLDED, columns)
        best = folded.max(-2) if largest else folded.min(-2)
        place = columns - k if largest else k - 1
        bound = np.partition(best, place, axis=-1)[..., place]
        for row in np.ndindex(keys.shape[:-1]):
            # NaN compares as neither, so it always remains.
            outside = keys[row] < bound[row] if largest else keys[row] > bound[row]
            (remain,) = np.nonzero(~outside)
            order[row] = remain[_sorted(keys[row][remain], largest)[:k]]
    else:
        order = _sorted(keys, largest)
    where = np.ascontiguousarray(np.moveaxis(order[..., :k], -1, axis)).astype(np.int64)
    return (np.take_along_axis(x, where, axis), where)[:outputs]


def _top_infer(
    x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1, outputs: int = 2
) -> list[TensorType]:
    try:
        count: Expr | None = size_list(k)[0]
    except NeedsValue:
        count = None
    return _top_types(x, count, axis, outputs)


@operator("TopK", since=10, host=True, infer=_top_infer, cases=[
    *(Case(draw(f"{d}[3,7]", [3]), outputs=2) for d in (*FLOATS, "int32", "int64")),
    Case(draw("uint8[3,7]", [2], high=4), {"largest": 0}, outputs=2),
    Case(draw("int8[5,3]", [2], low=-2), {"axis": 0}, outputs=2),
    Case(draw("float32[3,7]", [0]), outputs=2),
    *(
        Case(draw(f"{d}[2,513]", [n], low=-9, high=9), {"largest": n % 2}, outputs=2)
        for d in ("float32", "float16", "int8", "int64")
        for n in (1, 40, 127)
    ),
    Case(draw("float32[520,3]", [30]), {"axis": 0, "largest": 0}, outputs=2),
    Case(draw("float32[1,50257]", [50]), outputs=2, bench=True, label="vocabulary"),
])  # fmt: skip
def top_k(
    x: np.ndarray,
    k: np.ndarray,
    *,
    axis: int = -1,
    largest: int = 1,
    sorted: int = 1,
    outputs: int = 2,
) -> Any:
    """The k largest (smallest) elements along an axis in order, and their indices. Of equal
    elements the one with the lower index comes first; NaN counts as the largest."""
    return _top(x, int(k.reshape(-1)[0]), axis, largest, outputs)


def _top_1_infer(x: Tensor, *, axis: int = -1, k: int, outputs: int = 2) -> list[TensorType]:
    return _top_infer(x, k, axis=axis, outputs=outputs)  # type: ignore[arg-type]


@operator(
    "TopK",
    since=1,
    until=9,
    host=True,
    infer=lambda x, *, k, axis=-1, outputs=2: _top_types(x, Const(k, INDEX), axis, outputs),
    cases=[Case(draw("float32[3,7]"), {"k": 3}, outputs=2)],
)
def top_k_1(x: np.ndarray, *, k: int, axis: int = -1, outputs: int = 2) -> Any:
    """`top_k` with k as an attribute."""
    return _top(x, k, axis, 1, outputs)


# --- searches ----------------------------------------------------------------------------------


@operator("NonZero", since=9, host=True,
          infer=lambda x: [host_type(INDEX, (Const(x.rank, INDEX), None))],
          cases=[Case(draw(s, low=-1, high=2)) for s in
                 ("int32[3,5]", "bool[2,3,5]", "float32[0,3]", "int64[7]")])  # fmt: skip
def non_zero(x: np.ndarray) -> np.ndarray:
    """The indices of all elements that are not 0, one column for each."""
    if x.ndim == 0:
        return np.zeros((0, int(bool(x))), np.int64)
    return np.stack(np.nonzero(x)).astype(np.int64)


def _compress_infer(x: Tensor, condition: Tensor, *, axis: int | None = None) -> list[TensorType]:
    if axis is None:
        return [host_type(x.dtype, (None,))]
    shape: list[Any] = list(x.shape)
    shape[normal_axis(axis, x.rank)] = None
    return [host_type(x.dtype, shape)]


@operator("Compress", since=9, host=True, infer=_compress_infer, cases=[
    Case(draw("float32[3,5]", np.array([True, False, True])), {"axis": 0}),
    Case(draw("int8[3,5]", np.array([False, True])), {"axis": -1}),
    Case(draw("float32[3,5]", "bool[15]")),
])  # fmt: skip
def compress(x: np.ndarray, condition: np.ndarray, *, axis: int | None = None) -> np.ndarray:
    """The slices along an axis (or the elements, without one) where the condition holds."""
    return np.compress(condition, x, axis)


def _unique_infer(
    x: Tensor, *, axis: int | None = None, sorted: int = 1, outputs: int = 1
) -> list[TensorType]:
    shape: list[Any] = [None] if axis is None else list(x.shape)
    if axis is not None:
        shape[normal_axis(axis, x.rank)] = None
    all_elements = x.size if axis is None else x.shape[normal_axis(axis, x.rank)]
    counts = [(None,), (all_elements,), (None,)]
    return [host_type(x.dtype, shape), *(host_type(INDEX, s) for s in counts)][:outputs]


@operator("Unique", since=11, host=True, infer=_unique_infer, cases=[
    Case(draw("int64[3,5]", low=0), {"sorted": s}, outputs=4) for s in (0, 1)
] + [
    Case(draw("float32[1,5]"), {"axis": 0}, outputs=4),
    Case(lambda: [np.array([[1, 0, 0], [1, 0, 0], [2, 3, 4]], np.int64)], {"axis": 0}, outputs=4),
    Case(draw("int8[9]", low=0)),
])  # fmt: skip
def unique(x: np.ndarray, *, axis: int | None = None, sorted: int = 1, outputs: int = 1) -> Any:
    """The distinct elements (or slices along an axis), where each occurs first, which of them every
    element is, and how often each occurs; sorted, or in the order of their first occurrence."""
    values, first, inverse, counts = np.unique(
        x, return_index=True, return_inverse=True, return_counts=True, axis=axis
    )
    inverse = inverse.reshape(-1)
    if not sorted:
        order = np.argsort(first, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        values = np.take(values, order, axis=0 if axis is None else axis)
        first, inverse, counts = first[order], place[inverse], counts[order]
    rest = (a.astype(np.int64) for a in (first, inverse, counts))
    out = (values, *rest)[:outputs]
    return out if outputs > 1 else out[0]


# --- non-maximum suppression -------------------------------------------------------------------


def _suppression_infer(
    boxes: Tensor, scores: Tensor, *limits: Tensor | None, center_point_box: int = 0
) -> list[TensorType]:
    return [host_type(INDEX, (None, Const(3, INDEX)))]


def _corners(boxes: np.ndarray, center: int) -> np.ndarray:
    """Boxes as [low, low, high, high] in float32."""
    if center:
        middle, half = boxes[..., :2], boxes[..., 2:] / 2
        return np.concatenate([middle - half, middle + half], -1)
    a, b = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([np.minimum(a, b), np.maximum(a, b)], -1)


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with many; 0 where the union is empty."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.prod(np.maximum(high - low, 0), -1)
    union = np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], -1) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def _boxes() -> list[Any]:
    rng = np.random.default_rng(3)
    low = rng.uniform(0, 8, (2, 17, 2)).astype(np.float32)
    boxes = np.concatenate([low, low + rng.uniform(1, 4, (2, 17, 2)).astype(np.float32)], -1)
    scores = rng.permutation(2 * 3 * 17).reshape(2, 3, 17).astype(np.float32) / 102
    return [boxes, scores]


@operator("NonMaxSuppression", since=10, host=True, infer=_suppression_infer, cases=[
    Case(lambda: [*_boxes(), np.array([4]), np.array([0.2], np.float32),
                  np.array([0.3], np.float32)]),
    Case(lambda: [*_boxes(), np.array([20]), np.array([0.1], np.float32)],
         {"center_point_box": 1}),
    Case(lambda: [*_boxes(), np.array([0])]),
    Case(_boxes),
])  # fmt: skip
def non_max_suppression(
    boxes: np.ndarray,
    scores: np.ndarray,
    max_output_boxes_per_class: np.ndarray | None = None,
    iou_threshold: np.ndarray | None = None,
    score_threshold: np.ndarray | None = None,
    *,
    center_point_box: int = 0,
) -> np.ndarray:
    """Rows [batch, class, box]: for every class, boxes by falling score that overlap none of the
    boxes taken before by more than the threshold."""
    most = max_output_boxes_per_class
    limit = 0 if most is None else int(most.reshape(-1)[0])
    overlap = 0.0 if iou_threshold is None else float(iou_threshold.reshape(-1)[0])
    corners = _corners(boxes, center_point_box)
    chosen: list[tuple[int, int, int]] = []
    for batch, label in np.ndindex(*scores.shape[:2]) if limit > 0 else ():
        row = scores[batch, label]
        order = np.argsort(-row, kind="stable")
        if score_threshold is not None:
            order = order[row[order] > float(score_threshold.reshape(-1)[0])]
        taken = 0
        while order.size and taken < limit:
            best, order = order[0], order[1:]
            chosen.append((batch, label, int(best)))
            taken += 1
            order = order[_overlap(corners[batch, best], corners[batch, order]) <= overlap]
    return np.asarray(chosen, np.int64).reshape(-1, 3)


__all__ = ["host_type", "sortable"]
