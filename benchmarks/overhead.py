"""What a call costs beyond its arithmetic: models so small that nothing else is left.

The time of one call is that of a loop of calls, divided by their number.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, save

from benchmarks.record import write
from onnxjit.bench import ENGINES, load_openvino, take_turns

LOOP = 1000


def chain(nodes: int) -> ModelProto:
    """y = x through `nodes` alternating Softmax and Transpose nodes on 2x2: they cannot be merged
    into one pass over the data, and each is next to no work."""
    value = helper.make_tensor_value_info
    made, last = [], "x"
    for i in range(nodes):
        name = "y" if i == nodes - 1 else f"v{i}"
        op = {"axis": 1} if i % 2 == 0 else {"perm": [1, 0]}
        made.append(helper.make_node("Transpose" if i % 2 else "Softmax", [last], [name], **op))
        last = name
    graph = helper.make_graph(
        made,
        "chain",
        [value("x", TensorProto.FLOAT, [2, 2])],
        [value("y", TensorProto.FLOAT, [2, 2])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def main(arguments: Namespace) -> None:
    rows = []
    for nodes in (2, 200):
        times = measure(chain(nodes), arguments.seconds)
        rows.append({"nodes": nodes, "microseconds": times})
        cells = "  ".join(f"{name} {t:7.2f} us" for name, t in times.items())
        print(f"{nodes:>3} nodes: {cells}", flush=True)
    write(arguments, {"rows": rows})


def measure(model: ModelProto, seconds: float) -> dict[str, float]:
    """Microseconds of one call, by way of calling; OpenVINO where it is installed."""
    import onnxruntime

    import onnxjit

    x = np.random.default_rng(0).standard_normal((2, 2)).astype(np.float32)
    compiled = onnxjit.compile(model, threads=1)
    session = onnxjit.InferenceSession(model.SerializeToString(), _options(onnxjit))
    theirs = onnxruntime.InferenceSession(model.SerializeToString(), _options(onnxruntime))
    feeds = {"x": x}
    calls: dict[str, Callable[[], Any]] = {
        "CompiledModel": lambda: compiled(x),
        "InferenceSession": lambda: session.run(None, feeds)[0],
        "onnxruntime": lambda: theirs.run(None, feeds)[0],
    }
    infer = openvino_call(model, x)
    if infer is not None:
        calls["openvino"] = infer
    want = calls["onnxruntime"]()
    for name, call in calls.items():
        np.testing.assert_allclose(call(), want, rtol=1e-5, atol=1e-6, err_msg=name)
    loops = {
        "CompiledModel": _loop(lambda: compiled, lambda f: f(x)),
        "InferenceSession": _loop(lambda: session.run, lambda f: f(None, feeds)),
        "onnxruntime": _loop(lambda: theirs.run, lambda f: f(None, feeds)),
    }
    if infer is not None:
        loops["openvino"] = _loop(lambda: infer, lambda f: f())
    timings = take_turns(loops, seconds)
    empty = _empty_loop()
    return {name: max(0.0, (t.minimum - empty) / LOOP * 1e6) for name, t in timings.items()}


def openvino_call(model: ModelProto, x: np.ndarray) -> Callable[[], Any] | None:
    """A call of OpenVINO's that returns the output, on one thread."""
    if ENGINES["openvino"].missing:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "chain.onnx")
        save(model, path)
        request = load_openvino(path, 1).model.create_infer_request()
    feeds = {"x": x}

    def call() -> Any:
        request.infer(feeds, share_inputs=True)
        return request.get_output_tensor(0).data

    return call


def _options(module: Any) -> Any:
    options = module.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return options


def _loop(function: Callable[[], Any], apply: Callable[[Any], Any]) -> Callable[[], Any]:
    bound = function()

    def loop() -> tuple[()]:
        for _ in range(LOOP):
            apply(bound)
        return ()

    return loop


def _empty_loop() -> float:
    """What the loop and its lambda cost without the call inside, in seconds."""
    loop = _loop(lambda: None, lambda f: f)
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        loop()
        times.append(time.perf_counter() - begin)
    return min(times)
