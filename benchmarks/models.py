"""Speed of every model: engines take turns in one process; least and median time of one run.

`ratio` is onnxruntime's least time over onnxjit's: above 1, onnxjit is faster.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

import numpy as np

from benchmarks import zoo
from benchmarks.agreement import TOLERANCE, distance
from benchmarks.record import geometric_mean, write
from onnxjit.bench import ENGINES, take_turns


def main(arguments: Namespace) -> None:
    engines = ["onnxjit", "onnxruntime"] + ["openvino"] * arguments.openvino
    rows = []
    for threads in arguments.threads:
        for name in zoo.selected(arguments):
            row = measure(arguments, name, threads, engines)
            rows.append(row)
            times = "  ".join(
                f"{e} {t['minimum'] * 1e3:9.3f} ms" for e, t in row["engines"].items()
            )
            print(
                f"{name:<24} {threads} thread(s)  {times}  ratio {row['ratio']:5.2f}  "
                f"difference {row['difference']:.1e}",
                flush=True,
            )
    summary = []
    for threads in arguments.threads:
        ratios = {r["model"]: r["ratio"] for r in rows if r["threads"] == threads}
        worst = min(ratios, key=ratios.__getitem__)
        mean = geometric_mean(list(ratios.values()))
        summary.append(
            {"threads": threads, "mean": mean, "worst": worst, "worst_ratio": ratios[worst]}
        )
        print(
            f"{threads} thread(s): geometric mean {mean:.3f} times onnxruntime over "
            f"{len(ratios)} models, worst {ratios[worst]:.2f} ({worst})"
        )
    write(arguments, {"summary": summary, "rows": rows})


def measure(arguments: Namespace, name: str, threads: int, engines: list[str]) -> dict:
    """One model with so many threads."""
    file = zoo.path(arguments.models, name)
    assert file is not None
    feeds = zoo.inputs(arguments.models, name)
    calls = {e: ENGINES[e](file, threads).bind(feeds) for e in engines}
    # Copies: the next call of an engine may overwrite what its last one returned.
    results = {e: [np.array(a) for a in call()] for e, call in calls.items()}
    error = max(
        distance(a, b)
        for e in engines[1:]
        for a, b in zip(results["onnxjit"], results[e], strict=True)
    )
    timings = take_turns(calls, arguments.seconds)
    return {
        "model": name,
        "threads": threads,
        "difference": error,
        "agrees": error <= TOLERANCE,
        "ratio": timings["onnxruntime"].minimum / timings["onnxjit"].minimum,
        "ratio_median": timings["onnxruntime"].median / timings["onnxjit"].median,
        "engines": {e: asdict(t) for e, t in timings.items()},
    }
