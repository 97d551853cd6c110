"""Makes one kernel of the three that attention is: scores, softmax and the sum of values.

Fusion leaves them apart, because each reduces over what the one before wrote. On the CPU their
schedule keeps a strip of scores in L1 instead. CUDA keeps the three kernels: its rules schedule
one reduction of a block at a time.
"""

from __future__ import annotations

from onnxjit.codegen.expr import Apply, Const, Expr, Load, Reduce, apply
from onnxjit.codegen.kernel import Kernel, Stage, inline, used_inputs
from onnxjit.codegen.schedule import Declined, Request
from onnxjit.codegen.schedule.attention_match import recognise
from onnxjit.codegen.schedule.reduction import replace_node
from onnxjit.codegen.target import Target
from onnxjit.program import Call, KernelCall, Program


def fuse_attention(p: Program, target: Target) -> Program:
    """The program with every attention that a CPU schedule takes as one kernel."""
    if target.kind != "cpu":
        return p
    uses = p.uses()
    maker = {v: c for c in p.kernels() for v in c.outputs}
    calls: list[Call | None] = list(p.calls)
    place = {id(c): k for k, c in enumerate(p.calls)}
    for k, c in enumerate(p.calls):
        if not isinstance(c, KernelCall):
            continue
        parts = chain(c, maker, uses)
        if parts is None:
            continue
        merged = joined(parts)
        if not accepted(merged, p, target):
            continue
        for v in parts[0].inputs:
            if v in maker and uses[v] == 1:
                new = unscaled(merged, maker[v].kernel)
                if new is not None and accepted(new, p, target):
                    merged, parts = new, [maker[v], *parts]
        for part in parts[:-1]:
            calls[place[id(part)]] = None
        calls[k] = KernelCall(merged, tuple(o for part in parts for o in part.origin))
    return p.replace(calls=tuple(c for c in calls if c is not None))


def accepted(k: Kernel, p: Program, target: Target) -> bool:
    constants = frozenset(v for v in k.inputs if v in p.constants)
    try:
        recognise(Request(k, p.layouts, target, constants))
    except Declined:
        return False
    return True


def chain(
    last: KernelCall, maker: dict[str, KernelCall], uses: dict[str, int]
) -> list[KernelCall] | None:
    """The kernels that compute scores, softmax and `last`, where nothing else reads between."""

    def producer(c: KernelCall) -> list[KernelCall]:
        return [
            maker[v] for v in c.inputs if v in maker and uses[v] == 1 and len(maker[v].outputs) == 1
        ]

    if not is_sum(last):
        return None
    for softmax in producer(last):
        if len(softmax.kernel.stages) < 3 or not softmax.kernel.stages[0].reduces:
            continue
        for scores in producer(softmax):
            if is_sum(scores):
                return [scores, softmax, last]
    return None


def unscaled(k: Kernel, maker: Kernel) -> Kernel | None:
    """`k` with queries or keys read before `maker` multiplied them by a constant.

    The sum of products is multiplied instead. Fusion leaves such a map alone, because factors of a
    contraction have to be plain reads; it would cost a pass over the operand, and where heads share
    keys a copy for each.
    """
    stage, first = maker.stages[0], k.stages[0]
    if not maker.is_map or len(maker.outputs) != 1:
        return None
    source = stage.value
    if not (isinstance(source, Apply) and source.fn in ("mul", "div")):
        return None
    swapped = source.fn == "mul" and isinstance(source.args[0], Const)
    left, right = source.args[::-1] if swapped else source.args
    if not (isinstance(left, Load) and isinstance(right, Const)):
        return None
    (red,) = first.reduces
    made = maker.outputs[0]
    if not isinstance(red.body, Apply) or red.body.fn != "mul":
        return None
    factors = [x.buffer for x in red.body.args if isinstance(x, Load)]
    if factors.count(made) != 1 or len(factors) != 2:
        return None
    plain = Stage(stage.buffer, stage.axes, left)
    total: Expr = Reduce("sum", red.axes, inline(red.body, plain))
    value = replace_node(first.value, red, apply(source.fn, total, right))
    stages = (Stage(first.buffer, first.axes, value), *k.stages[1:])
    types = {**maker.types, **k.types}
    candidates = dict.fromkeys((*k.inputs, *maker.inputs))
    inputs = used_inputs(stages, (b for b in candidates if b != made))
    return Kernel(k.name, inputs, k.outputs, stages, types)


def is_sum(c: KernelCall) -> bool:
    """One stage with one sum, as a product of matrices has."""
    stages = c.kernel.stages
    return len(stages) == 1 and [x.fn for x in stages[0].reduces] == ["sum"]


def joined(parts: list[KernelCall]) -> Kernel:
    kernels = [c.kernel for c in parts]
    stages = tuple(s for k in kernels for s in k.stages)
    made = {s.buffer for s in stages}
    candidates = [b for b in dict.fromkeys(b for k in kernels for b in k.inputs) if b not in made]
    types = {b: t for k in kernels for b, t in k.types.items()}
    last = kernels[-1]
    return Kernel("attention", used_inputs(stages, candidates), last.outputs, stages, types)


__all__ = ["fuse_attention"]
