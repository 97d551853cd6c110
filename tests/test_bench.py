"""The comparison of engines: who takes part, what is checked, what is said, verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bench_data import MACHINE, result, row
from onnx import TensorProto, helper

from onnxjit.bench import against, engines
from onnxjit.bench.engines import ENGINES, Engine, Loaded, Unsupported
from onnxjit.bench.machine import describe, machine
from onnxjit.bench.measure import TOLERANCE, measure, summaries
from onnxjit.bench.turns import Timing

Y = np.array([[1.0, 2.0]], np.float32)


def engine_of(*outputs: np.ndarray, precision: str = "float32", note: str = "") -> Engine:
    """An engine whose every model returns these arrays."""

    def load(path: str, threads: int) -> Loaded:
        return Loaded(lambda feeds: lambda: outputs, ("y",), None, note)

    return Engine(load, ("onnxjit",), precision=precision)


def failing(error: Exception) -> Engine:
    def load(path: str, threads: int) -> Loaded:
        raise error

    return Engine(load, ("onnxjit",))


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`measure` with these engines in place of the table, and onnxjit returning `Y`."""

    def run(**table: Engine) -> dict[str, Any]:
        made = {"onnxjit": engine_of(Y), **table}
        monkeypatch.setattr("onnxjit.bench.measure.ENGINES", made)
        return measure("/somewhere/model.onnx", {}, 1, list(made), 0.0)

    return run


def test_a_peer_that_agrees_is_timed(compared: Callable[..., dict[str, Any]]) -> None:
    found = compared(peer=engine_of(Y * (1 + TOLERANCE / 2), note="a remark"))
    assert not found["failures"] and found["fastest"] == "peer" and not found["alone"]
    timed = found["engines"]["peer"]
    assert 0 < timed["minimum"] <= timed["lower"] <= timed["median"] <= timed["upper"]
    assert timed["runs"] >= 10 and timed["note"] == "a remark"
    assert timed["difference"] == pytest.approx(TOLERANCE / 2, rel=0.1)
    ours = found["engines"]["onnxjit"]["minimum"]
    assert found["ratios"]["fastest"] == pytest.approx(timed["minimum"] / ours)


def test_peers_that_cannot_be_compared_say_why(compared: Callable[..., dict[str, Any]]) -> None:
    found = compared(
        good=engine_of(Y),
        far=engine_of(Y + 1),
        other=engine_of(Y.astype(np.float64)),
        flat=engine_of(Y.ravel()),
        fewer=engine_of(),
        raises=failing(ValueError("no such operator\nin /somewhere/model.onnx")),
        unable=failing(Unsupported("one thread only")),
        absent=Engine(lambda path, threads: pytest.fail("loaded"), ("a-package-that-is-not",)),
    )
    assert list(found["engines"]) == ["onnxjit", "good"]
    why = found["failures"]
    assert "differ from onnxjit's by 5.0e-01" in why["far"]
    assert why["other"] == "its output 0 is float64[1, 2], not float32[1, 2]"
    assert why["flat"] == "its output 0 is float32[2], not float32[1, 2]"
    assert why["fewer"] == "it returns 0 outputs, not 1"
    assert why["raises"] == "no such operator in model.onnx"
    assert why["unable"] == "one thread only"
    assert why["absent"] == "not installed: a-package-that-is-not"
    assert found["disagree"] == ["far", "other", "flat", "fewer"] and not found["alone"]


def test_outputs_that_nobody_shares_are_in_doubt(compared: Callable[..., dict[str, Any]]) -> None:
    assert compared(far=engine_of(Y + 1))["alone"]
    assert not compared(raises=failing(ValueError("no")))["alone"]


def test_lower_precision_is_a_row_but_not_the_fastest(
    compared: Callable[..., dict[str, Any]],
) -> None:
    found = compared(half=engine_of(Y * np.float32(1.01), precision="bfloat16"))
    assert found["engines"]["half"]["difference"] == pytest.approx(0.01, rel=0.1)
    assert found["fastest"] is None and list(found["ratios"]) == ["half"]


def test_an_error_of_our_own_is_not_hidden(compared: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="ours"):
        compared(onnxjit=failing(ValueError("ours")), peer=engine_of(Y))


def test_openvino_failing_to_convert_is_a_row(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    # With ceil_mode a window may be larger than what it looks at; OpenVINO refuses that.
    node = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[9, 9], strides=[9, 9],
                            ceil_mode=1, count_include_pad=1)  # fmt: skip
    graph = helper.make_graph(
        [node],
        "pool",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 9, 7, 7])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    path = str(tmp_path / "pool.onnx")
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path
    )
    x = np.random.default_rng(0).standard_normal((1, 9, 7, 7)).astype(np.float32)
    found = measure(path, {"x": x}, 1, ["onnxjit", "onnxruntime", "openvino"], 0.0)
    assert "Conversion is failed for: AveragePool" in found["failures"]["openvino"]
    assert found["fastest"] == "onnxruntime"


