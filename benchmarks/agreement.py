"""Every model against onnxruntime: the largest difference over the largest value of each output.

Symbolic models are compiled once and run at three sizes.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np

from benchmarks import zoo
from benchmarks.record import write
from onnxjit.bench import load_onnxjit, load_onnxruntime
from onnxjit.bench.measure import distance

TOLERANCE = 1e-4


def main(arguments: Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for name in zoo.selected(arguments):
        file = zoo.path(arguments.models, name)
        assert file is not None
        ours, theirs = load_onnxjit(file, 2), load_onnxruntime(file, 2)
        for sizes in zoo.variants(name):
            before = len(ours.model.specialisations)
            feeds = zoo.inputs(arguments.models, name, sizes)
            pairs = zip(ours.bind(feeds)(), theirs.bind(feeds)(), strict=True)
            error = max(distance(np.asarray(a), np.asarray(b)) for a, b in pairs)
            again = len(ours.model.specialisations) > before
            row = {"model": name, "sizes": sizes, "difference": error, "compiled_again": again}
            rows.append(row)
            mark = "  compiled again" * again + "  DIFFERS" * (not error <= TOLERANCE)
            print(f"{name:<24} {error:9.2e} {sizes or ''}{mark}", flush=True)
    wrong = [row for row in rows if not row["difference"] <= TOLERANCE]
    print(f"{len(rows) - len(wrong)} of {len(rows)} agree")
    write(arguments, {"tolerance": TOLERANCE, "rows": rows})
    raise SystemExit(bool(wrong))
