"""What limits the kernels that pass over memory once: their arithmetic, or the memory.

Each is timed alone on data that stays in L1 and on data beyond L2. Where it already needs longer in
L1 than the memory behind L2 needs for the same bytes, memory is not what limits it, and no order of
reads and writes could bring it to that memory's bandwidth. So a kernel has two roofs, its own speed
in L1 and the bandwidth of the level that holds the data, and `attained` is its share of the lower.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from onnx import ModelProto
from onnx.defs import onnx_opset_version

import onnxjit
from benchmarks.operators import model_of
from benchmarks.record import write
from onnxjit.bench.roofline import roofline
from onnxjit.operators.registry import Case, find
from onnxjit.operators.samples import draw


def model(op: str, *operands: str, **attributes: Any) -> ModelProto:
    """A model of one node with operands such as "float32[16,128]"."""
    row = find("", op, onnx_opset_version())
    assert row is not None
    return model_of(row, Case(draw(*operands), attributes))[0]


def cases() -> dict[str, tuple[ModelProto, ModelProto]]:
    """Name -> the model on some 16 KB and on some megabytes."""
    found = {"Add": (model("Add", *["float32[1365]"] * 2), model("Add", *["float32[1048576]"] * 2))}
    for op in ("Relu", "Sqrt", "Exp", "Log", "Sigmoid", "Tanh", "Erf", "Gelu", "HardSwish", "Mish"):
        found[op] = model(op, "float32[2048]"), model(op, "float32[1048576]")
    for op in ("Softmax", "LogSoftmax"):
        for length, few, many in ((128, 16, 6144), (1024, 2, 1024)):
            found[f"{op} of {length}"] = (
                model(op, f"float32[{few},{length}]"), model(op, f"float32[{many},{length}]"),
            )  # fmt: skip
    for op, length, weights in (
        ("LayerNormalization", 96, 2), ("LayerNormalization", 768, 2), ("RMSNormalization", 768, 1)
    ):  # fmt: skip
        own = [f"float32[{length}]"] * weights
        few, many = (f"float32[{n // length},{length}]" for n in (2048, 1 << 20))
        found[f"{op} of {length}"] = model(op, few, *own), model(op, many, *own)
    found["Transpose"] = (
        model("Transpose", "float32[40,48]", perm=[1, 0]),
        model("Transpose", "float32[1024,1024]", perm=[1, 0]),
    )
    return found


def main(arguments: Namespace) -> None:
    machine = roofline(1, again=True)
    rows = []
    for name, models in cases().items():
        inner, outer = (rate(made, arguments.seconds / 4) for made in models)
        level = machine.level(outer["bytes"])
        roof = min(inner["gbytes"], level.best / 1e9)
        row = {
            "kernel": name,
            "inner": inner,
            "outer": outer,
            "level": level.level,
            "bandwidth": level.best / 1e9,
            "limit": "arithmetic" if roof == inner["gbytes"] else f"{level.level} bandwidth",
            "of_bandwidth": outer["gbytes"] * 1e9 / level.best,
            "attained": outer["gbytes"] / roof,
        }
        rows.append(row)
        print(
            f"{name:<28} in L1 {inner['gbytes']:6.1f} GB/s, in {level.level} "
            f"{outer['gbytes']:6.1f} of {level.best / 1e9:5.1f}: {row['of_bandwidth']:.2f} of the "
            f"bandwidth, {row['attained']:.2f} of what {row['limit']} allows",
            flush=True,
        )
    write(arguments, {"roofline": machine.to_json(), "rows": rows})


def rate(made: ModelProto, seconds: float) -> dict[str, float]:
    """GB/s of a model's only kernel, by its least time, and the bytes that it reads and writes."""
    kernels = onnxjit.compile(made, threads=1, cache=False).kernels
    (name,) = kernels
    found = kernels[name].time(seconds=seconds)["kernel"]
    return {"gbytes": found.gbytes, "bytes": found.bytes, "seconds": found.minimum}
