"""Tensors of imported models: element types, constants, sparse and external data."""

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import info, model_of, weight

from onnxjit.errors import ModelError
from onnxjit.importer import import_model


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(
    "code",
    [code for name, code in TensorProto.DataType.items() if name not in ("UNDEFINED", "STRING")],
    ids=lambda code: TensorProto.DataType.Name(code),
)
def test_tensor_types(code, raw):
    dtype = helper.tensor_dtype_to_np_dtype(code)
    values = np.array([2, 1, 1, 2, 1], np.float32).reshape(5, 1).astype(dtype)
    if dtype.name.startswith("int"):
        values[1] = -2
    tensor = numpy_helper.from_array(values, "w")
    if not raw:
        tensor = helper.make_tensor("w", code, (5, 1), values.flatten())
    assert tensor.HasField("raw_data") == raw
    array = import_model(model_of([], outputs=[info("w")], initializers=[tensor])).constants["w"]
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, numpy_helper.to_array(tensor))
    assert array.tolist() == values.tolist()


def test_strings_and_empty_tensors():
    strings = helper.make_tensor("w", TensorProto.STRING, (2,), ["a", "ö"])
    empty = numpy_helper.from_array(np.zeros((0, 3), ml_dtypes.bfloat16), "e")
    outputs = [info("w"), info("e")]
    constants = import_model(model_of([], [], outputs, [strings, empty])).constants
    assert constants["w"].tolist() == ["a", "ö"] and constants["w"].dtype == object
    assert constants["e"].shape == (0, 3) and constants["e"].dtype == ml_dtypes.bfloat16


def test_sparse_initializers():
    values = numpy_helper.from_array(np.array([5.0, 6.0], np.float32), "w")
    model = model_of([], outputs=[info("w")])
    for indices in ([1, 5], [[0, 1], [1, 2]]):
        index = numpy_helper.from_array(np.array(indices, np.int64), "i")
        del model.graph.sparse_initializer[:]
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, index, [2, 3]))
        assert import_model(model).constants["w"].tolist() == [[0, 5, 0], [0, 0, 6]]
    for indices in ([1, 6], [-1, 0], [0], [[0, 1, 1], [1, 2, 1]]):
        index = numpy_helper.from_array(np.array(indices, np.int64), "i")
        model.graph.sparse_initializer[0].indices.CopyFrom(index)
        with pytest.raises(ModelError, match="'w'"):
            import_model(model)


@pytest.mark.parametrize(
    "attrs, expected",
    [
        ({"value": weight("t", (2,))}, np.arange(2, dtype=np.float32)),
        ({"value_int": 3}, np.int64(3)),
        ({"value_ints": [1, 2]}, np.array([1, 2])),
        ({"value_float": 1.5}, np.float32(1.5)),
        ({"value_floats": [1.5]}, np.array([1.5], np.float32)),
        ({"value_string": "a"}, np.array("a", object)),
        ({"value_strings": ["a", "b"]}, np.array(["a", "b"], object)),
    ],
)
def test_constant_nodes(attrs, expected):
    made = import_model(model_of([helper.make_node("Constant", [], ["y"], **attrs)])).constants["y"]
    assert made.dtype == expected.dtype and made.tolist() == expected.tolist()
    assert not made.flags.writeable


def test_tensors_that_do_not_fit_their_shape():
    for change in (
        {"dims": [3, 64, 64]},
        {"dims": [-1, 64]},
        {"dims": [2**40, 2**40]},
        {"data_type": 0},
        {"data_type": 99},
        {"raw_data": b"123"},
    ):
        tensor = weight()
        fields = {"name": "w", "dims": tensor.dims, "data_type": 1, "raw_data": tensor.raw_data}
        broken = TensorProto(**{**fields, **change})
        with pytest.raises(ModelError, match="'w'"):
            import_model(model_of([], outputs=[info("w")], initializers=[broken]))


def external(tmp_path, name="w.bin", folder="sub", **entries):
    """A model file whose weight is external, with the given entries, and the folder around it."""
    tensor = weight()
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": name, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    home = tmp_path / folder
    home.mkdir(exist_ok=True)
    (home / "w.bin").write_bytes(b"12345678" + data)
    (tmp_path / "outside.bin").write_bytes(data)
    model = model_of([], outputs=[info("w")], initializers=[tensor])
    (home / "m.onnx").write_bytes(model.SerializeToString())
    return home / "m.onnx", model


def test_external_data(tmp_path):
    path, model = external(tmp_path, offset=8, length=64 * 64 * 4)
    expected = numpy_helper.to_array(weight())
    for graph in (
        import_model(path),
        import_model(model, folder=path.parent),
        import_model(external(tmp_path, offset=8)[0]),
    ):
        np.testing.assert_array_equal(graph.constants["w"], expected)
        assert not graph.constants["w"].flags.owndata


def test_external_data_behind_a_linked_model(tmp_path):
    path, _ = external(tmp_path, folder="blobs", offset=8)
    links = tmp_path / "snapshot"
    links.mkdir()
    (links / "model.onnx").symlink_to(path)
    (links / "w.bin").symlink_to(path.parent / "w.bin")
    assert import_model(links / "model.onnx").constants["w"].shape == (64, 64)


def test_external_data_that_is_refused(tmp_path):
    link = tmp_path / "sub" / "link.bin"
    outside = tmp_path / "outside.bin"
    cases = [
        {"name": "../outside.bin"},
        {"name": str(outside)},
        {"name": "link.bin"},
        {"name": "missing.bin"},
        {"name": ""},
        {"name": "."},
        {"offset": 9},
        {"offset": 8, "length": 64 * 64 * 4 + 1},
        {"offset": 8, "length": 8},
        {"offset": -1},
        {"offset": "zero"},
        {"length": -5},
    ]
    for case in cases:
        path, _ = external(tmp_path, **case)
        if not link.exists():
            link.symlink_to(outside)
        with pytest.raises(ModelError, match="'w'"):
            import_model(path)
    with pytest.raises(ModelError, match=r"'w'.*folder"):
        import_model(path.read_bytes())
