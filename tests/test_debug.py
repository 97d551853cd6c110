"""`ONNXJIT_DEBUG`: what each level prints, for models that are compiled and that are loaded."""

import re

import numpy as np
import onnx
import pytest
from api_models import affine, broadcasting
from typer.testing import CliRunner

import onnxjit
from onnxjit import cli
from onnxjit.errors import OnnxJitError
from onnxjit.passes import PIPELINE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def shown(folder, monkeypatch, capsys):
    """What standard error has after compiling at a level, and the model."""

    def shown(level, proto=None, **options):
        monkeypatch.setenv("ONNXJIT_DEBUG", str(level))
        capsys.readouterr()
        model = onnxjit.compile(
            affine() if proto is None else proto,
            **{"cache": folder, "jobs": 0, "threads": 1, **options},
        )
        output = capsys.readouterr()
        assert output.out == ""
        return output.err, model

    return shown


def titles(text):
    return re.findall(r"^\[onnxjit\] (.*)$", text, re.MULTILINE)


X = np.ones((4, 64), np.float32)

LEVELS = {
    1: ["report"],
    2: [],
    3: ["rule of relu_0"],
    4: ["source of relu_0"],
    5: ["after lower", *(f"after {name}" for name, _ in PIPELINE)],
    6: ["LLVM IR of relu_0", "assembly of relu_0"],
}


@pytest.mark.parametrize("level", range(7))
def test_each_level_has_those_below(shown, capsys, level):
    text, model = shown(level)
    assert titles(text) == [title for n in range(1, level + 1) for title in LEVELS[n]]
    model(X)
    later = capsys.readouterr().err
    assert titles(later) == (["kernel times"] if level >= 2 else [])
    model(X)
    assert capsys.readouterr().err == ""
    parts = {
        1: [model.report()],
        2: [],
        3: [model.kernels["relu_0"].decisions],
        4: [model.kernels["relu_0"].source],
        5: ["kernel matmul(", "kernel relu("],
        6: ["define", ".text"],
    }
    for n, wanted in parts.items():
        assert all((part in text) == (n <= level) for part in wanted), n


def test_a_loaded_model_prints_the_same(shown, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(affine(32), path)
    cold, first = shown(6, path)
    warm, second = shown(6, path)
    assert not first.from_cache and second.from_cache

    def unstamped(text):
        return re.sub(r"(compiled|loaded from the cache) in .* s for", "made in", text)

    # Axes are numbered through a process, so the texts of the passes differ in that.
    names = re.compile(r"\b([ar])\d+\b")
    assert names.sub(r"\1", unstamped(cold)) == names.sub(r"\1", unstamped(warm))


def test_the_times_are_those_of_the_first_run(shown, capsys):
    _, model = shown(2)
    with pytest.raises(onnxjit.InputError):
        model(np.ones((4, 5), np.float32))
    assert capsys.readouterr().err == ""  # nothing has run
    model.feed({"x": X})
    text = capsys.readouterr().err
    assert "relu_0" in text and "GFLOP/s" in text and titles(text) == ["kernel times"]


def test_specialised_runs_have_times_too(shown, capsys):
    _, model = shown(2, broadcasting())
    model(np.ones((4, 3), np.float32), np.ones((1, 3), np.float32))
    assert titles(capsys.readouterr().err) == ["kernel times"]
    assert len(model.specialisations) == 1


def test_sessions_print_too(shown, monkeypatch, capsys, folder):
    monkeypatch.setenv("ONNXJIT_CACHE", str(folder))
    monkeypatch.setenv("ONNXJIT_DEBUG", "2")
    session = onnxjit.InferenceSession(affine().SerializeToString())
    assert titles(capsys.readouterr().err) == ["report"]
    session.run(None, {"x": X})
    assert titles(capsys.readouterr().err) == ["kernel times"]


def test_overrides_count(shown):
    text, _ = shown(5, overrides={"n": 3}, cache=False)
    assert "float32[3, 64]" in text.split("after lower")[1]


@pytest.mark.parametrize("value", ["7", "-1", "yes", "1.5"])
def test_another_value_is_an_error(shown, value):
    with pytest.raises(OnnxJitError, match=f"ONNXJIT_DEBUG is a level from 1 to 6 .*{value}"):
        shown(value)


@pytest.mark.parametrize("value", ["", " ", "0"])
def test_no_level_prints_nothing(shown, value):
    assert shown(value)[0] == ""


def test_names_of_the_model_are_escaped(shown):
    proto = affine()
    proto.graph.node[0].name = "a\x1b[31mred"
    text, _ = shown(1, proto)
    assert "\x1b" not in text and "\\x1b[31mred" in text


def test_inspect_prints_the_same_passes(shown, monkeypatch, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(affine(), path)
    text, _ = shown(5, path)
    monkeypatch.delenv("ONNXJIT_DEBUG")
    printed = CliRunner().invoke(cli.app, ["inspect", str(path), "--passes"]).stdout
    names = re.compile(r"\b([ar])\d+\b")
    first = text.split("[onnxjit] after lower\n")[1].split("[onnxjit]")[0]
    assert names.sub(r"\1", first.strip()) in names.sub(r"\1", printed)
