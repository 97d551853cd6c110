"""The machine that a measurement was made on, and the file that keeps it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import platform
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PACKAGES = ("onnxjit", "numba", "llvmlite", "numpy", "onnx", "onnxruntime", "openvino")
_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")


def machine() -> dict[str, Any]:
    """Processor, the instruction sets that matter here, cores, memory, versions, date."""
    from onnxjit.codegen.target import host

    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        pass
    target = host()
    return {
        "cpu": model,
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": target.cores,
        "caches": {"l1": target.l1, "l2": target.l2, "l3": target.l3},
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(arguments: Namespace, data: dict[str, Any]) -> None:
    """Keep a result as results/WHAT.json."""
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"{arguments.what}.json"
    path.write_text(json.dumps({"machine": machine(), **data}, indent=1) + "\n")
    print(f"written to {path}")


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of the product; NaN of nothing."""
    if not values:
        return math.nan
    return math.exp(sum(map(math.log, values)) / len(values))
