"""Elementwise work on an operand of a contraction, done while its rows are copied for the product.

Fusion leaves such work alone, because it does not know the layouts: whether rows can be copied a
strip at a time with their channels side by side depends on these. What is saved is a pass over
memory, where the operand does not stay in L2 anyway; what it costs is the copy, which a padded
window, rows that share cache sets and the transformed patches of minimal filtering have already.
Few rows are copied for many columns again by each parallel tile. The rules for CUDA take plain
reads only.
"""

from __future__ import annotations

from onnxjit.codegen.expr import Apply, Reduce, loads, walk
from onnxjit.codegen.kernel import Kernel
from onnxjit.codegen.schedule.axes import typical
from onnxjit.codegen.schedule.recognised import Recogniser
from onnxjit.codegen.target import Target
from onnxjit.passes.fuse import is_simple, limited, substituted, weight
from onnxjit.program import Call, KernelCall, Program

LIGHT = 12
"""Most work per element: a border is computed twice, and rows once for each part of the columns."""


def fuse_prologues(p: Program, target: Target) -> Program:
    """The program with maps moved into the only contraction that reads them."""
    if target.kind != "cpu":
        return p
    uses = p.uses()
    maker = {v: k for k, c in enumerate(p.calls) if isinstance(c, KernelCall) for v in c.outputs}
    recogniser = Recogniser(target, frozenset(p.constants))
    calls: list[Call | None] = list(p.calls)
    for k, c in enumerate(p.calls):
        if not isinstance(c, KernelCall):
            continue
        operands = recogniser.operands(c.kernel, p.layouts)
        if operands is None:
            continue
        for v in rows_of(c.kernel, operands.x):
            source = calls[maker[v]] if v in maker and uses[v] == 1 else None
            if not isinstance(source, KernelCall) or not is_light(source.kernel):
                continue
            if typical(p.types[v].nbytes) < target.l2 // 2:
                continue
            merged = limited(substituted(c.kernel, source.kernel.stages[0], source.kernel))
            if merged is None or recogniser.operands(merged, p.layouts) is None:
                continue
            calls[maker[v]] = None
            c = KernelCall(merged, (*source.origin, *c.origin))
            calls[k] = c
            break
    return p.replace(calls=tuple(c for c in calls if c is not None))


def rows_of(k: Kernel, x: str) -> list[str]:
    """What the row operand `x` is read from: itself, or what a padded window of it is copied from.
    Nothing if that is read anywhere else."""
    first = k.stages[0]
    made = [*dict.fromkeys(r.buffer for r in loads(first.value))] if first.buffer == x else [x]
    everywhere = [r.buffer for s in k.stages for r in loads(s.value)]
    return [v for v in made if everywhere.count(v) == 1]


def is_light(k: Kernel) -> bool:
    """A map of a few operations on float32 values, element by element."""
    if not k.is_map or len(k.outputs) != 1 or k.types[k.outputs[0]].dtype != "float32":
        return False
    value = k.stages[0].value
    if not isinstance(value, Apply) or any(isinstance(x, Reduce) for x in walk(value)):
        return False
    return all(map(is_simple, loads(value))) and weight(value) <= LIGHT


__all__ = ["fuse_prologues"]
