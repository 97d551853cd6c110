"""Files that are not models, or no longer."""

import os
import random

import numpy as np
import onnx
import onnx.backend.test
import pytest
from onnx import helper, parser
from small_models import FUNCTIONS, info, model_of, weight

from onnxjit.errors import ModelError
from onnxjit.importer import import_model


def test_files_that_are_not_models(tmp_path):
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("hello, this is not a model\n" * 100)
    (tmp_path / "folder.onnx").mkdir()
    os.mkfifo(tmp_path / "pipe.onnx")
    for name in ("empty", "text", "folder", "pipe", "missing", "missing/deep"):
        with pytest.raises(ModelError, match=name):
            import_model(tmp_path / f"{name}.onnx")
    for data in (
        b"",
        b"\0",
        b"\xff" * 50,
        b"\x3a\x00",
        onnx.TensorProto(name="x").SerializeToString(),
    ):
        with pytest.raises(ModelError):
            import_model(data)
    with pytest.raises(ModelError):
        import_model("nul\0byte.onnx")


def fuzz_models():
    """Two small serialised models: one of many messages, one of much data."""
    yield parser.parse_model(FUNCTIONS).SerializeToString()
    yield model_of(
        [
            helper.make_node("MatMul", ["x", "w"], ["t"]),
            helper.make_node("Constant", [], ["c"], value=weight("c", (40, 40), np.int32)),
            helper.make_node("Cast", ["c"], ["d"], to=1),
            helper.make_node("Add", ["t", "d"], ["y"]),
        ],
        initializers=[weight()],
        value_info=[info("t", ("n", "16*n"))],
    ).SerializeToString()


@pytest.mark.parametrize("data", list(fuzz_models()), ids=["functions", "weights"])
def test_truncated_and_damaged_models(data):
    """Nothing but ModelError, whatever is cut off or overwritten."""
    refused = 0
    damaged = [data[:length] for length in range(0, len(data), 47)]
    generator = random.Random(0)
    for _ in range(400):
        copy = bytearray(data)
        # Only the first kilobytes: most of the rest is weights, where every value is valid.
        for _ in range(generator.randrange(1, 4)):
            copy[generator.randrange(min(len(data), 1500))] = generator.randrange(256)
        damaged.append(bytes(copy))
    for variant in damaged:
        try:
            import_model(variant)
        except ModelError:
            refused += 1
    assert refused > len(damaged) // 4
