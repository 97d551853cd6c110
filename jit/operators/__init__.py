"""Operator definitions; importing this package fills the table of `registry`."""

from onnxjit.operators import (  # noqa: F401
    activations,
    constants,
    conv,
    einsum,
    elementwise,
    indexing,
    logical,
    matmul,
    movement,
    norm,
    padding,
    pool,
    reduction,
    resize,
    softmax,
)
