"""Small models for the tests of the public interface."""

import numpy as np
from onnx import TensorProto, helper
from small_models import info, model_of, weight

NODE = helper.make_node


def affine(size=64, name="w"):
    """y = relu(x @ w), float32[n, size]."""
    return model_of(
        [NODE("MatMul", ["x", name], ["t"], name="first"), NODE("Relu", ["t"], ["y"], name="last")],
        [info("x", ("n", size))],
        [info("y", ("n", size))],
        [weight(name, (size, size))],
    )


def affine_result(x, size=64):
    """What `affine` computes."""
    return np.maximum(x @ np.arange(size * size, dtype=np.float32).reshape(size, size), 0)


def broadcasting():
    """y = x + z, where z's own free size may equal x's, or be 1."""
    return model_of(
        [NODE("Add", ["x", "z"], ["y"], name="sum")],
        [info("x", ("n", 3)), info("z", ("m", 3))],
        [info("y", ("k", 3))],
    )


def two_outputs():
    """Outputs with awkward names: x + z, and x - z, where both share a size."""
    return model_of(
        [NODE("Add", ["x", "a/b"], ["sum:0"]), NODE("Sub", ["x", "a/b"], ["class"])],
        [info("x", ("n", 3)), info("a/b", ("n", 3))],
        [info("sum:0", ("n", 3)), info("class", ("n", 3))],
    )


def integers():
    """y = x + z, int64[2] and a scalar."""
    kind = TensorProto.INT64
    return model_of(
        [NODE("Add", ["x", "z"], ["y"])],
        [info("x", (2,), kind), info("z", (), kind)],
        [info("y", (2,), kind)],
    )
