"""The session interface: what onnxruntime's programs call, in its words."""

from __future__ import annotations

import json
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxjit
from onnxjit.capi import onnxruntime_pybind11_state as state

INFO = helper.make_tensor_value_info


def model(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], initializers: Any = (), **extra: Any
) -> bytes:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, **extra
    )
    return made.SerializeToString()


ADD = model(
    [helper.make_node("Add", ["a", "b"], ["t"]), helper.make_node("Relu", ["t"], ["c"])],
    [INFO("a", 1, ["N", 2]), INFO("b", 1, [2])],
    [INFO("c", 1, None), INFO("t", 1, None)],
    producer_name="tests",
    doc_string="about",
)
A, B = np.array([[-1, 2], [3, -4]], np.float32), np.array([1, 1], np.float32)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXJIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def session(cache: None) -> onnxjit.InferenceSession:
    return onnxjit.InferenceSession(ADD, providers=["CPUExecutionProvider"])


def test_runs_by_name(session: onnxjit.InferenceSession) -> None:
    c, t = np.maximum(A + B, 0), A + B
    for names, wanted in [
        (None, [c, t]), ([], [c, t]), (["c", "t"], [c, t]), (["t"], [t]),
        (("t", "c", "t"), [t, c, t]),
    ]:  # fmt: skip
        for _ in range(2):  # the second run takes the short way
            got = session.run(names, {"b": B, "a": A})
            assert isinstance(got, list)
            for x, y in zip(got, wanted, strict=True):
                np.testing.assert_array_equal(x, y)
    for rows in (0, 1, 5):
        a = np.ones((rows, 2), np.float32)
        np.testing.assert_array_equal(session.run(["t"], {"a": a, "b": B})[0], a + B)


def test_accepts_lists_and_values(session: onnxjit.InferenceSession) -> None:
    np.testing.assert_array_equal(session.run(["t"], {"a": A.tolist(), "b": [1, 1]})[0], A + B)
    value = onnxjit.OrtValue.ortvalue_from_numpy(A)
    np.testing.assert_array_equal(session.run(["t"], {"a": value, "b": B})[0], A + B)
    (got,) = session.run_with_ort_values(
        ["t"], {"a": value, "b": onnxjit.OrtValue.ortvalue_from_numpy(B)}
    )
    assert (got.shape(), got.data_type(), got.element_type()) == ([2, 2], "tensor(float)", 1)
    np.testing.assert_array_equal(np.asarray(got), A + B)


def test_describes_the_model(session: onnxjit.InferenceSession) -> None:
    a, b = session.get_inputs()
    assert (a.name, a.type, a.shape) == ("a", "tensor(float)", ["N", 2])
    assert (b.name, b.type, b.shape) == ("b", "tensor(float)", [2])
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("c", ["N", 2]), ("t", ["N", 2])]
    assert session.get_overridable_initializers() == []
    meta = session.get_modelmeta()
    assert (meta.producer_name, meta.graph_name, meta.description) == ("tests", "g", "about")
    assert meta.version == 2**63 - 1 and meta.custom_metadata_map == {}
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.get_provider_options() == {"CPUExecutionProvider": {}}


@pytest.mark.parametrize(
    "names, feed, kind, text",
    [
        (None, {"a": A}, ValueError,
         "Required inputs (['b']) are missing from input feed (['a'])."),
        (None, {"a": A, "b": B, "z": B}, state.InvalidArgument,
         "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Invalid input name: z"),
        (None, {"a": A.astype("f8"), "b": B}, state.InvalidArgument,
         "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Unexpected input data type. "
         "Actual: (tensor(double)) , expected: (tensor(float))"),
        (None, {"a": A[None], "b": B}, state.InvalidArgument,
         "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Invalid rank for input: a Got: 3 Expected: 2 "
         "Please fix either the inputs/outputs or the model."),
        (None, {"a": np.ones((1, 3), "f4"), "b": B}, state.InvalidArgument,
         "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input: a for the "
         "following indices\n index: 1 Got: 3 Expected: 2\n"
         " Please fix either the inputs/outputs or the model."),
        (["zz"], {"a": A, "b": B}, state.InvalidArgument,
         "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Invalid output name:zz"),
        (None, {"a": [[1, "x"]], "b": B}, RuntimeError,
         "Could not create tensor from given input list"),
        (None, {"a": 1.0, "b": B}, RuntimeError,
         "Unable to handle object of type <class 'float'>"),
    ],
)  # fmt: skip
def test_wrong_calls(
    session: onnxjit.InferenceSession, names: Any, feed: Any, kind: Any, text: str
) -> None:
    with pytest.raises(kind) as caught:
        session.run(names, feed)
    assert str(caught.value) == text