def test_engines_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = Engine(lambda path, threads: pytest.fail("loaded"), ("a-package-that-is-not",))
    table = {**ENGINES, "extra": nowhere}
    monkeypatch.setattr(engines, "ENGINES", table)
    usual = engines.wanted()
    assert usual[:3] == ["onnxjit", "onnxruntime", "openvino"] and "extra" not in usual
    assert engines.wanted(["extra", "onnxjit", "extra"]) == ["onnxjit", "extra"]
    with pytest.raises(KeyError, match="no engine 'tensorflow'; there are onnxjit, "):
        engines.wanted(["tensorflow"])
    assert engines.engine_version("extra") is None and engines.engine_version("numpy")


def test_quartiles() -> None:
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Timing(1.0, 3.0, 2.0, 4.0, 5)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 2.0, 1)


def test_summaries_name_the_worst_model() -> None:
    rows = [row("a", 1, 1.0, ort=2.0, ov=1.0), row("b", 1, 1.0, ort=0.5), row("c", 2, 1.0, ort=3.0)]
    found = {(s["threads"], s["peer"]): s for s in summaries(rows)}
    assert set(found) == {(1, "ort"), (1, "ov"), (1, "fastest"), (2, "ort"), (2, "fastest")}
    assert found[1, "ort"]["mean"] == pytest.approx(1.0)
    fastest = found[1, "fastest"]
    assert (fastest["worst"], fastest["worst_ratio"], fastest["faster"]) == ("b", 0.5, 1)
    assert fastest["mean"] == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1.25", ("fastest", 1.25, False)),
        ("onnxruntime=1", ("onnxruntime", 1.0, False)),
        ("worst:openvino-bf16=.5", ("openvino-bf16", 0.5, True)),
        ("worst:1.0", ("fastest", 1.0, True)),
    ],
)
def test_assertions(text: str, expected: tuple[str, float, bool]) -> None:
    found = against.parse(text)
    assert (found.what, found.ratio, found.worst) == expected


@pytest.mark.parametrize("text", ["", "fast", "ort=", "=1", "ort>1", "worst=1:2", "-1", "1e3"])
def test_what_is_no_assertion(text: str) -> None:
    with pytest.raises(ValueError, match="is no assertion"):
        against.parse(text)


def test_verdicts() -> None:
    rows = [row("a", 1, 1.0, ort=2.0), row("b", 1, 1.0, ort=0.5), row("a", 2, 1.0, ort=1.5)]
    found = against.judge(["0.99", "worst:ort=0.6", "ov=1"], rows)
    assert [(v.threads, v.holds) for v in found] == [
        (1, True), (2, True), (1, False), (2, True), (1, False), (2, False)
    ]  # fmt: skip
    assert "worst 0.500 over 2 model(s), least for b" in str(found[2])
    assert "nothing to compare with" in str(found[4])


def test_comparison_with_an_earlier_result(tmp_path: Path) -> None:
    earlier = tmp_path / "old.json"
    old = [row("a", 1, 1.0, ort=2.0), row("b", 1, 1.0), row("gone", 1, 1.0)]
    earlier.write_text(json.dumps({"machine": MACHINE, "rows": old}))
    # The machine became half as fast: the peer and we alike on "a", where "ov" is new.
    new = [row("a", 1, 2.0, ort=4.0, ov=1.0), row("b", 1, 2.0), row("a", 2, 1.0)]
    changes = against.compare(new, against.load(earlier))
    assert [(c.model, c.threads) for c in changes] == [("a", 1), ("b", 1)]
    assert changes[0].time == 0.5 and changes[0].ratio == pytest.approx(1.0)
    assert changes[1].relative is None and changes[1].ratio == 0.5
    verdicts = against.judge(["against=0.95", "worst:against=0.95"], new, changes)
    assert [(v.threads, v.holds) for v in verdicts] == [(1, False), (2, False)] * 2
    only_a = against.judge(["against=0.95"], new[:1], changes[:1])
    assert [v.holds for v in only_a] == [True]
    other = against.other_machine({"machine": MACHINE}, {**MACHINE, "cores": 8})
    assert other == ["cores 2 then, 8 now"]


def test_files_that_are_no_result(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(against.ResultError, match="cannot read"):
        against.load(path)
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "it is not a result"),
        ('{"rows": []}', "it is not a result"),
        ('{"rows": [{"model": "a", "threads": 1, "ratio": 1.0}]}', "it is not a result"),
    ):
        path.write_text(text)
        with pytest.raises(against.ResultError, match=message):
            against.load(path)
    path.write_text(json.dumps(result()))
    assert against.load(path)["rows"][0]["model"] == "small"


def test_the_machine_is_recorded() -> None:
    facts = machine()
    assert facts["cores"] >= 1 and facts["cpu"] and facts["packages"]["numpy"] == np.__version__
    assert {"governor", "clock", "load", "date", "virtual"} <= facts.keys()
    json.dumps(facts)
    text = "\n".join(describe(facts))
    assert facts["cpu"] in text and "governor" in text and f"numpy {np.__version__}" in text
