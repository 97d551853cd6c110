"""The demonstration: the ResNet-50 that ships inside the onnx package, checked and timed.

That file has the network's structure but constant weights, with which the output would not depend
on the input. They are replaced by random ones from a fixed seed.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxjit.bench import ENGINES, Timing, engine_version, random_inputs, take_turns
from onnxjit.compare import difference
from onnxjit.errors import ModelError

TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Result:
    """One engine on the demonstration model: seconds until it was ready to run, seconds of a run
    (None where it was not timed), and `compare.difference` of its output from onnxjit's."""

    engine: str
    version: str
    ready: float
    timing: Timing | None
    difference: float | None


def resnet50() -> bytes:
    """The model with random weights (seed 0), as the bytes of an ONNX file of about 100 MB."""
    import onnx
    from onnx import numpy_helper

    path = Path(onnx.__file__).parent / "backend/test/data/light/light_resnet50.onnx"
    if not path.is_file():
        raise ModelError(f"this version of the onnx package does not contain {path.name}")
    model = onnx.load(path)
    graph = model.graph
    shapes = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    filled = {n.output[0]: n for n in graph.node if n.op_type == "ConstantOfShape"}
    rng = np.random.default_rng(0)
    for node in list(graph.node):
        for position, name in enumerate(node.input):
            maker = filled.pop(name, None)
            if maker is None:
                continue
            shape = shapes[maker.input[0]].tolist()
            weight = _weight(rng, node.op_type, position, shape)
            graph.initializer.append(numpy_helper.from_array(weight, name))
            graph.node.remove(maker)
    read = {name for node in graph.node for name in node.input}
    for tensor in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(tensor)
    constants = {t.name for t in graph.initializer}
    for value in [v for v in graph.input if v.name not in read or v.name in constants]:
        graph.input.remove(value)
    # The file's own opset 9 means the same here, but the reference evaluator would compute its
    # BatchNormalization as in training. IR version 3 wants initializers among the inputs.
    model.opset_import[0].version = 15
    model.ir_version = 8
    return model.SerializeToString()


def _weight(rng: np.random.Generator, op: str, position: int, shape: list[int]) -> np.ndarray:
    normal = rng.standard_normal(shape, np.float32)
    if op == "BatchNormalization":  # scale, bias, mean, variance
        centre, spread = {1: (0.5, 0.1), 2: (0.0, 0.1), 3: (0.0, 0.1), 4: (1.0, 0.0)}[position]
        return (centre + spread * normal).astype(np.float32)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
    gain = 2.0 if op == "Conv" else 0.1
    return (normal * np.sqrt(gain / fan_in)).astype(np.float32)


def demonstrate(
    threads: int, seconds: float, progress: Callable[[str], None] = lambda text: None
) -> list[Result]:
    """Compiles the model and compares and times it: against onnxruntime and OpenVINO where they
    are installed, else its output is compared with the ONNX reference evaluator's.

    `progress` is told what is done next. The first result is onnxjit's own.
    """
    progress("writing the model")
    handle, path = tempfile.mkstemp(suffix=".onnx")
    try:
        with open(handle, "wb") as file:
            file.write(resnet50())
        return _results(path, threads, seconds, progress)
    finally:
        os.unlink(path)


def _results(
    path: str, threads: int, seconds: float, progress: Callable[[str], None]
) -> list[Result]:
    names = [name for name, engine in ENGINES.items() if engine.always and not engine.missing]
    ready, loaded = {}, {}
    for name in names:
        progress(f"{'compiling' if name == 'onnxjit' else 'loading'} with {name}")
        begin = time.perf_counter()
        loaded[name] = ENGINES[name].load(path, threads)
        ready[name] = time.perf_counter() - begin
    feeds = random_inputs(loaded["onnxjit"].model.inputs)
    calls = {name: one.bind(feeds) for name, one in loaded.items()}
    own = np.asarray(calls["onnxjit"]()[0])
    far: dict[str, float | None] = {
        name: None if name == "onnxjit" else difference(own, np.asarray(call()[0]))
        for name, call in calls.items()
    }
    results = []
    if len(calls) == 1:
        progress("running the ONNX reference evaluator")
        results.append(_reference(path, feeds, own))
    progress("timing")
    timings = take_turns(calls, seconds)
    own_results = [
        Result(name, engine_version(name) or "", ready[name], timings[name], far[name])
        for name in names
    ]
    return own_results + results


def _reference(path: str, feeds: dict[str, np.ndarray], own: np.ndarray) -> Result:
    from onnx.reference import ReferenceEvaluator

    begin = time.perf_counter()
    evaluator = ReferenceEvaluator(path)
    ready = time.perf_counter() - begin
    begin = time.perf_counter()
    want = np.asarray(next(iter(evaluator.run(None, feeds))))
    taken = time.perf_counter() - begin
    version = engine_version("onnx") or ""
    return Result("onnx reference", version, ready, Timing.of([taken]), difference(own, want))
