"""Sharing loops among the threads of a CUDA block: what its schedule rules have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from onnxjit.codegen.expr import (
    Axis,
    Expr,
    Reduce,
    Var,
    apply,
    substitute,
    walk,
)
from onnxjit.codegen.kernel import rename_axes
from onnxjit.codegen.loops import (
    THREAD,
    Assign,
    Barrier,
    For,
    If,
    Stmt,
    Store,
    loop,
)
from onnxjit.codegen.schedule.reduction import (
    combine,
    guarded,
    identity,
    ordered_reduction,
    replace_node,
)
from onnxjit.codegen.schedule.request import Request


def block_threads(r: Request) -> int:
    """The target's threads of a block."""
    for f in r.target.features:
        if f.startswith("block="):
            return int(f.removeprefix("block="))
    return 256


def positions(axes: Sequence[Axis], linear: Expr) -> tuple[list[Stmt], dict[Expr, Expr]]:
    """Statements that derive each axis from its row-major linear index, and axis -> variable."""
    if len(axes) == 1:
        return [], {axes[0]: linear}
    out: list[Stmt] = []
    rest = linear
    for k in range(len(axes) - 1, -1, -1):
        a = axes[k]
        out.append(Assign(Var(a.name), rest if k == 0 else apply("mod", rest, a.extent)))
        rest = apply("floordiv", rest, a.extent)
    return out, {a: Var(a.name) for a in axes}


def replaced(s: Stmt, table: Mapping[Expr, Expr]) -> Stmt:
    """A statement with leaves of its expressions replaced."""
    if isinstance(s, For):
        body = tuple(replaced(x, table) for x in s.body)
        start, stop = substitute(s.start, table), substitute(s.stop, table)
        return replace(s, start=start, stop=stop, body=body)
    if isinstance(s, If):
        then = tuple(replaced(x, table) for x in s.then)
        other = tuple(replaced(x, table) for x in s.orelse)
        return If(substitute(s.cond, table), then, other)
    if isinstance(s, Assign):
        return Assign(s.var, substitute(s.value, table))
    if isinstance(s, Store):
        return Store(s.buffer, substitute(s.offset, table), substitute(s.value, table))
    assert isinstance(s, Barrier)
    return s


def over_threads(var: Var, count: Expr, threads: int, *body: Stmt) -> For:
    """`for var in range(thread, count, threads)`: the block's threads share the range."""
    return For(var, THREAD, count, tuple(body), step=threads)


def outermost(e: Expr) -> list[Reduce]:
    """Reductions of `e` that are in no other reduction, in a deterministic order."""
    found = [x for x in walk(e) if isinstance(x, Reduce)]
    inner = {y for x in found for y in walk(x.body) if isinstance(y, Reduce)}
    return [x for x in found if x not in inner]


def serial(value: Expr, prefix: str = "acc") -> tuple[list[Stmt], Expr]:
    """Statements that compute every reduction of `value` in scalars, and what is left of it."""
    stmts: list[Stmt] = []
    for n, red in enumerate(outermost(value)):
        acc = Var(f"{prefix}_{n}", red.dtype)
        guard, body = guarded(red)
        inner, body = serial(body, f"{prefix}_{n}")
        step: tuple[Stmt, ...] = (*inner, Assign(acc, combine(red.fn, acc, body)))
        if guard is not None and not any(isinstance(x, Reduce) for x in walk(guard)):
            step = (If(guard, step),)
        elif guard is not None:
            inner, body = serial(red.body, f"{prefix}_{n}")
            step = (*inner, Assign(acc, combine(red.fn, acc, body)))
        for a in reversed(ordered_reduction(red)):
            step = (loop(a, *step),)
        stmts += [Assign(acc, identity(red.fn, red.dtype)), *step]
        value = replace_node(value, red, acc)
    return stmts, value


def numbered(exprs: Sequence[Expr], axes: Sequence[Axis], prefix: str) -> list[Expr]:
    """`exprs` with `axes` and all reduced axes renamed to prefix0, prefix1 ..."""
    table: dict[Expr, Expr] = {}
    reduced = [a for e in exprs for x in walk(e) if isinstance(x, Reduce) for a in x.axes]
    for a in dict.fromkeys([*axes, *reduced]):
        table[a] = Axis(f"{prefix}{len(table)}", a.extent)
    return [rename_axes(e, table) for e in (*exprs, *axes)]


__all__ = [
    "block_threads", "numbered", "outermost", "over_threads", "positions", "replaced", "serial",
]  # fmt: skip
