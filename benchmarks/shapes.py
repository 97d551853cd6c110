"""What a shape that was not seen before costs beyond the run itself.

The model's own plan is run with every kernel replaced by one that returns at once: what is left is
reading the sizes, binding them (extents, tiles, arena offsets) and calling the steps. The first run
at a shape less the median of later ones is the cost, free of the noise of the arithmetic.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

import onnxjit
from benchmarks import zoo
from benchmarks.record import write
from onnxjit.codegen.target import host, target_machine
from onnxjit.deferred import host_functions
from onnxjit.runtime.executor import Executable
from onnxjit.runtime.link import Library, link

MODEL = "bert_base_dyn"
LENGTHS = range(11, 131, 6)
_EMPTY = "define void @empty(ptr %a, ptr %b, ptr %c, i64 %d, i64 %e) { ret void }"


class Empty:
    """A library whose every kernel is the empty function."""

    def __init__(self) -> None:
        import llvmlite.binding as llvm

        machine = target_machine(host())
        self._library = link([machine.emit_object(llvm.parse_assembly(_EMPTY))])

    def address(self, symbol: str) -> int:
        return self._library.address("empty")


def main(arguments: Namespace) -> None:
    rows = []
    threads = arguments.threads[0]
    for name in arguments.only or [MODEL]:
        file = zoo.path(arguments.models, name)
        if file is None:
            raise SystemExit(f"{name}: not below {arguments.models}")
        model = onnxjit.compile(file, threads=threads)
        names = [v.name for v in model.inputs]
        execute = without_arithmetic(model, threads)

        def arrays(length: int, model_name: str = name, order: Sequence[str] = names) -> list:
            feeds = zoo.inputs(arguments.models, model_name, {"batch": 1, "seq": length})
            return [feeds[n] for n in order]

        # The largest first: the arena grows once, which is no matter of the shapes to come.
        execute(*arrays(256))
        for length in LENGTHS:
            given = arrays(length)
            first = timed(execute, given)
            later = median(timed(execute, given) for _ in range(9))
            rows.append({"model": name, "length": length, "first": first, "later": later})
    costs = [row["first"] - row["later"] for row in rows]
    summary = {"median": median(costs), "least": min(costs), "most": max(costs)}
    print(
        f"a new shape costs {summary['median'] * 1e3:.3f} ms (median of {len(costs)}; "
        f"{summary['least'] * 1e3:.3f} to {summary['most'] * 1e3:.3f})"
    )
    write(arguments, {"threads": threads, "summary": summary, "rows": rows})


def without_arithmetic(model: onnxjit.CompiledModel, threads: int) -> Executable:
    """The model's plan over empty kernels, which have no answers to what the data is asked."""
    artifact = model._artifact
    executor: Library = link(artifact.objects)
    return Executable(
        artifact.plan._replace(faults=()),
        Empty(),
        artifact.constants,
        threads,
        executor=executor,
        host=host_functions(artifact.plan),
    )


def timed(call: Callable[..., Any], arrays: Sequence[np.ndarray]) -> float:
    begin = time.perf_counter()
    call(*arrays)
    return time.perf_counter() - begin
