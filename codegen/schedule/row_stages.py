"""Kernels of several stages as stages of a row, over row axes that they share; softmax in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    axes_of,
    index,
    leaves,
    loads,
    map_loads,
    rewrite,
    substitute,
    walk,
)
from onnxjit.codegen.kernel import Kernel, Stage, rename_axes
from onnxjit.codegen.scalar_functions import FUNCTIONS
from onnxjit.codegen.schedule.axes import by_stride, drop_unit, flat_offset
from onnxjit.codegen.schedule.reduction import replace_node
from onnxjit.codegen.schedule.request import Declined, Request


@dataclass(frozen=True, slots=True)
class RowStage:
    """A stage in the axes of the kernel's rows and `inner` ones of its own.

    `offset` is where a parameter stores, None for a temporary. A temporary without inner axes is a
    `scalar` of the row, by which others read it; the loads of other temporaries count elements from
    the row's start.
    """

    buffer: str
    inner: tuple[Axis, ...]
    value: Expr
    offset: Expr | None = None
    scalar: Var | None = None

    @property
    def reduces(self) -> list[Reduce]:
        return [x for x in walk(self.value) if isinstance(x, Reduce)]


def row_stages(r: Request) -> tuple[list[Axis], list[RowStage]]:
    """The row axes, from the largest stride of the result to the smallest, and the stages."""
    k = r.kernel
    shared, named = align_rows(k.stages, set(k.outputs))
    final = named[-1]
    where = flat_offset(final.store, k.types[final.buffer], r.layouts.get(final.buffer), False)
    order = by_stride([a for a in shared if a.extent is not ONE], where)
    canonical = {a: Axis(f"i{n}", a.extent) for n, a in enumerate(order)}
    table: dict[Expr, Expr] = {a: axis for a, axis in canonical.items()}
    table.update({a: ZERO for a in shared if a.extent is ONE})
    temps = set(k.temporaries)
    scalars: dict[str, Var] = {}
    counter = len(order)
    out: list[RowStage] = []
    for n, s in enumerate(named):
        inner = [a for a in s.axes if a not in shared and a.extent is not ONE]
        gone: dict[Expr, Expr] = {a: ZERO for a in s.axes if a.extent is ONE}
        value = substitute(drop_unit(s.value), gone)
        value = local_loads(value, temps, scalars, k, shared)
        value = flatten_loads_except(value, r, temps)
        reds = [x for x in walk(value) if isinstance(x, Reduce)]
        fresh: dict[Axis, Axis] = {}
        for a in [*inner, *(a for x in reds for a in x.axes)]:
            fresh[a] = Axis(f"i{counter}", a.extent)
            counter += 1
        both = table | {a: axis for a, axis in fresh.items()}
        value = rename_axes(value, both)
        for red in (x for x in walk(value) if isinstance(x, Reduce)):
            if any(isinstance(y, Reduce) for y in walk(red.body)):
                raise Declined("a reduction inside a reduction")
            if any(a in axes_of(red) for a in fresh.values() if a not in red.axes):
                raise Declined("a reduction that varies inside the row")
        axes = tuple(fresh[a] for a in inner)
        if s.buffer in temps and not inner:
            scalars[s.buffer] = Var(f"v{n}", k.types[s.buffer].dtype)
            out.append(RowStage(s.buffer, (), value, scalar=scalars[s.buffer]))
        elif s.buffer in temps:
            out.append(RowStage(s.buffer, axes, value))
        else:
            store = [rename_axes(substitute(i, gone), both) for i in s.store]
            at = flat_offset(store, k.types[s.buffer], r.layouts.get(s.buffer), False)
            out.append(RowStage(s.buffer, axes, value, at))
    return [canonical[a] for a in order], out


def hoisted(stages: Sequence[RowStage]) -> list[RowStage]:
    """Functions of a row's scalars as scalars of their own, not computed for every element."""
    out: list[RowStage] = []
    for s in stages:
        value = s.value
        for x in list(walk(value)) if s.inner else ():
            if isinstance(x, Apply) and FUNCTIONS[x.fn].cost > 1 and of_scalars(x):
                name = f"v{len(out)}_{s.buffer}"
                v = Var(f"v{len(out)}h", x.dtype)
                replaced = replace_node(value, x, v)
                if replaced is not value:
                    out.append(RowStage(name, (), x, scalar=v))
                    value = replaced
        out.append(replace(s, value=value))
    return out


