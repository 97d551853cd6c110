"""Speed of every model: engines take turns in one process; least and median time of one run.

A ratio is a peer's least time over onnxjit's: above 1, onnxjit is faster. Differences are the
largest absolute one over the largest value, against onnxjit's results.
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
    peers = ["onnxruntime"] + ["openvino"] * arguments.openvino
    rows = []
    for threads in arguments.threads:
        for name in zoo.selected(arguments):
            row = measure(arguments, name, threads, peers)
            rows.append(row)
            print(line(row), flush=True)
    summary = [
        summarise(peer, [r for r in rows if r["threads"] == threads])
        for threads in arguments.threads
        for peer in [*peers, *(["fastest"] if len(peers) > 1 else [])]
    ]
    for s in summary:
        print(
            f"{s['threads']} thread(s): geometric mean {s['mean']:.3f} times {s['peer']} over "
            f"{s['models']} models, worst {s['worst_ratio']:.2f} ({s['worst']})"
        )
    write(arguments, {"summary": summary, "rows": rows})


def measure(arguments: Namespace, name: str, threads: int, peers: list[str]) -> dict:
    """One model with so many threads; a peer that fails is an entry that says why."""
    file = zoo.path(arguments.models, name)
    assert file is not None
    feeds = zoo.inputs(arguments.models, name)
    calls, failures = {"onnxjit": ENGINES["onnxjit"](file, threads).bind(feeds)}, {}
    for peer in peers:
        try:
            call = ENGINES[peer](file, threads).bind(feeds)
            call()
        except Exception as error:  # whatever another engine raises
            failures[peer] = " ".join(str(error).split())[-300:]
        else:
            calls[peer] = call
    # Copies: the next call of an engine may overwrite what its last one returned.
    results = {e: [np.array(a) for a in call()] for e, call in calls.items()}
    timings = take_turns(calls, arguments.seconds)
    ours = timings["onnxjit"]
    engines = {}
    for engine, timing in timings.items():
        pairs = zip(results["onnxjit"], results[engine], strict=True)
        difference = max(distance(a, b) for a, b in pairs)
        engines[engine] = {
            **asdict(timing),
            "ratio": timing.minimum / ours.minimum,
            "ratio_median": timing.median / ours.median,
            "difference": difference,
            "agrees": difference <= TOLERANCE,
        }
    ratios = {e: t["ratio"] for e, t in engines.items() if e != "onnxjit"}
    return {
        "model": name,
        "threads": threads,
        "ratios": {**ratios, "fastest": min(ratios.values())} if ratios else {},
        "engines": engines,
        "failures": failures,
    }


def line(row: dict) -> str:
    """One row of the table: least times, and each peer's over ours."""
    cells = [f"{row['model']:<24} {row['threads']}"]
    for engine, t in row["engines"].items():
        cells.append(f"{engine} {t['minimum'] * 1e3:8.3f} ms")
        if engine != "onnxjit":
            cells.append(f"{t['ratio']:5.2f} (differs {t['difference']:.0e})")
    cells += [f"{engine} failed" for engine in row["failures"]]
    return "  ".join(cells)


def summarise(peer: str, rows: list[dict]) -> dict:
    """Mean and worst ratio of one peer's least time to ours; `fastest`: the faster peer of each."""
    ratios = {r["model"]: r["ratios"][peer] for r in rows if peer in r["ratios"]}
    worst = min(ratios, key=ratios.__getitem__)
    return {
        "threads": rows[0]["threads"],
        "peer": peer,
        "models": len(ratios),
        "mean": geometric_mean(list(ratios.values())),
        "worst": worst,
        "worst_ratio": ratios[worst],
    }
