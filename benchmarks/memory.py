"""Memory of every model, in processes of their own: what loading adds, and what running adds.

`run` is the peak of the resident set over five runs, less what was resident when the model was
loaded: intermediate results, scratch memory and outputs, and for an engine that maps its constants
also those that are first read then. `arena` is what onnxjit itself counts. Medians.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import zoo
from benchmarks.processes import ChildError, child
from benchmarks.record import write

ENGINES = ("onnxjit", "onnxruntime", "openvino")
FACTS = ("load", "run", "peak", "arena")
ROUNDS = 3
MIB = 1 << 20


def main(arguments: Namespace) -> None:
    rows = []
    threads = arguments.threads[0]
    for name in zoo.selected(arguments):
        row = {"model": name, **measure(arguments, name, threads)}
        rows.append(row)
        cells = [
            f"{engine}: load {mib(t['load'])}, run {mib(t['run'])}"
            + (f" (arena {mib(t['arena'])})" if t["arena"] is not None else "")
            for engine, t in row["engines"].items()
        ]
        cells += [f"{engine} failed" for engine in row["failures"]]
        print(f"{name:<24} MiB: {'; '.join(cells)}", flush=True)
    write(arguments, {"threads": threads, "rows": rows})


def mib(count: float | None) -> str:
    return "-" if count is None else f"{count / MIB:.1f}"


def measure(arguments: Namespace, name: str, threads: int) -> dict[str, Any]:
    """Medians over some processes of each engine; a full cache, so that nothing is compiled."""
    model = zoo.path(arguments.models, name)
    assert model is not None
    engines: dict[str, dict[str, Any]] = {}
    failures = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = str(Path(folder) / "inputs.npz")
        np.savez(inputs, **zoo.inputs(arguments.models, name))
        cache = Path(folder) / "cache"
        child("onnxjit", model, inputs, threads, cache)
        time.sleep(2.5)  # see startup.py
        sums = []
        for engine in ENGINES:
            try:
                found = [child(engine, model, inputs, threads, cache) for _ in range(ROUNDS)]
            except ChildError as error:
                if engine == "onnxjit":
                    raise
                failures[engine] = str(error)
                continue
            sums.append(found[0]["checksum"])
            engines[engine] = {
                fact: None if found[0][fact] is None else median(row[fact] for row in found)
                for fact in FACTS
            }
    if not np.allclose(sums, sums[0], rtol=1e-2):
        raise SystemExit(f"{name}: the outputs differ: {sums}")
    return {"engines": engines, "failures": failures}
