"""The dialect of generated CPU kernel sources: every name they may use, and their compilation.

A kernel source is Python text that defines

    def kernel(ptrs, ints, scratch, begin, end): ...

with C signature void(void** ptrs, int64* ints, void* scratch, int64 begin, int64 end), its free
names taken from `namespace`. `compile_ir` turns it into LLVM IR of an external function named
"kernel" that refers to nothing of Numba or Python. `dialect_python` has the same names as plain
Python, for stepping through a kernel with a debugger.

Buffers of different scopes are promised not to overlap, except that a loop may read and write the
same element of two buffers over the same memory (in-place elementwise work). The promise reaches
LLVM as alias scope metadata on every access, so vectorised loops carry no run-time overlap checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from types import FunctionType

from onnxjit.codegen import dialect_loops as _loops  # noqa: F401  (registers range)
from onnxjit.codegen import scalar_math
from onnxjit.codegen.dialect_compile import FASTMATH, lower
from onnxjit.codegen.dialect_external import external_function
from onnxjit.codegen.dialect_formulas import compiled
from onnxjit.codegen.dialect_scalar import scalar_operations
from onnxjit.codegen.dialect_table import family_of
from onnxjit.codegen.dialect_types import buffer_operations

__all__ = [
    "FASTMATH",
    "compile_ir",
    "external_symbols",
    "namespace",
]

external_symbols = scalar_math.external_symbols


@cache
def _operations() -> dict[str, object]:
    names = {"range": range, "nan": math.nan, "inf": math.inf}
    return {**names, **buffer_operations(), **scalar_operations()}


def namespace(symbols: Iterable[str] = ()) -> dict[str, object]:
    """Globals to execute a kernel source in; `symbols` are the micro-kernels that it calls.

    Raises ValueError for a symbol that belongs to no micro-kernel family.
    """
    result = dict(_operations())
    for symbol in symbols:
        result[symbol] = external_function(symbol, family_of(symbol).parameters)
    return result


def compile_ir(
    source: str,
    symbols: Iterable[str] = (),
    filename: str = "<kernel>",
    *,
    native_half: bool = True,
) -> str:
    """Unoptimised LLVM IR text of the kernel in `source`, as external function "kernel".

    The text has the host's triple and data layout; besides "kernel" it has internal functions and
    declarations of LLVM intrinsics, of `symbols` and of names in `external_symbols()`. A source may
    set `FASTMATH` to a tuple of LLVM fast-math flags for its own arithmetic; the elementary
    functions never carry any. `native_half` says that the target has instructions between half
    and float (x86: feature f16c), else float16 elements are converted by integer arithmetic.

    Raises ValueError for an unknown symbol, Numba's TypingError for a name or a combination of
    types that the dialect does not have. One compilation at a time: it holds Numba's global lock.
    """
    scope = namespace(symbols)
    exec(compiled(source, filename, scope), scope)
    kernel = scope["kernel"]
    if not isinstance(kernel, FunctionType):
        raise TypeError("a kernel source must define the function kernel")
    flags = scope.get("FASTMATH", FASTMATH)
    assert isinstance(flags, tuple)
    return lower(kernel, flags, native_half)