def of_scalars(e: Expr) -> bool:
    """Whether an expression depends on scalars of the row and nothing else."""
    found = [x for x in leaves(e) if not isinstance(x, Const)]
    return bool(found) and not loads(e) and all(isinstance(x, Var) for x in found)


# --- softmax -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exponentials:
    """`e**(value - maximum)` along `axis` and the sum of them, where `highest` is the stage of the
    row's maximum and `total` that of the sum; `each` stores them, if others read them."""

    highest: RowStage
    each: RowStage | None
    total: RowStage
    axis: Axis
    value: Expr

    @property
    def buffers(self) -> set[str]:
        """The temporaries that the three stages store."""
        return {s.buffer for s in (self.highest, self.each, self.total) if s is not None}


def exponentials(stages: Sequence[RowStage]) -> Exponentials | None:
    """The only maximum of a row whose elements' exponentials are summed against it."""
    for total in stages:
        red = total.value
        if total.scalar is None or not isinstance(red, Reduce) or red.fn != "sum":
            continue
        if len(red.axes) != 1:
            continue
        (axis,) = red.axes
        body = red.body
        source = body.buffer if isinstance(body, Load) else None
        each = next((s for s in stages if s.offset is None and s.buffer == source), None)
        if each is not None:
            if len(each.inner) != 1 or red.body is not Load(each.buffer, (axis,), red.dtype):
                continue
            body = rename_axes(each.value, {each.inner[0]: axis})
        if not (isinstance(body, Apply) and body.fn == "exp"):
            continue
        (difference,) = body.args
        for s in stages:
            top = s.value
            if s.scalar is None or not isinstance(top, Reduce) or top.fn != "max":
                continue
            if len(top.axes) != 1 or top.axes[0].extent is not axis.extent:
                continue
            value = rename_axes(top.body, {top.axes[0]: axis})
            if difference is apply("sub", value, s.scalar):
                return Exponentials(s, each, total, axis, value)
    return None


def with_reciprocal(stages: Sequence[RowStage], found: Exponentials) -> list[RowStage]:
    """Products by the sum's reciprocal instead of divisions: the sum lies between 1 and the number
    of elements."""
    total = found.total.scalar
    assert total is not None
    inverse = Var(f"{total.name}r", total.dtype)

    def product(x: Expr) -> Expr | None:
        if isinstance(x, Apply) and x.fn == "div" and x.args[1] is total:
            return apply("mul", x.args[0], inverse)
        return None

    out: list[RowStage] = []
    for s in stages:
        out.append(replace(s, value=rewrite(s.value, product)))
        if s is found.total:
            one = apply("div", Const(1.0, total.dtype), total)
            out.append(RowStage(f"{s.buffer} inverse", (), one, scalar=inverse))
    used = any(inverse in leaves(s.value) for s in out)
    return out if used else list(stages)


def only_shares(stages: Sequence[RowStage], found: Exponentials) -> bool:
    """Whether nothing else of the exponentials and the maximum is used than with the sum.

    Of a row of -inf the sum is NaN, and so is all that is made with it.
    """
    total = found.total.scalar
    assert total is not None
    sums: set[Expr] = {total, Var(f"{total.name}r", total.dtype)}

    def share(x: Expr) -> Expr | None:
        product = isinstance(x, Apply) and x.fn == "mul" and sums & set(x.args)
        return Const(0.0, x.dtype) if product else None

    for s in stages:
        if s.buffer in found.buffers:
            continue
        used = set(leaves(s.value))
        if found.highest.scalar in used and not sums & used:
            return False
        alone = loads(rewrite(s.value, share))
        if found.each is not None and any(x.buffer == found.each.buffer for x in alone):
            return False
    return True


