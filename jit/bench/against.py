"""Verdicts over measured rows: what was asserted, and a comparison with an earlier result.

An assertion is `[worst:][WHAT=]RATIO`. WHAT is a peer, `fastest` (the fastest peer of each model,
taken when nothing is said) or `against` (the earlier result). It holds where the geometric mean
over the models is at least RATIO, with `worst:` where every model's is. Each number of threads is
judged on its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxjit.bench.machine import key_facts
from onnxjit.bench.measure import Row, geometric_mean

EARLIER = "against"
ALLOWANCE = 0.95
"""What `--against` asks for by itself: an engine timed against itself in turns, in other processes
and at other times, has been seen to differ by a few per cent."""

_ASSERTION = re.compile(r"(worst:)?(?:([A-Za-z][\w-]*)=)?(\d+(?:\.\d*)?|\.\d+)")


class ResultError(ValueError):
    """A file that is no result of this benchmark; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Assertion:
    """At least `ratio` against `what`: by the mean over models, or each one (`worst`)."""

    text: str
    what: str
    ratio: float
    worst: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an assertion found for one number of threads. `found` is the mean or the worst ratio
    over `models` models, None where there was nothing to compare, which does not hold either."""

    assertion: str
    threads: int
    found: float | None
    models: int
    worst: str | None

    @property
    def holds(self) -> bool:
        """Whether it is met."""
        limit = parse(self.assertion).ratio
        return self.found is not None and self.found >= limit

    def __str__(self) -> str:
        state = "holds" if self.holds else "FAILS"
        if self.found is None:
            return f"{self.assertion} {state}: {self.threads} thread(s): nothing to compare with"
        kind = "worst" if parse(self.assertion).worst else "mean"
        where = f", least for {self.worst}" if self.worst and self.models > 1 else ""
        return (
            f"{self.assertion} {state}: {self.threads} thread(s): {kind} {self.found:.3f} over "
            f"{self.models} model(s){where}"
        )


@dataclass(frozen=True, slots=True)
class Change:
    """One model against its earlier result. `time` is the earlier least time over the present one;
    `relative` the same of onnxjit's ratio to the fastest of the peers in both results, which a
    slower machine does not change (None without such a peer). Above 1 is an improvement."""

    model: str
    threads: int
    before: float
    now: float
    time: float
    relative: float | None

    @property
    def ratio(self) -> float:
        """What is judged: `relative` where there is one, else `time`."""
        return self.time if self.relative is None else self.relative


def parse(text: str) -> Assertion:
    """Raises ValueError, with the form, for a text that is no assertion."""
    match = _ASSERTION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no assertion: [worst:][PEER=]RATIO, such as fastest=1.25")
    worst, what, ratio = match.groups()
    return Assertion(text.strip(), what or "fastest", float(ratio), worst is not None)


def judge(
    assertions: Sequence[str], rows: Sequence[Row], changes: Sequence[Change] = ()
) -> list[Verdict]:
    """A verdict for each assertion and number of threads."""
    found = []
    for text in assertions:
        one = parse(text)
        for threads in dict.fromkeys(row["threads"] for row in rows):
            if one.what == EARLIER:
                ratios = {c.model: c.ratio for c in changes if c.threads == threads}
            else:
                ratios = {
                    row["model"]: row["ratios"][one.what]
                    for row in rows
                    if row["threads"] == threads and one.what in row["ratios"]
                }
            least = min(ratios, key=ratios.__getitem__, default=None)
            value = None
            if least is not None:
                value = ratios[least] if one.worst else geometric_mean(list(ratios.values()))
            found.append(Verdict(one.text, threads, value, len(ratios), least))
    return found


def compare(rows: Sequence[Row], earlier: dict[str, Any]) -> list[Change]:
    """The rows that an earlier result has as well, by model and threads."""
    before = {(row["model"], row["threads"]): row for row in earlier["rows"]}
    changes = []
    for row in rows:
        old = before.get((row["model"], row["threads"]))
        if old is None:
            continue
        then, now = (r["engines"]["onnxjit"]["minimum"] for r in (old, row))
        common = [
            name
            for name, engine in row["engines"].items()
            if name != "onnxjit"
            and name in old["engines"]
            and engine.get("precision", "float32") == "float32"
        ]
        relative = None
        if common:
            ratios = [min(r["engines"][n]["minimum"] for n in common) for r in (old, row)]
            relative = (ratios[1] / now) / (ratios[0] / then)
        changes.append(Change(row["model"], row["threads"], then, now, then / now, relative))
    return changes


def load(path: str | Path) -> dict[str, Any]:
    """A result of `onnxjit bench --json` or `python -m benchmarks models`. Raises ResultError."""
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise ResultError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError:
        raise ResultError(f"{str(path)!r} is not JSON") from None
    rows = data.get("rows") if isinstance(data, dict) else None
    whole = isinstance(rows, list) and all(
        isinstance(row, dict) and {"model", "threads", "engines", "ratios"} <= row.keys()
        for row in rows
    )
    if not whole or not rows:
        raise ResultError(
            f"{str(path)!r} has no rows with model, threads, engines and ratios: it is not a "
            "result of `onnxjit bench --json` or of `python -m benchmarks models`"
        )
    return data


def other_machine(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How the machines of two results differ, in words; empty where times are comparable."""
    before, after = key_facts(earlier.get("machine", {})), key_facts(now)
    return [
        f"{name} {before[name]} then, {after[name]} now"
        for name in before
        if before[name] != after[name]
    ]
