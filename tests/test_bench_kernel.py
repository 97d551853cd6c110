"""`onnxjit bench-kernel`: its figures, the check of an edited source, and what it refuses."""

import json

import onnx
import pytest
from api_models import affine
from typer.testing import CliRunner

import onnxjit
from onnxjit import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def path(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("ONNXJIT_CACHE", str(folder))
    onnx.save(affine(), tmp_path / "model.onnx")
    return str(tmp_path / "model.onnx")


def call(*arguments, status=0):
    result = CliRunner().invoke(cli.app, ["bench-kernel", *arguments, "--seconds", "0"])
    assert result.exit_code == status, (result.output, result.exception)
    return result.stdout if status < 2 else result.stderr


def test_one_kernel(path):
    data = json.loads(call(path, "relu_0", "--dim", "n=16", "--json"))
    assert data["kernel"] == "relu_0" and data["dims"] == {"n": 16} and data["check"] is None
    assert data["flops"] == 16 * 64 * (2 * 64 + 1) and data["bytes"] == 4 * (64 * 64 + 2 * 16 * 64)
    (row,) = data["times"]
    assert row["source"] == "as compiled" and 0 < row["minimum"] <= row["median"]
    assert row["gflops"] == pytest.approx(data["flops"] / row["minimum"] / 1e9)
    text = call(path, "relu_0")
    assert "as compiled" in text and "GFLOP/s" in text and "(contraction)" in text


def test_an_edited_source(path, tmp_path):
    source = onnxjit.compile(path, jobs=0).kernels["relu_0"].source
    mine = tmp_path / "mine.py"
    mine.write_text(source + "\n# mine\n")
    text = call(path, "relu_0", "--source", str(mine))
    assert "agrees with the kernel's definition" in text
    data = json.loads(call(path, "relu_0", "--source", str(mine), "--json"))
    assert data["check"]["right"] and data["check"]["elements"] > 0
    assert [row["source"] for row in data["times"]] == ["as compiled", str(mine)]

    mine.write_text(source.replace("float32(0.0)", "float32(0.5)"))
    text = call(path, "relu_0", "--source", str(mine), status=1)
    assert "is 0.5, expected 0.0" in text and "GFLOP/s" in text
    data = json.loads(call(path, "relu_0", "--source", str(mine), "--json", status=1))
    assert not data["check"]["right"] and "expected 0.0" in data["check"]["problem"]


def test_what_it_refuses(path, tmp_path, monkeypatch, capsys):
    def refused(*arguments):
        monkeypatch.setattr("sys.argv", ["onnxjit", "bench-kernel", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        message = capsys.readouterr().err
        assert stop.value.code == 2 and "Traceback" not in message
        return message

    assert "no kernel 'foo'" in refused(path, "foo")
    assert "no free dimension 'rows'" in refused(path, "relu_0", "--dim", "rows=3")
    mine = tmp_path / "mine.py"
    assert "cannot read" in refused(path, "relu_0", "--source", str(mine))
    mine.write_text("def kernel(:\n")
    assert "line 1" in refused(path, "relu_0", "--source", str(mine))
