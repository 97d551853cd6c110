"""What limits the kernels that pass over memory once: their arithmetic, or the memory.

Each is timed alone on data that stays in L1 and on data beyond L2. Where it already needs longer in
L1 than the memory behind L2 needs for the same bytes, memory is not what limits it, and no order of
reads and writes could bring it to that memory's bandwidth. So a kernel has two roofs, its own speed
in L1 and the bandwidth of the level that holds the data, and `attained` is its share of the lower.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxjit
from benchmarks.record import write
from onnxjit.bench.roofline import roofline

OPSET = 21

Shape = Sequence[int]


def case(
    op: str, shape: Shape, weights: Sequence[Shape] = (), inputs: int = 1, **attributes: Any
) -> ModelProto:
    """A model of one node: `inputs` inputs of a shape, then constants of the shapes `weights`."""
    rng = np.random.default_rng(0)
    names = [f"x{k}" for k in range(inputs)]
    tensors = [
        numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), f"w{k}")
        for k, s in enumerate(weights)
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in names]
    node = helper.make_node(op, [*names, *(t.name for t in tensors)], ["y"], **attributes)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "case", values, [result], tensors)
    opset = 23 if op == "RMSNormalization" else OPSET
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def cases() -> dict[str, tuple[ModelProto, ModelProto]]:
    """Name -> the model on some 16 KB and on some megabytes."""
    found = {}
    for op, count in {"Add": 2, "Relu": 1, "Sqrt": 1, "Exp": 1, "Log": 1, "Sigmoid": 1, "Tanh": 1,
                      "Erf": 1, "Gelu": 1, "HardSwish": 1, "Mish": 1}.items():  # fmt: skip
        few = 2048 * 2 // (count + 1)
        found[op] = case(op, (few,), inputs=count), case(op, (1 << 20,), inputs=count)
    for op in ("Softmax", "LogSoftmax"):
        found[f"{op} of 128"] = case(op, (16, 128)), case(op, (12 * 512, 128))
        found[f"{op} of 1024"] = case(op, (2, 1024)), case(op, (1024, 1024))
    for length in (96, 768):
        pair = [(length,)] * 2
        few, many = (2048 // length, length), ((1 << 20) // length, length)
        found[f"LayerNormalization of {length}"] = (
            case("LayerNormalization", few, pair), case("LayerNormalization", many, pair),
        )  # fmt: skip
    found["RMSNormalization of 768"] = (
        case("RMSNormalization", (2, 768), [(768,)]),
        case("RMSNormalization", (1365, 768), [(768,)]),
    )
    found["Transpose"] = (
        case("Transpose", (40, 48), perm=[1, 0]), case("Transpose", (1024, 1024), perm=[1, 0]),
    )  # fmt: skip
    return found


def main(arguments: Namespace) -> None:
    machine = roofline(1, again=True)
    rows = []
    for name, (small, large) in cases().items():
        inner, outer = (rate(model, arguments.seconds / 4) for model in (small, large))
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


def rate(model: ModelProto, seconds: float) -> dict[str, float]:
    """GB/s of a model's only kernel, by its least time, and the bytes that it reads and writes."""
    kernels = onnxjit.compile(model, threads=1, cache=False).kernels
    (name,) = kernels
    found = kernels[name].time(seconds=seconds)["kernel"]
    return {"gbytes": found.gbytes, "bytes": found.bytes, "seconds": found.minimum}
