"""Linear algebra that is no index function; it runs on the host."""

from __future__ import annotations

import numpy as np

from onnxjit.codegen.kernel import TensorType
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw


@operator("Det", since=11, host=True, infer=lambda x: [TensorType(x.dtype, x.shape[:-2])], cases=[
    Case(draw("float32[3,3]")), Case(draw("float64[2,1,5,5]")), Case(draw("float16[2,3,3]")),
])  # fmt: skip
def det(x: np.ndarray) -> np.ndarray:
    """Determinants of the matrices in the last two axes."""
    wide = x if x.dtype.name in ("float32", "float64") else x.astype(np.float32)
    return np.asarray(np.linalg.det(wide)).astype(x.dtype)
