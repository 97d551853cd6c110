"""Speed of single operators: the cases marked `bench` in their definitions, against onnxruntime."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from benchmarks.agreement import distance
from benchmarks.record import geometric_mean, write
from onnxjit import operators as _operators  # noqa: F401  (fills the operator table)
from onnxjit.bench import load_onnxjit, load_onnxruntime, take_turns
from onnxjit.operators.registry import Case, Operator, table

OPSET = 21  # one that every onnxruntime in use knows


def main(arguments: Namespace) -> None:
    rows = []
    threads = arguments.threads[0]
    for row in table():
        if arguments.only and row.name not in arguments.only:
            continue
        for case in (c for c in row.cases if c.bench):
            name = f"{row.name} {case.label}".strip()
            try:
                result = measure(row, case, threads, arguments.seconds / 10)
            except Exception as error:  # one that an engine lacks leaves the others
                print(f"{name:<32} {str(error).splitlines()[0][:90]}", flush=True)
                continue
            rows.append({"operator": name, **result})
            times = "  ".join(
                f"{e} {t['minimum'] * 1e6:10.1f} us" for e, t in result["engines"].items()
            )
            print(
                f"{name:<32} {times}  ratio {result['ratio']:5.2f}  "
                f"difference {result['difference']:.1e}",
                flush=True,
            )
    mean = geometric_mean([row["ratio"] for row in rows])
    print(f"geometric mean {mean:.3f} times onnxruntime over {len(rows)} cases")
    write(arguments, {"threads": threads, "mean": mean, "rows": rows})


def measure(row: Operator, case: Case, threads: int, seconds: float) -> dict[str, Any]:
    """One case as a model of one node."""
    model, feeds = model_of(row, case)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "case.onnx")
        onnx.save(model, file)
        loaded = {
            "onnxjit": load_onnxjit(file, threads),
            "onnxruntime": load_onnxruntime(file, threads),
        }
        calls = {name: one.bind(feeds) for name, one in loaded.items()}
        pairs = zip(calls["onnxjit"](), calls["onnxruntime"](), strict=True)
        error = max(distance(np.asarray(a), np.asarray(b)) for a, b in pairs)
        timings = take_turns(calls, seconds)
    return {
        "difference": error,
        "ratio": timings["onnxruntime"].minimum / timings["onnxjit"].minimum,
        "engines": {name: asdict(t) for name, t in timings.items()},
    }


def model_of(row: Operator, case: Case) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of one node, and its inputs."""
    arrays = list(case.inputs())
    names = ["" if a is None else f"x{i}" for i, a in enumerate(arrays)]
    outputs = [f"y{i}" for i in range(case.outputs)]
    newest = OPSET if row.domain in ("", "ai.onnx") else row.since
    opset = row.until or max(newest, row.since)
    feeds = {n: np.asarray(a) for n, a in zip(names, arrays, strict=True) if n}
    node = helper.make_node(row.name, names, outputs, domain=row.domain, **case.attrs)
    graph = helper.make_graph(
        [node],
        "case",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in feeds.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    imports = [helper.make_opsetid(row.domain, opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10), feeds
