"""The command line, as a process would run it: output, JSON, exit status, messages."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from onnxjit import cli, compare
from onnxjit.bench import random_inputs, take_turns
from onnxjit.bench.turns import settle

W = np.random.default_rng(1).standard_normal((4, 3), np.float32)


def model_proto() -> onnx.ModelProto:
    """y = relu(x @ w), z = softmax(y), with a free dimension called "rows"."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["xw"], name="product"),
            helper.make_node("Relu", ["xw"], ["y"]),
            helper.make_node("Softmax", ["y"], ["z"]),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 3]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, ["rows", 3]),
        ],
        [numpy_helper.from_array(W, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def path(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ONNXJIT_CACHE", str(cache))
    onnx.save(model_proto(), tmp_path / "model.onnx")
    return str(tmp_path / "model.onnx")


def call(*arguments: str, status: int = 0) -> str:
    """Standard output of the command, whose exit status is checked."""
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == status, (result.output, result.exception)
    return result.stdout


def call_json(*arguments: str, status: int = 0) -> Any:
    return json.loads(call(*arguments, "--json", status=status))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message with which the whole program refuses, with status 2 and no traceback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["onnxjit", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_run_with_a_file_and_an_output_folder(path: str, tmp_path: Path) -> None:
    x = np.random.default_rng(2).standard_normal((5, 4), np.float32)
    np.save(tmp_path / "x.npy", x)
    out = tmp_path / "out"
    rows = call_json("run", path, "--input", f"x={tmp_path / 'x.npy'}", "--output", str(out))
    assert [row["name"] for row in rows] == ["y", "z"]
    assert rows[0]["shape"] == [5, 3]
    y, z = (np.load(row["file"]) for row in rows)
    np.testing.assert_allclose(y, np.maximum(x @ W, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(z.sum(-1), 1, rtol=1e-5)
    assert sorted(p.name for p in out.iterdir()) == ["0.npy", "1.npy"]


def test_run_prints_a_table(path: str) -> None:
    text = call("run", path, "--dim", "rows=7")
    assert "[7, 3]" in text and "float32" in text


def test_inspect(path: str) -> None:
    facts = call_json("inspect", path, "--dim", "rows=100")
    assert facts["operators"] == {"MatMul": 1, "Relu": 1, "Softmax": 1}
    assert facts["dims"] == {"rows": 100}
    assert facts["memory"]["constants"] >= W.nbytes
    assert facts["kernels"][0]["flops"] >= 2 * 100 * W.size
    assert "MatMul 'product'" in facts["kernels"][0]["origin"]
    name = facts["kernels"][0]["name"]
    assert name in call("inspect", path)
    assert "def kernel(ptrs, ints, scratch, begin, end):" in call("inspect", path, "--kernel", name)
    for what, expected in (
        ("definition", "sum["),
        ("schedule", "tiles="),
        ("llvm", "define"),
        ("asm", ".text"),
    ):
        assert expected in call("inspect", path, "--kernel", name, "--what", what)
    graph = call("inspect", path, "--graph")
    assert 'node "xw" = MatMul:13("x", "w")' in graph
    passes = call("inspect", path, "--passes")
    assert passes.index("# after lower") < passes.index("# after fuse")


def test_compare_agrees(path: str) -> None:
    text = call("compare", path, "--dim", "rows=3", "--all", "--against", "onnxruntime")
    assert "all 3 values agree with onnxruntime" in text
    assert "xw" in text and "[3, 3]" in text


def test_compare_names_the_first_divergence(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> dict[str, np.ndarray]:
        values = right(*arguments)
        return {**values, "y": values["y"] + 1, "z": values["z"] + 1}

    def rows(found: list[dict[str, Any]]) -> tuple[compare.Row, ...]:
        return tuple(compare.Row(**row) for row in found)

    right = compare._reference
    monkeypatch.setattr(compare, "_reference", wrong)
    found = call_json("compare", path, status=1)
    assert found["first"] == "y"
    assert [row["same"] for row in found["values"]] == [True, False, False]
    verdict = cli._verdict(compare.Comparison((), rows(found["values"])), "onnx")
    assert verdict == "first divergence from onnx: 'y', made by Relu"


def test_difference_sees_special_values() -> None:
    want = np.array([1.0, np.nan, np.inf, -2.0], np.float32)
    assert compare.difference(want, want) == 0
    assert compare.difference(want + np.float32(0.5), want) == pytest.approx(0.25)
    assert compare.difference(np.array([1, 0, np.inf, -2], np.float32), want) == np.inf
    assert compare.difference(np.array([1, np.nan, -np.inf, -2], np.float32), want) == np.inf
    assert compare.difference(np.array([np.nan, np.nan, np.inf, -2], np.float32), want) == np.inf
    assert compare.difference(np.zeros((0, 2)), np.zeros((0, 2))) == 0
    row = compare.compare_value("v", "Node", np.zeros((2, 1)), np.zeros(2), None)
    assert not row.same and "shape" in row.note


def test_bench(path: str, tmp_path: Path) -> None:
    html, trace, kept = (tmp_path / name for name in ("page.html", "trace.json", "old.json"))
    options = ["bench", path, "--seconds", "0", "--dim", "rows=8", "--engine", "onnxruntime"]
    written = call(
        *options, "--json", "--html", str(html), "--trace", str(trace), "--assert", "0.000001"
    )
    kept.write_text(written)
    data = json.loads(written)
    (row,) = data["rows"]
    engines = row["engines"]
    assert row["model"] == "model" and list(engines) == ["onnxjit", "onnxruntime"]
    assert engines["onnxruntime"]["difference"] < 1e-5
    ours = engines["onnxjit"]
    assert 0 < ours["minimum"] <= ours["lower"] <= ours["median"] <= ours["upper"]
    assert {k["name"] for k in data["kernels"]["rows"]} == {
        k["name"] for k in call_json("inspect", path)["kernels"]
    }
    assert data["roofline"]["peaks"] and data["verdicts"][0]["holds"]
    assert data["sizes"] == {"x": [8, 4]}
    assert "onnxruntime" in html.read_text() and json.loads(trace.read_text())["traceEvents"]

    text = call(*options, "--against", str(kept), "--assert", "against=0.000001")
    assert "against the earlier result" in text and "% of roof" in text
    assert "against=0.000001 holds" in text and "GFLOP/s float32" in text
    text = call(*options, "--kernels", "0", "--assert", "onnxruntime=1000000", status=1)
    assert "onnxruntime=1000000 FAILS" in text and "% of roof" not in text


def test_bench_draws(path: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    png = tmp_path / "plots.png"
    call("bench", path, "--seconds", "0", "--engine", "onnxruntime", "--png", str(png))
    assert png.read_bytes().startswith(b"\x89PNG")


def test_bench_refuses(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--engine", "tensorflow"], "no engine 'tensorflow'; there are onnxjit, onnxruntime"),
        (["--assert", "fast"], "is no assertion"),
        (["--assert", "against=1"], "needs --against"),
        (["--against", str(tmp_path / "none.json")], "cannot read"),
    ):
        assert message in " ".join(refused(capsys, "bench", path, *options).split())


def test_take_turns_rotates_the_order() -> None:
    order: list[str] = []

    def call_of(name: str) -> Callable[[], tuple[()]]:
        def call() -> tuple[()]:
            order.append(name)
            return ()

        return call

    timings = take_turns({name: call_of(name) for name in "abc"}, seconds=0, burst=0, rounds=3)
    assert "".join(order) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert all(t.runs == 6 and 0 <= t.minimum <= t.median for t in timings.values())


def test_a_turn_begins_when_no_other_thread_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxjit.bench.turns._PATIENCE", 60.0)
    done = threading.Event()
    data = bytes(16 << 20)

    def spin() -> None:
        while not done.is_set():
            zlib.crc32(data)  # without the interpreter's lock

    threads = [threading.Thread(target=spin), threading.Timer(0.1, done.set)]
    for thread in threads:
        thread.start()
    settle()
    assert done.is_set()
    for thread in threads:
        thread.join()


def test_random_inputs_fill_every_dtype() -> None:
    from onnxjit import TensorInfo

    dtypes = ["float32", "float16", "bfloat16", "int64", "uint8", "bool", "string"]
    made = random_inputs([TensorInfo(d, d, ("n", 2, None)) for d in dtypes], {"n": 3})
    assert {array.shape for array in made.values()} == {(3, 2, 1)}
    assert [array.dtype.name for array in made.values()] == [*dtypes[:-1], "object"]


def test_ops() -> None:
    data = call_json("ops")
    rows = {row["operator"]: row for row in data["supported"] if row["domain"] == "ai.onnx"}
    assert rows["Conv"]["runs"] == ["kernel"] and rows["Conv"]["cases"] > 0
    assert rows["NonZero"]["runs"] == ["host"] and rows["Loop"]["runs"] == ["control flow"]
    names = {(row["domain"], row["operator"]) for row in data["missing"]}
    assert not names & {(row["domain"], row["operator"]) for row in data["supported"]}
    assert "MatMulInteger" in call("ops", "matmul")


def test_cache(path: str, cache: Path) -> None:
    call("run", path)
    assert call("cache", "path").strip() == str(cache)
    shown = call_json("cache", "show", "--entries")
    assert shown["kinds"]["models"]["entries"] >= 1
    assert shown["bytes"] == sum(row["bytes"] for row in shown["entries"])
    assert call_json("cache", "verify")["damaged"] == []
    victim = next((cache / "kernels").glob("*.o"))
    victim.write_bytes(victim.read_bytes()[:-40])
    damaged = call_json("cache", "verify", status=1)["damaged"]
    assert [row["key"] for row in damaged] == [victim.stem]
    assert call_json("cache", "trim", "1K")["freed"] > 0
    call("cache", "clear")
    assert call_json("cache", "show")["bytes"] == 0


def test_errors_are_one_message(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is no model")
    assert "broken.onnx" in refused(capsys, "run", str(broken))
    assert "nowhere.onnx" in refused(capsys, "inspect", "nowhere.onnx")
    assert "'rows'" in refused(capsys, "run", path, "--dim", "columns=3")
    assert "takes a size" in refused(capsys, "run", path, "--dim", "rows=many")
    assert "no input 'q'" in refused(capsys, "run", path, "--input", f"q={broken}")
    assert "not a .npy file" in refused(capsys, "run", path, "--input", f"x={broken}")
    assert "cannot read" in refused(capsys, "run", path, "--input", f"x={tmp_path / 'none.npy'}")
    wide = tmp_path / "wide.npy"
    np.save(wide, np.zeros((2, 5), np.float32))
    assert "'x'" in refused(capsys, "run", path, "--input", f"x={wide}")
    assert "no kernel" in refused(capsys, "inspect", path, "--kernel", "none")
    assert "--against" in refused(capsys, "compare", path, "--against", "tea leaves")
    assert "number with K" in refused(capsys, "cache", "trim", "lots")


def test_unsupported_operators_are_listed(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXJIT_CACHE", str(cache))
    proto = model_proto()
    for node in proto.graph.node[1:]:
        node.op_type, node.domain = f"Custom{node.op_type}", "org.example"
    proto.opset_import.append(helper.make_opsetid("org.example", 1))
    onnx.save(proto, tmp_path / "custom.onnx")
    message = refused(capsys, "run", str(tmp_path / "custom.onnx"))
    assert "CustomRelu" in message and "CustomSoftmax" in message


def test_names_are_escaped_for_the_terminal() -> None:
    from onnxjit.cli_output import clean

    assert clean("a\x1b[31mb\nc") == "a\\x1b[31mb\\nc"
    assert clean("größe [bold]") == "größe [bold]"
