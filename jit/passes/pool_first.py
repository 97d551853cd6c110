"""Sums before products: a sum of rows of a product becomes the product of summed rows.

Both are linear. What a pooling window sums of a 1x1 convolution's results is the convolution of
what it sums of the input, with as many times fewer products as the window has places: of the
convolutions between the blocks of a dense network a quarter is left. It holds for any sum over axes
that one factor depends on and the other does not; a bias counts once for each place.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxjit.codegen.expr import (
    ONE,
    ZERO,
    Apply,
    Axis,
    Const,
    Expr,
    Load,
    Reduce,
    apply,
    as_int,
    axes_of,
    fresh_axis,
    loads,
    rewrite,
    substitute,
    walk,
)
from onnxjit.codegen.kernel import Kernel, Stage, TensorType, product, rename_axes, used_inputs
from onnxjit.codegen.schedule.axes import typical
from onnxjit.codegen.target import Target
from onnxjit.program import Call, KernelCall, Program


def pool_first(p: Program, target: Target) -> Program:
    """The program with sums over the results of products moved before these."""
    uses = p.uses()
    types = dict(p.types)
    maker = {v: k for k, c in enumerate(p.calls) if isinstance(c, KernelCall) for v in c.outputs}
    fresh = p.fresh()
    name = next(fresh)
    calls: list[tuple[Call, ...]] = [(c,) for c in p.calls]
    for k, c in enumerate(p.calls):
        found = pooled(c.kernel) if isinstance(c, KernelCall) else None
        if found is None or found.read.buffer not in maker or uses[found.read.buffer] > 1:
            continue
        first = p.calls[maker[found.read.buffer]]
        assert isinstance(c, KernelCall) and isinstance(first, KernelCall)
        swapped = exchanged(first.kernel, c.kernel, found, name)
        if swapped is None:
            continue
        name = next(fresh)
        sums, products = swapped
        types[sums.outputs[0]] = sums.types[sums.outputs[0]]
        calls[maker[found.read.buffer]] = ()
        calls[k] = (KernelCall(sums, c.origin), KernelCall(products, first.origin))
    return p.replace(calls=tuple(c for group in calls for c in group), types=types)


@dataclass(frozen=True, slots=True)
class Pooled:
    """A sum of one read of a value, `total` in the only stage of its kernel."""

    stage: Stage
    total: Reduce
    read: Load


def pooled(k: Kernel) -> Pooled | None:
    """The sum of plain reads that a kernel consists of, with whatever is done to it then."""
    if len(k.stages) != 1 or k.stages[0].index or len(k.stages[0].reduces) != 1:
        return None
    stage = k.stages[0]
    (total,) = stage.reduces
    read = total.body
    if total.fn != "sum" or total.dtype != "float32" or not isinstance(read, Load):
        return None
    if [x.buffer for x in loads(stage.value)].count(read.buffer) != 1 or read.dtype != "float32":
        return None
    return Pooled(stage, total, read)


def exchanged(first: Kernel, last: Kernel, pool: Pooled, name: str) -> tuple[Kernel, Kernel] | None:
    """The kernel that sums one factor into the value `name`, and the one of the product."""
    if len(first.stages) != 1 or first.stages[0].index or len(first.stages[0].reduces) != 1:
        return None
    stage = first.stages[0]
    (red,) = stage.reduces
    if typical(last.types[pool.stage.buffer].elements) * 2 > typical(
        first.types[stage.buffer].elements
    ):
        return None
    term = stage.value
    bias: Expr | None = None
    if term is not red:
        if not (isinstance(term, Apply) and term.fn == "add" and red in term.args):
            return None
        bias = term.args[1] if term.args[0] is red else term.args[0]
    body = red.body
    if red.fn != "sum" or not (isinstance(body, Apply) and body.fn == "mul"):
        return None
    if not all(isinstance(x, Load) and x.dtype == "float32" for x in body.args):
        return None

    # Both factors at the places that are summed; one of them is the same at all of them.
    places = set(pool.total.axes)
    at: dict[Expr, Expr] = dict(zip(stage.axes, pool.read.index, strict=True))
    terms = tuple(fresh_axis(a.extent, "r") for a in red.axes)
    renamed: dict[Expr, Expr] = dict(zip(red.axes, terms, strict=True))
    factors = [substitute(rename_axes(x, renamed), at) for x in body.args]
    varying = [x for x in factors if axes_of(x) & places]
    if len(varying) != 1:
        return None
    (x,) = varying
    assert isinstance(x, Load)
    shape: list[Expr] = []
    index: list[Expr] = []
    for i in x.index:
        own = axes_of(i) - places
        if len(own) > 1 or own & set(index):
            return None
        (a,) = own or (None,)
        shape.append(ONE if a is None else a.extent)
        index.append(ZERO if a is None else a)
    if any(isinstance(e, Load) for i in x.index for e in walk(i)):
        return None
    count = as_int(product(a.extent for a in pool.total.axes))
    if bias is not None:
        bias = substitute(bias, at)
        if (
            count is None
            or axes_of(bias) & places
            or any(isinstance(e, Reduce) for e in walk(bias))
        ):
            return None
        bias = apply("mul", bias, Const(count, "float32"))

    kind = TensorType("float32", tuple(shape))
    axes = tuple(fresh_axis(d) for d in shape)
    own_axes: dict[Expr, Expr] = {
        i: a for i, a in zip(index, axes, strict=True) if isinstance(i, Axis)
    }
    taps = tuple(fresh_axis(a.extent, "r") for a in pool.total.axes)
    own_axes.update(zip(pool.total.axes, taps, strict=True))
    sums = Stage(name, axes, Reduce("sum", taps, substitute(x, own_axes)))
    types = {**first.types, **last.types, name: kind}
    u = Load(name, index, "float32")
    total: Expr = Reduce("sum", terms, apply("mul", *(u if f is x else f for f in factors)))
    if bias is not None:
        total = apply("add", total, bias)
    value = rewrite(pool.stage.value, lambda e: total if e is pool.total else None)
    products = Stage(pool.stage.buffer, pool.stage.axes, value)
    inputs = (name, *dict.fromkeys((*first.inputs, *last.inputs)))
    return (
        Kernel(last.name, used_inputs((sums,), first.inputs), (name,), (sums,), types),
        Kernel(first.name, used_inputs((products,), inputs), last.outputs, (products,), types),
    )


__all__ = ["pool_first"]
