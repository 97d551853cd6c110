"""In which syntax: prints a loop nest as the Python source of a Numba CUDA kernel.

One block of threads computes one tile; blocks stride over the tiles, so any grid is correct. The
names a kernel may use are those of `dialect_cuda.namespace()`.
"""

from __future__ import annotations

from onnxjit.codegen.dialect_cuda import MEMORY
from onnxjit.codegen.emit_cpu import Printer, _has_loads
from onnxjit.codegen.expr import Apply, Expr, Load, Var, as_int, leaves, walk
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
        names = [f"b{k}" for k in range(len(nest.params))] + list(self.dims.values())
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

    def expression(self, e: Expr) -> str:
        if isinstance(e, Apply) and e.fn == "logical_and" and not any(e in x for x in self.scopes):
            for guard, rest in (e.args, e.args[::-1]):
                if not _has_loads(guard) and _has_loads(rest):
                    return self.conjunction(e, guard, rest)
        return super().expression(e)

    def conjunction(self, e: Expr, guard: Expr, rest: Expr) -> str:
        """`guard and rest` without evaluating `rest`, whose reads the guard may protect."""
        name = f"t{self.temps}"
        self.temps += 1
        self.line(f"{name} = {self.expression(guard)}")
        self.line(f"if {name}:")
        self.depth += 1
        self.scopes.append({})
        self.line(f"{name} = {self.expression(rest)}")
        self.scopes.pop()
        self.depth -= 1
        self.scopes[-1][e] = name
        return name

    def unsigned(self, e: Apply) -> bool:
        """Accumulators hold data, which may be negative; all other int64 variables count tiles,
        threads and axes."""
        data = any(isinstance(v, Var) and v.name.startswith(("acc", "scalar")) for v in leaves(e))
        return not data and super().unsigned(e)


def emit(nest: LoopNest) -> str:
    """The Python source of a CUDA kernel."""
    return CudaPrinter(nest).source()
