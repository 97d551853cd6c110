"""What the public interface says when it is used wrongly: one clear sentence, naming the input."""

import numpy as np
import pytest
from api_models import NODE, affine, integers, two_outputs
from small_models import info, model_of

import onnxjit
from onnxjit.devices import cuda_devices


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")

    def build(model, **options):
        return onnxjit.compile(model, **{"cache": folder, "jobs": 0, "threads": 1, **options})

    return build


@pytest.fixture(scope="module")
def model(build):
    return build(two_outputs())


X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("arrays", "named", "message"),
    [
        ((), {}, r"takes 2 input\(s\) \('x', 'a/b'\), got 0"),
        ((X, X, X), {}, r"takes 2 input\(s\) .* got 3"),
        ((X,), {"y": X}, r"no input 'y'; it takes 'x', 'a/b'"),
        ((X,), {"x": X}, r"'x' is given twice"),
        ((), {"a/b": X}, r"missing input\(s\) 'x'"),
        (({"x": X},), {}, r"missing input\(s\) 'a/b'"),
        ((X, X.astype("f8")), {}, r"'a/b': expected float32, got float64"),
        ((X, X.astype("i4")), {}, r"'a/b': expected float32, got int32"),
        ((X, X[0]), {}, r"'a/b': expected 2 axes, shape \(n, 3\), got 1, shape \(3,\)"),
        ((X, X[:, :2]), {}, r"'a/b'.*axis 1 must be 3, got 2"),
        ((X, X[:1]), {}, r"'a/b': axis 0 must be 2 \(n; n is read from input 'x' axis 0\), got 1"),
        ((X, "abc"), {}, r"'a/b'"),
        ((X, None), {}, r"'a/b'"),
        ((X, [[1, 2, 3], [4, 5]]), {}, r"'a/b'"),
        ((X, [["a", "b", "c"]]), {}, r"'a/b'"),
    ],
)
def test_inputs_that_do_not_fit(model, arrays, named, message):
    for _ in range(2):  # before and after a call that succeeded
        with pytest.raises(onnxjit.InputError, match=message) as caught:
            model(*arrays, **named)
        assert isinstance(caught.value, ValueError)
        np.testing.assert_array_equal(model(X, X)[0], X + X)


def test_lists_of_another_kind(build):
    made = build(integers())
    with pytest.raises(onnxjit.InputError, match="'x': expected int64, got float64"):
        made([1.5, 2.5], 1)
    with pytest.raises(onnxjit.InputError, match="'x'"):
        made([2**70, 1], 1)


def test_what_is_no_model(tmp_path, build):
    (tmp_path / "text.onnx").write_text("no model")
    whole = affine().SerializeToString()
    (tmp_path / "short.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(onnxjit.ModelError, match="no file"):
        build(tmp_path / "absent.onnx")
    for given in (tmp_path / "text.onnx", tmp_path / "short.onnx", b"", b"\x08", tmp_path):
        with pytest.raises(onnxjit.ModelError):
            build(given)
    with pytest.raises(TypeError, match=r"path, bytes, .* not int"):
        build(3)


def test_every_unsupported_node_is_listed(build):
    proto = model_of(
        [
            NODE("Strange", ["x"], ["a"], name="one", domain="mine"),
            NODE("Odd", ["a"], ["y"], name="two", domain="mine"),
        ],
        imports=[("", 18), ("mine", 3)],
    )
    with pytest.raises(onnxjit.UnsupportedOperators) as caught:
        build(proto)
    assert [(n.domain, n.op, n.name, n.version) for n in caught.value.nodes] == [
        ("mine", "Strange", "one", 3),
        ("mine", "Odd", "two", 3),
    ]
    assert isinstance(caught.value, onnxjit.ModelError)


def test_devices(build):
    with pytest.raises(onnxjit.DeviceError, match="auto, cpu, cuda"):
        build(affine(), device="tpu")
    reason = "does not run models" if cuda_devices() else "no CUDA device"
    with pytest.raises(onnxjit.DeviceError, match=reason):
        build(affine(), device="cuda")
    assert build(affine(), device="cpu").threads == 1


def test_thread_counts(build):
    with pytest.raises(ValueError, match="threads must be positive"):
        build(affine(), threads=-1)


def test_names_of_the_model_reach_no_source(build):
    nasty = '__import__(\'os\').abort()\n"""x'
    proto = model_of(
        [NODE("Relu", [nasty], [f"{nasty}2"], name=nasty), NODE("Exp", [f"{nasty}2"], ["y"])],
        [info(nasty, (nasty, 3))],
        [info("y", (nasty, 3))],
    )
    made = build(proto)
    np.testing.assert_allclose(made({nasty: X}), np.exp(X), rtol=1e-6)
    assert all("abort" not in k.source + k.name for k in made.kernels.values())
    with pytest.raises(onnxjit.InputError):
        made(**{"y": X})
    assert nasty in made.report() or "abort" in made.report()
