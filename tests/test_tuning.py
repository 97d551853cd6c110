"""Tuning: what is measured, kept, used again and reported, and what cannot go wrong.

The clock is replaced where a test says which variant is fastest, so that no test depends on how
busy the machine is; `test_tuned_by_the_clock` measures for real.
"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from api_models import NODE, affine
from small_models import info, model_of, weight
from typer.testing import CliRunner

import onnxjit
from onnxjit import tuning
from onnxjit.bench import Timing
from onnxjit.cli import app
from onnxjit.codegen.build import Source
from onnxjit.codegen.canonical import canonical
from onnxjit.codegen.microkernels import covers
from onnxjit.codegen.signature import structure
from onnxjit.codegen.target import host
from onnxjit.codegen.tuned import Table, Tuned, read, tables
from onnxjit.codegen_calls import planned
from onnxjit.errors import ModelError
from onnxjit.importer import import_model
from onnxjit.passes import run_pipeline
from onnxjit.session_errors import InvalidArgument

USUAL, *OTHERS = dict.fromkeys(cover.nr for cover in covers(None, 64, host()))
FEW, MANY = min(OTHERS), max(OTHERS)
"""Widths of a register tile that this machine has beside the one it takes for 64 columns."""

NARROW, WIDE = f"tile_columns_{FEW}", f"tile_columns_{MANY}"

X = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of compiled kernels that the tests of this module share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(kernels: Path) -> Path:
    """A cache without models and without a table."""
    for name in ("models", "tuning", "index"):
        shutil.rmtree(kernels / name, ignore_errors=True)
    return kernels


@pytest.fixture
def build(cache: Path) -> Callable[..., onnxjit.CompiledModel]:
    """`onnxjit.compile` without processes of its own, in that cache."""

    def build(model: Any, **options: Any) -> onnxjit.CompiledModel:
        return onnxjit.compile(model, **{"cache": cache, "jobs": 0, "threads": 1, **options})

    return build


class Clock:
    """Says that a kernel takes 100 us, divided by the factor of each choice of its variant."""

    def __init__(self, factors: Mapping[tuple[str, int], float]) -> None:
        self.factors = factors
        self.asked: list[dict[str, int]] = []

    def __call__(self, kernel: Any, among: Sequence[Any], *_: Any) -> list[Timing]:
        times = []
        for one in among:
            self.asked.append(dict(one.variant))
            seconds = 100e-6
            for choice in one.variant.items():
                seconds /= self.factors.get(choice, 0.9)
            times.append(Timing(seconds, seconds, seconds, seconds, 9))
        return times


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    def install(**factors: float) -> Clock:
        """`clock(strip_tiles_6=1.5)`: that choice makes a kernel 1.5 times as fast."""
        table = {(n.rpartition("_")[0], int(n.rpartition("_")[2])): f for n, f in factors.items()}
        made = Clock(table)
        monkeypatch.setattr(tuning._Kernel, "times", lambda *given: made(*given))
        return made

    return install


def convolution(side: int = 12, name: str = "w") -> onnx.ModelProto:
    """y = relu(conv(x, w)), 3x3 with padding: minimal filtering or not is a choice."""
    return model_of(
        [NODE("Conv", ["x", name], ["t"], pads=[1, 1, 1, 1]), NODE("Relu", ["t"], ["y"])],
        [info("x", ("n", 16, side, side))],
        [info("y", ("n", 20, side, side))],
        [onnx.numpy_helper.from_array(
            np.random.default_rng(1).standard_normal((20, 16, 3, 3), np.float32), name)],
    )  # fmt: skip


def only(model: onnxjit.CompiledModel) -> Any:
    (kernel,) = model.kernels.values()
    return kernel


# --- what is measured and used -------------------------------------------------------------------


def test_the_fastest_variant_is_used_and_remembered(build, clock, cache):
    ticks = clock(**{NARROW: 1.25}, parallel_tiles_2=1.2, strip_tiles_6=0.5)
    usual = build(affine(), cache=False)
    model = build(affine(), tune=60)
    kernel = only(model)
    assert kernel.variant == {"tile_columns": FEW, "parallel_tiles": 2}
    assert kernel.gain == pytest.approx(1.5)
    assert f"x{FEW}_" in kernel.source
    assert f"x{FEW}_" not in only(usual).source
    assert f"tuned: tile_columns {FEW}, parallel_tiles 2; 1.50 times as fast" in kernel.decisions
    assert f"1.50x  tile_columns {FEW}, parallel_tiles 2" in model.report()
    assert "tuned" not in usual.report()
    np.testing.assert_allclose(model(X), usual(X), rtol=1e-4, atol=1e-2)
    assert {} in ticks.asked
    again = build(affine())
    assert only(again).variant == kernel.variant
    assert again.from_cache
    data = json.loads(next((cache / "tuning").glob("*.json")).read_text())
    (row,) = data["kernels"].values()
    assert row["choices"] == kernel.variant
    assert row["sizes"] == {"n": 1}
    assert data["threads"] == 1


def test_options_that_were_slow_are_not_tried_with_others(build, clock):
    ticks = clock(**{NARROW: 1.25}, parallel_tiles_2=1.2)
    build(affine(), tune=60)
    pairs = [v for v in ticks.asked if len(v) > 1 and v.keys() != {"tile_columns"}]
    assert pairs
    assert all(v.get("parallel_tiles") == 2 for v in pairs if "tile_rows" not in v)


def test_a_gain_within_the_noise_is_none(build, clock):
    ticks = clock(**{NARROW: 1.02})
    model = build(affine(), tune=60)
    assert only(model).variant == {}
    assert only(model).gain == 1.0
    asked = len(ticks.asked)
    assert asked
    build(affine(), tune=60)
    assert len(ticks.asked) == asked  # it is known that there is nothing to gain


def test_the_table_serves_other_models_and_other_threads_have_their_own(build, clock):
    ticks = clock(**{NARROW: 1.25})
    build(affine(name="w"), tune=60)
    asked = len(ticks.asked)
    other = build(affine(name="other"), tune=60)  # the same kernel, another model
    assert only(other).variant == {"tile_columns": FEW}
    assert len(ticks.asked) == asked
    assert only(build(affine(), threads=2)).variant == {}
    build(affine(), threads=2, tune=60)
    assert len(ticks.asked) == 2 * asked


def test_other_models_are_not_compiled_again(build, clock):
    clock(**{NARROW: 1.25}, filtering_2=1.5, filtering_4=1.5)
    build(affine(), tune=60)
    first = build(convolution())
    assert not first.from_cache
    assert build(convolution()).from_cache
    build(affine(), threads=2, tune=60)  # another table
    build(affine(32), tune=60)  # the table grows by a kernel that this model lacks
    assert build(convolution()).from_cache
    tuned = build(convolution(), tune=60)
    assert any(k.variant for k in tuned.kernels.values())
    again = build(convolution())
    assert again.from_cache
    assert [k.variant for k in again.kernels.values()] == [
        k.variant for k in tuned.kernels.values()
    ]


def test_minimal_filtering_is_a_choice(build, clock):
    clock(filtering_4=2.0, filtering_2=1.5, filtering_0=2.0)
    x = np.random.default_rng(2).standard_normal((2, 16, 12, 12)).astype(np.float32)
    usual = build(convolution(), cache=False)
    tuned = build(convolution(), tune=60)
    rules = [{k.rule for k in m.kernels.values()} for m in (usual, tuned)]
    assert ("winograd" in rules[0]) != ("winograd" in rules[1])
    np.testing.assert_allclose(tuned(x), usual(x), rtol=1e-3, atol=1e-3)


def test_nothing_to_choose(build, clock):
    ticks = clock()
    model = build(
        model_of([NODE("Relu", ["x"], ["y"])], [info("x", ("n", 3))], [info("y", ("n", 3))]),
        tune=60,
    )
    assert only(model).variant == {}
    assert not ticks.asked


def test_kernels_of_no_time_are_left_as_they_are(build, monkeypatch):
    def times(kernel: Any, among: Sequence[Any], *_: Any) -> list[Timing]:
        assert len(among) == 1
        return [Timing(1e-6, 1e-6, 1e-6, 1e-6, 9)]

    monkeypatch.setattr(tuning._Kernel, "times", times)
    assert only(build(affine(), tune=60)).variant == {}


# --- budget --------------------------------------------------------------------------------------


def test_a_tiny_budget_measures_nothing(build, clock, cache):
    ticks = clock(**{NARROW: 1.25})
    model = build(affine(), tune=1e-9)
    assert not ticks.asked
    assert only(model).variant == {}
    assert not list((cache / "tuning").glob("*.json"))
    assert only(build(affine(), tune=60)).variant  # nothing was taken for known


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_a_budget_is_a_number_of_seconds(build, seconds):
    with pytest.raises(ValueError, match="seconds"):
        build(affine(), tune=seconds)


def test_time_that_runs_out_keeps_what_is_known(build, clock, monkeypatch):
    """The second kernel's turn does not come."""
    clock(**{NARROW: 1.25})
    now = [0.0]
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now[0])
    fastest = tuning._Kernel.fastest

    def slow(kernel: Any, end: float) -> Any:
        found = fastest(kernel, end)
        now[0] += 100
        return found

    monkeypatch.setattr(tuning._Kernel, "fastest", slow)
    nodes = [NODE("MatMul", ["x", "a"], ["t"]), NODE("MatMul", ["t", "b"], ["y"])]
    weights = [weight("a", (64, 96)), weight("b", (96, 512))]
    proto = model_of(nodes, [info("x", ("n", 64))], [info("y", ("n", 512))], weights)
    gains = [k.variant for k in build(proto, tune=50).kernels.values()]
    assert gains.count({}) == 1  # the larger one comes first
    assert gains[0] == {}
    assert all(k.variant for k in build(proto, tune=50).kernels.values())