def test_wrong_argument_types(session: onnxjit.InferenceSession) -> None:
    with pytest.raises(TypeError, match="output_names"):
        session.run("c", {"a": A, "b": B})  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        session.run(None, [A, B])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="run_options"):
        session.run(None, {"a": A, "b": B}, "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(session)
    options = onnxjit.RunOptions()
    session.run(None, {"a": A, "b": B}, options)
    options.terminate = True
    with pytest.raises(state.Fail, match="terminate"):
        session.run(None, {"a": A, "b": B}, options)


def test_broken_models(cache: None, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Unable to load from type '<class 'int'>'"):
        onnxjit.InferenceSession(3)  # type: ignore[arg-type]
    missing = tmp_path / "nofile.onnx"
    with pytest.raises(state.NoSuchFile) as caught:
        onnxjit.InferenceSession(missing)
    assert str(caught.value) == (
        f"[ONNXRuntimeError] : 3 : NO_SUCHFILE : Load model from {missing} failed:"
        f"Load model {missing} failed. File doesn't exist"
    )
    with pytest.raises(state.InvalidProtobuf) as broken:
        onnxjit.InferenceSession(b"not a model")
    assert str(broken.value) == (
        "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : "
        "Failed to load model because protobuf parsing failed."
    )
    foo = model([helper.make_node("Foo", ["a"], ["c"], name="n1", domain="no.such")],
                [INFO("a", 1, [2])], [INFO("c", 1, [2])])  # fmt: skip
    with pytest.raises((state.NotImplemented, state.InvalidGraph)) as no:
        onnxjit.InferenceSession(foo)
    assert "Foo" in str(no.value)
    assert isinstance(pickle.loads(pickle.dumps(no.value)), type(no.value))


def test_providers(cache: None) -> None:
    with pytest.warns(UserWarning, match="Specified provider 'Other' is not in available"):
        onnxjit.InferenceSession(ADD, providers=["Other", "CPUExecutionProvider"])
    with pytest.warns(UserWarning, match="Duplicate provider"):
        onnxjit.InferenceSession(ADD, providers=["CPUExecutionProvider"] * 2)
    s = onnxjit.InferenceSession(ADD, providers=[("CPUExecutionProvider", {"k": 1})])
    assert s.get_provider_options() == {"CPUExecutionProvider": {"k": "1"}}
    for wrong in (
        {"providers": 3},
        {"providers": [3]},
        {"providers": ["CPUExecutionProvider"], "provider_options": []},
        {"providers": ["CPUExecutionProvider"], "provider_options": [3]},
    ):
        with pytest.raises(ValueError, match="provider"):
            onnxjit.InferenceSession(ADD, **wrong)  # type: ignore[arg-type]


def test_options_keep_values_and_check_types() -> None:
    o = onnxjit.SessionOptions()
    assert o.graph_optimization_level is onnxjit.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert o.execution_mode is onnxjit.ExecutionMode.ORT_SEQUENTIAL
    assert (o.log_severity_level, o.intra_op_num_threads, o.enable_mem_pattern) == (-1, 0, True)
    assert o.profile_file_prefix == "onnxruntime_profile_"
    o.intra_op_num_threads = True
    o.logid = "x"
    assert (o.intra_op_num_threads, o.logid) == (1, "x")
    for name, wrong in {
        "intra_op_num_threads": 2.5, "execution_mode": 0, "logid": 3, "enable_profiling": "x"
    }.items():  # fmt: skip
        with pytest.raises(TypeError):
            setattr(o, name, wrong)
    with pytest.raises(AttributeError):
        o.foo = 1  # type: ignore[attr-defined]
    o.add_session_config_entry("session.x", "1")
    assert o.get_session_config_entry("session.x") == "1"
    with pytest.raises(RuntimeError, match="does not have configuration with key: zz"):
        o.get_session_config_entry("zz")
    with pytest.raises(RuntimeError, match="longer than maximum length 1024"):
        o.add_session_config_entry("", "")
    assert onnxjit.SessionOptions().logid == ""


def test_free_dimension_overrides(cache: None) -> None:
    o = onnxjit.SessionOptions()
    o.add_free_dimension_override_by_name("N", 2)
    o.add_free_dimension_override_by_name("no such dimension", 7)
    s = onnxjit.InferenceSession(ADD, o)
    assert s.get_inputs()[0].shape == [2, 2]
    np.testing.assert_array_equal(s.run(["t"], {"a": A, "b": B})[0], A + B)
    with pytest.raises(state.InvalidArgument, match="index: 0 Got: 3 Expected: 2"):
        s.run(None, {"a": np.ones((3, 2), np.float32), "b": B})


def test_profile_file(cache: None, tmp_path: Path) -> None:
    o = onnxjit.SessionOptions()
    o.enable_profiling = True
    o.profile_file_prefix = str(tmp_path / "profile")
    s = onnxjit.InferenceSession(ADD, o)
    assert s.get_profiling_start_time_ns() > 0
    for _ in range(3):
        s.run(None, {"a": A, "b": B})
    name = s.end_profiling()
    events = json.loads(Path(name).read_text())
    assert name.startswith(o.profile_file_prefix) and s.end_profiling() == ""
    assert [e["name"] for e in events].count("model_run") == 3
    kernels = [e for e in events if e["cat"] == "Node"]
    assert len(kernels) == 3 * len(s._model.plan.steps)
    assert all(e["ph"] == "X" and e["dur"] >= 0 for e in events)
    s.run(None, {"a": A, "b": B})


def test_overridable_initializers(cache: None) -> None:
    s = onnxjit.InferenceSession(
        model(
            [helper.make_node("Add", ["a", "b"], ["c"])],
            [INFO("a", 1, ["N", 2]), INFO("b", 1, [2])],
            [INFO("c", 1, None)],
            [numpy_helper.from_array(B, "b")],
        )
    )
    assert [v.name for v in s.get_inputs()] == ["a"]
    (b,) = s.get_overridable_initializers()
    assert (b.name, b.type, b.shape) == ("b", "tensor(float)", [2])
    np.testing.assert_array_equal(s.run(None, {"a": A})[0], A + B)
    np.testing.assert_array_equal(s.run(None, {"a": A, "b": 3 * B})[0], A + 3 * B)
    np.testing.assert_array_equal(s.run(None, {"a": A})[0], A + B)


def test_values_of_unknown_rank_and_sequences(cache: None) -> None:
    s = onnxjit.InferenceSession(
        model(
            [
                helper.make_node("Relu", ["a"], ["r"]),
                helper.make_node("SequenceConstruct", ["a", "r"], ["c"]),
            ],
            [INFO("a", 1, None)],
            [helper.make_tensor_sequence_value_info("c", 1, None)],
        )
    )
    assert (s.get_inputs()[0].shape, s.get_outputs()[0].type) == ([], "seq(tensor(float))")
    for x in (A, A[0], A[None], np.float32(-3)):
        (got,) = s.run(None, {"a": np.asarray(x)})
        np.testing.assert_array_equal(got[0], x)
        np.testing.assert_array_equal(got[1], np.maximum(x, 0))


def test_contents_that_are_known_at_run_time(cache: None) -> None:
    s = onnxjit.InferenceSession(
        model(
            [
                helper.make_node("Reshape", ["a", "shape"], ["r"]),
                helper.make_node("Transpose", ["r"], ["c"]),
            ],
            [INFO("a", 1, ["N"]), INFO("shape", 7, ["K"])],
            [INFO("c", 1, None)],
        )
    )
    x = np.arange(24, dtype=np.float32)
    for shape in ([4, 6], [2, 3, 4], [-1], [4, 6], [6, -1]):
        (got,) = s.run(None, {"a": x, "shape": np.array(shape)})
        np.testing.assert_array_equal(got, x.reshape(shape).T)


def test_control_flow(cache: None) -> None:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["still"]),
            helper.make_node("Concat", ["total", "a"], ["longer"], axis=0),
            helper.make_node("ReduceSum", ["longer"], ["sum"], keepdims=0),
        ],
        "body",
        [INFO("i", 7, []), INFO("going", 9, []), INFO("total", 1, ["M"])],
        [INFO("still", 9, []), INFO("longer", 1, ["P"]), INFO("sum", 1, [])],
    )
    s = onnxjit.InferenceSession(
        model(
            [helper.make_node("Loop", ["trips", "", "a"], ["end", "sums"], body=body)],
            [INFO("a", 1, ["N"]), INFO("trips", 7, [])],
            [INFO("end", 1, ["Q"]), INFO("sums", 1, ["R"])],
        )
    )
    x = np.array([1, 2], np.float32)
    for trips in (0, 1, 4):
        end, sums = s.run(None, {"a": x, "trips": np.array(trips)})
        np.testing.assert_array_equal(end, np.tile(x, trips + 1))
        np.testing.assert_array_equal(sums, 3 * np.arange(2, trips + 2))


