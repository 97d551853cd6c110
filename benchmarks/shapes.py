"""What a shape that was not seen before costs: its first run less a later run at the same shape."""

from __future__ import annotations

import time
from argparse import Namespace
from statistics import median

from benchmarks import zoo
from benchmarks.record import write
from onnxjit.bench import load_onnxjit

MODEL = "bert_base_dyn"
LENGTHS = range(11, 131, 6)


def main(arguments: Namespace) -> None:
    rows = []
    for name in arguments.only or [MODEL]:
        file = zoo.path(arguments.models, name)
        if file is None:
            raise SystemExit(f"{name}: not below {arguments.models}")
        loaded = load_onnxjit(file, arguments.threads[0])
        # The largest first: the arena grows once, which is no matter of the shapes to come.
        loaded.bind(zoo.inputs(arguments.models, name, {"batch": 1, "seq": 256}))()
        for length in LENGTHS:
            call = loaded.bind(zoo.inputs(arguments.models, name, {"batch": 1, "seq": length}))
            first = timed(call)
            later = [timed(call) for _ in range(8)]
            rows.append(
                {"model": name, "length": length, "first": first, "least": min(later),
                 "median": median(later)}
            )  # fmt: skip
            print(
                f"{name} length {length:>4}: first run {first * 1e3:7.2f} ms, later "
                f"{median(later) * 1e3:7.2f} ms, new shape {(first - median(later)) * 1e3:6.2f} ms",
                flush=True,
            )
    costs = [row["first"] - row["median"] for row in rows]
    summary = {"median": median(costs), "least": min(costs), "most": max(costs)}
    print(
        f"a new shape costs {summary['median'] * 1e3:.2f} ms (median of {len(costs)}; "
        f"{summary['least'] * 1e3:.2f} to {summary['most'] * 1e3:.2f})"
    )
    write(arguments, {"threads": arguments.threads[0], "summary": summary, "rows": rows})


def timed(call) -> float:  # type: ignore[no-untyped-def]
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
