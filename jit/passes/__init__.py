"""The passes from an imported graph to a program ready for code generation, in their only order."""

from __future__ import annotations

from onnxjit.codegen.target import Target
from onnxjit.graph import Graph
from onnxjit.passes.attention import fuse_attention
from onnxjit.passes.fold_constants import fold_constants
from onnxjit.passes.fold_scales import fold_scales
from onnxjit.passes.fuse import fuse
from onnxjit.passes.join import join_in_place
from onnxjit.passes.layouts import assign_layouts
from onnxjit.passes.lower import lower, prune_program
from onnxjit.passes.pool_first import pool_first
from onnxjit.passes.prologue import fuse_prologues
from onnxjit.passes.stagger import stagger_rows
from onnxjit.program import Program

PIPELINE = (
    ("pool_first", pool_first),
    ("fuse", fuse),
    ("fold_constants", lambda p, target: fold_constants(prune_program(p))),
    ("fold_scales", fold_scales),
    ("assign_layouts", assign_layouts),
    ("fuse_attention", fuse_attention),
    ("fuse_prologues", fuse_prologues),
    ("join_in_place", join_in_place),
    ("stagger_rows", stagger_rows),
)


def run_pipeline(graph: Graph, target: Target, observe=None) -> Program:  # type: ignore[no-untyped-def]
    """Lowers a graph and runs every pass; `observe(name, program)` sees each result."""
    program = lower(graph)
    if observe is not None:
        observe("lower", program)
    for name, step in PIPELINE:
        program = step(program, target)
        program.verify()
        if observe is not None:
            observe(name, program)
    return program