def test_progress(build, clock):
    clock()
    seen: list[tuple[int, int]] = []
    build(affine(), tune=60, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1), (1, 1)]  # tuned, then compiled


# --- never wrong ---------------------------------------------------------------------------------


def test_a_wrong_variant_is_never_used(build, clock, monkeypatch):
    clock(**{NARROW: 3.0, WIDE: 1.5})

    def wrong(request: Any, name: str, *rest: Any) -> Any:
        made = planned(request, name, *rest)
        if request.variant.get("tile_columns") != FEW:
            return made
        text = made.source.text.replace("0.0", "1.0")
        assert text != made.source.text
        return replace(made, source=Source(text, made.source.symbols, name, made.source.wide))

    monkeypatch.setattr(tuning, "planned", wrong)
    with pytest.warns(UserWarning, match="left out: it computes something else"):
        model = build(affine(), tune=60)
    assert only(model).variant == {"tile_columns": MANY}


def test_a_variant_that_does_not_compile_is_left_out(build, clock, monkeypatch):
    clock(**{NARROW: 3.0, WIDE: 1.5})

    def broken(request: Any, name: str, *rest: Any) -> Any:
        made = planned(request, name, *rest)
        if request.variant.get("tile_columns") != FEW:
            return made
        text = made.source.text + "\nnonsense("
        return replace(made, source=Source(text, made.source.symbols, name, made.source.wide))

    monkeypatch.setattr(tuning, "planned", broken)
    with pytest.warns(UserWarning, match="left out: cannot compile"):
        model = build(affine(), tune=60)
    assert only(model).variant == {"tile_columns": MANY}


