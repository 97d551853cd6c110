"""`onnxjit.compile` and what it returns."""

import gc
import io
import pickle
import subprocess
import sys
import threading

import numpy as np
import onnx
import pytest
from api_models import NODE, affine, affine_result, broadcasting, integers, two_outputs
from onnx import external_data_helper
from small_models import info, model_of, run, weight

import onnxjit


@pytest.fixture(scope="module")
def model(build):
    return build(affine())


def batch(n=4, size=64, seed=0):
    return np.random.default_rng(seed).standard_normal((n, size)).astype(np.float32)


def test_every_way_to_give_a_model(tmp_path, build):
    proto = affine()
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    data = proto.SerializeToString()
    x = batch()
    for given in (path, str(path), data, bytearray(data), io.BytesIO(data), proto):
        np.testing.assert_allclose(build(given)(x), affine_result(x), rtol=1e-4)


def test_external_data(tmp_path, build):
    proto = affine()
    external_data_helper.convert_model_to_external_data(proto, location="w.bin", size_threshold=0)
    onnx.save(proto, tmp_path / "m.onnx")
    x = batch()
    np.testing.assert_allclose(build(tmp_path / "m.onnx")(x), affine_result(x), rtol=1e-4)
    again = onnx.load(tmp_path / "m.onnx", load_external_data=False).SerializeToString()
    np.testing.assert_allclose(build(again, folder=tmp_path)(x), affine_result(x), rtol=1e-4)
    before = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(bytes(len(before)))
    assert not build(tmp_path / "m.onnx")(x).any(), "other external data is another model"


def test_without_a_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXJIT_CACHE", str(tmp_path / "never"))
    x = batch()
    made = onnxjit.compile(affine(), cache=False, jobs=0, threads=2)
    np.testing.assert_allclose(made(x), affine_result(x), rtol=1e-4)
    assert not made.from_cache and not (tmp_path / "never").exists()


def test_sizes_share_one_compilation(model):
    for n in (1, 2, 3, 17, 64):
        np.testing.assert_allclose(model(batch(n)), affine_result(batch(n)), rtol=1e-4, atol=1e-2)
    assert model.specialisations == ()


def test_inputs_by_name(model):
    x = batch()
    want = affine_result(x)
    for got in (model(x=x), model({"x": x}), model(x), model.feed({"x": x})[0], model.run([x])[0]):
        np.testing.assert_allclose(got, want, rtol=1e-4)


def test_several_outputs_are_a_named_tuple(build):
    made = build(two_outputs())
    x, z = batch(2, 3), batch(2, 3, 1)
    for got in (made(x, z), made(x, **{"a/b": z}), made({"a/b": z, "x": x})):
        assert got._fields == ("sum_0", "class_")
        np.testing.assert_array_equal(got.sum_0, x + z)
        np.testing.assert_array_equal(got.class_, x - z)
        np.testing.assert_array_equal(got[1], x - z)
    first, second = got
    assert isinstance(got, tuple) and first is got.sum_0 and second is got[1]
    copy = pickle.loads(pickle.dumps(got))
    assert type(copy) is type(got)
    np.testing.assert_array_equal(copy.sum_0, got.sum_0)
    assert "sum_0=" in repr(got)


def test_what_may_stand_for_an_array(build, model):
    made = build(integers())
    np.testing.assert_array_equal(made([1, 2], 3), [4, 5])
    np.testing.assert_array_equal(made(np.array([1, 2]), np.int64(3)), [4, 5])
    np.testing.assert_array_equal(made((1, 2), np.array(3)), [4, 5])
    x = batch()
    np.testing.assert_allclose(model(x.tolist()), affine_result(x), rtol=1e-4)
    np.testing.assert_allclose(model(np.asfortranarray(x)), affine_result(x), rtol=1e-4)
    np.testing.assert_allclose(model(batch(8)[::2]), affine_result(batch(8)[::2]), rtol=1e-4)

    class Lazy:
        def __array__(self, dtype=None, copy=None):
            return x

    np.testing.assert_allclose(model(Lazy()), affine_result(x), rtol=1e-4)


