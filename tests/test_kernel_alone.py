"""One kernel by itself: against its definition, at which sizes, against the clock, in Python."""

import bdb
import json

import numpy as np
import pytest
from api_models import affine, broadcasting
from kernels_support import lower_model
from swap_models import MODELS, RELU, convolutions, embedding, matrices, shifted

from onnxjit.codegen.signature import from_data, signature, to_data
from onnxjit.codegen_calls import ScheduledCall
from onnxjit.errors import InputError
from onnxjit.kernel_check import agree
from onnxjit.kernel_run import index_limits, random_problem
from onnxjit.kernel_sizes import small_sizes


@pytest.fixture
def model(build):
    """y = relu(x @ w) as one kernel, `relu_0`."""
    return build(affine())


@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_agrees_with_its_definition(build, name):
    made = build(MODELS[name]())
    assert len(made.kernels)
    for kernel in made.kernels.values():
        checked = kernel.check(kernel.source)
        assert checked.elements > 0
        assert kernel.check(kernel.source + "\n# the same\n") == checked


@pytest.mark.parametrize("name", MODELS)
def test_signatures_survive_json(name):
    low = lower_model(MODELS[name]())
    calls = [c for c in low.generated.scheduled if isinstance(c, ScheduledCall)]
    for c in calls:
        made = signature(c.call.kernel, c.nest, low.program.layouts)
        again = from_data(json.loads(json.dumps(to_data(made))))
        assert again == made and str(again.definition) == str(made.definition)
    assert calls


# --- random data and sizes ---------------------------------------------------------------------


def test_small_sizes_have_edges_and_keep_conditions(build):
    made = build(matrices())
    (kernel,) = made.kernels.values()
    space = kernel._space()
    chosen = small_sizes(space)
    values = {n for sizes in chosen for n in sizes.values()}
    assert {0, 1, 3, 17} <= values and len(space.dims) == 3
    assert len({tuple(sizes.values()) for sizes in chosen}) == len(chosen) >= 6
    assert any(len(set(sizes.values())) > 1 for sizes in chosen)


def test_sizes_that_the_code_does_not_serve(build):
    """`broadcasting` assumes that both sizes are the same."""
    made = build(broadcasting())
    (kernel,) = made.kernels.values()
    space = kernel._space()
    assert set(space.labels.values()) == {"n", "m"}
    assert all(len(set(sizes.values())) == 1 for sizes in small_sizes(space))
    assert kernel.check(kernel.source, {"n": 9, "m": 9}).sizes == ({"n": 9, "m": 9},)
    with pytest.raises(InputError, match="n=9, m=5"):
        kernel.check(kernel.source, {"n": 9, "m": 5})


def test_integers_that_are_indices_are_valid(build):
    made = build(embedding())
    kernel = next(k for k in made.kernels.values() if not k.name.startswith("index_check"))
    space = kernel._space()
    sizes = dict.fromkeys(space.dims, 40)
    (ids,) = index_limits(space.signature.definition, sizes)
    drawn = random_problem(space.signature, sizes).inputs[ids]
    assert drawn.min() == -11 and drawn.max() == 10
    drawn = random_problem(space.signature, sizes, positive=True).inputs[ids]
    assert drawn.min() == 0 and drawn.max() == 10


# --- time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_time(model, threads):
    kernel = model.kernels["relu_0"]
    alone = kernel.time(dims={"n": 32}, threads=threads, seconds=0.0)
    assert set(alone) == {"kernel"}
    both = kernel.time(shifted(kernel), dims={"n": 32}, threads=threads, seconds=0.0)
    assert set(both) == {"kernel", "edited"}
    for t in (*alone.values(), *both.values()):
        assert 0 < t.minimum <= t.median < 1.0 and t.runs >= 10
        assert t.flops >= 2 * 32 * 64 * 64 and t.bytes == 4 * (32 * 64 * 2 + 64 * 64)
        assert t.gflops == pytest.approx(t.flops / t.minimum / 1e9)
        assert t.gbytes == pytest.approx(t.bytes / t.minimum / 1e9)


