"""Models whose kernels are edited and run by themselves, and an edit that shows."""

import numpy as np
from api_models import NODE, affine, broadcasting
from kernels_support import model as model_proto

RNG = np.random.default_rng(5)


def batch(n=4, size=64, seed=0):
    return np.random.default_rng(seed).standard_normal((n, size)).astype(np.float32)


RELU = "float32(0.0))"
SHIFTED = "float32(1e-6))"
"""A lower end that the tolerance lets pass, and that a result shows."""


def shifted(kernel):
    assert RELU in kernel.source
    return kernel.source.replace(RELU, SHIFTED)


def is_shifted(y):
    return bool((y == np.float32(1e-6)).any())


def convolutions():
    """Two convolutions with padding, pooling, and a softmax over channels-last values."""
    w = RNG.standard_normal((8, 3, 3, 3)).astype(np.float32)
    v = RNG.standard_normal((40, 8, 3, 3)).astype(np.float32)
    return model_proto(
        [
            NODE("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
            NODE("Relu", ["a"], ["b"]),
            NODE("MaxPool", ["b"], ["c"], kernel_shape=[2, 2], strides=[2, 2]),
            NODE("Conv", ["c", "v"], ["d"], strides=[2, 2]),
            NODE("Softmax", ["d"], ["y"], axis=1),
        ],
        {"x": ("float32", ("n", 3, 13, 11))},
        ["y"],
        {"w": w, "v": v},
    )


def embedding():
    """Rows of a table that are looked up, in a batch of free size."""
    table = RNG.standard_normal((11, 6)).astype(np.float32)
    return model_proto(
        [NODE("Gather", ["table", "ids"], ["rows"]), NODE("Exp", ["rows"], ["y"])],
        {"ids": ("int64", ("n", "m"))},
        ["y"],
        {"table": table},
    )


def quantised():
    """Floats to bytes: rounded, and saturated."""
    return model_proto(
        [NODE("QuantizeLinear", ["x", "scale", "zero"], ["y"])],
        {"x": ("float32", ("n", 33))},
        ["y"],
        {"scale": np.float32(0.02), "zero": np.uint8(100)},
    )


def matrices():
    """A product of two inputs, with free sizes on every side."""
    return model_proto(
        [NODE("MatMul", ["x", "z"], ["t"]), NODE("Tanh", ["t"], ["y"])],
        {"x": ("float32", ("n", "k")), "z": ("float32", ("k", "m"))},
        ["y"],
    )


MODELS = {
    "affine": affine,
    "broadcasting": broadcasting,
    "convolutions": convolutions,
    "embedding": embedding,
    "matrices": matrices,
    "quantised": quantised,
}
