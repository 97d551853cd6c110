"""In which syntax: prints a loop nest as the Python source of a Numba CUDA kernel.

One block of threads computes one tile; blocks stride over the tiles, so any grid is correct. The
names a kernel may use are those of `dialect_cuda.namespace()`.
"""

from __future__ import annotations

from onnxjit.codegen.dialect_cuda import MEMORY
from onnxjit.codegen.emit_cpu import Printer
from onnxjit.codegen.expr import Expr, Load, as_int, walk
from onnxjit.codegen.loops import Barrier, LoopNest, Stmt, Store

_SHARED = {"float16": "float32", "bfloat16": "float32", "bool": "uint8"}
"""dtype -> dtype in shared memory: 16-bit floats are kept as the (already rounded) float32."""


class CudaPrinter(Printer):
    """Numba CUDA: `kernel(*pointers, *sizes)`."""

    def __init__(self, nest: LoopNest) -> None:
        super().__init__(nest)
        self.shared = {x.buffer for x in nest.locals}

    def source(self) -> str:
        nest = self.nest
        self.depth = 0
        self.line(f'"""Schedule: {nest.rule}."""')
        self.line("")
        buffers = ", ".join(f'"{p.dtype}"' for p in nest.params)
        self.line(f"BUFFERS = ({buffers},)")
        self.line(f"THREADS = {nest.threads}")
        self.line("")
        self.line("")
        names = [f"b{k}" for k in range(len(nest.params))] + list(self.sizes.values())
        self.line(f"def kernel({', '.join(names)}):")
        self.depth = 1
        for k, x in enumerate(nest.locals):
            dtype = _SHARED.get(x.dtype, x.dtype)
            self.line(f"s{k} = cuda.shared.array({as_int(x.count)}, types.{dtype})")
        self.line("thread = int64(cuda.threadIdx.x)")
        tiles = self.expression(nest.tiles)
        start, step = "int64(cuda.blockIdx.x)", "int64(cuda.gridDim.x)"
        self.line(f"for tile in range({start}, {tiles}, {step}):")
        self.block(nest.body)
        return "\n".join(self.lines) + "\n"

    def statement(self, s: Stmt) -> None:
        if isinstance(s, Barrier):
            self.line("cuda.syncthreads()")
            # Other threads' stores become visible here.
            for scope in self.scopes:
                for e in [e for e in scope if any(isinstance(x, Load) for x in walk(e))]:
                    del scope[e]
        elif isinstance(s, Store):
            value, offset = self.value(s.value), self.expression(s.offset)
            text = self.stored(s.buffer, value)
            self.line(f"{self.names[s.buffer]}[{offset}] = {text}")
            self.forget_loads(s.buffer)
        else:
            super().statement(s)

    def stored(self, buffer: str, value: str) -> str:
        dtype = self.dtypes[buffer]
        if dtype == "bool":
            return f"uint8({value})"
        if dtype in MEMORY and buffer not in self.shared:
            return f"to_{dtype}({value})"
        return value

    def _plain(self, e: Expr) -> str:
        text = super()._plain(e)
        if not isinstance(e, Load):
            return text
        dtype = self.dtypes[e.buffer]
        if dtype == "bool":
            return f"({text} != 0)"
        if dtype in MEMORY and e.buffer not in self.shared:
            return f"from_{dtype}({text})"
        return text


def emit(nest: LoopNest) -> str:
    """The Python source of a CUDA kernel."""
    return CudaPrinter(nest).source()
