"""Kernel sources that are kept as files, so that a change of what is emitted is seen in review.

`pytest tests/test_golden.py --update-golden` writes them anew. The target is fixed: the sources
are the same on every machine.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from kernels_support import model
from onnx.helper import make_node as node

from onnxjit.codegen.target import AVX512_FEATURES, cpu_target
from onnxjit.codegen_calls import generate
from onnxjit.importer import import_model
from onnxjit.passes import run_pipeline

FOLDER = Path(__file__).parent / "golden"
TARGET = cpu_target(
    "x86_64-unknown-linux-gnu",
    AVX512_FEATURES | {"avx", "avx2", "fma", "bmi", "bmi2", "f16c", "lzcnt", "movbe", "sse4.2"},
    l1=32 << 10,
    l2=1 << 20,
    l3=32 << 20,
    cores=2,
)
F = "float32"


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[str, Sequence[int | str]]],
    outputs: Sequence[str] = ("y",),
    **constants: np.ndarray,
) -> onnx.ModelProto:
    return model(nodes, inputs, outputs, constants)


MODELS = {
    "elementwise": graph(
        [node("Sigmoid", ["x"], ["a"]), node("Add", ["a", "c"], ["y"])],
        {"x": (F, ("n", 7)), "c": (F, (7,))},
    ),
    "transpose": graph(
        [node("Transpose", ["x"], ["y"], perm=[0, 2, 1])], {"x": (F, ("b", 5, "n"))}
    ),
    "split_heads": graph(
        [node("Reshape", ["x", "s"], ["a"]), node("Transpose", ["a"], ["y"], perm=[0, 2, 1, 3])],
        {"x": (F, (1, "n", 12))},
        s=np.array([0, 0, 3, 4]),
    ),
    "concat": graph(
        [node("Concat", ["x", "z"], ["y"], axis=1)], {"x": (F, (3, "n")), "z": (F, (3, 5))}
    ),
    "gather": graph(
        [node("Gather", ["x", "i"], ["y"])], {"x": (F, (9, 4)), "i": ("int64", ("n",))}
    ),
    "cast": graph([node("Cast", ["x"], ["y"], to=onnx.TensorProto.FLOAT16)], {"x": (F, ("n",))}),
    "reduce_rows": graph(
        [node("ReduceMax", ["x", "a"], ["y"], keepdims=0)], {"x": (F, (6, "n"))}, a=np.array([1])
    ),
    "reduce_columns": graph(
        [node("ReduceMean", ["x", "a"], ["y"], keepdims=0)], {"x": (F, ("n", 70))}, a=np.array([0])
    ),
    "max_pool": graph(
        [node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)],
        {"x": (F, (1, 4, 9, "n"))},
    ),
    "softmax": graph([node("Softmax", ["x"], ["y"], axis=-1)], {"x": (F, ("n", 33))}),
    "layer_norm": graph(
        [node("LayerNormalization", ["x", "s", "t"], ["y"], axis=-1)],
        {"x": (F, ("n", 24))},
        s=zeros(24),
        t=zeros(24),
    ),
    "matmul_bias": graph(
        [node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "b"], ["y"])],
        {"x": (F, ("m", 20))},
        w=zeros(20, 40),
        b=zeros(40),
    ),
    "matmul_run_time": graph(
        [node("MatMul", ["x", "z"], ["y"])], {"x": (F, ("b", 8, 20)), "z": (F, ("b", 20, 16))}
    ),
    "convolution_relu": graph(
        [node("Conv", ["x", "w"], ["a"], pads=[1] * 4), node("Relu", ["a"], ["y"])],
        {"x": (F, (1, 4, 9, 11))},
        w=zeros(16, 4, 3, 3),
    ),
    "winograd": graph(
        [node("Conv", ["x", "m"], ["a"]), node("Conv", ["a", "w"], ["y"], pads=[1] * 4)],
        {"x": (F, ("n", 8, "h", "w"))},
        m=zeros(64, 8, 1, 1),
        w=zeros(64, 64, 3, 3),
    ),
    "depthwise": graph(
        [node("Conv", ["x", "w"], ["y"], pads=[1] * 4, group=6)],
        {"x": (F, (1, 6, 9, 9))},
        w=zeros(6, 1, 3, 3),
    ),
}


def sources(name: str) -> str:
    """The sources of a model's kernels, one after the other."""
    program = run_pipeline(import_model(MODELS[name].SerializeToString()), TARGET)
    return "\n\n".join(s.text for s in generate(program, TARGET).sources)


@pytest.mark.parametrize("name", MODELS)
def test_sources_are_the_golden_ones(name: str, update_golden: bool) -> None:
    file, text = FOLDER / f"{name}.py.txt", sources(name)
    if update_golden:
        FOLDER.mkdir(exist_ok=True)
        file.write_text(text)
    assert file.exists(), f"run pytest with --update-golden to write {file.name}"
    assert text == file.read_text(), f"{name}: review the change, then run with --update-golden"


def test_no_golden_file_is_left_over() -> None:
    assert {f.name for f in FOLDER.iterdir()} == {f"{name}.py.txt" for name in MODELS}


def test_sources_do_not_depend_on_the_process() -> None:
    """Kernels are cached by their text: hash seeds and addresses must not show in it."""
    script = (
        "import hashlib, test_golden as g\n"
        "print(hashlib.sha256(''.join(map(g.sources, g.MODELS)).encode()).hexdigest())"
    )
    folder = str(Path(__file__).parent)
    wanted = hashlib.sha256("".join(map(sources, MODELS)).encode()).hexdigest()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=folder, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == wanted
