"""Inputs for a model of which nothing but its interface is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def random_inputs(
    inputs: Sequence[Any], dims: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Arrays for inputs with `name`, `dtype` and `shape`: floats from the normal distribution,
    integers and booleans 0 or 1 (valid as an index, an id and a mask alike), strings of a letter.

    `dims` gives sizes to the model's free dimensions; one that it does not name is 1.
    """
    rng = np.random.default_rng(seed)
    sizes = dict(dims or {})
    return {v.name: _random(rng, v.dtype, [_size(d, sizes) for d in v.shape]) for v in inputs}


def _size(dim: int | str | None, sizes: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else sizes.get(dim or "", 1)


def _random(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> np.ndarray:
    if dtype == "string":
        return np.full(shape, "a", dtype=object)
    if dtype in ("bool",) or dtype.startswith(("int", "uint")):
        return rng.integers(0, 2, shape).astype(dtype)
    from onnxjit.runtime.plan import dtype_of

    return rng.standard_normal(shape).astype(dtype_of(dtype))
