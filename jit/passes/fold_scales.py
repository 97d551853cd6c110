"""Moves constant factors and sums around a product with constant weights into the weights.

Batch normalisation after a convolution becomes nothing but other weights and one bias, and so does
the scale of a linear layer. Only what depends on nothing but the axes of the weights can go in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from onnxjit.codegen.evaluate import evaluate
from onnxjit.codegen.expr import (
    Apply,
    Axis,
    Const,
    Expr,
    Load,
    Reduce,
    apply,
    axes_of,
    fresh_axis,
    index,
    leaves,
    loads,
    rewrite,
    substitute,
    walk,
)
from onnxjit.codegen.kernel import Kernel, Stage, TensorType
from onnxjit.codegen.target import Target
from onnxjit.program import KernelCall, Program


@dataclass(frozen=True, slots=True)
class Affine:
    """`top` equals `red` times `scale` plus `bias`; None is 1 or 0."""

    red: Reduce
    weights: Load
    top: Expr
    scale: Expr | None
    bias: Expr | None


def fold_scales(p: Program, target: Target) -> Program:
    """Rewrites every kernel that ends in such a product; constants are added, none is changed."""
    constants, types = dict(p.constants), dict(p.types)
    fresh = p.fresh()
    calls = []
    for c in p.calls:
        found = affine(c.kernel, constants) if isinstance(c, KernelCall) else None
        if found is None:
            calls.append(c)
            continue
        assert isinstance(c, KernelCall)
        made: dict[str, np.ndarray] = {}
        weights: Expr = found.weights
        if found.scale is not None:
            name = next(fresh)
            made[name] = scaled(found.weights, found.scale, constants)
            weights = Load(name, found.weights.index, "float32")
        if not all(np.isfinite(a).all() for a in made.values()):
            calls.append(c)
            continue
        result: Expr = rewrite(found.red, partial(swapped, found.weights, weights))
        if found.bias is not None:
            name = next(fresh)
            axes = sorted(axes_of(found.bias), key=lambda a: a.name)
            made[name] = computed(axes, found.bias, constants)
            result = apply("add", result, Load(name, axes, "float32"))
        constants.update(made)
        for v, a in made.items():
            types[v] = TensorType("float32", tuple(map(index, a.shape)))
        calls.append(replace(c, kernel=with_top(c.kernel, found.top, result, types)))
    used = {v for c in calls for v in c.inputs} | set(p.outputs)
    kept = {v: a for v, a in constants.items() if v in used}
    return p.replace(calls=tuple(calls), constants=kept, types=types)


def swapped(old: Expr, new: Expr, x: Expr) -> Expr | None:
    """`new` in place of `old`, for `rewrite`."""
    return new if x is old else None


def affine(k: Kernel, constants: Mapping[str, np.ndarray]) -> Affine | None:
    """The longest chain of constant factors and terms around a kernel's only sum of products."""
    stage = k.stages[-1]
    reds = stage.reduces
    if len(reds) != 1 or reds[0].fn != "sum":
        return None
    (red,) = reds
    body = red.body
    if not (isinstance(body, Apply) and body.fn == "mul" and body.dtype == "float32"):
        return None
    fixed = [a for a in body.args if isinstance(a, Load) and a.buffer in constants]
    if len(fixed) != 1 or not all(isinstance(a, Load) for a in body.args):
        return None
    (weights,) = fixed
    own = [i for i in weights.index if isinstance(i, Axis) and i in stage.axes]
    if any(weights.index.count(i) > 1 for i in own):
        return None

    def goes_in(e: Expr) -> bool:
        reads = loads(e)
        return (
            e.dtype == "float32"
            and axes_of(e) <= set(own)
            and all(x.buffer in constants for x in reads)
            and not any(isinstance(x, Reduce) for x in walk(e))
            and all(isinstance(x, Axis) for x in leaves(e))
        )

    parents: dict[Expr, set[Expr]] = {}
    for x in walk(stage.value):
        for child in x.kids:
            parents.setdefault(child, set()).add(x)
    top: Expr = red
    scale: Expr | None = None
    bias: Expr | None = None
    terms = 0
    while len(parents.get(top, ())) == 1:
        (above,) = parents[top]
        if not (isinstance(above, Apply) and above.fn in ("add", "sub", "mul")):
            break
        left, right = above.args
        other = right if left is top else left
        if other is top or not goes_in(other):
            break
        if above.fn == "mul":
            scale = other if scale is None else apply("mul", scale, other)
            bias = None if bias is None else apply("mul", bias, other)
        elif above.fn == "add":
            bias = other if bias is None else apply("add", bias, other)
        elif left is top:
            bias = apply("neg", other) if bias is None else apply("sub", bias, other)
        else:
            minus = Const(-1.0, "float32")
            scale = minus if scale is None else apply("mul", scale, minus)
            bias = other if bias is None else apply("sub", other, bias)
        terms += 1
        top = above
    if scale is None and terms < 2:
        return None
    return Affine(red, weights, top, scale, bias)


def scaled(weights: Load, scale: Expr, constants: Mapping[str, np.ndarray]) -> np.ndarray:
    """The weights times a factor over some of their axes."""
    shape = constants[weights.buffer].shape
    axes = tuple(fresh_axis(n) for n in shape)
    where: dict[Expr, Expr] = {
        i: a for i, a in zip(weights.index, axes, strict=True) if isinstance(i, Axis)
    }
    value = apply("mul", Load(weights.buffer, axes, "float32"), substitute(scale, where))
    return computed(axes, value, constants)


def computed(
    axes: tuple[Axis, ...] | list[Axis], value: Expr, constants: Mapping[str, np.ndarray]
) -> np.ndarray:
    """`value` for all values of `axes`."""
    inputs = tuple(dict.fromkeys(x.buffer for x in loads(value)))
    types = {
        v: TensorType(constants[v].dtype.name, tuple(map(index, constants[v].shape)))
        for v in inputs
    }
    types["result"] = TensorType("float32", tuple(a.extent for a in axes))
    stage = Stage("result", tuple(axes), value)
    kernel = Kernel("constant", inputs, ("result",), (stage,), types)
    with np.errstate(all="ignore"):
        (result,) = evaluate(kernel, {v: constants[v] for v in inputs})
    return np.array(result, np.float32, order="C")  # keeps rank 0


def with_top(k: Kernel, top: Expr, result: Expr, types: Mapping[str, TensorType]) -> Kernel:
    """The kernel with `top` of its last stage replaced."""
    last = k.stages[-1]
    value = rewrite(last.value, partial(swapped, top, result))
    stages = (*k.stages[:-1], replace(last, value=value))
    made = {s.buffer for s in stages}
    read = dict.fromkeys(x.buffer for s in stages for x in loads(s.value) if x.buffer not in made)
    inputs = tuple(v for v in k.inputs if v in read) + tuple(v for v in read if v not in k.inputs)
    known = {**k.types, **{v: types[v] for v in inputs}}
    return replace(k, inputs=inputs, stages=stages, types=known)


__all__ = ["fold_scales"]
