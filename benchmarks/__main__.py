"""`python -m benchmarks WHAT`: runs one measurement, prints a table and writes results/WHAT.json.

Run them alone on the machine, from the repository's root, with onnxjit[bench] installed. Each one
checks the outputs before it times anything. `readme` measures nothing: it writes the README's
section of results from the files.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

WHAT = {
    "agreement": "every model against onnxruntime, symbolic ones at three sizes",
    "models": "speed of every model against the other engines",
    "operators": "speed of single operators: the cases marked `bench` in their definitions",
    "contractions": "the products and convolutions of the models, one by one, against the peak",
    "limits": "kernels in L1 and beyond L2: whether arithmetic or memory limits them",
    "scaling": "what a second thread gains, and what two separate processes would",
    "overhead": "cost of a call: a two-node model, a chain of 200 tiny nodes",
    "startup": "process start to first output, cold and warm, and peak memory",
    "shapes": "cost of a new shape beyond the run itself",
    "tuning": "what tuning gains: every model usual and tuned",
    "memory": "memory that a run takes, and a loaded model, per engine",
    "roofline": "what the machine can do: multiply-adds and bandwidth per cache level",
    "microkernels": "GFLOP/s of every register tile that this machine can run",
    "readme": "write the README's table and plots from results/",
}


def main(given: list[str] | None = None) -> None:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="\n".join(f"{name:<14} {text}" for name, text in WHAT.items()),
    )
    parser.add_argument("what", choices=WHAT)
    parser.add_argument(
        "--models",
        type=Path,
        default=Path(os.environ.get("ONNXJIT_MODELS", "../shared/models")),
        help="folder of models and models.json (default: $ONNXJIT_MODELS or ../shared/models)",
    )
    parser.add_argument("--only", action="append", help="only this model or operator; repeatable")
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and 2")
    parser.add_argument("--seconds", type=float, default=4.0, help="of runs per model or row")
    parser.add_argument("--tune", type=float, default=120.0, help="seconds per model (tuning)")
    parser.add_argument("--rounds", type=int, default=7, help="processes per row")
    parser.add_argument(
        "--engine",
        action="append",
        help="only this engine (models, operators); repeatable; default: onnxruntime, OpenVINO "
        "and whatever else is installed",
    )
    parser.add_argument("--against", type=Path, help="an earlier result to compare with (models)")
    parser.add_argument(
        "--assert",
        dest="asserted",
        action="append",
        default=[],
        metavar="[worst:][PEER=]RATIO",
        help="fail unless the mean (worst) ratio to PEER, or to the fastest peer, is at least "
        "RATIO (models, operators); `against=RATIO` is about the earlier result; repeatable",
    )
    parser.add_argument("--check", action="store_true", help="readme: only say if it is up to date")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args(given)
    arguments.threads = arguments.threads or [1, 2]
    importlib.import_module(f"benchmarks.{arguments.what}").main(arguments)


if __name__ == "__main__":
    main()