def test_element_types_without_kernels(cache: None) -> None:
    import ml_dtypes

    s = onnxjit.InferenceSession(
        model(
            [
                helper.make_node("Mul", ["a", "a"], ["m"]),
                helper.make_node("Cast", ["m"], ["c"], to=1),
            ],
            [INFO("a", TensorProto.BFLOAT16, ["N"])],
            [INFO("c", 1, None), INFO("m", TensorProto.BFLOAT16, None)],
        )
    )
    x = np.array([1.5, -2, 3], ml_dtypes.bfloat16)
    c, m = s.run(None, {"a": x})
    assert m.dtype == x.dtype
    np.testing.assert_array_equal(c, np.array([2.25, 4, 9], np.float32))
    s = onnxjit.InferenceSession(
        model(
            [helper.make_node("Concat", ["a", "a"], ["c"], axis=0)],
            [INFO("a", TensorProto.STRING, ["N"])],
            [INFO("c", TensorProto.STRING, None)],
        )
    )
    (joined,) = s.run(None, {"a": np.array(["x", "yz"], object)})
    assert joined.tolist() == ["x", "yz", "x", "yz"]


def test_async_and_threads(session: onnxjit.InferenceSession) -> None:
    done = threading.Event()
    seen: list[Any] = []

    def callback(results: list[Any], data: Any, error: str) -> None:
        seen.append((results, data, error, threading.current_thread()))
        done.set()

    session.run_async(["t"], {"a": A, "b": B}, callback, "data")
    assert done.wait(30)
    ((results, data, error, thread),) = seen
    assert (data, error) == ("data", "") and thread is not threading.current_thread()
    np.testing.assert_array_equal(results[0], A + B)

    wrong: list[int] = []

    def work(k: int) -> None:
        a = np.full((k + 1, 2), k, np.float32)
        for _ in range(50):
            if not np.array_equal(session.run(["t"], {"a": a, "b": B})[0], a + B):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_module_functions() -> None:
    assert onnxjit.get_available_providers() == ["CPUExecutionProvider"]
    assert onnxjit.get_device() == "CPU"
    assert onnxjit.get_version_string() == onnxjit.__version__
    onnxjit.set_default_logger_severity(3)
    with pytest.raises(RuntimeError):
        onnxjit.set_default_logger_severity(9)


