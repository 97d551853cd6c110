"""Operators on strings, computed on the host with arrays of Python strings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxjit.codegen.kernel import TensorType
from onnxjit.codegen.tensor import DefinitionError, Tensor, broadcast_shape
from onnxjit.operators.registry import operator


def strings(items: Any, shape: Sequence[int]) -> np.ndarray:
    """An array of Python strings."""
    out = np.empty(len(items), dtype=object)
    out[:] = items
    return out.reshape(shape)


def _same_shape(dtype: str) -> Callable[..., list[TensorType]]:
    return lambda x, **attrs: [TensorType(dtype, x.shape)]


@operator("StringConcat", since=20, host=True, infer=lambda a, b: [
    TensorType("string", broadcast_shape(a.shape, b.shape))
])  # fmt: skip
def string_concat(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.broadcast_arrays(a, b)
    return strings([x + y for x, y in zip(a.ravel(), b.ravel(), strict=True)], a.shape)


@operator("RegexFullMatch", since=20, host=True, infer=_same_shape("bool"))
def regex_full_match(x: np.ndarray, *, pattern: str = "") -> np.ndarray:
    expression = re.compile(pattern)
    found = [expression.fullmatch(s) is not None for s in x.ravel()]
    return np.array(found, bool).reshape(x.shape)


def _split_types(x: Tensor, **attrs: Any) -> list[TensorType]:
    return [
        TensorType("string", (*x.shape, None)),  # type: ignore[arg-type]
        TensorType("int64", x.shape),
    ]


@operator("StringSplit", since=20, host=True, infer=_split_types)
def string_split(
    x: np.ndarray, *, delimiter: str = "", maxsplit: int = -1
) -> tuple[np.ndarray, np.ndarray]:
    parts = [s.split(delimiter or None, maxsplit) for s in x.ravel()]
    longest = max(map(len, parts), default=0)
    padded = [p + [""] * (longest - len(p)) for p in parts]
    counts = np.array([len(p) for p in parts], np.int64).reshape(x.shape)
    return strings([s for p in padded for s in p], (*x.shape, longest)), counts


def _normal_type(x: Tensor, **attrs: Any) -> list[TensorType]:
    return [TensorType("string", (*x.shape[:-1], None))]  # type: ignore[arg-type]


@operator("StringNormalizer", since=10, host=True, infer=_normal_type)
def string_normalizer(
    x: np.ndarray,
    *,
    case_change_action: str = "NONE",
    is_case_sensitive: int = 0,
    locale: str = "",
    stopwords: Sequence[str] = (),
) -> np.ndarray:
    """Drops stop words and changes case. Cases are Unicode's default ones whatever the locale."""
    if x.ndim not in (1, 2) or (x.ndim == 2 and x.shape[0] != 1):
        raise DefinitionError(f"strings of shape {x.shape}: expected [C] or [1, C]")
    changes: dict[str, Callable[[str], str]]
    changes = {"NONE": str, "LOWER": str.lower, "UPPER": str.upper}
    change = changes[case_change_action]
    fold: Callable[[str], str] = str if is_case_sensitive else str.lower
    dropped = {fold(w) for w in stopwords}
    kept = [change(s) for s in x.ravel() if fold(s) not in dropped] or [""]
    return strings(kept, (*x.shape[:-1], len(kept)))


def _counts_type(x: Tensor, *, ngram_indexes: Sequence[int], **attrs: Any) -> list[TensorType]:
    from onnxjit.codegen.expr import index

    return [TensorType("float32", (*x.shape[:-1], index(max(ngram_indexes) + 1)))]


@operator("TfIdfVectorizer", since=9, host=True, infer=_counts_type)
def tf_idf_vectorizer(
    x: np.ndarray,
    *,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: Sequence[int],
    ngram_indexes: Sequence[int],
    pool_int64s: Sequence[int] = (),
    pool_strings: Sequence[str] = (),
    weights: Sequence[float] = (),
) -> np.ndarray:
    """Counts n-grams of the last axis, with up to `max_skip_count` items between neighbours."""
    pool: list[Any] = [*pool_strings] or [*pool_int64s]
    grams: dict[tuple[Any, ...], int] = {}
    ends = [*ngram_counts[1:], len(pool)]
    number = 0
    for length, (begin, end) in enumerate(zip(ngram_counts, ends, strict=True), 1):
        for at in range(begin, end, length):
            if min_gram_length <= length <= max_gram_length:
                grams[tuple(pool[at : at + length])] = number
            number += 1
    rows = (
        x.reshape(-1, x.shape[-1]).tolist() if x.size else [[]] * (x.shape[0] if x.ndim > 1 else 1)
    )
    counts = np.zeros((len(rows), max(ngram_indexes) + 1), np.float32)
    for row, items in zip(counts, rows, strict=True):
        for length in range(min_gram_length, max_gram_length + 1):
            for skip in range(1, (max_skip_count if length > 1 else 0) + 2):
                for at in range(len(items) - skip * (length - 1)):
                    found = grams.get(tuple(items[at + skip * k] for k in range(length)))
                    if found is not None:
                        row[ngram_indexes[found]] += 1
    if mode != "TF":
        scale = np.ones(counts.shape[1], np.float32)
        if len(weights):
            scale[list(ngram_indexes)] = weights
        counts = (counts > 0) * scale if mode == "IDF" else counts * scale
    return counts.astype(np.float32).reshape(*x.shape[:-1], counts.shape[1])
