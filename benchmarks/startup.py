"""Whole processes: from their start to the first output, and their peak resident set.

The kinds take turns: onnxjit with an empty cache, onnxjit with a full one, each other engine, and
"numpy", a process that imports NumPy, reads the inputs and has no model: the floor of the others,
together with a later run of the model (`call`). Medians. An engine that fails is an entry that says
why.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import zoo
from benchmarks.processes import ChildError, child
from benchmarks.record import write

MODELS = ("resnet50", "bert_base_dyn")
PEERS = ("onnxruntime", "openvino")
FLOOR = "numpy"
MIB = 1 << 20


def main(arguments: Namespace) -> None:
    arguments.only = arguments.only or list(MODELS)
    rows = []
    for name in zoo.selected(arguments):
        for threads in arguments.threads:
            row = {"model": name, "threads": threads, **measure(arguments, name, threads)}
            rows.append(row)
            print(f"{name}, {threads} thread(s)")
            for kind, facts in row["kinds"].items():
                print(
                    f"  {kind:<14} first output after {facts['seconds']:6.3f} s (least "
                    f"{facts['least']:6.3f}), peak {facts['peak'] / MIB:7.1f} MiB, largest "
                    f"child {facts['children'] / MIB:6.1f} MiB",
                    flush=True,
                )
            for kind, why in row["failures"].items():
                print(f"  {kind:<14} {why}", flush=True)
    write(arguments, {"rows": rows})


def measure(arguments: Namespace, name: str, threads: int) -> dict[str, Any]:
    """Medians over rounds of the kinds of process."""
    model = zoo.path(arguments.models, name)
    assert model is not None
    failures = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = str(Path(folder) / "inputs.npz")
        np.savez(inputs, **zoo.inputs(arguments.models, name))
        found: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": [], FLOOR: []}
        full = Path(folder) / "full"
        child("onnxjit", model, inputs, threads, full)
        # A note of a file's key is believed once it is older than the resolution of time stamps.
        time.sleep(2.5)
        child("onnxjit", model, inputs, threads, full)
        for peer in PEERS:
            try:
                child(peer, model, inputs, threads, full)
            except ChildError as error:
                failures[peer] = str(error)
            else:
                found[peer] = []
        kinds = list(found)
        for number in range(arguments.rounds):
            for position in range(len(kinds)):
                kind = kinds[(position + number) % len(kinds)]
                if kind == "cold" and number >= 3:
                    continue  # seconds each, and they vary little
                cache = Path(folder) / f"cold{number}" if kind == "cold" else full
                engine = kind if kind in (*PEERS, FLOOR) else "onnxjit"
                found[kind].append(child(engine, model, inputs, threads, cache))
    own = found["cold"][0]["checksum"]
    for kind in kinds:
        sums = [row["checksum"] for row in found[kind]]
        if kind == FLOOR or np.allclose(sums, own, rtol=1e-3):
            continue
        if kind not in PEERS:
            raise SystemExit(f"{name}: the outputs differ: {own}, {sums}")
        failures[kind] = f"its outputs differ: sums {sums} instead of {own}"
        del found[kind]
    return {
        "kinds": {
            kind: {
                "seconds": median(row["seconds"] for row in rows),
                "least": min(row["seconds"] for row in rows),
                "call": min(row["call"] for row in rows),
                "peak": median(row["peak"] for row in rows),
                "children": median(row["children"] for row in rows),
                "processes": len(rows),
            }
            for kind, rows in found.items()
        },
        "failures": failures,
    }
