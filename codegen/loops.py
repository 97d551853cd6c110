"""In which order: a loop nest over flat buffers, as schedules construct it and emitters print it.

All loads and stores in a nest use one flat element offset. A nest computes the tiles
[begin, end) of its parallel index space; `tile` is the variable that runs over them. Where
neighbouring tiles share work, they are the parts of a *block*: `tile` then runs over the blocks,
and the body computes the parts [`part0`, `part1`) of each together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from onnxjit.codegen.expr import ONE, ZERO, Axis, Expr, Var, index, to_text
from onnxjit.codegen.packing import Packing
from onnxjit.codegen.scalar_functions import numpy_dtype

TILE = Var("tile")
THREAD = Var("thread")
FIRST_PART, LAST_PART = Var("part0"), Var("part1")


@dataclass(frozen=True, slots=True)
class For:
    """`for var in range(start, stop)`; `unroll` asks the emitter to repeat the body instead."""

    var: Axis | Var
    start: Expr
    stop: Expr
    body: tuple[Stmt, ...]
    unroll: bool = False
    step: int = 1


@dataclass(frozen=True, slots=True)
class If:
    cond: Expr
    then: tuple[Stmt, ...]
    orelse: tuple[Stmt, ...] = ()


@dataclass(frozen=True, slots=True)
class Assign:
    """Sets a local scalar (declares it at its first assignment)."""

    var: Var
    value: Expr


@dataclass(frozen=True, slots=True)
class Store:
    buffer: str
    offset: Expr
    value: Expr


@dataclass(frozen=True, slots=True)
class Address:
    """A pointer argument of a call: element `offset` of `buffer`, or its start (None)."""

    buffer: str
    offset: Expr | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A micro-kernel call, or one of the memory intrinsics `copy(dst, src, n)`, `zero(dst, n)`."""

    fn: str
    args: tuple[Expr | Address, ...]


@dataclass(frozen=True, slots=True)
class Barrier:
    """All threads of a CUDA block meet here; never inside a condition that threads decide apart."""


Stmt = For | If | Assign | Store | Call | Barrier


@dataclass(frozen=True, slots=True)
class Local:
    """Private memory of one call: on the stack (`count` constant) or in the thread's scratch.

    On CUDA: memory that the threads of a block share (`count` constant), with `stack` False.
    """

    buffer: str
    dtype: str
    count: Expr
    stack: bool = True

    @property
    def nbytes(self) -> Expr:
        """Bytes in scratch memory, rounded up so that the next array is 64-byte aligned."""
        return ((self.count * numpy_dtype(self.dtype).itemsize + 63) // 64) * 64


@dataclass(frozen=True, slots=True)
class Param:
    """A pointer parameter: buffer name, element dtype, written or only read."""

    buffer: str
    dtype: str
    written: bool = False


@dataclass(frozen=True, slots=True)
class LoopNest:
    """`sizes`: the run-time integers of the kernel, in the order of its `ints` argument. What the
    body divides, rounds or limits of sizes alone is one of them, so that the kernel has no such
    arithmetic and kernels at several scales of a network are one.

    Each run of `parts` tiles is a block. The tiles are `rounds` equal shares, each of which is
    finished before the next one begins; a nest has one of both at most.
    With `threads`, a tile is computed by the threads of one CUDA block; `THREAD` numbers them.
    """

    name: str
    params: tuple[Param, ...]
    sizes: tuple[Expr, ...]
    tiles: Expr
    body: tuple[Stmt, ...]
    locals: tuple[Local, ...] = ()
    symbols: tuple[str, ...] = ()
    rule: str = ""
    declined: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())
    packings: tuple[Packing, ...] = field(default=())
    threads: int = 0
    rounds: Expr = ONE
    parts: Expr = ONE

    @property
    def scratch(self) -> Expr:
        """Scratch bytes that one thread needs."""
        return sum((x.nbytes for x in self.locals if not x.stack), start=ZERO)

    def __str__(self) -> str:
        lines = [f"nest {self.name} [{self.rule}] tiles={to_text(self.tiles)}"]
        lines += [f"  local {x.buffer}: {x.dtype}[{to_text(x.count)}]" for x in self.locals]
        lines += _print(self.body, "  ")
        return "\n".join(lines)


def _print(body: tuple[Stmt, ...], pad: str) -> list[str]:
    out = []
    for s in body:
        if isinstance(s, For):
            kind = "unroll" if s.unroll else "for"
            out.append(f"{pad}{kind} {s.var.name} in {to_text(s.start)}..{to_text(s.stop)}:")
            out += _print(s.body, pad + "  ")
        elif isinstance(s, If):
            out.append(f"{pad}if {to_text(s.cond)}:")
            out += _print(s.then, pad + "  ")
            if s.orelse:
                out.append(f"{pad}else:")
                out += _print(s.orelse, pad + "  ")
        elif isinstance(s, Assign):
            out.append(f"{pad}{s.var.name} = {to_text(s.value)}")
        elif isinstance(s, Store):
            out.append(f"{pad}{s.buffer}[{to_text(s.offset)}] = {to_text(s.value)}")
        elif isinstance(s, Barrier):
            out.append(f"{pad}barrier")
        else:
            args = ", ".join(
                (f"&{a.buffer}[{to_text(a.offset)}]" if a.offset is not None else f"&{a.buffer}")
                if isinstance(a, Address)
                else to_text(a)
                for a in s.args
            )
            out.append(f"{pad}{s.fn}({args})")
    return out


def statements(body: tuple[Stmt, ...]) -> Iterator[Stmt]:
    """Every statement of a body, outer before inner."""
    for s in body:
        yield s
        if isinstance(s, For):
            yield from statements(s.body)
        elif isinstance(s, If):
            yield from statements(s.then)
            yield from statements(s.orelse)


def loop(var: Axis, *body: Stmt) -> For:
    """The full loop over an axis."""
    return For(var, index(0), var.extent, body)
