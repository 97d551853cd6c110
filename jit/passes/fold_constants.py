"""Computes what is left of kernels that only constants enter."""

from __future__ import annotations

from onnxjit.codegen.evaluate import evaluate
from onnxjit.codegen.expr import as_int
from onnxjit.codegen.kernel import TensorType
from onnxjit.program import KernelCall, Program


def fold_constants(p: Program) -> Program:
    """Replaces calls whose inputs are all constants by their results."""
    constants = dict(p.constants)
    calls = []
    for c in p.calls:
        fixed = isinstance(c, KernelCall) and all(v in constants for v in c.inputs)
        if not fixed or not all(as_int(p.types[v].elements) is not None for v in c.outputs):
            calls.append(c)
            continue
        assert isinstance(c, KernelCall)
        results = evaluate(c.kernel, {v: constants[v] for v in c.inputs})
        constants.update(zip(c.outputs, results, strict=True))
    used = {v for c in calls for v in c.inputs} | set(p.outputs)
    kept = {v: a for v, a in constants.items() if v in used}
    return p.replace(calls=tuple(calls), constants=kept)


__all__ = ["TensorType", "fold_constants"]