# --- the table -----------------------------------------------------------------------------------

GOOD = "a" * 32
ROW = {
    "kernel": "k",
    "sizes": {"n": 1},
    "choices": {"tile_rows": 6},
    "microseconds": 1.0,
    "usual": 2.0,
}


def table_path(tmp_path: Path) -> Path:
    path = tmp_path / "avx512-1.json"
    Table(path).remember(GOOD, Tuned({"tile_rows": 6}, 1e-6, 2e-6, "k", {"n": 1}))
    return path


def test_a_table_comes_back(tmp_path):
    path = table_path(tmp_path)
    (row,) = read(path).values()
    assert row == Tuned({"tile_rows": 6}, 1e-6, 2e-6, "k", {"n": 1})
    assert row.gain == pytest.approx(2)
    assert json.loads(path.read_text())["kernels"] == {GOOD: ROW}


@pytest.mark.parametrize("change", [
    {"choices": {"tile_rows": -1}}, {"choices": {"tile_rows": True}}, {"choices": {"x; y": 1}},
    {"choices": {"tile_rows": 6.5}}, {"choices": {"tile_rows": "6"}}, {"choices": [1, 2]},
    {"choices": {"tile_rows": 1 << 40}}, {"choices": {f"c{n}": 1 for n in range(99)}},
    {"choices": None}, {"microseconds": "fast"}, {"usual": float("nan")}, {"usual": -1},
    {"sizes": {"n": "1"}}, {"sizes": 3},
], ids=str)  # fmt: skip
def test_a_row_that_makes_no_sense_is_ignored(tmp_path, change):
    path = table_path(tmp_path)
    data = json.loads(path.read_text())
    data["kernels"]["b" * 32] = {**ROW, **change}
    path.write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="1 of 2 kernels are ignored"):
        assert list(read(path)) == [GOOD]


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", '"x"', "{}", '{"format": 1}', '{"format": 2, "kernels": {}}',
    '{"format": 1, "kernels": 3}', "\x00\xff", "[" * 100_000,
], ids=lambda t: t[:20])  # fmt: skip
def test_a_damaged_table_is_ignored_and_replaced(tmp_path, text):
    path = table_path(tmp_path)
    path.write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match="ignored"):
        table = Table(path, read(path))
    assert not table.rows
    table.remember(GOOD, Tuned({}))
    assert list(read(path)) == [GOOD]


