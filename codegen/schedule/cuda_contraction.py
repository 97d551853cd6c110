"""CUDA schedule for sums of products: matrix products and convolutions over shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnxjit.codegen.expr import (
    ONE,
    ZERO,
    Apply,
    Axis,
    Const,
    Expr,
    Load,
    Reduce,
    Var,
    apply,
    as_int,
    axes_of,
    index,
    loads,
    substitute,
    walk,
)
from onnxjit.codegen.kernel import inline, product
from onnxjit.codegen.loops import (
    THREAD,
    TILE,
    Assign,
    Barrier,
    For,
    If,
    Local,
    LoopNest,
    Stmt,
    Store,
)
from onnxjit.codegen.schedule.axes import (
    FlatStage,
    by_stride,
    ceil_div,
    coefficient,
    flatten_stage,
    split_axes,
    typical,
)
from onnxjit.codegen.schedule.cuda_threads import (
    block_threads,
    numbered,
    outermost,
    over_threads,
    positions,
)
from onnxjit.codegen.schedule.pointwise import finish_nest
from onnxjit.codegen.schedule.reduction import (
    identity,
    ordered_reduction,
    replace_node,
)
from onnxjit.codegen.schedule.request import Declined, Request


@dataclass(frozen=True, slots=True)
class Product:
    """A stage that is a sum of `x * y`: its axes by role, all renamed."""

    stage: FlatStage
    red: Reduce
    x: Expr
    y: Expr
    batch: tuple[Axis, ...]
    m: tuple[Axis, ...]
    n: tuple[Axis, ...]
    k: tuple[Axis, ...]


def recognise(r: Request) -> Product:
    """The sum of products that a kernel is, producers without reductions substituted into it."""
    *before, final = r.kernel.stages
    if final.index:
        raise Declined("the stage stores through an index map")
    if any(s.reduces or s.index or s.buffer in r.kernel.outputs for s in before):
        raise Declined("an earlier stage reduces, is a part, or is an output")
    value = final.value
    for s in reversed(before):
        value = inline(value, s)
    final = replace(final, value=value)
    stage = split_axes(flatten_stage(final, r.kernel.types, r.layouts))
    reds = [x for x in walk(stage.value) if isinstance(x, Reduce)]
    if len(reds) != 1 or reds[0].fn != "sum":
        raise Declined("not one sum")
    body = reds[0].body
    if not (isinstance(body, Apply) and body.fn == "mul" and body.dtype in _MATRIX_DTYPES):
        raise Declined(f"the sum is not over a product but over {body.dtype} values")
    order = by_stride(stage.axes, stage.offset)
    offset, value, *axes = numbered([stage.offset, stage.value], order, "i")
    order = [a for a in axes if isinstance(a, Axis)]
    stage = FlatStage(stage.buffer, tuple(order), offset, value)
    red = outermost(value)[0]
    assert isinstance(red.body, Apply)
    x, y = red.body.args
    unit = [a for a in order if coefficient(offset, a) is ONE]
    in_x, in_y = axes_of(x), axes_of(y)
    if any(a in in_x and a not in in_y for a in unit):
        x, y, in_x, in_y = y, x, in_y, in_x
    if any(a not in in_x and a not in in_y for a in red.axes):
        raise Declined("a summed axis occurs in no operand")
    m = tuple(a for a in order if a in in_x and a not in in_y)
    n = tuple(a for a in order if a in in_y and a not in in_x)
    for axes_, what in ((m, "rows"), (n, "columns")):
        count = as_int(product(a.extent for a in axes_))
        if count is not None and count < 4:
            raise Declined(f"only {count} {what}")
    batch = tuple(a for a in order if (a in in_x) == (a in in_y))
    return Product(stage, red, x, y, batch, m, n, tuple(ordered_reduction(red)))


_MATRIX_DTYPES = ("float32", "float64", "int32", "uint32")


def contraction(r: Request) -> LoopNest:
    """A square tile of outputs a block; V. Volkov and J. Demmel, "Benchmarking GPUs to tune dense
    linear algebra" (2008): several outputs a thread, so that registers feed most multiplications.
    """
    c = recognise(r)
    threads = block_threads(r)
    side = int(threads**0.5)
    rm, rn = (registers(product(a.extent for a in axes), side) for axes in (c.m, c.n))
    return _Tile(r, c, side, rm, rn).nest()


def registers(extent: Expr, side: int) -> int:
    """Outputs of one thread along a direction: 1, 2 or 4, no more than the extent fills."""
    n = typical(extent)
    return 4 if n > 2 * side else 2 if n > side else 1


class _Tile:
    """Builds the body of one tile: `rm * side` rows times `rn * side` columns."""

    def __init__(self, r: Request, c: Product, side: int, rm: int, rn: int) -> None:
        self.r, self.c, self.side, self.rm, self.rn = r, c, side, rm, rn
        self.rows, self.columns, self.depth = rm * side, rn * side, side
        self.m = product(a.extent for a in c.m)
        self.n = product(a.extent for a in c.n)
        self.k = product(a.extent for a in c.k)

    def nest(self) -> LoopNest:
        c, side = self.c, self.side
        m_tiles, n_tiles = ceil_div(self.m, self.rows), ceil_div(self.n, self.columns)
        rest = apply("floordiv", TILE, n_tiles)
        m0, n0, k0 = Var("base_m"), Var("base_n"), Var("base_k")
        body: list[Stmt] = [
            Assign(n0, apply("mod", TILE, n_tiles) * self.columns),
            Assign(m0, apply("mod", rest, m_tiles) * self.rows),
        ]
        sets, self.outer = positions(c.batch, apply("floordiv", rest, m_tiles))
        if len(c.batch) == 1:
            sets = [Assign(Var(c.batch[0].name), self.outer[c.batch[0]])]
            self.outer = {c.batch[0]: Var(c.batch[0].name)}
        ty, tx = Var("ty"), Var("tx")
        body += [
            *sets,
            Assign(ty, apply("floordiv", THREAD, side)),
            Assign(tx, apply("mod", THREAD, side)),
        ]
        dtype = c.red.dtype
        self.acc = [[Var(f"acc{i}_{j}", dtype) for j in range(self.rn)] for i in range(self.rm)]
        body += [Assign(v, identity("sum", dtype)) for row in self.acc for v in row]
        step: list[Stmt] = [
            self.stage_in("x_tile", c.x, c.m, m0, self.m, self.rows, k0),
            self.stage_in("y_tile", c.y, c.n, n0, self.n, self.columns, k0),
            Barrier(),
            self.multiply(tx, ty),
            Barrier(),
        ]
        body.append(For(k0, ZERO, self.k, tuple(step), step=self.depth))
        body += self.results(m0, n0, tx, ty)
        tiles = product(a.extent for a in c.batch) * m_tiles * n_tiles
        # A padded row keeps the threads that fill a column out of each other's memory banks.
        shared = (
            Local("x_tile", c.x.dtype, index(self.depth * (self.rows + 1)), stack=False),
            Local("y_tile", c.y.dtype, index(self.depth * (self.columns + 1)), stack=False),
        )
        rule = f"contraction: {self.rows}x{self.columns} outputs a block"
        return finish_nest(self.r, tuple(body), tiles, rule, locals=shared, threads=side * side)

    def stage_in(
        self, buffer: str, e: Expr, axes: Sequence[Axis], base: Var, extent: Expr, width: int,
        k0: Var,
    ) -> For:  # fmt: skip
        """Copies one operand's tile to shared memory, zeros beyond its edges."""
        p, mine, k = Var(f"p_{buffer[0]}"), Var(f"a_{buffer[0]}"), Var(f"k_{buffer[0]}")
        reads = [x.index[0] for x in loads(e)]
        by_k = any(coefficient(o, a) is ONE for o in reads for a in self.c.k)
        inner = self.depth if by_k else width
        fast, slow = apply("mod", p, inner), apply("floordiv", p, inner)
        along, down = (slow, fast) if by_k else (fast, slow)
        at = down * (width + 1) + along
        sets_a, table_a = positions(axes, mine)
        sets_k, table_k = positions(self.c.k, k)
        value = substitute(e, {**self.outer, **table_a, **table_k})
        inside = apply("logical_and", apply("lt", mine, extent), apply("lt", k, self.k))
        return over_threads(
            p,
            index(width * self.depth),
            self.side * self.side,
            Assign(mine, base + along),
            Assign(k, k0 + down),
            If(
                inside,
                (*sets_a, *sets_k, Store(buffer, at, value)),
                (Store(buffer, at, Const(0, e.dtype)),),
            ),
        )

    def multiply(self, tx: Var, ty: Var) -> For:
        c, side = self.c, self.side
        kk = Var("kk")
        xs = [Var(f"x{i}", c.x.dtype) for i in range(self.rm)]
        ys = [Var(f"y{j}", c.y.dtype) for j in range(self.rn)]
        body: list[Stmt] = []
        for i, v in enumerate(xs):
            at = kk * (self.rows + 1) + ty + i * side
            body.append(Assign(v, Load("x_tile", (at,), c.x.dtype)))
        for j, v in enumerate(ys):
            at = kk * (self.columns + 1) + tx + j * side
            body.append(Assign(v, Load("y_tile", (at,), c.y.dtype)))
        for i, x in enumerate(xs):
            for j, y in enumerate(ys):
                acc = self.acc[i][j]
                body.append(Assign(acc, apply("add", acc, apply("mul", x, y))))
        return For(kk, ZERO, index(self.depth), tuple(body))

    def results(self, m0: Var, n0: Var, tx: Var, ty: Var) -> list[Stmt]:
        """The epilogue and the store of every output that lies inside."""
        c, side = self.c, self.side
        out: list[Stmt] = []
        for i in range(self.rm):
            m = Var(f"at_m{i}")
            sets_m, table_m = positions(c.m, m)
            inner: list[Stmt] = []
            for j in range(self.rn):
                n = Var(f"at_n{j}")
                sets_n, table_n = positions(c.n, n)
                table = {**self.outer, **table_m, **table_n}
                value = substitute(replace_node(c.stage.value, c.red, self.acc[i][j]), table)
                store = Store(c.stage.buffer, substitute(c.stage.offset, table), value)
                inner += [
                    Assign(n, n0 + tx + j * side),
                    If(apply("lt", n, self.n), (*sets_n, store)),
                ]
            out += [
                Assign(m, m0 + ty + i * side),
                If(apply("lt", m, self.m), (*sets_m, *inner)),
            ]
        return out


__all__ = ["contraction", "recognise"]
