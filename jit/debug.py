"""`ONNXJIT_DEBUG=1..6`: what a compilation did, printed to standard error.

Each level prints what the levels below print, and then:

1. the report: partition, kernels, memory, assumptions;
2. after the model's first run, the time of each kernel (ten more runs, with the same inputs);
3. which schedule rule made each kernel, and why the others declined;
4. the source of each distinct kernel;
5. the program after each pass;
6. LLVM IR and assembly of each distinct kernel.

A model that comes from the cache prints the same: passes, IR and assembly are made again for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxjit.errors import OnnxJitError

if TYPE_CHECKING:
    from onnxjit.compiled import CompiledModel
    from onnxjit.origin import Origin

VARIABLE = "ONNXJIT_DEBUG"
REPORT, TIMES, RULES, SOURCE, PASSES, CODE = range(1, 7)
PROFILED_RUNS = 10


def debug_level() -> int:
    """The level that the environment asks for, 0 for none. `OnnxJitError` for another value."""
    text = os.environ.get(VARIABLE, "").strip()
    if text in ("", *map(str, range(CODE + 1))):
        return int(text or 0)
    raise OnnxJitError(f"{VARIABLE} is a level from 1 to {CODE} (0: none), not {text!r}")


def show_compiled(
    model: CompiledModel, level: int, origin: Origin, overrides: Mapping[str, int]
) -> None:
    """Print what `level` asks for of a model that is ready to run."""
    from onnxjit.report import passes

    kernels = list(model.kernels.values())
    distinct = list({kernel.key: kernel for kernel in kernels}.values())
    _print("report", model.report())
    if level >= TIMES:
        model.observe_first_run(lambda arrays: show_times(model, arrays))
    if level >= RULES:
        for kernel in kernels:
            _print(f"rule of {kernel.name}", kernel.decisions)
    if level >= SOURCE:
        for kernel in distinct:
            _print(f"source of {kernel.name}", kernel.source)
    if level >= PASSES:
        for name, program in passes(origin.read(), overrides):
            _print(f"after {name}", program)
    if level >= CODE:
        for kernel in distinct:
            _print(f"LLVM IR of {kernel.name}", kernel.llvm)
            _print(f"assembly of {kernel.name}", kernel.assembly)


def show_times(model: CompiledModel, arrays: Sequence[Any]) -> None:
    """Print the time of every step on the inputs of a run."""
    _print("kernel times", str(model.profile(*arrays, runs=PROFILED_RUNS)))


def _print(title: str, text: str) -> None:
    from onnxjit.cli_output import clean_lines

    print(clean_lines(f"[onnxjit] {title}\n{text}\n"), file=sys.stderr, flush=True)