def test_a_table_of_other_schedules_is_ignored(tmp_path):
    path = table_path(tmp_path)
    path.write_text(path.read_text().replace(tuning_code(), "0123456789abcdef"))
    with pytest.warns(UserWarning, match="other schedules"):
        assert read(path) == {}


def tuning_code() -> str:
    from onnxjit.codegen.tuned import code

    return code()


def test_unknown_choices_change_nothing(build, clock, cache):
    """A row may name choices and values that no rule offers."""
    clock(**{NARROW: 1.25})
    usual = only(build(affine(), cache=False))
    build(affine(), tune=60)
    (path,) = (cache / "tuning").glob("*.json")
    data = json.loads(path.read_text())
    for row in data["kernels"].values():
        row["choices"] = {"tile_columns": 17, "strip_tiles": 0, "no_such_choice": 5}
    path.write_text(json.dumps(data))
    model = build(affine())
    assert only(model).source == usual.source
    assert only(model).key == usual.key


def test_processes_add_to_one_table(tmp_path):
    path = tmp_path / "avx512-2.json"
    code = (
        "import sys; from pathlib import Path; from onnxjit.codegen.tuned import Table, Tuned\n"
        "table = Table(Path(sys.argv[1]))\n"
        "for n in range(20): table.remember(f'{int(sys.argv[2]) * 100 + n:032x}', Tuned({}))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), str(k)]) for k in range(3)]
    assert [one.wait() for one in running] == [0, 0, 0]
    assert len(read(path)) == 60


def test_a_table_that_cannot_be_written_is_a_warning(tmp_path):
    table = Table(tmp_path / "missing" / "avx512-1.json")
    with pytest.warns(UserWarning, match="cannot keep"):
        table.remember(GOOD, Tuned({}))
    assert GOOD in table.rows


# --- models --------------------------------------------------------------------------------------


def test_without_a_cache_nothing_is_kept(build, clock, tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXJIT_CACHE", str(tmp_path / "unused"))
    clock(**{NARROW: 1.25})
    model = build(affine(), cache=False, tune=60)
    assert only(model).variant == {"tile_columns": FEW}
    assert not (tmp_path / "unused").exists()


def test_pickle(build, clock):
    clock(**{NARROW: 1.25})
    model = build(affine(), tune=60)
    copy = pickle.loads(pickle.dumps(model))
    assert only(copy).variant == {"tile_columns": FEW}
    np.testing.assert_array_equal(copy(X), model(X))


def test_edited_kernels_of_a_tuned_model(build, clock):
    clock(**{NARROW: 1.25})
    model = build(affine(), tune=60)
    (name,) = model.kernels
    edited = model.kernels.replace(name, model.kernels[name].source + "\n# edited\n")
    assert edited.original is not None
    assert "tuned, and" not in model.report()
    model.kernels.restore()
    assert "tuned, and" in model.report()


def test_stages_and_parts_that_depend_on_data(build, clock):
    """A product behind NonZero has a size that only the run knows; it is tuned as any other."""
    clock(**{NARROW: 1.25})
    nodes = [
        NODE("NonZero", ["c"], ["at"]),
        NODE("Squeeze", ["at", "zero"], ["rows"]),
        NODE("Gather", ["x", "rows"], ["some"], axis=0),
        NODE("MatMul", ["some", "w"], ["y"]),
    ]
    constants = [
        weight("w", (64, 96)),
        onnx.numpy_helper.from_array(np.array([0], np.int64), "zero"),
    ]
    proto = model_of(nodes, [info("x", ("n", 64)), info("c", ("n",))], [info("y", None)], constants)
    model = build(proto, tune=60)
    assert any(k.variant for k in model.kernels.values())
    c = np.array([1, 0, 2, 0, 3], np.float32)
    w = onnx.numpy_helper.to_array(constants[0])
    np.testing.assert_allclose(model(X, c), X[[0, 2, 4]] @ w, rtol=1e-4, atol=1e-2)


def test_sizes_to_measure_at(build, clock, monkeypatch):
    clock()
    seen = []
    measured = tuning._Kernel.measured
    monkeypatch.setattr(
        tuning._Kernel, "measured", lambda k, sizes: seen.append(measured(k, sizes)) or seen[-1]
    )
    build(affine(), tune=60, sizes={"n": 33})
    assert [list(s.values()) for s in seen] == [[33]]
    with pytest.raises(ModelError, match="no dimension is called 'm'; the model has 'n'"):
        build(affine(32), tune=60, sizes={"m": 3})


def test_guessed_sizes():
    proto = model_of(
        [NODE("Relu", ["x"], ["y"]), NODE("Relu", ["i"], ["j"])],
        [info("x", ("b", "s", 4)), info("i", ("b", 3, "h", "w"))],
        [info("y", None), info("j", None)],
    )
    program = run_pipeline(import_model(proto.SerializeToString()), onnxjit_host())
    labels = {d.name: d.label for d in program.dims}
    guessed = {labels[n]: v for n, v in tuning.guessed(program, {"w": 7}).items()}
    assert guessed == {"b": 1, "s": 128, "h": 224, "w": 7}


def onnxjit_host() -> Any:
    from onnxjit.codegen.target import host

    return host()


def test_structure_ignores_names_alone():
    def of(proto: onnx.ModelProto) -> list[str]:
        program = run_pipeline(import_model(proto.SerializeToString()), onnxjit_host())
        return [structure(canonical(c.kernel).kernel, {}, ["b1"]) for c in program.kernels()]

    assert of(affine(name="a")) == of(affine(name="b"))
    assert of(affine(64)) != of(affine(65))
    (kernel,) = [canonical(c.kernel).kernel for c in run_pipeline(
        import_model(affine().SerializeToString()), onnxjit_host()).kernels()]  # fmt: skip
    one = structure(kernel, {}, ["b1"])
    assert one != structure(kernel, {}, [])
    assert one != structure(kernel, {"b0": (1, 0)}, ["b1"])


def test_tuned_by_the_clock(build):
    """Without a replaced clock; whatever is found, the results are the same."""
    x = np.random.default_rng(2).standard_normal((1, 16, 12, 12)).astype(np.float32)
    usual = build(convolution(), cache=False)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(convolution(), tune=120)
    np.testing.assert_allclose(model(x), usual, rtol=1e-3, atol=1e-3)
    again = build(convolution(), tune=120)
    assert again.from_cache
    np.testing.assert_array_equal(again(x), model(x))


# --- sessions and the command line ---------------------------------------------------------------


def test_sessions(clock, cache, monkeypatch):
    clock(**{NARROW: 1.25})
    monkeypatch.setenv("ONNXJIT_CACHE", str(cache))
    options = onnxjit.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("onnxjit.tune", "30")
    session = onnxjit.InferenceSession(affine().SerializeToString(), options)
    assert only(session._model).variant == {"tile_columns": FEW}
    for text in ("soon", "-1", "nan"):
        options.add_session_config_entry("onnxjit.tune", text)
        with pytest.raises(InvalidArgument, match="number of seconds"):
            onnxjit.InferenceSession(affine().SerializeToString(), options)


def test_command_line(clock, cache, tmp_path, monkeypatch):
    clock(**{NARROW: 1.25})
    monkeypatch.setenv("ONNXJIT_CACHE", str(cache))
    path = str(tmp_path / "m.onnx")
    onnx.save(affine(), path)
    run = CliRunner().invoke
    assert run(app, ["run", path, "--threads", "1", "--tune", "30", "--dim", "n=3"]).exit_code == 0
    shown = run(app, ["cache", "show"])
    assert "1 thread(s): 1 kernels, 1 of them with a variant that is faster" in shown.stdout
    data = json.loads(run(app, ["cache", "show", "--json"]).stdout)
    ((name, counts),) = data["tuned"].items()
    assert counts == {"kernels": 1, "variants": 1}
    assert name.endswith("-1")
    from onnxjit.codegen.cache import Cache

    assert list(tables(Cache())) == [name]
    assert run(app, ["cache", "clear"]).exit_code == 0
    assert tables(Cache()) == {}
