"""`python -m benchmarks`: results, verdicts and the README's section, on a small model."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
from bench_data import MACHINE, row, small_model

from benchmarks import limits, memory, readme, scaling, startup
from benchmarks.__main__ import main
from benchmarks.processes import ChildError, child
from onnxjit.bench.against import ResultError
from onnxjit.runtime.threads import available_threads

COMMITTED = Path(readme.__file__).parent / "results"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONNXJIT_CACHE", str(tmp_path / "cache"))
    small_model(tmp_path)
    return tmp_path


def run(folder: Path, *arguments: str) -> None:
    options = ["--models", str(folder), "--results", str(folder / "results"), "--only", "small",
               "--threads", "1", "--seconds", "0", "--engine", "onnxruntime"]  # fmt: skip
    main([*arguments, *options])


def test_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "models", "--assert", "0.000001", "--assert", "worst:onnxruntime=0.000001")
    path = folder / "results" / "models.json"
    data = json.loads(path.read_text())
    assert data["machine"]["cores"] >= 1 and not data["failed"]
    (found,) = data["rows"]
    assert found["model"] == "small" and found["fastest"] == "onnxruntime"
    assert {s["peer"] for s in data["summary"]} == {"onnxruntime", "fastest"}
    assert "0.000001 holds" in capsys.readouterr().out

    kept = folder / "old.json"
    path.rename(kept)
    with pytest.raises(SystemExit) as stop:
        run(folder, "models", "--against", str(kept), "--assert", "against=1000000")
    assert stop.value.code == 1 and path.is_file()
    text = capsys.readouterr().out
    assert "times as fast as before" in text and "against=1000000 FAILS" in text


def test_what_is_asked_for_is_checked_before_anything_runs(folder: Path) -> None:
    for arguments, message in (
        (["--assert", "fast"], "is no assertion"),
        (["--assert", "against=1"], "needs --against"),
        (["--against", str(folder / "none.json")], "cannot read"),
        (["--engine", "tensorflow"], "no engine 'tensorflow'"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(folder, "models", *arguments)
    assert not (folder / "results").exists()


def test_a_model_that_onnxjit_refuses_leaves_the_others(folder: Path) -> None:
    (folder / "broken.onnx").write_bytes(b"\x00\x01")
    with pytest.raises(SystemExit) as stop:
        run(folder, "models", "--only", "broken")
    assert stop.value.code == 1
    data = json.loads((folder / "results" / "models.json").read_text())
    assert [r["model"] for r in data["rows"]] == ["small"]
    (why,) = data["failed"].items()
    assert why[0] == "broken, 1 thread(s)" and str(folder) not in why[1]


def test_startup_has_a_floor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup.time, "sleep", lambda _: None)
    run(folder, "startup", "--rounds", "1")
    (found,) = json.loads((folder / "results" / "startup.json").read_text())["rows"]
    kinds = found["kinds"]
    assert {"cold", "warm", "numpy", "onnxruntime"} <= set(kinds)
    assert 0 < kinds["numpy"]["peak"] <= kinds["warm"]["peak"]
    assert 0 < kinds["numpy"]["call"] < kinds["warm"]["call"] < kinds["warm"]["seconds"]


@pytest.mark.skipif(available_threads() < 2, reason="needs two cores")
def test_scaling_and_its_ceiling(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "TURNS", 2)
    run(folder, "scaling")
    data = json.loads((folder / "results" / "scaling.json").read_text())
    found = data["rows"][0]["engines"]["onnxjit"]
    assert found["scaling"] > 0 and 0 < found["ceiling"] < 10
    assert data["summary"]["onnxruntime"]["ceiling"] > 0


def test_limits_tell_arithmetic_from_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {k: v for k, v in limits.cases().items() if k in ("Relu", "LogSoftmax of 128")}
    monkeypatch.setattr(limits, "cases", lambda: chosen)
    run(folder, "limits")
    rows = json.loads((folder / "results" / "limits.json").read_text())["rows"]
    assert [r["kernel"] for r in rows] == list(chosen)
    for found in rows:
        assert found["inner"]["bytes"] <= 32 << 10 < found["outer"]["bytes"]
        assert found["attained"] > 0.99 * found["of_bandwidth"] > 0


def test_memory_and_a_process_of_its_own(folder: Path) -> None:
    import numpy as np

    monkeypatched = memory.ROUNDS
    try:
        memory.ROUNDS = 1
        run(folder, "memory")
    finally:
        memory.ROUNDS = monkeypatched
    data = json.loads((folder / "results" / "memory.json").read_text())
    ours = data["rows"][0]["engines"]["onnxjit"]
    assert ours["peak"] > 10 << 20 and ours["arena"] is not None
    assert "onnxruntime" in data["rows"][0]["engines"]

    np.savez(folder / "wrong.npz", other=np.zeros((1, 4), np.float32))
    model, inputs = str(folder / "small.onnx"), str(folder / "wrong.npz")
    with pytest.raises(ChildError, match="KeyError"):
        child("onnxjit", model, inputs, 1, folder / "cache")


def results(folder: Path) -> Path:
    """A folder with results of every kind that the README knows."""
    rows = [
        row("fast", 1, 1e-3, onnxruntime=2e-3, openvino=3e-3),
        row("slow", 1, 2e-3, onnxruntime=1e-3),
        row("fast", 2, 1e-3, onnxruntime=1.5e-3),
    ]
    rows[1]["failures"]["openvino"] = "Conversion is failed"
    rows[2]["failures"]["openvino"] = "its outputs differ"
    rows[2]["disagree"] = ["openvino"]
    seconds = {
        name: {"seconds": 0.5, "call": 0.125} for name in ("cold", "warm", "onnxruntime", "numpy")
    }
    runs = {
        "onnxjit": {"peak": 8.0, "load": 5.0, "run": 1.0},
        "onnxruntime": {"peak": 9.0, "load": 3.0, "run": 2.0},
    }
    peaks = [
        {"model": m, "threads": 1, "peak": p, "ratios": {"onnxruntime": q, "fastest": q}}
        for m, p, q in (("good", 0.9, 2.0), ("low", 0.6, 1.5), ("slower", 0.9, 0.5))
    ]
    kernel = {"kernel": "Exp", "inner": {"gbytes": 22.0}, "outer": {"gbytes": 21.0}, "level": "L3",
              "of_bandwidth": 0.48, "limit": "arithmetic", "attained": 0.95}  # fmt: skip
    gains = {"onnxjit": {"scaling": 1.9, "ceiling": 1.96}}
    files = {
        "models": {"rows": rows},
        "overhead": {"rows": [{"nodes": 2, "microseconds": {"CompiledModel": 1.25}}]},
        "startup": {"rows": [{"model": "fast", "threads": 1, "kinds": seconds}]},
        "memory": {"rows": [{"model": "fast", "engines": runs}]},
        "shapes": {"summary": {"median": 0.001}, "rows": [{"model": "fast"}]},
        "contractions": {"rows": peaks},
        "limits": {"rows": [kernel]},
        "scaling": {"summary": gains, "rows": [{"model": "fast", "engines": gains}]},
    }
    made = folder / "benchmarks" / "results"
    made.mkdir(parents=True)
    for name, data in files.items():
        (made / f"{name}.json").write_text(json.dumps({"machine": MACHINE, **data}))
    return made


def test_readme_is_made_from_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    made = results(tmp_path)
    (made / "elsewhere").mkdir()
    shutil.copy(made / "models.json", made / "elsewhere")
    text = tmp_path / "README.md"
    text.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    arguments = Namespace(results=made, check=True)
    with pytest.raises(SystemExit, match="is not what the results give"):
        readme.main(arguments, text)
    readme.main(Namespace(results=made, check=False), text)
    readme.main(arguments, text)
    assert "is up to date" in capsys.readouterr().out
    before, inside, after = readme.parts(text.read_text())
    assert (before, after) == ("before\n", "\nafter\n")
    # The fastest peer: 2.0 and 0.5 times on one thread, geometric mean 1.
    headline = "| 1 | **the fastest peer of each model** | 2 | **1.00x** | 1 of 2 | 0.50x `slow` |"
    assert inside.count(headline) == 2
    assert "Earlier, on another machine: elsewhere" in inside
    assert "| 2 | ONNX Runtime | 1 | 1.50x | 1 of 1 | 1.50x `fast` |" in inside
    assert "| `slow` | 2 | **1** | fails | 0.50x |" in inside
    assert "| `fast` | **1** | 1.5 | differs | 1.50x |" in inside
    assert "`CompiledModel` 1.2 µs" in inside and "onnxjit with an empty cache 0.50 s" in inside
    assert "at its peak on 1 of 1 models" in inside and "together on 0, for" in inside
    assert "has left) on 1." in inside
    assert "costs 1.00 ms" in inside and "A Processor" in inside
    assert "3 rows, one thread: 1.14 times" in inside
    assert "2 at least as fast as ONNX Runtime, 2 at 88%" in inside
    assert "| `low` | 0.60 | 0.40 | 1.50x |" in inside and "`good`" not in inside
    assert "| Exp | 22 | 21 | 0.48 | arithmetic | 0.95 |" in inside
    assert "| `fast` | 1.90 / 1.96 |" in inside
    assert (
        "at most 5 s on 1 of 1 models; warm is at most half of ONNX Runtime's on 0 of 1" in inside
    )
    assert "| `fast` | 0.50 | 0.50 | 0.50 | 0.50 | 0.62 |" in inside
    for name in readme.PLOTS.values():
        assert f"benchmarks/results/{name}" in inside and (made / name).is_file()


def test_readme_says_what_it_needs(tmp_path: Path) -> None:
    made = results(tmp_path)
    with pytest.raises(ValueError, match="has no <!--"):
        readme.parts("no marks")
    (made / "models.json").write_text('{"rows": [{"model": "a", "ratio": 1.0}]}')
    with pytest.raises(ResultError, match="it is not a result"):
        readme.section(made, tmp_path)


def test_the_readme_of_this_tree_is_what_its_results_give() -> None:
    """Between the marks stands nothing, or what the command makes of the committed results."""
    inside = readme.parts(readme.README.read_text(encoding="utf-8"))[1].strip()
    assert not inside or inside == readme.section(COMMITTED, readme.README.parent).strip()


def test_contractions_of_a_model(folder: Path) -> None:
    import numpy as np

    from benchmarks.contractions import contractions

    model = str(folder / "small.onnx")
    (found,) = contractions(model, {"x": np.zeros((7, 4), np.float32)})
    assert (found.op, found.shapes, found.output) == ("MatMul", ((7, 4), (4, 3)), (7, 3))
    assert found.constant == (False, True) and found.name == "MatMul 7x4 4x3 xw"
    assert found.flops == 2 * 7 * 4 * 3 and found.bytes == 4 * (28 + 12 + 21)
    run(folder, "contractions")
    data = json.loads((folder / "results" / "contractions.json").read_text())
    (measured,) = data["rows"]
    assert measured["model"] == "MatMul 1x4 4x3 xw" and measured["count"] == 1
    assert measured["gflops"] > 0 and measured["peak"] > 0 and measured["ratios"]["onnxruntime"] > 0


def test_tuning(folder: Path) -> None:
    run(folder, "tuning", "--tune", "1e-6")
    data = json.loads((folder / "results" / "tuning.json").read_text())
    (found,) = data["rows"]
    assert found["model"] == "small" and found["kernels"] == []
    assert (
        found["ratio"] == found["usual"] / found["tuned"] == pytest.approx(data["summary"]["mean"])
    )
