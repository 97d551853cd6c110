"""Edited kernels: checked against the definition, and put into a running model."""

import pickle
import threading

import numpy as np
import pytest
from api_models import NODE, affine, affine_result
from onnx import numpy_helper
from small_models import info, model_of
from swap_models import RELU, SHIFTED, batch, is_shifted, quantised, shifted

from onnxjit.codegen.cache import Cache
from onnxjit.errors import KernelMismatch, KernelSourceError, OnnxJitError
from onnxjit.kernel_check import agree


@pytest.fixture
def model(build):
    """y = relu(x @ w) as one kernel, `relu_0`."""
    return build(affine())


# --- replace and restore -----------------------------------------------------------------------


def test_replace_and_restore(model):
    x = batch(20)
    before = model(x)
    original = model.kernels["relu_0"]
    assert not is_shifted(before) and original.original is None

    edited = model.kernels.replace("relu_0", shifted(original))
    assert edited.source == shifted(original) and edited.key != original.key
    assert edited.original == original.key and model.kernels["relu_0"] == edited
    assert "edited" in str(edited) and "(edited)" in model.report()
    after = model(x)
    assert is_shifted(after)
    np.testing.assert_allclose(after, before, atol=2e-6)

    model.kernels.restore("relu_0")
    assert model.kernels["relu_0"] == original
    np.testing.assert_array_equal(model(x), before)
    assert "(edited)" not in model.report()


def test_an_edited_kernel_can_be_edited_again(model):
    first = model.kernels["relu_0"]
    objects = model._artifact.objects
    for _ in range(2):
        model.kernels.replace("relu_0", shifted(first))
    assert len(model._artifact.objects) == len(objects) + 1
    third = model.kernels.replace("relu_0", first.source.replace(RELU, "float32(2e-6))"))
    assert third.original == first.key
    assert (model(batch()) == np.float32(2e-6)).any()
    assert len(model._artifact.objects) == len(objects) + 1  # what nothing runs is dropped
    back = model.kernels.replace("relu_0", first.source)
    assert back == first and model._artifact.objects == objects
    assert not is_shifted(model(batch()))


