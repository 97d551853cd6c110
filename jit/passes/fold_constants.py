"""Computes what is left of kernels that only constants enter."""

from __future__ import annotations

from onnxjit.codegen.evaluate import evaluate
from onnxjit.codegen.expr import Dim, leaves
from onnxjit.codegen.kernel import Kernel
from onnxjit.program import KernelCall, Program


def fold_constants(p: Program) -> Program:
    """Replaces calls whose inputs are all constants by their results."""
    constants = dict(p.constants)
    calls = []
    for c in p.calls:
        fixed = isinstance(c, KernelCall) and all(v in constants for v in c.inputs)
        if not fixed:
            calls.append(c)
            continue
        assert isinstance(c, KernelCall)
        if depends_on_sizes(c.kernel):
            calls.append(c)
            continue
        results = evaluate(c.kernel, {v: constants[v] for v in c.inputs})
        constants.update(zip(c.outputs, results, strict=True))
    used = {v for c in calls for v in c.inputs} | set(p.outputs)
    kept = {v: a for v, a in constants.items() if v in used}
    return p.replace(calls=tuple(calls), constants=kept)


def depends_on_sizes(k: Kernel) -> bool:
    """Whether a symbolic dim occurs in a stage: in its value, where it stores, or its extents."""
    for s in k.stages:
        exprs = [s.value, *s.index, *(a.extent for a in s.axes)]
        exprs += [a.extent for r in s.reduces for a in r.axes]
        if any(isinstance(x, Dim) for e in exprs for x in leaves(e)):
            return True
    return False


__all__ = ["fold_constants"]
