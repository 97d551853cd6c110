"""Input arrays for test cases, written as short texts: `draw("float32[3,5]", "bool[5]")`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

_SPEC = re.compile(r"(\w+)\[([\d,]*)\]")


def draw(*specs: Any, low: float = -3.0, high: float = 3.0) -> Callable[[], Sequence[Any]]:
    """A maker of inputs. Each spec is "dtype[sizes]" for random values in [low, high) (integers of
    unsigned dtypes start at 0), an array or a list of integers (int64) as it is, or None."""

    def make() -> Sequence[Any]:
        rng = np.random.default_rng(20)
        return [_one(s, rng, low, high) for s in specs]

    return make


def _one(spec: Any, rng: np.random.Generator, low: float, high: float) -> Any:
    if spec is None or isinstance(spec, np.ndarray):
        return spec
    if not isinstance(spec, str):
        return np.asarray(spec, np.int64)
    match = _SPEC.fullmatch(spec)
    assert match, spec
    dtype, sizes = match.groups()
    shape = tuple(int(s) for s in sizes.split(",") if s)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.startswith("uint"):
        return rng.integers(max(0, int(low)), max(2, int(high)), shape).astype(dtype)
    if dtype.startswith("int"):
        return rng.integers(int(low), int(high), shape).astype(dtype)
    values = rng.uniform(low, high, shape)
    if dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16)
    return values.astype(dtype)