def test_a_path_is_read(model, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(shifted(model.kernels["relu_0"]))
    for given in (path, str(path)):
        model.kernels.restore()
        model.kernels.replace("relu_0", given)
        assert is_shifted(model(batch()))


def layers(count=3):
    """Equal layers, whose kernels are one, and another one behind them."""
    names = [f"t{k}" for k in range(count)]
    nodes = []
    for k, (source, target) in enumerate(zip(["x", *names], names, strict=False)):
        nodes += [NODE("MatMul", [source, f"w{k}"], [f"p{k}"]), NODE("Relu", [f"p{k}"], [target])]
    eye = np.eye(32, dtype=np.float32)
    return model_of(
        [*nodes, NODE("Softmax", [names[-1]], ["y"])],
        [info("x", ("n", 32))],
        [info("y", ("n", 32))],
        [numpy_helper.from_array(eye, f"w{k}") for k in range(count)],
    )


def test_every_step_with_the_same_code_is_replaced(build):
    made = build(layers())
    x = batch(5, 32)
    before = made(x)
    names = [n for n, k in made.kernels.items() if k.rule == "contraction"]
    (other,) = set(made.kernels) - set(names)
    untouched = made.kernels[other]
    assert len(names) == 3 and len({made.kernels[n].key for n in names}) == 1
    made.kernels.replace(names[1], shifted(made.kernels[names[1]]))
    assert len({made.kernels[n].key for n in names}) == 1
    assert all(made.kernels[n].original for n in names)
    assert made.kernels[other] == untouched
    np.testing.assert_allclose(made(x), before, atol=1e-5)
    assert not np.array_equal(made(x), before)
    made.kernels.restore()
    np.testing.assert_array_equal(made(x), before)


def test_a_source_may_call_other_micro_kernels(model):
    """Written anew, by hand, with a register tile that the original does not use."""
    kernel = model.kernels["relu_0"]
    (packing,) = kernel._space().signature.packings.values()
    nr, isa = packing.nr, kernel.symbols[0].split("_")[3]
    one, three = (f"gemm_f32_{rows}x{nr}_{isa}" for rows in (1, 3))
    assert three not in kernel.symbols
    args = f"x, i * 64, 64, zero_, 0, 1, 64, w, p * {64 * nr}, acc, 0, {nr}, 0, w, 0"
    text = f"""
def kernel(ptrs, ints, scratch, begin, end):
    x, w, y = buffer_float32(ptrs, 0), buffer_float32(ptrs, 1), buffer_float32(ptrs, 2)
    zero_ = stack_int64(1, 8)
    acc = stack_float32({3 * nr}, 9)
    zero_[0] = 0
    for tile in range(begin, end):
        if tile == 0:
            for i in range(ints[0]):
                for p in range({64 // nr}):
                    if i + 3 <= ints[0]:
                        {three}({args})
                    else:
                        {one}({args})
                    for j in range({nr}):
                        y[i * 64 + p * {nr} + j] = max_(acc[j], {SHIFTED}
"""
    objects = len(model._artifact.objects)
    edited = model.kernels.replace("relu_0", text)
    assert edited.symbols == tuple(sorted([one, three]))
    assert len(model._artifact.objects) == objects + (3 if one not in kernel.symbols else 2)
    y = model(batch(9))
    assert is_shifted(y)
    np.testing.assert_allclose(y, affine_result(batch(9)), rtol=1e-4, atol=1e-5)
    (z,) = edited.interpret(end=None, dims={"n": 9}, seed=1)
    assert agree(z, edited._problem({"n": 9}, 1).expected()[0]).all()


def test_pickled_with_its_edits(model):
    before = model(batch())
    original = model.kernels["relu_0"]
    edited = model.kernels.replace("relu_0", shifted(original))
    copy = pickle.loads(pickle.dumps(model))
    assert copy.kernels["relu_0"] == edited and is_shifted(copy(batch()))
    copy.kernels.restore()
    assert copy.kernels["relu_0"] == original
    np.testing.assert_array_equal(copy(batch()), before)
    assert is_shifted(model(batch()))


def test_a_closed_model_refuses(model):
    kernels = model.kernels
    text = shifted(kernels["relu_0"])
    model.close()
    with pytest.raises(OnnxJitError, match="closed"):
        kernels.replace("relu_0", text)


def test_replacing_while_other_threads_run(build):
    made = build(affine(), threads=2)
    x = batch(64)
    plain = made(x)
    text = shifted(made.kernels["relu_0"])
    made.kernels.replace("relu_0", text)
    edited = made(x)
    assert not np.array_equal(plain, edited)
    done = threading.Event()
    wrong = []
    runs = [0]

    def run():
        while not done.is_set():
            y = made(x)
            runs[0] += 1
            if not np.array_equal(y, plain) and not np.array_equal(y, edited):
                wrong.append(y)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        made.kernels.restore("relu_0")
        np.testing.assert_array_equal(made(x), plain)
        made.kernels.replace("relu_0", text)
        np.testing.assert_array_equal(made(x), edited)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong and runs[0] > 10


def test_host_steps_keep_what_they_have(build):
    made = build(
        model_of(
            [NODE("Relu", ["x"], ["a"]), NODE("NonZero", ["a"], ["y"])],
            [info("x", ("n", 3))],
            [info("y", (2, "k"), 7)],
        )
    )
    x = np.array([[1, -1, 2], [0, 3, -4]], np.float32)
    host = made._executable._host
    want = made(x)
    made.kernels.replace("relu_0", made.kernels["relu_0"].source + "\n# edited\n")
    assert made._executable._host.items() == host.items()
    np.testing.assert_array_equal(made(x), want)


def test_an_edited_source_is_a_file_of_its_own_in_the_cache(build, folder):
    made = build(affine(48))
    original = made.kernels["relu_0"]
    text = shifted(original)
    edited = made.kernels.replace("relu_0", text)
    assert original.path.read_text() == original.source
    assert edited.path.read_text() == text and edited.path != original.path
    assert Cache(folder).get("kernels", edited.key) is not None
    assert not build(affine(48)).kernels["relu_0"].original  # the cached model has no edits


# --- refusals ----------------------------------------------------------------------------------


def refused(model, text, kind, *parts):
    """The edit is refused with one message that has all `parts`, and the model stays as it is."""
    before = model(batch())
    kernel = model.kernels["relu_0"]
    with pytest.raises(kind) as caught:
        model.kernels.replace("relu_0", text)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert model.kernels["relu_0"] == kernel
    np.testing.assert_array_equal(model(batch()), before)


def test_a_wrong_result_is_refused(model):
    text = model.kernels["relu_0"].source.replace(RELU, "float32(0.5))")
    refused(model, text, KernelMismatch, "'relu_0'", "element [", "is 0.5, expected 0.0", "n=")


def test_a_result_that_is_wrong_at_one_edge_is_refused(model):
    source = model.kernels["relu_0"].source
    store = next(line for line in source.splitlines() if RELU in line)
    indent = store[: len(store) - len(store.lstrip())]
    index, value = store.strip().split(" = ", 1)
    edge = f"{indent}if eq(n0, 17):\n    {indent}{index} = -{value}\n{indent}else:\n    {store}"
    refused(model, source.replace(store, edge), KernelMismatch, "n=17", "[0, 0]")


@pytest.mark.parametrize(
    "change, problem",
    [
        (("for tile in range(", "for tile in range(end, "), "is nan, expected"),
        (("b2[(", "b2[(64*n0 + "), "stores behind buffer 2 (an output)"),
        (("b2[(", "b2[(-1 + "), "stores before buffer 2 (an output)"),
    ],
)
def test_stores_in_the_wrong_place_are_refused(model, change, problem):
    source = model.kernels["relu_0"].source
    assert change[0] in source
    refused(model, source.replace(*change), KernelMismatch, problem)


def test_a_store_into_an_input_is_refused(model):
    source = model.kernels["relu_0"].source
    text = source.replace("    for tile in", "    if n0 > 0:\n        b0[0] = 1.0\n    for tile in")
    refused(model, text, KernelMismatch, "stores into buffer 0, an input")


HEAD = "def kernel(ptrs, ints, scratch, begin, end):\n"


@pytest.mark.parametrize(
    "text, problem",
    [
        (HEAD + "    x = (1\n", "line 2: '(' was never closed"),
        (HEAD + "    x = len(ptrs)\n", "line 2: the kernel dialect has no name 'len'"),
        ("import numpy\n" + HEAD + "    pass\n", "line 1: a kernel source holds the function"),
        ("def other(x):\n    pass\n", "line 1: a kernel source holds the function"),
        ('"""Nothing."""\n', "must define kernel(ptrs, ints, scratch, begin, end)"),
        ("def kernel(ptrs, ints, begin, end):\n    pass\n", "must define kernel(ptrs, ints,"),
        (HEAD + "    x = [i for i in range(3)]\n", "line 2: the kernel dialect has no"),
        (HEAD + "    x = lambda: 1\n", "line 2: the kernel dialect has no functions"),
        (
            f"{HEAD}    x = buffer_float32(ptrs, 0)\n"
            "    gemm_f32_77x32_avx512(x, 0, 1, ints, 0, 1, 1, x, 0, x, 0, 1, 0, x, 0)\n",
            "cannot be compiled: 'gemm_f32_77x32_avx512': the tile does not fit the registers",
        ),
        (
            HEAD + "\n    x = exp(buffer_float32(ptrs, 0))\n",
            "line 3: cannot be compiled: the kernel dialect has no exp(",
        ),
        (
            HEAD + "    b0 = buffer_float32(ptrs, 0)\n    b0[0] = 'x'\n",
            "line 3: cannot be compiled",
        ),
        (HEAD + "    raise begin\n", "cannot be compiled"),
        ("no such file.py", "no such file.py"),
    ],
)
def test_sources_outside_of_the_dialect_are_refused(model, text, problem):
    refused(model, text, KernelSourceError, problem)


def test_a_file_is_named_in_the_message(model, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(HEAD + "    y = foo\n")
    refused(model, path, KernelSourceError, f"{path}, line 2: the kernel dialect has no name 'foo'")


def test_an_unknown_name(model):
    with pytest.raises(KeyError):
        model.kernels.replace("no such kernel", "x\n")
    with pytest.raises(KeyError):
        model.kernels.restore("no such kernel")


def test_rounding_may_fall_the_other_way_but_not_everywhere(build):
    made = build(quantised())
    (name,) = made.kernels
    source = made.kernels[name].source
    assert "round_(" in source
    made.kernels.replace(name, source.replace("round_(", "round_(float32(1e-7) + ", 1))
    made.kernels.restore()
    with pytest.raises(KernelMismatch):
        made.kernels.replace(name, source.replace("round_(", "floor(", 1))


def test_agree():
    want = np.array([1.0, 1e-3, 0.0, np.nan, np.inf, -np.inf], np.float32)
    assert agree(want, want).all()
    for k, value in enumerate([1.001, 2e-3, 1e-3, 0.0, np.nan, np.inf]):
        got = want.copy()
        got[k] = value
        assert agree(got, want).tolist() == [i != k for i in range(6)]
    got = want.copy()
    got[:2] = 1.00001, 1.02e-3  # the second is within the typical size's share
    assert agree(got, want).all()
    numbers = np.arange(1000, dtype=np.int8)
    near = numbers.copy()
    near[:10] += 1
    assert agree(near, numbers, rounded=True).all() and not agree(near, numbers)[:10].any()
    near[:11] = numbers[:11] + 1
    assert not agree(near, numbers, rounded=True).all()
    flags = np.array([True, False])
    assert agree(np.array([0xFF, 0], np.uint8).view(bool), flags).tolist() == [False, True]
