"""Compiled models in the cache: hits, misses, damage, and the warm start."""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from api_models import NODE, affine, affine_result, broadcasting
from small_models import info, model_of, weight

import onnxjit
from onnxjit.artifact import Artifact, TensorInfo, write_constants
from onnxjit.codegen.cache import Cache
from onnxjit.codegen.target import host
from onnxjit.runtime.plan import HostStep, Plan
from onnxjit.store import dump, model_key, undump

X = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def build(model, folder, **options):
    return onnxjit.compile(model, **{"cache": folder, "jobs": 0, "threads": 1, **options})


def right(model):
    np.testing.assert_allclose(model(X), affine_result(X), rtol=1e-4)
    return model


def stored(folder):
    """The folders of the models in a cache."""
    return sorted((folder / "models").iterdir())


def test_a_model_is_found_by_content(tmp_path, folder):
    data = affine().SerializeToString()
    first = right(build(data, folder))
    assert not first.from_cache
    assert right(build(data, folder)).from_cache
    (tmp_path / "m.onnx").write_bytes(data)
    assert right(build(tmp_path / "m.onnx", folder)).from_cache
    assert right(build(onnx.load_from_string(data), folder)).from_cache
    assert len(stored(folder)) == 1
    assert not build(affine(name="other"), folder).from_cache
    assert not build(data, folder, overrides={"n": 4}).from_cache
    assert build(data, folder, overrides={"n": 4}).from_cache
    assert len(stored(folder)) == 3


def test_what_is_loaded_tells_the_same(folder):
    cold, warm = (build(affine(), folder) for _ in range(2))
    assert warm.from_cache and not cold.from_cache
    assert (cold.inputs, cold.outputs) == (warm.inputs, warm.outputs)
    assert cold.plan == warm.plan and dict(cold.metadata) == dict(warm.metadata)
    assert dict(cold.kernels) == dict(warm.kernels)
    assert warm.metadata["opset_imports"] == {"": 18}


def test_specialisations_are_stored(folder):
    x = X[:, :3]
    for warm in (False, True):
        made = build(broadcasting(), folder)
        np.testing.assert_array_equal(made(x, x[:1]), x + x[:1])
        assert made.from_cache == warm
        assert len(stored(folder)) == 2


@pytest.mark.parametrize("name", ["model.json", "code.bin", "constants.bin", "kernels.json",
                                  "manifest.json"])  # fmt: skip
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty"])
def test_damage_is_rebuilt(folder, name, damage):
    right(build(affine(), folder))
    (entry,) = stored(folder)
    path = entry / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0x10
    path.unlink()
    if damage != "gone":
        path.write_bytes({"flip": data, "cut": data[:-1], "empty": b""}[damage])
    assert not right(build(affine(), folder)).from_cache
    assert right(build(affine(), folder)).from_cache


def test_damaged_kernels_are_rebuilt(folder):
    right(build(affine(), folder))
    for path in [*stored(folder), *(folder / "kernels").glob("*.o")]:
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-30] + bytes(30))
    assert not right(build(affine(), folder)).from_cache


