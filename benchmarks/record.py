"""The file that keeps a measurement, with the machine that it was made on; and its verdicts."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from onnxjit.bench import against
from onnxjit.bench.engines import wanted
from onnxjit.bench.machine import machine
from onnxjit.bench.measure import Row, summaries
from onnxjit.bench.roofline import Roofline


def write(arguments: Namespace, data: dict[str, Any]) -> None:
    """Keep a result as results/WHAT.json."""
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"{arguments.what}.json"
    path.write_text(json.dumps({"machine": machine(), **data}, indent=1) + "\n")
    print(f"written to {path}")


def conclude(
    arguments: Namespace, claims: Claims, rows: list[Row], failed: dict[str, str], what: str,
    roof: Roofline,
) -> None:  # fmt: skip
    """Print, keep and judge the rows of single kernels (`what`: cases, shapes) on one number of
    threads."""
    summary = summaries(rows)
    for s in summary:
        print(
            f"geometric mean {s['mean']:.3f} times {s['peer']} over {s['models']} {what}, worst "
            f"{s['worst_ratio']:.2f} ({s['worst']})"
        )
    data = {
        "threads": roof.threads,
        "roofline": roof.to_json(),
        "summary": summary,
        "rows": rows,
        "failed": failed,
    }
    write(arguments, data)
    claims.settle(rows, failed)


class Claims:
    """What `--engine`, `--against` and `--assert` ask for, read before anything is measured."""

    def __init__(self, arguments: Namespace) -> None:
        try:
            self.engines = wanted(arguments.engine)
            self.earlier = None if arguments.against is None else against.load(arguments.against)
            parsed = [against.parse(text) for text in arguments.asserted]
        except (KeyError, ValueError) as error:
            raise SystemExit(error.args[0]) from None
        self.asserted = [one.text for one in parsed]
        about_earlier = any(one.what == against.EARLIER for one in parsed)
        if about_earlier and self.earlier is None:
            raise SystemExit("an assertion about `against` needs --against")
        if self.earlier is not None and not about_earlier:
            self.asserted.append(f"{against.EARLIER}={against.ALLOWANCE}")

    def settle(self, rows: Sequence[Row], failed: Mapping[str, str]) -> None:
        """Print the comparison and the verdicts; SystemExit where an assertion does not hold,
        onnxjit's outputs are nobody else's, or onnxjit failed."""
        changes = []
        if self.earlier is not None:
            for text in against.other_machine(self.earlier, machine()):
                print(f"the earlier result is of another machine: {text}")
            changes = against.compare(rows, self.earlier)
            for c in changes:
                peers = "" if c.relative is None else f", {c.relative:.3f} relative to the peers"
                print(f"{c.model:<28} {c.threads} {c.time:.3f} times as fast as before{peers}")
        verdicts = against.judge(self.asserted, rows, changes)
        for verdict in verdicts:
            print(verdict)
        for row in rows:
            for name in row["disagree"]:
                print(f"{row['model']}, {row['threads']} thread(s): {name} is left out: "
                      f"{row['failures'][name]}")  # fmt: skip
        differ = [row["model"] for row in rows if row["alone"]]
        if differ:
            print(f"no peer has the outputs that onnxjit has: {', '.join(differ)}")
        if failed:
            print(f"onnxjit failed on {', '.join(failed)}")
        if differ or failed or not all(v.holds for v in verdicts):
            raise SystemExit(1)