def test_ort_values() -> None:
    x = np.arange(6, dtype=np.int64).reshape(2, 3)
    v = onnxjit.OrtValue.ortvalue_from_numpy(x)
    assert (v.shape(), v.data_type(), v.device_name()) == ([2, 3], "tensor(int64)", "cpu")
    assert v.is_tensor() and v.has_value() and not v.is_tensor_sequence()
    assert v.tensor_size_in_bytes() == 48 and v.data_ptr() == x.ctypes.data
    np.testing.assert_array_equal(np.from_dlpack(v), x)
    v.update_inplace(x + 1)
    assert x[0, 0] == 1
    with pytest.raises(ValueError):
        v.update_inplace(x[:1])
    with pytest.raises(ValueError, match="CPU only"):
        onnxjit.OrtValue.ortvalue_from_numpy(x, "cuda")
    made = onnxjit.OrtValue.ortvalue_from_shape_and_type([2], TensorProto.FLOAT)
    assert (made.shape(), made.element_type()) == ([2], TensorProto.FLOAT)


def test_io_binding(session: onnxjit.InferenceSession) -> None:
    binding = session.io_binding()
    a, out = A.copy(), np.zeros_like(A)
    binding.bind_input("a", "cpu", 0, np.float32, a.shape, a.ctypes.data)
    binding.bind_cpu_input("b", B)
    binding.bind_output("t", "cpu", 0, TensorProto.FLOAT, out.shape, out.ctypes.data)
    binding.bind_output("c")
    for _ in range(2):
        session.run_with_iobinding(binding)
        t, c = binding.copy_outputs_to_cpu()
        np.testing.assert_array_equal(out, a + B)
        np.testing.assert_array_equal(t, out)
        np.testing.assert_array_equal(c, np.maximum(a + B, 0))
        a += 1
    binding.clear_binding_outputs()
    binding.bind_ortvalue_output("t", onnxjit.OrtValue.ortvalue_from_numpy(np.zeros((3, 2), "f4")))
    with pytest.raises(ValueError, match="does not fit"):
        session.run_with_iobinding(binding)
    for wrong in (lambda: binding.bind_cpu_input("z", A), lambda: binding.bind_output("z")):
        with pytest.raises(state.InvalidArgument, match="z"):
            wrong()
    with pytest.raises(ValueError, match="CPU only"):
        binding.bind_output("t", "cuda")