def test_a_failure_leaves_no_entry(folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("no disk")

    monkeypatch.setattr("onnxjit.store.header", fail)
    with pytest.raises(RuntimeError, match="no disk"):
        build(affine(), folder)
    assert stored(folder) == []


def test_a_full_disk_is_no_error(folder, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnxjit.store.header", fail)
    with pytest.warns(UserWarning, match="not kept in the cache: .*No space left"):
        right(build(affine(), folder))
    assert stored(folder) == []


def test_the_key_covers_all_that_decides():
    target = host()
    base = model_key("c", target)
    assert base == model_key("c", target, {}, None)
    keys = {
        base,
        model_key("d", target),
        model_key("c", target, {"n": 1}),
        model_key("c", target, {"n": 2}),
        model_key("c", target, None, [(1, 2)]),
        model_key("c", target, None, [(1,), (2,)]),
    }
    assert len(keys) == 6


def test_constants_keep_type_shape_and_alignment(folder):
    import ml_dtypes

    text = np.array([["a", "b"], ["", "ü"]], dtype=object)
    arrays = (
        np.arange(5, dtype=np.int8), np.array(3.5), np.zeros((0, 4), np.float32), text,
        np.arange(6, dtype=np.float16).reshape(2, 3)[:, ::2], np.array([True]),
        np.ones(3, ml_dtypes.bfloat16),
    )  # fmt: skip
    plan = Plan((), (), (), ())
    infos = (TensorInfo("x", "float32", (1, "n", None)),)
    made = Artifact(plan, (b"one", b"", b"three"), arrays, infos, (), {"a": 1}, b"{}", "cpu")
    back = undump(dump(made))
    assert (back.inputs, back.outputs, back.objects) == (infos, (), made.objects)
    for a, b in zip(arrays, back.constants, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype and a.shape == b.shape
        assert b.dtype == object or b.ctypes.data % 64 == 0 or not b.size
    with open(folder.with_name("blob"), "w+b") as file:
        places = write_constants(file, arrays)
        assert file.tell() == len(dump(made)["constants.bin"])
    assert all(p.offset % 64 == 0 for p in places if p.strings is None)


def test_attributes_of_host_steps_survive():
    attributes = {"a": np.array([[1, 2]], np.int8), "b": b"\0x", "c": [1.5, float("inf")], "d": "t",
                  "e": np.float32(2.0)}  # fmt: skip
    plan = Plan((), (HostStep("f", (-1,), (), attributes),), (), ())
    back = Plan.from_json(plan.to_json()).steps[0].attributes
    assert {k: v for k, v in back.items() if k != "a"} == {
        "b": b"\0x", "c": [1.5, float("inf")], "d": "t", "e": 2.0}  # fmt: skip
    np.testing.assert_array_equal(back["a"], attributes["a"])
    assert back["a"].dtype == np.int8


def aged(path):
    """Wait until a note about the file's time stamps can be trusted."""
    wait = 2.1 - (time.time() - path.stat().st_ctime)
    time.sleep(max(wait, 0))


WARM = """
import sys, numpy as np, onnxjit
model = onnxjit.compile({path!r}, threads=1)
y = model(np.load({x!r}))
slow = {{'numba', 'onnx', 'ml_dtypes', 'google', '_hashlib'}}
print(model.from_cache, sorted(slow & sys.modules.keys()), float(y.sum()))
"""


def test_a_warm_start_imports_neither_onnx_nor_numba(tmp_path, folder):
    path = tmp_path / "m.onnx"
    onnx.save(affine(256), path)
    x = np.ones((2, 256), np.float32)
    np.save(tmp_path / "x.npy", x)
    aged(path)
    script = WARM.format(path=str(path), x=str(tmp_path / "x.npy"))
    environment = {**os.environ, "ONNXJIT_CACHE": str(folder)}
    total = float(affine_result(x, 256).sum())
    for first in ("False", "True"):
        out = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
        state, *modules, got = out.split(maxsplit=1)[0], *out.split()[1:-1], out.split()[-1]
        assert state == first and float(got) == pytest.approx(total, rel=1e-4)
    assert modules == ["[]"]


def test_a_changed_file_is_another_model(tmp_path, folder):
    path = tmp_path / "m.onnx"
    onnx.save(affine(), path)
    aged(path)
    right(build(path, folder))
    assert Cache(folder).known_key(path)
    assert right(build(path, folder)).from_cache
    proto = model_of([NODE("Neg", ["x"], ["y"])], [info("x", ("n", 64))], [info("y", ("n", 64))],
                     [weight("w", (64, 64))])  # fmt: skip
    onnx.save(proto, path)
    made = build(path, folder)
    assert not made.from_cache
    np.testing.assert_array_equal(made(X), -X)


def test_nothing_of_the_process_is_in_the_entry(folder):
    build(affine(), folder)
    here = str(pathlib.Path(__file__).parent).encode()
    for path in stored(folder)[0].iterdir():
        assert here not in path.read_bytes()
