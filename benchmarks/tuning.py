"""What tuning gains: every model as the cost models have it and tuned, in turns in one process.

`--tune` seconds are spent on each model, in a cache that is thrown away. A ratio is the usual
model's least time over the tuned one's. `kernels` lists the variants that were taken, and what each
gained alone.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import onnxjit
from benchmarks import zoo
from benchmarks.record import write
from onnxjit.bench import Feeds, take_turns
from onnxjit.bench.measure import TOLERANCE
from onnxjit.compare import difference


def main(arguments: Namespace) -> None:
    rows = []
    for threads in arguments.threads:
        with tempfile.TemporaryDirectory() as folder:
            for name in zoo.selected(arguments):
                row = case_row(arguments, name, threads, Path(folder))
                rows.append(row)
                print(line(row), flush=True)
    mean = geometric_mean([row["ratio"] for row in rows])
    print(f"geometric mean {mean:.3f} over {len(rows)} rows")
    write(arguments, {"tune": arguments.tune, "summary": {"mean": mean}, "rows": rows})


def case_row(arguments: Namespace, name: str, threads: int, folder: Path) -> dict[str, Any]:
    """One model. Raises SystemExit where tuning changes what it computes."""
    file = zoo.path(arguments.models, name)
    feeds = zoo.inputs(arguments.models, name)
    usual = onnxjit.compile(file, threads=threads, cache=False)
    begin = time.perf_counter()
    tuned = onnxjit.compile(
        file, threads=threads, cache=folder, tune=arguments.tune, sizes=sizes_of(usual, feeds)
    )
    spent = time.perf_counter() - begin
    for a, b in zip(usual.feed(feeds), tuned.feed(feeds), strict=True):
        if difference(b, a) > TOLERANCE:
            raise SystemExit(f"{name}: the tuned model computes something else")
    times = take_turns(
        {"usual": lambda: usual.feed(feeds), "tuned": lambda: tuned.feed(feeds)}, arguments.seconds
    )
    variants = [
        {"kernel": k.name, "rule": k.rule, "variant": dict(k.variant), "gain": k.gain}
        for k in tuned.kernels.values()
        if k.variant
    ]
    return {
        "model": name,
        "threads": threads,
        "usual": times["usual"].minimum,
        "tuned": times["tuned"].minimum,
        "ratio": times["usual"].minimum / times["tuned"].minimum,
        "seconds": spent,
        "steps": len(tuned.kernels),
        "kernels": variants,
    }


def sizes_of(model: onnxjit.CompiledModel, feeds: Feeds) -> dict[str, int]:
    """What free dimensions are in `feeds`, by the model's names of them."""
    return {
        dim: int(extent)
        for v in model.inputs
        for dim, extent in zip(v.shape, feeds[v.name].shape, strict=True)
        if isinstance(dim, str)
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    return (
        f"{row['model']:<24} {row['threads']}  usual {row['usual'] * 1e3:8.3f} ms  tuned "
        f"{row['tuned'] * 1e3:8.3f} ms  {row['ratio']:5.3f}x  {len(row['kernels'])} of "
        f"{row['steps']} steps, {row['seconds']:.0f} s"
    )
