"""The measured roofline: its loops, its cache, and what it says of kernels."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import numpy as np
import pytest
from bench_data import roof, small_model

import onnxjit
from onnxjit.bench import roofline, roofline_code
from onnxjit.bench.kernels import _roof, kernel_table
from onnxjit.bench.roofline_code import CHAIN, PRODUCTS, STEP, Product
from onnxjit.codegen.target import AVX2_FEATURES, AVX512_FEATURES, cpu_target, host, target_machine
from onnxjit.runtime.profile import StepTime
from onnxjit.runtime.threads import aligned

X86 = AVX512_FEATURES | AVX2_FEATURES | frozenset(
    {"sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "cx16", "sahf", "avx512bf16", "avx512vnni",
     "avx512fp16"}
)  # fmt: skip
INSTRUCTIONS = {
    "float32/avx512": ("vfmadd", "ps", "zmm"), "float64/avx512": ("vfmadd", "pd", "zmm"),
    "float32/avx2": ("vfmadd", "ps", "ymm"), "float64/avx2": ("vfmadd", "pd", "ymm"),
    "float32/scalar": ("mulps", "addps", "xmm"), "float64/scalar": ("mulpd", "addpd", "xmm"),
    "float16/avx512": ("vfmadd", "ph", "zmm"), "bfloat16/avx512": ("vdpbf16ps", "zmm"),
    "int8/avx512": ("vpdpbusd", "zmm"), "float32/neon": ("fmla", "4s"),
    "float64/neon": ("fmla", "2d"),
}  # fmt: skip


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.name)
def test_every_product_compiles_to_its_instruction(product: Product) -> None:
    from llvmlite import binding

    triple, features = "x86_64-unknown-linux-gnu", X86
    if product.isa == "neon":
        triple, features = "aarch64-unknown-linux-gnu", frozenset({"neon", "fp-armv8"})
    elif product.isa != "avx512":
        features = X86 - AVX512_FEATURES - {"avx512bf16", "avx512vnni", "avx512fp16"}
        features -= frozenset() if product.isa == "avx2" else AVX2_FEATURES
    target = cpu_target(triple, features)
    assert product.runs_on(target)
    machine = target_machine(target, wide=True)
    module = binding.parse_assembly(roofline_code.products(product))
    module.triple = triple
    module.verify()
    loop = [line for line in machine.emit_assembly(module).splitlines() if line.startswith("\t")]
    name, *marks = INSTRUCTIONS[product.name]
    found = [line for line in loop if name in line and all(m in line for m in marks[-1:])]
    sums = roofline_code.rounds_of(product) // product.operations
    assert len(found) == sums, f"{len(found)} of {name}, not {sums}"


def test_products_multiply_and_add() -> None:
    own = [p for p in PRODUCTS if p.dtype == "float32" and p.runs_on(host())]
    assert own
    for product in own:
        built = roofline._build(roofline_code.products(product), host())
        function = built("products", ctypes.c_int64, ctypes.c_void_p)
        memory = aligned(64 * 32).view(np.float32)
        memory[:] = 0.5
        function(8, memory.ctypes.data)
        if product.call:
            assert memory[16] == 8 * 0.25  # a sum of eight products
        else:
            assert memory[16] == pytest.approx(1 - 0.5**8)  # a = a * 0.5 + 0.5


@pytest.mark.parametrize("vector_bytes", [16, 32, 64])
def test_memory_loops_touch_every_byte(vector_bytes: int) -> None:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    built = roofline._build(roofline_code.memory(vector_bytes), host())
    a, b, sink = aligned(4 * STEP), aligned(5 * STEP), aligned(64)
    a[:] = np.random.default_rng(0).integers(0, 256, a.size)
    b[:] = 7
    built("copy", pointer, pointer, integer, integer)(a.ctypes.data, b.ctypes.data, 4 * STEP, 1)
    np.testing.assert_array_equal(b[: 4 * STEP], a)
    assert (b[4 * STEP :] == 7).all()
    read = built("read", pointer, integer, integer, pointer)
    read(a.ctypes.data, 4 * STEP, 1, sink.ctypes.data)
    want = np.bitwise_xor.reduce(a.reshape(-1, vector_bytes), axis=0)
    np.testing.assert_array_equal(sink[:vector_bytes], want)
    read(a.ctypes.data, 4 * STEP, 3, sink.ctypes.data)  # an odd number of times: the same
    np.testing.assert_array_equal(sink[:vector_bytes], want)


def test_chain_adds_one_at_a_time() -> None:
    function = roofline._build(roofline_code.chain(), host())(
        "chain", ctypes.c_int64, ctypes.c_void_p
    )
    sink = aligned(64).view(np.int64)
    function(10, sink.ctypes.data)
    assert sink[0] == 10 * CHAIN


@pytest.mark.parametrize("threads", [1, 2])
def test_a_measurement(threads: int) -> None:
    found = roofline.measure(threads, part=1e-5, rounds=1)
    assert found.threads == threads and found.frequency > 0
    assert found.peak("float32") == max(
        value for name, value in found.peaks.items() if name.startswith("float32/")
    )
    assert all(value > 0 for value in found.peaks.values())
    assert found.bandwidths[0].level == "L1"
    assert found.bandwidths[-1].level == "memory"
    assert all(b.read > 0 and b.copy > 0 and b.footprint > 0 for b in found.bandwidths)
    again = roofline.Roofline.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert roofline.Roofline.from_json({"format": 0}) is None


def test_the_measurement_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measured(threads: int) -> roofline.Roofline:
        calls.append(threads)
        return roof(threads)

    monkeypatch.setattr(roofline, "measure", measured)
    folder = tmp_path / "roofline"
    assert roofline.roofline(2, folder=folder) == roof(2)
    assert roofline.roofline(2, folder=folder) == roof(2) and calls == [2]
    assert roofline.roofline(1, folder=folder) == roof(1) and calls == [2, 1]
    assert roofline.roofline(1, folder=folder, again=True) and calls == [2, 1, 1]
    for path in folder.iterdir():
        path.write_text("{")
    assert roofline.roofline(2, folder=folder) == roof(2) and calls == [2, 1, 1, 2]


def test_levels_and_peaks() -> None:
    machine = roof()
    sizes = (1, 32 << 10, 33 << 10, 1 << 20, 2 << 20, 17 << 20)
    assert [machine.level(n).level for n in sizes] == ["L1", "L1", "L2", "L2", "L3", "memory"]
    assert machine.peak("int8") == 400e9
    assert machine.peak("float32") == 100e9 == machine.peak("float16")  # none of its own


def step(seconds: float, flops: int, size: int) -> StepTime:
    return StepTime("k", "k", seconds, flops, size, 1, 1, (seconds,))


def test_what_limits_a_kernel() -> None:
    machine = roof()
    far = 1 << 30
    # 1 GFLOP takes 10 ms at the peak; 1 MB comes from L2 in 5 us.
    assert _roof(step(0.02, 10**9, 10**6), "float32", 0, far, machine) == (0.01, "L2", "compute")
    # Its megabyte is constants and the run touches 1 GiB: they come from memory, in 100 us.
    found = _roof(step(1e-3, 10**3, 10**6), "float32", 10**6, far, machine)
    assert found == (pytest.approx(1e-4), "memory", "memory bandwidth")
    # The same in a run that stays in L3: 25 us.
    found = _roof(step(1e-3, 10**3, 10**6), "float32", 10**6, 4 << 20, machine)
    assert found == (pytest.approx(2.5e-5), "L3", "L3 bandwidth")
    assert _roof(step(1e-6, 10, 100), "float32", 0, far, machine)[2] == "overhead"


def test_table_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXJIT_CACHE", str(tmp_path / "cache"))
    model = onnxjit.compile(small_model(tmp_path), threads=1)
    x = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    found = kernel_table(model, [x], roof(), runs=3)
    assert [row.name for row in found.rows] == list(model.kernels)
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert sum(found.limits().values()) == pytest.approx(1)
    assert found.slowest()[0].seconds == max(row.seconds for row in found.rows)
    first = found.rows[0]
    assert first.flops >= 2 * 64 * 4 * 3 and first.dtype == "float32" and first.origin
    assert first.intensity == pytest.approx(first.flops / first.bytes)
    starts = [row.start for row in found.rows]
    assert starts[0] == 0 and starts == sorted(starts)
    assert found.run >= found.rows[-1].start + found.rows[-1].wall - 1e-12
    assert all(row.seconds <= row.wall for row in found.rows)
    with pytest.raises(ValueError, match="runs must be positive"):
        kernel_table(model, [x], roof(), runs=0)


def test_host_steps_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx
    from onnx import TensorProto, helper

    monkeypatch.setenv("ONNXJIT_CACHE", str(tmp_path / "cache"))
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("NonZero", ["r"], ["y"])],
        "host",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, None)],
    )
    path = tmp_path / "host.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path
    )
    model = onnxjit.compile(str(path), threads=1)
    found = kernel_table(model, [np.array([1, -1, 2, 0, 3], np.float32)], roof(), runs=2)
    limits = [row.limit for row in found.rows]
    assert "host step" in limits and limits[0] != "host step"
    host_row = found.rows[limits.index("host step")]
    assert host_row.of_roof is None and host_row.start > 0
