"""Memory of results is given out again only when nobody can see it any more."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto, helper

import onnxjit
from onnxjit.runtime.results import KEPT, LEAST, Results

COUNT = LEAST // 4 + 5


@pytest.fixture(scope="module")
def double() -> Callable[[np.ndarray], np.ndarray]:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnxjit.compile(model)


def x(value: float, count: int = COUNT) -> np.ndarray:
    return np.full(count, value, np.float32)


def address(a: np.ndarray) -> int:
    return a.ctypes.data


def test_memory_that_was_let_go_of_is_used_again(double) -> None:
    double(x(0))
    seen = set()
    for n in range(8):
        y = double(x(n))
        assert (y == 2 * n).all() and address(y) % 64 == 0
        seen.add(address(y))
    assert len(seen) <= KEPT


HOLDERS: dict[str, Callable[[np.ndarray], object]] = {
    "the array": lambda y: y,
    "a view": lambda y: y[3:7],
    "a view of a view": lambda y: y.reshape(-1, 1)[::2].T,
    "a buffer": memoryview,
    "another array over it": lambda y: np.frombuffer(memoryview(y), np.uint8),
    "a capsule": lambda y: y.__dlpack__(),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_memory_that_somebody_holds_is_left_alone(double, name: str) -> None:
    for _ in range(3):
        double(x(1))
    y = double(x(21))
    start, stop = address(y), address(y) + y.nbytes
    held = HOLDERS[name](y)
    content = y.copy()
    del y
    for n in range(6):
        z = double(x(n))
        assert not start <= address(z) < stop
        del z
    if isinstance(held, np.ndarray | memoryview):
        flat = np.asarray(held)
        assert np.isin(flat.view(np.float32) if flat.dtype == np.uint8 else flat, content).all()


def test_a_result_may_be_the_next_input(double) -> None:
    y = x(1)
    for _ in range(12):
        y = double(y)
    assert (y == 4096).all()


def test_its_shape_may_be_changed_by_whoever_has_it(double) -> None:
    for _ in range(6):
        y = double(x(2, 2 * COUNT))
        y.shape = (2, COUNT)
        y.flags.writeable = False
        del y
        z = double(x(3, 2 * COUNT))
        assert z.shape == (2 * COUNT,) and z.flags.writeable and (z == 6).all()


def test_sizes_that_change_keep_little() -> None:
    results = Results()
    for n in (LEAST, 3 * LEAST, LEAST, 9 * LEAST, LEAST + 64):
        a = results.array(0, (n,), np.dtype(np.uint8), n)
        assert a.nbytes == n
        a[:] = 1
        del a
    assert [len(ring) for ring in results._rings.values()] == [KEPT]


def test_threads_do_not_share_results(double) -> None:
    wrong = []

    def work(value: float) -> None:
        for _ in range(40):
            y = double(x(value))
            if not (y == 2 * value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(n),)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
