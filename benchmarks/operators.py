"""Speed of single operators: the cases marked `bench` in their definitions, against peers and roof.

Each row also has the bytes of all operands and results, the rate at which they pass, and the share
of the roofline: most of these operators do little with each element, so their roof is the bandwidth
that was measured for the level of memory that holds them (L2 for the small, beyond it for others).
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks import recurrences
from benchmarks.record import Claims, conclude
from onnxjit import operators as _operators  # noqa: F401  (fills the operator table)
from onnxjit.bench.engines import load_onnxjit
from onnxjit.bench.measure import Row, measure, reason
from onnxjit.bench.roofline import Roofline, roofline
from onnxjit.operators.registry import Case, Operator, table

OPSET = 21  # one that every onnxruntime in use knows

SETTING = 8
"""Most elements of an operand that says how (axes, sizes, scales, a zero point), not on what."""


def main(arguments: Namespace) -> None:
    claims = Claims(arguments)
    rows: list[Row] = []
    failed: dict[str, str] = {}
    threads = arguments.threads[0]
    machine = roofline(threads, again=True)
    for row in table():
        if arguments.only and row.name not in arguments.only:
            continue
        for case in (c for c in row.cases if c.bench):
            name = f"{row.name} {case.label}".strip()
            try:
                found = case_row(row, case, name, machine, claims.engines, arguments.seconds / 10)
            except Exception as error:  # a defect of ours in one leaves the others
                failed[name] = reason(error)
                print(f"{name:<32} FAILED: {failed[name]}", flush=True)
                continue
            rows.append(found)
            print(line(found), flush=True)
    seconds = arguments.seconds / 10
    for name, model, feeds in recurrences.models(arguments.only):
        found = measured(model, feeds, name, machine, claims.engines, seconds)
        rows.append(found)
        print(line(found), flush=True)
    conclude(arguments, claims, rows, failed, "cases", machine)


def case_row(
    row: Operator, case: Case, name: str, machine: Roofline, engines: Sequence[str], seconds: float
) -> Row:
    """One case as a model of one node."""
    return measured(*model_of(row, case), name, machine, engines, seconds)


def measured(
    model: onnx.ModelProto,
    feeds: dict[str, np.ndarray],
    name: str,
    machine: Roofline,
    engines: Sequence[str],
    seconds: float,
) -> Row:
    """The row of a model; its fields about the roof are None where a step is not a kernel, whose
    bytes and operations nobody counts."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "case.onnx")
        onnx.save(model, file)
        own = load_onnxjit(file, machine.threads)
        found = measure(file, feeds, machine.threads, engines, seconds, label=name, own=own)
        _, steps = own.model.timed([feeds[v.name] for v in own.model.inputs])
    if not all(s.bytes for s in steps):
        return found | dict.fromkeys(("bytes", "flops", "gbytes", "level", "of_roof"))
    least = found["engines"]["onnxjit"]["minimum"]
    size, work = sum(s.bytes for s in steps), sum(s.flops for s in steps)
    roof = max(size / machine.level(size).best, work / machine.peak("float32"))
    return found | {
        "bytes": size,
        "flops": work,
        "gbytes": size / least / 1e9,
        "level": machine.level(size).level,
        "of_roof": roof / least,
    }


def line(row: Row) -> str:
    """One row of the table."""
    times = "  ".join(f"{e} {t['minimum'] * 1e6:10.1f} us" for e, t in row["engines"].items())
    ratio = f"ratio {row['ratios']['fastest']:5.2f}" if row["fastest"] else "no peer"
    failed = "".join(f"  {name}: {why[-60:]}" for name, why in row["failures"].items())
    rate = f"{'no roof':<31}"
    if row["bytes"] is not None:
        rate = f"{row['gbytes']:6.1f} GB/s, {row['of_roof']:4.2f} of the {row['level']} roof"
    return f"{row['model']:<32} {times}  {rate}  {ratio}{failed}"


def model_of(row: Operator, case: Case) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of one node, and its inputs.

    Small operands after the first are constants, as models have them: a node whose axes or sizes
    are known at run time alone is a step that compiles when it runs, which is another question.
    """
    arrays = list(case.inputs())
    names = ["" if a is None else f"x{i}" for i, a in enumerate(arrays)]
    outputs = [f"y{i}" for i in range(case.outputs)]
    newest = OPSET if row.domain in ("", "ai.onnx") else row.since
    opset = row.until or max(newest, row.since)
    given = {n: np.asarray(a) for n, a in zip(names, arrays, strict=True) if n}
    fixed = {n: a for n, a in given.items() if n != "x0" and a.size <= SETTING}
    feeds = {n: a for n, a in given.items() if n not in fixed}
    node = helper.make_node(row.name, names, outputs, domain=row.domain, **case.attrs)
    graph = helper.make_graph(
        [node],
        "case",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in feeds.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(a, n) for n, a in fixed.items()],
    )
    imports = [helper.make_opsetid(row.domain, opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10), feeds
