"""An index outside of what it indexes is an error of the run, wherever it comes from."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from kernels_support import model
from onnx import helper

import onnxjit
from onnxjit.session_errors import InvalidArgument


def gathering(shape: list[int | str], axis: int = 0, kind: str = "int64", operator="Gather"):
    nodes = [helper.make_node(operator, ["x", "i"], ["y"], axis=axis)]
    return model(nodes, {"x": ("float32", shape), "i": (kind, ["a", "b"])}, ["y"])


@pytest.mark.parametrize("kind", ["int32", "int64"])
@pytest.mark.parametrize("shape", [[5, 7], ["n", 7]], ids=["fixed", "free"])
def test_gather(shape, kind) -> None:
    f = onnxjit.compile(gathering(shape, 0, kind), cache=False)
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    good = np.array([[0, -5, 4], [-1, 2, 3]], kind)
    np.testing.assert_array_equal(f(x, good), x[good])
    for value in (5, -6, 2**31 - 1, -(2**31)):
        bad = good.copy()
        bad[1, 1] = value
        with pytest.raises(onnxjit.InputError, match=rf"Gather.*outside of axis 0.*: {value}$"):
            f(x, bad)
        # Nothing is lost: the next run is like the first.
        np.testing.assert_array_equal(f(x, good), x[good])
    if shape == [5, 7]:
        with pytest.raises(onnxjit.InputError, match="which has 5 elements"):
            f(x, np.full((1, 1), 5, kind))
    assert f(x, np.zeros((0, 3), kind)).shape == (0, 3, 7)
    again = pickle.loads(pickle.dumps(f))
    with pytest.raises(onnxjit.InputError, match="outside of axis 0"):
        again(x, np.full((1, 1), 9, kind))
    with pytest.raises(onnxjit.InputError, match="outside of axis 0"):
        f.profile(x, np.full((1, 1), 9, kind))


def test_the_other_operators_and_axes() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    f = onnxjit.compile(gathering([3, 4], 1, operator="GatherElements"), cache=False)
    good = np.array([[3, -4], [0, 1]])
    np.testing.assert_array_equal(f(x, good), [[3, 0], [4, 5]])
    with pytest.raises(onnxjit.InputError, match="axis 1, which has 4 elements: 4"):
        f(x, good + 1)
    nodes = [helper.make_node("GatherND", ["x", "i"], ["y"])]
    pairs = model(nodes, {"x": ("float32", [3, 4]), "i": ("int64", ["a", 2])}, ["y"])
    g = onnxjit.compile(pairs, cache=False)
    np.testing.assert_array_equal(g(x, np.array([[2, -1], [0, 0]])), [11, 0])
    with pytest.raises(onnxjit.InputError, match="axis 0, which has 3 elements: -4"):
        g(x, np.array([[-4, 0]]))
    with pytest.raises(onnxjit.InputError, match="axis 1, which has 4 elements: 4"):
        g(x, np.array([[0, 4]]))


def test_computed_indices_and_several_outputs(tmp_path) -> None:
    nodes = [
        helper.make_node("Add", ["i", "one"], ["j"]),
        helper.make_node("Gather", ["words", "j"], ["h"]),
        helper.make_node("Relu", ["h"], ["y"]),
        helper.make_node("Gather", ["places", "i"], ["z"]),
    ]
    rng = np.random.default_rng(0)
    words, places = (rng.standard_normal((n, 3)).astype(np.float32) for n in (300, 200))
    values = {"one": np.array(1), "words": words, "places": places}
    m = model(nodes, {"i": ("int64", ["n"])}, ["y", "z"], values)
    for cache in (False, True):
        f = onnxjit.compile(m, cache=cache)
        y, z = f(np.array([5, 199]))
        np.testing.assert_array_equal(y, np.maximum(words[[6, 200]], 0))
        np.testing.assert_array_equal(z, places[[5, 199]])
        assert [o.name for o in f.outputs] == ["y", "z"]
        with pytest.raises(onnxjit.InputError, match="which has 200 elements: 200"):
            f(np.array([0, 200]))
        with pytest.raises(onnxjit.InputError, match="which has 300 elements: 300"):
            f(np.array([299]))
    session = onnxjit.InferenceSession(m.SerializeToString())
    assert len(session.run(None, {"i": np.array([1])})) == 2
    with pytest.raises(InvalidArgument, match="which has 300 elements: 401"):
        session.run(["y"], {"i": np.array([400])})


def test_a_constant_index_outside_is_an_error_of_the_model() -> None:
    big = np.zeros(400, np.int64)
    big[300] = 7
    nodes = [helper.make_node("Gather", ["x", "i"], ["y"])]
    m = model(nodes, {"x": ("float32", [7, 2])}, ["y"], {"i": big})
    with pytest.raises(onnxjit.ModelError, match="which has 7 elements: 7"):
        onnxjit.compile(m, cache=False)
