"""The matrix products and convolutions of the models, each on its own, against peers and peak.

Every distinct Conv, Gemm and MatMul of the models, at the sizes of their examples, as a model of
one node with random weights. Those with the most work over all models are measured. `peak` is the
share of the multiply-adds that this machine was measured to make, `of_roof` the share of its
roofline, which for products with few rows is bandwidth.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks import zoo
from benchmarks.record import Claims, conclude
from onnxjit.bench.measure import Row, measure, reason
from onnxjit.bench.roofline import roofline

OPERATORS = ("Conv", "Gemm", "MatMul")
MOST = 60
OPSET = 18
_NEUTRAL = {"strides": 1, "dilations": 1}
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contraction:
    """A node by what its speed depends on: `constant` says which inputs are weights; `output` is
    the shape of the result."""

    op: str
    shapes: tuple[Shape, ...]
    constant: tuple[bool, ...]
    attributes: tuple[tuple[str, Any], ...]
    output: Shape

    @property
    def flops(self) -> int:
        """Multiplications and additions, borders counted as if they were there."""
        if self.op == "Conv":
            return 2 * prod(self.output) * prod(self.shapes[1][1:])
        inner = self.shapes[0][0 if dict(self.attributes).get("transA") else -1]
        return 2 * prod(self.output) * inner

    @property
    def bytes(self) -> int:
        """Of the operands and the result, each counted once."""
        return 4 * sum(map(prod, (*self.shapes, self.output)))

    @property
    def name(self) -> str:
        """Readable and unique: operator, operands, attributes that are not the usual ones."""
        sizes = " ".join("x".join(map(str, shape)) for shape in self.shapes[:2])
        usual = {"kernel_shape", "auto_pad", "alpha", "beta"}
        extra = [
            f"{k}={'x'.join(map(str, v)) if isinstance(v, tuple) else v}"
            for k, v in self.attributes
            if k not in usual and v not in (0, 1) and v != (_NEUTRAL.get(k, 0),) * _length(v)
        ]
        fixed_sides = "".join("w" if c else "x" for c in self.constant[:2])
        return " ".join([self.op, sizes, fixed_sides, *extra])


def main(arguments: Namespace) -> None:
    claims = Claims(arguments)
    threads = arguments.threads[0]
    counts: dict[Contraction, int] = {}
    for name in zoo.selected(arguments):
        file = zoo.path(arguments.models, name)
        assert file is not None
        for one in contractions(file, zoo.inputs(arguments.models, name)):
            counts[one] = counts.get(one, 0) + 1
    chosen = sorted(counts, key=lambda c: (-counts[c] * c.flops, c.name))[:MOST]
    machine = roofline(threads, again=True)
    peak = machine.peak("float32")
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for one in chosen:
        try:
            row = case_row(one, threads, claims.engines, arguments.seconds / 10)
        except Exception as error:  # a defect of ours in one leaves the others
            failed[one.name] = reason(error)
            print(f"{one.name:<64} FAILED: {failed[one.name]}", flush=True)
            continue
        seconds = row["engines"]["onnxjit"]["minimum"]
        rate = one.flops / seconds
        least = max(one.flops / peak, one.bytes / machine.level(one.bytes).best)
        row |= {
            "flops": one.flops,
            "bytes": one.bytes,
            "count": counts[one],
            "gflops": rate / 1e9,
            "gbytes": one.bytes / seconds / 1e9,
            "peak": rate / peak,
            "of_roof": least / seconds,
        }
        rows.append(row)
        peers = "  ".join(f"{n} {r:5.2f}" for n, r in row["ratios"].items() if n != "fastest")
        print(
            f"{one.name:<64} {counts[one]:>3}x {rate / 1e9:7.1f} GFLOP/s {rate / peak:5.2f} of the "
            f"peak {row['of_roof']:5.2f} of the roof  {peers}",
            flush=True,
        )
    conclude(arguments, claims, rows, failed, "shapes", machine)


def contractions(file: str, feeds: dict[str, np.ndarray]) -> Iterator[Contraction]:
    """Those of a model's own graph (not of its functions and branches), with the shapes that
    onnxruntime sees for these inputs."""
    model = onnx.load(file)
    graph = model.graph
    nodes = [n for n in graph.node if n.op_type in OPERATORS and n.domain in ("", "ai.onnx")]
    weights = {t.name for t in graph.initializer}
    for node in graph.node:  # in order of computation: what comes from weights alone is one
        if all(n in weights for n in node.input if n):
            weights.update(node.output)
    wanted = list(dict.fromkeys(v for n in nodes for v in [*n.input, *n.output] if v))
    known = {v.name for v in graph.output}
    for name in wanted:
        if name not in known:
            graph.output.append(onnx.ValueInfoProto(name=name))
    arrays = dict(zip(wanted, _run(model, feeds, wanted), strict=True)) if wanted else {}
    for node in nodes:
        operands = [arrays[n] for n in [*node.input, node.output[0]] if n]
        if any(a.dtype != np.float32 for a in operands) or min(a.ndim for a in operands[:2]) < 2:
            continue
        attributes = {a.name: _plain(helper.get_attribute_value(a)) for a in node.attribute}
        yield Contraction(
            node.op_type,
            tuple(a.shape for a in operands[:-1]),
            tuple(n in weights for n in node.input if n),
            tuple(sorted(attributes.items())),
            operands[-1].shape,
        )


def _run(
    model: onnx.ModelProto, feeds: dict[str, np.ndarray], wanted: list[str]
) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(wanted, feeds)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, tuple) else 0


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return tuple(value) if isinstance(value, list) else value


def case_row(one: Contraction, threads: int, engines: list[str], seconds: float) -> Row:
    """One contraction in all engines."""
    model, feeds = model_of(one)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "case.onnx")
        onnx.save(model, file)
        return measure(file, feeds, threads, engines, seconds, label=one.name)


def model_of(one: Contraction) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of one node, and its inputs."""
    rng = np.random.default_rng(0)
    names = [f"x{i}" for i in range(len(one.shapes))]
    arrays = {
        n: rng.standard_normal(shape, np.float32)
        for n, shape in zip(names, one.shapes, strict=True)
    }
    fixed_names = {n for n, constant in zip(names, one.constant, strict=True) if constant}
    if len(fixed_names) == len(names):  # an input there must be
        fixed_names.discard(names[0])
    attributes = {k: list(v) if isinstance(v, tuple) else v for k, v in one.attributes}
    graph = helper.make_graph(
        [helper.make_node(one.op, names, ["y"], **attributes)],
        "case",
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape)
            for n, a in arrays.items()
            if n not in fixed_names
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, one.output)],
        [numpy_helper.from_array(arrays[n], n) for n in sorted(fixed_names)],
    )
    imports = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    return model, {n: a for n, a in arrays.items() if n not in fixed_names}
