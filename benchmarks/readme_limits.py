"""The README's folded tables of what is short of a goal, and what limits it.

Each is made from one file of `results/` and is left out without it: products and convolutions below
a share of the peak, kernels below a share of the bandwidth, what a second thread gains, and every
model's start beside its floor.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import geometric_mean
from typing import Any

PEAK = 0.88


def tables(results: Path) -> str:
    """All that there are files for."""
    makers = {
        "contractions": _contractions, "limits": _limits, "scaling": _scaling, "startup": _startup,
    }  # fmt: skip
    found = [
        make(data) for name, make in makers.items() if (data := read(results / f"{name}.json"))
    ]
    return "\n\n".join(block for block in found if block)


def read(path: Path) -> dict[str, Any] | None:
    """A file of results, None where there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def folded(title: str, head: list[str], rows: list[list[str]], text: str = "") -> str:
    """A table of a column of names and columns of numbers, folded below `title`."""
    lines = [
        f"| {' | '.join(head)} |",
        f"| --- |{' ---: |' * (len(head) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    blocks = [f"<details><summary>{title}</summary>", text, "\n".join(lines), "</details>"]
    return "\n\n".join(block for block in blocks if block)


def _contractions(data: dict[str, Any]) -> str:
    rows = [r for r in data["rows"] if r["threads"] == 1 and "onnxruntime" in r["ratios"]]
    high = sum(r["peak"] >= PEAK for r in rows)
    faster = sum(r["ratios"]["onnxruntime"] >= 1 for r in rows)
    mean = geometric_mean([r["ratios"]["fastest"] for r in rows])
    short = [r for r in rows if r["peak"] < PEAK or r["ratios"]["onnxruntime"] < 1]
    text = (
        f"Products and convolutions of the models, {len(rows)} rows, one thread: {mean:.2f} times "
        f"the faster of the peers (geometric mean); {faster} at least as fast as ONNX Runtime, "
        f"{high} at {PEAK:.0%} of the measured multiply-add peak or more (3x3 convolutions need "
        "fewer multiply-adds than are counted). The others:"
    )
    table = [
        [f"`{r['model']}`", f"{r['peak']:.2f}", f"{r['peak'] / r['ratios']['onnxruntime']:.2f}",
         f"{r['ratios']['onnxruntime']:.2f}x"]
        for r in sorted(short, key=lambda r: r["ratios"]["onnxruntime"])
    ]  # fmt: skip
    head = ["operands", "share of the peak", "ONNX Runtime's", "to ONNX Runtime"]
    return folded("Products and convolutions against the peak", head, table, text)


def _limits(data: dict[str, Any]) -> str:
    text = (
        "One thread, each kernel alone on data in L1 and beyond L2. Where L1 is no faster, memory "
        "is not what limits it: the last column is the share of the lower of both roofs, the "
        "kernel's own speed in L1 and the bandwidth."
    )
    table = [
        [r["kernel"], f"{r['inner']['gbytes']:.0f}", f"{r['outer']['gbytes']:.0f}",
         f"{r['of_bandwidth']:.2f}", r["limit"], f"{r['attained']:.2f}"]
        for r in data["rows"]
    ]  # fmt: skip
    head = ["kernel", "GB/s in L1", f"in {data['rows'][0]['level']}", "of the bandwidth", "limit",
            "attained"]  # fmt: skip
    return folded("Kernels that pass over memory once, against the bandwidth", head, table, text)


def _scaling(data: dict[str, Any]) -> str:
    engines = list(data["summary"])
    text = (
        "Speed of two threads over one, and (behind the stroke) that of two processes with one "
        "thread each at the same time: what this machine gives at most."
    )
    rows = []
    for r in data["rows"]:
        cells = [
            f"{r['engines'][e]['scaling']:.2f} / {r['engines'][e]['ceiling']:.2f}"
            if e in r["engines"]
            else "fails"
            for e in engines
        ]
        rows.append([f"`{r['model']}`", *cells])
    means = [f"{s['scaling']:.2f} / {s['ceiling']:.2f}" for s in data["summary"].values()]
    rows.append(["geometric mean", *means])
    return folded("What a second thread gains", ["model", *engines], rows, text)


def _startup(data: dict[str, Any]) -> str:
    same = [r for r in data["rows"] if r["threads"] == data["rows"][0]["threads"]]
    kinds = ["cold", "warm", "onnxruntime", "numpy", "floor"]
    rows = [r for r in same if {"cold", "warm", "numpy"} <= set(r["kinds"])]
    if not rows:
        return ""
    seconds = [{k: facts["seconds"] for k, facts in r["kinds"].items()} for r in rows]
    for r, s in zip(rows, seconds, strict=True):
        s["floor"] = s["numpy"] + r["kinds"]["warm"]["call"]
    peers = [s for s in seconds if "onnxruntime" in s]
    text = (
        f"Seconds from the start of a process to the first output. Cold is at most 5 s on "
        f"{sum(s['cold'] <= 5 for s in seconds)} of {len(rows)} models; warm is at most half of "
        f"ONNX Runtime's on {sum(2 * s['warm'] <= s['onnxruntime'] for s in peers)} of "
        f"{len(peers)}. A process that imports NumPy and reads the inputs (`numpy`) and one run "
        f"(together: `floor`) already take longer than that half on "
        f"{sum(2 * s['floor'] > s['onnxruntime'] for s in peers)}."
    )
    table = [
        [f"`{r['model']}`", *(f"{s[k]:.2f}" if k in s else "fails" for k in kinds)]
        for r, s in zip(rows, seconds, strict=True)
    ]
    return folded("Every model's start", ["model", *kinds], table, text)