def test_parts_for_run_time_go_through_the_cache(cache: None) -> None:
    proto = model(
        [helper.make_node("Reshape", ["a", "shape"], ["r"]), helper.make_node("Exp", ["r"], ["c"])],
        [INFO("a", 1, ["N"]), INFO("shape", 7, [2])],
        [INFO("c", 1, None)],
    )
    x, shape = np.arange(6, dtype=np.float32), np.array([2, 3])
    first = onnxjit.compile(proto, jobs=0)
    again = onnxjit.compile(proto, jobs=0)
    assert not first.from_cache and again.from_cache
    for m in (first, again, pickle.loads(pickle.dumps(again))):
        np.testing.assert_allclose(m(x, shape), np.exp(x.reshape(2, 3)), rtol=1e-5)
        np.testing.assert_allclose(m(x, shape[::-1].copy()), np.exp(x.reshape(3, 2)), rtol=1e-5)
    assert "deferred" in first.report()


def test_backend_interface(cache: None) -> None:
    from onnxjit import backend

    proto = onnx.load_from_string(ADD)
    assert backend.supports_device("CPU") and not backend.supports_device("CUDA")
    assert not backend.supports_device("no such device")
    assert backend.is_compatible(proto) and not backend.is_compatible(proto, "CUDA")
    rep = backend.prepare(proto, jobs=0)
    out = rep.run([A, B])
    np.testing.assert_array_equal(out.t, A + B)
    np.testing.assert_array_equal(rep.run({"b": B, "a": A})["c"], np.maximum(A + B, 0))
    np.testing.assert_array_equal(backend.run_model(proto, [A, B], jobs=0)[1], A + B)
    (y,) = backend.run_node(helper.make_node("Neg", ["x"], ["y"]), [A], jobs=0)
    np.testing.assert_array_equal(y, -A)
    with pytest.raises(onnxjit.DeviceError):
        backend.prepare(proto, "CUDA")
    with pytest.raises(TypeError):
        backend.prepare(proto, unknown=1)


def test_imports_stay_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, onnxjit; onnxjit.InferenceSession; onnxjit.SessionOptions();"
        "sys.exit(any(m in sys.modules for m in ('onnx', 'numba')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