def test_inputs_and_outputs_are_described(build, model):
    assert model.inputs == (("x", "float32", ("n", 64)),)
    assert model.outputs[0].name == "y" and model.outputs[0].dtype == "float32"
    assert model.outputs[0].shape == ("n", 64)
    unnamed = build(model_of([], [info("x", (None, 3))], [info("x", (None, 3))]))
    assert unnamed.inputs[0].shape == (None, 3)


def test_overrides(build):
    made = build(affine(), overrides={"n": 4})
    assert made.inputs[0].shape == (4, 64)
    np.testing.assert_allclose(made(batch()), affine_result(batch()), rtol=1e-4)
    with pytest.raises(onnxjit.InputError, match=r"'x'.*axis 0 must be 4"):
        made(batch(5))
    with pytest.raises(onnxjit.ModelError, match=r"'q'.*'n'"):
        build(affine(), overrides={"q": 4})


def test_other_sizes_than_assumed_are_specialised(build):
    made = build(broadcasting())
    x, z = batch(4, 3), batch(4, 3, 1)
    np.testing.assert_array_equal(made(x, z), x + z)
    assert made.specialisations == ()
    for _ in range(3):
        np.testing.assert_array_equal(made(x, z[:1]), x + z[:1])
        np.testing.assert_array_equal(made(x[:1], z), x[:1] + z)
        np.testing.assert_array_equal(made(x, z), x + z)
    assert made.specialisations == (((4, 3), (1, 3)), ((1, 3), (4, 3)))
    assert "specialised" in made.report() and "(4, 3), (1, 3)" in made.report()
    with pytest.raises(onnxjit.InputError, match=r"shapes \(4, 3\), \(3, 3\).*sum"):
        made(x, z[:3])
    copy = pickle.loads(pickle.dumps(made))
    np.testing.assert_array_equal(copy(x, z[:1]), x + z[:1])
    assert copy.profile(x, z[:1], runs=1).rows


def test_specialisation_reads_the_model_again(tmp_path, folder):
    path = tmp_path / "m.onnx"
    onnx.save(broadcasting(), path)
    x, z = batch(5, 3), batch(1, 3, 1)
    made = onnxjit.compile(path, cache=folder, jobs=0)
    np.testing.assert_array_equal(made(x, z), x + z)
    bare = onnxjit.compile(broadcasting().SerializeToString(), cache=False, jobs=0)
    np.testing.assert_array_equal(bare(x, z), x + z)
    others = [onnxjit.compile(path, cache=c, jobs=0) for c in (folder, False)]
    onnx.save(affine(), path)
    for other in others:
        with pytest.raises(onnxjit.InputError, match="has changed since"):
            other(batch(7, 3), z)


def test_kernels_tell_how_they_were_made(model):
    assert len(model.kernels) >= 1
    for name, k in model.kernels.items():
        assert name == k.name and name.isidentifier()
        compile(k.source, "kernel", "exec")
        assert "def kernel(" in k.source and k.rule and k.definition
        assert all(len(row) == 2 for row in k.declined)
    nodes = " ".join(n for k in model.kernels.values() for n in k.origin)
    assert "'first'" in nodes and "'last'" in nodes
    k = next(iter(model.kernels.values()))
    assert "define" in k.llvm and k.key in k.assembly
    with pytest.raises(KeyError):
        model.kernels["no such kernel"]