# --- alignment -----------------------------------------------------------------------------------


def align_rows(stages: tuple[Stage, ...], outputs: set[str]) -> tuple[list[Axis], list[Stage]]:
    """Renames every stage's row axes to those of the last stage; returns the row axes too."""
    final = stages[-1]
    if any(s.index for s in stages):
        raise Declined("a stage stores through an index map")
    axis_of: dict[str, dict[int, Axis]] = {final.buffer: dict(enumerate(final.axes))}
    done: dict[str, Stage] = {final.buffer: final}
    rows: set[Axis] = set(final.axes)
    buffers = {s.buffer for s in stages}
    for _ in range(len(final.axes) + 2):
        before = set(rows)
        done = {}
        axis_of = {final.buffer: {p: a for p, a in enumerate(final.axes) if a in rows}}
        for s in reversed(stages):
            mapping = axis_of.get(s.buffer)
            if mapping is None:
                if s.buffer not in outputs:
                    raise Declined("a stage that nothing reads")
                mapping = match_output(s, final, rows)
            rows &= set(mapping.values())
            table: dict[Expr, Expr] = {
                s.axes[p]: a for p, a in mapping.items() if s.axes[p] is not a
            }
            named = Stage(
                s.buffer,
                tuple(mapping.get(p, a) for p, a in enumerate(s.axes)),
                rename_axes(s.value, table),
            )
            done[s.buffer] = named
            for x in loads(named.value):
                if x.buffer not in buffers:
                    continue
                found = {p: i for p, i in enumerate(x.index) if isinstance(i, Axis) and i in rows}
                known = axis_of.get(x.buffer)
                if known is not None and known != found:
                    both = {p: a for p, a in known.items() if found.get(p) is a}
                    rows &= set(both.values())
                    found = both
                axis_of[x.buffer] = found
                rows &= set(found.values())
        if rows == before:
            break
    if any(s.buffer not in done for s in stages):
        raise Declined("stages that do not share rows")
    ordered = [a for a in final.axes if a in rows]
    checked = [done[s.buffer] for s in stages]
    for s in checked:
        for red in s.reduces:
            if rows & set(red.axes):
                raise Declined("a row axis is reduced")
    for s in checked:
        if rows - set(s.axes):
            raise Declined(f"stages do not share rows ({len(rows - set(s.axes))} axes differ)")
    return ordered, checked


def match_output(s: Stage, final: Stage, rows: set[Axis]) -> dict[int, Axis]:
    """Row axes of a further output that no stage reads: equal extents in equal positions."""
    out: dict[int, Axis] = {}
    for p, (a, b) in enumerate(zip(s.axes, final.axes, strict=False)):
        if b in rows and a.extent is b.extent:
            out[p] = b
    return out


def local_loads(
    e: Expr, temps: set[str], scalars: Mapping[str, Var], k: Kernel, shared: list[Axis]
) -> Expr:
    """Reads of temporaries become scalars or offsets within the row."""

    def put(x: Load) -> Expr | None:
        if x.buffer not in temps:
            return None
        if x.buffer in scalars:
            return scalars[x.buffer]
        at: Expr = index(0)
        for i, d in zip(x.index, k.types[x.buffer].shape, strict=True):
            if d is ONE or (isinstance(i, Axis) and i in shared):
                continue
            at = at * d + i
        return Load(x.buffer, (at,), x.dtype)

    return map_loads(e, put)


def flatten_loads_except(e: Expr, r: Request, temps: set[str]) -> Expr:
    """Flat offsets for loads of parameters; loads of row temporaries are flat already."""

    def flat(x: Load) -> Expr | None:
        if x.buffer in temps:
            return None
        t = r.kernel.types[x.buffer]
        return Load(x.buffer, (flat_offset(x.index, t, r.layouts.get(x.buffer)),), x.dtype)

    return map_loads(e, flat)


__all__ = ["RowStage", "align_rows", "exponentials", "hoisted", "row_stages"]
