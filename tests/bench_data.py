"""A result as `onnxjit bench` makes it, with invented numbers, and a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxjit.bench.kernels import KernelRow, KernelTable
from onnxjit.bench.roofline import Bandwidth, Roofline


def small_model(folder: Path) -> str:
    """y = softmax(relu(x @ w)), with a free dimension "rows", in a file."""
    weights = np.random.default_rng(1).standard_normal((4, 3), np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["xw"]),
            helper.make_node("Relu", ["xw"], ["r"]),
            helper.make_node("Softmax", ["r"], ["y"]),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 3])],
        [numpy_helper.from_array(weights, "w")],
    )
    path = folder / "small.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path
    )
    return str(path)


def roof(threads: int = 1) -> Roofline:
    """100 GFLOP/s; 400, 200, 40 and 10 GB/s; caches of 32 KiB, 1 MiB and 16 MiB."""
    rates = {"L1": 400e9, "L2": 200e9, "L3": 40e9, "memory": 10e9}
    return Roofline(
        threads=threads,
        frequency=3e9,
        peaks={"float32/avx512": 100e9, "float32/avx2": 50e9, "int8/avx512": 400e9},
        bandwidths=tuple(Bandwidth(name, 1 << 10, rate, rate / 2) for name, rate in rates.items()),
        sizes={"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20},
        date="2026-01-01T00:00:00+00:00",
    )


def kernel(name: str, start: float, busy: tuple[float, ...], limit: str, **other: Any) -> KernelRow:
    """A row of a million operations and a megabyte."""
    wall = max(busy)
    facts: dict[str, Any] = {
        "name": name, "rule": "contraction", "origin": ("MatMul 'a'",), "dtype": "float32",
        "seconds": wall, "share": 0.5, "flops": 10**6, "bytes": 10**6, "gflops": 1e-3 / wall,
        "gbytes": 1e-3 / wall, "intensity": 1.0, "roof": wall / 2, "of_roof": 0.5, "level": "L2",
        "limit": limit, "start": start, "wall": wall, "busy": busy,
    }  # fmt: skip
    return KernelRow(**{**facts, **other})


def table() -> KernelTable:
    """Two kernels on two threads, the second of which ran on the worker alone."""
    rows = (
        kernel("first", 0.0, (2e-3, 1e-3), "compute"),
        kernel("second", 2e-3, (0.0, 2e-3), "L2 bandwidth"),
    )
    return KernelTable(rows, 4e-3, 4e-3, 3)


def engine(minimum: float, own: float, **other: Any) -> dict[str, Any]:
    """An engine's part of a row."""
    facts = {
        "minimum": minimum, "median": 1.1 * minimum, "lower": 1.05 * minimum,
        "upper": 1.2 * minimum, "runs": 9, "ratio": minimum / own, "ratio_median": minimum / own,
        "difference": 1e-7, "load": 0.5, "version": "1.0", "precision": "float32", "note": "",
    }  # fmt: skip
    return {**facts, **other}


def row(model: str, threads: int, own: float, **peers: float) -> dict[str, Any]:
    """A row of a result from least times in seconds."""
    engines = {"onnxjit": engine(own, own)}
    engines |= {name: engine(seconds, own) for name, seconds in peers.items()}
    ratios = {name: seconds / own for name, seconds in peers.items()}
    fastest = min(ratios, key=ratios.__getitem__, default=None)
    if fastest is not None:
        ratios["fastest"] = ratios[fastest]
    return {
        "model": model, "threads": threads, "ratios": ratios, "fastest": fastest,
        "engines": engines, "failures": {}, "disagree": [], "alone": False,
    }  # fmt: skip


MACHINE = {
    "cpu": "A Processor", "flags": ["avx2"], "isa_limit": None, "cores": 2,
    "caches": {"l1": 32768, "l2": 1048576, "l3": 0}, "memory": 1 << 34, "virtual": True,
    "governor": None, "clock": {"nominal": 2.5e9}, "load": [0.1, 0.2, 0.3], "system": "Linux",
    "python": "3.11.0", "packages": {"onnxjit": "0.1.0"}, "date": "2026-01-01T00:00:00+00:00",
}  # fmt: skip


def result() -> dict[str, Any]:
    """What `onnxjit bench --json` prints of one model."""
    return {
        "machine": MACHINE,
        "about": ["A Processor"],
        "sizes": {"x": [2, 4]},
        "summary": [],
        "rows": [row("small", 2, 4e-3, onnxruntime=5e-3, openvino=8e-3)],
        "roofline": roof(2).to_json(),
        "kernels": table().to_json(),
        "verdicts": [],
    }