def test_equal_layers_share_a_kernel(build):
    nodes = [
        NODE(op, [*inputs], [output])
        for k in range(3)
        for op, inputs, output in (
            ("MatMul", (f"t{k}", f"w{k}"), f"m{k}"),
            ("Tanh", (f"m{k}",), f"t{k + 1}"),
        )
    ]
    weights = [weight(f"w{k}", (16, 16)) for k in range(3)]
    proto = model_of(nodes, [info("t0", ("n", 16))], [info("t3", ("n", 16))], weights)
    made = build(proto)
    assert len(made.plan.steps) == 3 and len(made.plan.kernels()) == 1
    assert len({k.key for k in made.kernels.values()}) == 1 and len(made.kernels) == 3
    x = batch(4, 16)
    np.testing.assert_allclose(made(x), run(proto, x)[0], rtol=1e-4, atol=1e-5)


def test_plan_profile_and_report(model):
    assert len(model.plan.steps) == len(model.kernels)
    table = model.profile(batch(), runs=2)
    assert [row.name for row in table.rows] == list(model.kernels)
    assert sum(row.share for row in table.rows) == pytest.approx(1)
    assert all(name in str(table) for name in model.kernels)
    text = model.report()
    assert all(name in text for name in model.kernels) and "constants 16.4 kB" in text


def test_pickle_needs_no_cache(model, monkeypatch, tmp_path):
    x = batch()
    data = pickle.dumps(model)
    script = (
        "import pickle, sys, numpy as np\n"
        f"model = pickle.loads(open({str(tmp_path / 'm.pickle')!r}, 'rb').read())\n"
        f"print(float(model(np.load({str(tmp_path / 'x.npy')!r})).sum()))\n"
        "print(sorted({'numba', 'onnx'} & sys.modules.keys()))"
    )
    (tmp_path / "m.pickle").write_bytes(data)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setenv("ONNXJIT_CACHE", str(tmp_path / "never"))
    lines = subprocess.check_output([sys.executable, "-c", script], text=True).splitlines()
    assert float(lines[0]) == pytest.approx(float(affine_result(x).sum()), rel=1e-3)
    assert lines[1] == "[]" and not (tmp_path / "never").exists()
    copy = pickle.loads(data)
    assert copy.inputs == model.inputs and copy.threads == model.threads
    assert list(copy.kernels) == list(model.kernels)


def test_threads_call_one_model(build):
    made = build(affine(), threads=2)
    wrong = []

    def work(seed):
        for k in range(40):
            x = batch(1 + (seed + k) % 5, seed=seed)
            if not np.allclose(made(x), affine_result(x), rtol=1e-3, atol=1e-2):
                wrong.append((seed, k))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_close(build):
    x = batch()
    with build(affine()) as made:
        kept = made(x)
    with pytest.raises(onnxjit.OnnxJitError, match="closed"):
        made(x)
    del made
    gc.collect()
    np.testing.assert_allclose(kept, affine_result(x), rtol=1e-4)


def test_outputs_that_no_kernel_makes(build):
    made = build(
        model_of([], [info("x", ("n", 3))], [info("x", ("n", 3)), info("w", (2, 3))],
                 [weight("w", (2, 3))])
    )  # fmt: skip
    x = batch(2, 3)
    got = made(x)
    np.testing.assert_array_equal(got.x, x)
    assert not np.shares_memory(got.x, x)
    np.testing.assert_array_equal(got.w, np.arange(6).reshape(2, 3))
    got.w[:] = 9
    np.testing.assert_array_equal(made(x).w, np.arange(6).reshape(2, 3))


def test_agrees_with_the_reference_evaluator(build):
    proto = two_outputs()
    x, z = batch(3, 3), batch(3, 3, 5)
    for got, want in zip(build(proto)(x, z), run(proto, x, z), strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_package_imports_nothing_heavy():
    script = (
        "import sys, onnxjit\n"
        "assert onnxjit.__version__ and 'compile' in dir(onnxjit)\n"
        "heavy = {'onnx', 'numba', 'llvmlite', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "for name in onnxjit.__all__: getattr(onnxjit, name)\n"
        "assert not {'onnx', 'numba'} & sys.modules.keys()\n"
        "try: onnxjit.nothing\n"
        "except AttributeError as error: print(error)"
    )
    out = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert "has no attribute 'nothing'" in out
