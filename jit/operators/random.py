"""Random numbers, drawn on the host. A node with a seed gives the same numbers in every run."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxjit.codegen.expr import Const, index
from onnxjit.codegen.kernel import TensorType
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.codegen.tensor import Tensor
from onnxjit.operators.registry import operator
from onnxjit.tensors import array_dtype_name, dtype_name


def _generator(seed: float | None) -> np.random.Generator:
    """A generator seeded with the bits of a float, or freshly when there is none."""
    bits = None if seed is None else struct.unpack("<I", struct.pack("<f", seed))[0]
    return np.random.default_rng(bits)


def _shaped(*, shape: Sequence[int], dtype: int = 1, **attrs: Any) -> list[TensorType]:
    return [TensorType(dtype_name(dtype), tuple(index(d) for d in shape))]


def _like(x: Tensor, *, dtype: int | None = None, **attrs: Any) -> list[TensorType]:
    return [TensorType(x.dtype if dtype is None else dtype_name(dtype), x.shape)]


def _like_dtype(x: np.ndarray, dtype: int | None) -> np.dtype[Any]:
    return numpy_dtype(array_dtype_name(x) if dtype is None else dtype_name(dtype))


@operator("RandomNormal", since=1, host=True, infer=_shaped)
def random_normal(
    *,
    shape: Sequence[int],
    dtype: int = 1,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
) -> np.ndarray:
    """Normal distribution with the given mean and standard deviation."""
    return _generator(seed).normal(mean, scale, tuple(shape)).astype(numpy_dtype(dtype_name(dtype)))


@operator("RandomNormalLike", since=1, host=True, infer=_like)
def random_normal_like(
    x: np.ndarray,
    *,
    dtype: int | None = None,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
) -> np.ndarray:
    """`random_normal` in the shape of a tensor."""
    return _generator(seed).normal(mean, scale, x.shape).astype(_like_dtype(x, dtype))


@operator("RandomUniform", since=1, host=True, infer=_shaped)
def random_uniform(
    *,
    shape: Sequence[int],
    dtype: int = 1,
    low: float = 0.0,
    high: float = 1.0,
    seed: float | None = None,
) -> np.ndarray:
    """Uniform distribution over [low, high)."""
    return _generator(seed).uniform(low, high, tuple(shape)).astype(numpy_dtype(dtype_name(dtype)))


@operator("RandomUniformLike", since=1, host=True, infer=_like)
def random_uniform_like(
    x: np.ndarray,
    *,
    dtype: int | None = None,
    low: float = 0.0,
    high: float = 1.0,
    seed: float | None = None,
) -> np.ndarray:
    """`random_uniform` in the shape of a tensor."""
    return _generator(seed).uniform(low, high, x.shape).astype(_like_dtype(x, dtype))


@operator("Bernoulli", since=15, host=True, infer=_like)
def bernoulli(x: np.ndarray, *, dtype: int | None = None, seed: float | None = None) -> np.ndarray:
    """1 with the probability that the element gives, else 0."""
    drawn = _generator(seed).random(x.shape) < x.astype(np.float64)
    return drawn.astype(_like_dtype(x, dtype))


def _samples(
    x: Tensor, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None
) -> list[TensorType]:
    return [TensorType(dtype_name(dtype), (x.shape[0], Const(sample_size, "int64")))]


@operator("Multinomial", since=7, host=True, infer=_samples)
def multinomial(
    x: np.ndarray, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None
) -> np.ndarray:
    """Class numbers drawn with probabilities proportional to exp(x), with replacement."""
    logits = x.astype(np.float64)
    weights = np.cumsum(np.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)
    points = _generator(seed).random((x.shape[0], sample_size)) * weights[:, -1:]
    found = (points[:, :, None] >= weights[:, None, :]).sum(axis=2)
    return found.astype(numpy_dtype(dtype_name(dtype)))
