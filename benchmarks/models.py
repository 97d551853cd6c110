"""Speed of every model: engines take turns in one process; `onnxjit.bench.measure` has the rows.

A ratio is a peer's least time over onnxjit's: above 1, onnxjit is faster. The headline is the ratio
to the fastest peer of each model.
"""

from __future__ import annotations

from argparse import Namespace

from benchmarks import zoo
from benchmarks.record import Claims, write
from onnxjit.bench.measure import Row, measure, reason, summaries


def main(arguments: Namespace) -> None:
    claims = Claims(arguments)
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for threads in arguments.threads:
        for name in zoo.selected(arguments):
            file = zoo.path(arguments.models, name)
            assert file is not None
            try:
                feeds = zoo.inputs(arguments.models, name)
                row = measure(file, feeds, threads, claims.engines, arguments.seconds, label=name)
            except Exception as error:  # a defect of ours in one leaves the others
                failed[f"{name}, {threads} thread(s)"] = reason(error, file)
                print(f"{name:<24} {threads} FAILED: {reason(error, file)}", flush=True)
                continue
            rows.append(row)
            print(line(row), flush=True)
    summary = summaries(rows)
    for s in summary:
        print(
            f"{s['threads']} thread(s): geometric mean {s['mean']:.3f} times {s['peer']} over "
            f"{s['models']} models, at least as fast on {s['faster']}, worst "
            f"{s['worst_ratio']:.2f} ({s['worst']})"
        )
    write(arguments, {"summary": summary, "rows": rows, "failed": failed})
    claims.settle(rows, failed)


def line(row: Row) -> str:
    """One row of the table: least times, and each peer's over ours."""
    cells = [f"{row['model']:<24} {row['threads']}"]
    for engine, t in row["engines"].items():
        cells.append(f"{engine} {t['minimum'] * 1e3:8.3f} ms")
        if engine != "onnxjit":
            cells.append(f"{t['ratio']:5.2f} (differs {t['difference']:.0e})")
    cells += [f"{engine}: {why[-80:]}" for engine, why in row["failures"].items()]
    return "  ".join(cells)