def test_time_tells_slow_from_fast(build):
    made = build(convolutions())
    kernel = next(k for k in made.kernels.values() if "MaxPool" in " ".join(k.origin))
    slow = kernel.source.replace(
        "    for tile in range(begin, end):",
        "    for again in range(9):\n     for tile in range(begin, end):",
    )
    assert slow != kernel.source
    times = kernel.time(slow, seconds=0.2)
    assert times["edited"].minimum > 3 * times["kernel"].minimum


# --- interpretation ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["affine", "convolutions", "embedding", "quantised"])
def test_interpreted_kernels_compute_their_definition(build, name):
    for kernel in build(MODELS[name]()).kernels.values():
        dims = {"n": 3, "m": 2}
        got = kernel.interpret(end=None, dims=dims, seed=3)
        want = kernel._problem(dims, 3).expected()
        for a, b in zip(got, want, strict=True):
            assert agree(a, b, rounded=True).all(), kernel.name


def test_some_tiles_write_some_elements(build):
    made = build(embedding())
    kernel = next(k for k in made.kernels.values() if not k.name.startswith("index_check"))
    sizes = {"n": 300, "m": 40}
    tiles = kernel._problem(sizes, 0).tiles
    assert tiles > 1
    (first,) = kernel.interpret(dims=sizes)
    written = ~np.isnan(first)
    assert written.any() and not written.all()
    with pytest.raises(ValueError, match=f"{tiles} tiles"):
        kernel.interpret(end=tiles + 1, dims=sizes)


class Stops(bdb.Bdb):
    """A debugger with a breakpoint in each line that has `text`; it notes the locals there."""

    def __init__(self, path, text):
        super().__init__()
        self.seen = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if text in line:
                problem = self.set_break(str(path), number)
                assert problem is None, problem

    def user_line(self, frame):
        if self.break_here(frame):
            self.seen.append((frame.f_code.co_filename, dict(frame.f_locals)))
        self.set_continue()


def test_breakpoints_stop_in_the_kernels_file(model, tmp_path):
    kernel = model.kernels["relu_0"]
    mine = tmp_path / "mine.py"
    mine.write_text(kernel.source)
    for source, path in ((None, kernel.path), (mine, mine)):
        stops = Stops(path, RELU)
        stops.runcall(kernel.interpret, source, dims={"n": 2})
        names = {name for name, _ in stops.seen}
        # Two rows of the first tile, whose width is the machine's: 8 columns at least.
        assert names == {str(path)} and len(stops.seen) >= 2 * 8
        scope = stops.seen[0][1]
        assert scope["n0"] == 2 and scope["tile"] == 0


def test_without_a_cache_debuggers_see_the_text(build):
    import linecache

    kernel = build(affine(), cache=False).kernels["relu_0"]
    assert kernel.path is None
    (y,) = kernel.interpret(dims={"n": 1})
    assert np.isfinite(y).any()
    assert linecache.getline("<kernel relu_0>", 1) == kernel.source.splitlines(keepends=True)[0]


def test_interpretation_finds_accesses_outside(model):
    kernel = model.kernels["relu_0"]
    with pytest.raises(IndexError, match="in a buffer of 128 float32"):
        kernel.interpret(kernel.source.replace("b2[(", "b2[(128 + "), dims={"n": 2})
    with pytest.raises(IndexError):
        kernel.interpret(kernel.source.replace("b2[(", "b2[(-1 + "), dims={"n": 2})


def test_prints_work_in_interpreted_sources(model, capsys):
    kernel = model.kernels["relu_0"]
    text = kernel.source.replace(
        "    for tile in range(", "    print('here')\n    for tile in range("
    )
    kernel.interpret(text)
    assert capsys.readouterr().out == "here\n"
