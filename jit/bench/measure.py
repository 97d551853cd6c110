"""One comparison: a model in several engines, checked against each other and then timed in turns.

The result is a row of plain data, the same for `onnxjit bench` and for `python -m benchmarks`:

    model, threads, engines {name: minimum, median, lower, upper, runs (seconds and a count),
    ratio, ratio_median, difference, load, version, precision, note}, failures {name: why},
    ratios {peer: its least time over onnxjit's, and "fastest"}, fastest (that peer's name),
    disagree [engines whose failure is that their outputs differ], alone (no float32 peer agrees
    with onnxjit although one ran: then it is onnxjit's outputs that are in doubt)

A ratio above 1 says that onnxjit is faster. `fastest` is the peer with the least time among those
that compute in the model's own precision.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from onnxjit.bench.engines import ENGINES, Call, Engine, Feeds, Loaded, engine_version
from onnxjit.bench.turns import take_turns
from onnxjit.compare import difference

TOLERANCE = 1e-3
"""How far the outputs of a peer may be from onnxjit's to be timed as the same function: largest
difference over largest value. Rounding alone gives up to 2e-4 on deep models."""

Row = dict[str, Any]


def measure(
    path: str,
    feeds: Feeds,
    threads: int,
    engines: Sequence[str],
    seconds: float,
    *,
    label: str | None = None,
    own: Loaded | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Row:
    """The row of a model (see above). `engines` names onnxjit first; `own` is onnxjit's model where
    it is compiled already; `progress` is told what is done next.

    An engine that is missing, raises, or disagrees with onnxjit is not timed: it is a failure that
    says why. An engine of a lower precision is timed whatever its difference.
    """
    calls: dict[str, Call] = {}
    loads: dict[str, float] = {}
    notes: dict[str, str] = {}
    failures: dict[str, str] = {}
    disagree: list[str] = []
    far: dict[str, float] = {}
    results: list[np.ndarray] = []
    for name in engines:
        engine = ENGINES[name]
        progress(f"loading with {name}")
        begin = time.perf_counter()
        try:
            if engine.missing:
                raise ModuleNotFoundError(f"not installed: {', '.join(engine.missing)}")
            loaded = own if name == "onnxjit" and own else engine.load(path, threads)
            call = loaded.bind(feeds)
            # Copies: the next call of an engine may overwrite what its last one returned.
            values = [np.array(a) for a in call()]
        except Exception as error:  # whatever another engine raises
            if name == "onnxjit":
                raise
            failures[name] = reason(error, path)
            continue
        loads[name] = time.perf_counter() - begin
        notes[name] = loaded.note
        if name == "onnxjit":
            results = values
        else:
            far[name], wrong = disagreement(values, results, engine)
            if wrong:
                failures[name] = wrong
                disagree.append(name)
                continue
        calls[name] = call
    progress("timing")
    timings = take_turns(calls, seconds)
    ours = timings["onnxjit"]
    rows: dict[str, Row] = {}
    for name, timing in timings.items():
        rows[name] = {
            **asdict(timing),
            "ratio": timing.minimum / ours.minimum,
            "ratio_median": timing.median / ours.median,
            "difference": far.get(name, 0.0),
            "load": loads[name],
            "version": engine_version(name),
            "precision": ENGINES[name].precision,
            "note": notes[name],
        }
    ratios = {name: row["ratio"] for name, row in rows.items() if name != "onnxjit"}
    exact = [name for name in ratios if ENGINES[name].precision == "float32"]
    fastest = min(exact, key=ratios.__getitem__, default=None)
    if fastest is not None:
        ratios["fastest"] = ratios[fastest]
    return {
        "model": label or path,
        "threads": threads,
        "ratios": ratios,
        "fastest": fastest,
        "engines": rows,
        "failures": failures,
        "disagree": disagree,
        "alone": bool(disagree) and not exact,
    }


def disagreement(
    got: Sequence[np.ndarray], want: Sequence[np.ndarray], engine: Engine
) -> tuple[float, str]:
    """The largest difference over all outputs, and why it is too large ("" where it is not)."""
    if len(got) != len(want):
        return math.inf, f"it returns {len(got)} outputs, not {len(want)}"
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape or (a.dtype != b.dtype and engine.precision == "float32"):
            return math.inf, f"its output {number} is {_spelled(a)}, not {_spelled(b)}"
    worst = max((difference(a, b) for a, b in zip(got, want, strict=True)), default=0.0)
    if engine.precision == "float32" and not worst <= TOLERANCE:
        return worst, f"its outputs differ from onnxjit's by {worst:.1e} (allowed {TOLERANCE:.0e})"
    return worst, ""


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """`difference`, infinite for another shape or dtype."""
    same = got.shape == want.shape and got.dtype == want.dtype
    return difference(got, want) if same else math.inf


def reason(error: BaseException, path: str = "") -> str:
    """Why an engine failed, in a line: the end of its message, where the cause usually stands,
    with the model's file by its name alone."""
    text = " ".join(str(error).split())
    if path:
        text = text.replace(path, Path(path).name)
    short = text if len(text) <= 300 else f"… {text[-300:]}"
    return short or type(error).__name__


def summarise(rows: Sequence[Row], peer: str = "fastest") -> Row | None:
    """Mean and worst of the ratios to one peer over rows with equal threads, None without any."""
    ratios = {row["model"]: row["ratios"][peer] for row in rows if peer in row["ratios"]}
    if not ratios:
        return None
    worst = min(ratios, key=ratios.__getitem__)
    return {
        "threads": rows[0]["threads"],
        "peer": peer,
        "models": len(ratios),
        "mean": geometric_mean(list(ratios.values())),
        "worst": worst,
        "worst_ratio": ratios[worst],
        "faster": sum(ratio >= 1 for ratio in ratios.values()),
    }


def summaries(rows: Sequence[Row]) -> list[Row]:
    """A summary of each peer, and of the fastest one of each model, for each number of threads."""
    found = []
    for threads in dict.fromkeys(row["threads"] for row in rows):
        same = [row for row in rows if row["threads"] == threads]
        peers = dict.fromkeys(p for row in same for p in row["ratios"] if p != "fastest")
        found += [summarise(same, peer) for peer in [*peers, "fastest"]]
    return [row for row in found if row is not None]


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of the product; NaN of nothing."""
    if not values:
        return math.nan
    return math.exp(sum(map(math.log, values)) / len(values))


def _spelled(array: np.ndarray) -> str:
    return f"{array.dtype}[{', '.join(map(str, array.shape))}]"
