"""Micro-kernels against float64 NumPy, with unreadable memory behind every operand."""

import ctypes
import mmap
import re
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from llvmlite import binding

from onnxjit.codegen import microkernels
from onnxjit.codegen.instruction_sets import ISAS, isa_of
from onnxjit.codegen.microkernels import gemm, object_code, row, rows, select
from onnxjit.codegen.target import AVX512_FEATURES, Target, cpu_target, host, limited

SENTINEL = np.float32(12345.0)
RUNNABLE = [kernel for isa in ISAS for kernel in rows(isa) if kernel.runs_on(host())]
X86_SYMBOLS = [kernel.symbol for isa in ("avx512", "avx2") for kernel in rows(isa)]
X86 = cpu_target(
    "x86_64-unknown-linux-gnu", AVX512_FEATURES | {"avx", "avx2", "fma", "bmi", "bmi2", "sse2"}
)
SEGMENTS = [
    # (offsets, run, row stride)
    ([], 5, 7),
    ([3], 0, 2),
    ([0], 1, 1),
    ([0], 2, 0),
    ([0], 3, 11),
    ([0], 4, 4),
    ([2], 5, 3),
    ([0], 33, 40),
    ([0, 9], 1, 2),
    ([4, 0, 21], 7, 5),
    ([0, 10, 20], 9, 6),
    ([0, 3, 6, 30, 33], 8, 3),
]


class Fenced:
    """A float32 array that ends at an unreadable page (where the system can protect one)."""

    def __init__(self, size: int, fill: float) -> None:
        page = mmap.PAGESIZE
        total = (size * 4 + page - 1) // page * page + page
        self.memory = mmap.mmap(-1, total + page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        if sys.platform == "linux":
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.mprotect(ctypes.c_void_p(base + total), ctypes.c_size_t(page), 0) == 0
        whole = np.frombuffer(self.memory, np.float32, total // 4)
        whole[:] = fill
        self.before = whole[: whole.size - size]
        self.array = whole[whole.size - size :]
        self.address = base + total - size * 4


@pytest.fixture(scope="module")
def link():
    """Object code to a callable address, through one ORC JIT."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    jit = binding.create_lljit_compiler(machine)
    trackers = []

    @cache
    def linked(symbol: str, target: Target):
        builder = binding.JITLibraryBuilder().add_object_img(object_code(symbol, target))
        tracker = builder.export_symbol(symbol).link(jit, f"{symbol} {target.code_key}")
        trackers.append(tracker)
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        arguments = [pointer, integer, pointer, integer, integer, pointer, pointer, integer]
        arguments += [integer, pointer, *([integer] if row(symbol).any_rows else [])]
        return ctypes.CFUNCTYPE(None, *arguments)(tracker[symbol])

    return linked


def runnable_target(isa: str) -> Target:
    return limited(host(), isa if isa in ("avx512", "avx2", "scalar") else "scalar")


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("kernel", RUNNABLE, ids=lambda kernel: kernel.symbol)
def test_row_matches_numpy_and_stays_in_bounds(link, kernel, more, alone):
    function = link(kernel.symbol, runnable_target(kernel.isa))
    for case in SEGMENTS:
        check(function, kernel.mr, kernel.nr, more, *case, alone=alone)


@pytest.mark.parametrize("isa", sorted({kernel.isa for kernel in RUNNABLE}))
def test_one_function_takes_any_number_of_rows(link, isa):
    for vectors in range(1, ISAS[isa].vectors + 1):
        mr, nr = microkernels.max_rows(ISAS[isa], vectors), vectors * ISAS[isa].lanes
        symbol = gemm(mr, nr, isa, any_rows=True)
        assert row(symbol).any_rows and (row(symbol).mr, row(symbol).nr) == (mr, nr)
        function = link(symbol, runnable_target(isa))
        for count in range(1, mr + 1):
            for more in (0, 1):
                check(function, count, nr, more, [4, 0, 21], 7, 5, any_rows=True)
        for count in (0, mr + 1, -1):
            function(None, 1, None, 1, 1, None, None, 1, 0, None, count)


def check(function, mr, nr, more, offsets, run, stride, any_rows=False, alone=False):
    rng = np.random.default_rng(mr * nr)
    depth, ldc = len(offsets) * run, nr + 3
    reach = (mr - 1) * stride + max(offsets, default=0) + run if depth else 0
    a, b = Fenced(reach, np.nan), Fenced(depth * nr, np.nan)
    c = Fenced((mr - 1) * ldc + nr, SENTINEL)
    b.array[:] = rng.standard_normal(b.array.size)
    index = (
        np.arange(mr)[:, None, None] * stride
        + np.asarray(offsets, np.int64)[:, None]
        + np.arange(run)
    )
    a.array[index.ravel()] = rng.standard_normal(index.size)
    left = a.array[index].reshape(mr, depth).astype(np.float64)
    right = b.array.reshape(depth, nr).astype(np.float64)
    expected, scale = left @ right, np.abs(left) @ np.abs(right)
    tile = np.lib.stride_tricks.as_strided(c.array, (mr, nr), (ldc * 4, 4))
    if more:
        tile[:] = rng.standard_normal((mr, nr))
        expected, scale = expected + tile, scale + np.abs(tile)
    segs = np.asarray(offsets, np.int64)
    # What is prefetched is behind the fence, or with `alone` may be.
    function(
        a.address, stride, segs.ctypes.data, len(offsets), run, b.address, c.address, ldc, more,
        b.address + (0 if alone else b.array.nbytes), *([mr] if any_rows else []),
    )  # fmt: skip
    error = np.abs(tile - expected)
    bound = 2e-7 * (depth + 2) * scale
    assert (error <= bound).all(), f"offsets {offsets}, run {run}, stride {stride}"
    gaps = np.ones(c.array.size, bool)
    gaps[(np.arange(mr)[:, None] * ldc + np.arange(nr)).ravel()] = False
    assert (c.array[gaps] == SENTINEL).all() and (c.before == SENTINEL).all()


@pytest.mark.parametrize("symbol", X86_SYMBOLS)
def test_prefetches_reach_every_line_of_a_share(symbol):
    """An iteration of `steps` asks for each line that a row of B may have a part of, in its last
    step; tiles that also prefetch what they alone read, in every step."""
    kernel, text = row(symbol), microkernels.ir(symbol)
    isa = ISAS[kernel.isa]
    sums = kernel.mr * kernel.nr // isa.lanes
    steps, rest = divmod(len(re.findall(r'call .* @"llvm\.fma\.', text)), sums)
    lines = -(-kernel.nr * 4 // 64)
    assert steps > 2 and not rest  # an iteration of several, and one of one
    asking = steps if kernel.mr >= isa.prefetching else 2
    assert text.count('call void @"llvm.prefetch.p0"') == lines * asking


def test_negative_counts_read_nothing(link):
    symbol = gemm(2, ISAS[isa_of(host())].lanes, isa_of(host()))
    function = link(symbol, host())
    for nseg, run in ((-1, 4), (3, -2)):
        c = np.full((2, row(symbol).nr), SENTINEL)
        function(None, 1, None, nseg, run, None, c.ctypes.data, c.shape[1], 0, None)
        assert (c == 0).all()


def test_nan_and_infinity_stay_in_their_row(link):
    isa = isa_of(host())
    symbol = gemm(4, ISAS[isa].lanes, isa)
    function = link(symbol, host())
    nr = row(symbol).nr
    a = np.ones((4, 6), np.float32)
    a[1, 2], a[2, 5] = np.nan, np.inf
    b, c = np.ones((6, nr), np.float32), np.zeros((4, nr), np.float32)
    segs = np.zeros(1, np.int64)
    function(a.ctypes.data, 6, segs.ctypes.data, 1, 6, b.ctypes.data, c.ctypes.data, nr, 0, None)
    assert (c[[0, 3]] == 6).all() and np.isnan(c[1]).all() and np.isposinf(c[2]).all()


def test_names_parse_back():
    for isa in ISAS:
        for kernel in rows(isa):
            for any_rows in (False, True):
                symbol = gemm(kernel.mr, kernel.nr, isa, any_rows=any_rows)
                found = row(symbol)
                assert found.symbol == symbol and found.any_rows == any_rows
                assert (found.mr, found.nr) == (kernel.mr, kernel.nr)
                assert 0 < found.throughput < 1
    assert row("gemm_f32_14x32_avx512") in set(rows("avx512"))
    assert [microkernels.max_rows(ISAS["avx512"], nv) for nv in (1, 2, 3, 4)] == [16, 14, 9, 6]
    assert [microkernels.max_rows(ISAS["avx2"], nv) for nv in (1, 2, 3, 4)] == [14, 6, 4, 2]


@pytest.mark.parametrize(
    "symbol",
    [
        "gemm_f32_15x32_avx512",
        "gemm_f32_7x64_avx512",
        "gemm_f32_7x16_avx2",
        "gemm_f32_5x4_scalar",
        "gemm_f32_0x16_avx512",
        "gemm_f32_4x20_avx512",
        "gemm_f32_04x16_avx512",
        "gemm_f64_4x16_avx512",
        "gemm_f32_4x16_sve",
        "gemm_f32_4x16_avx512_acc",
        "gemm_f32_2to4x16_avx512",
        "gemm_f32_4x16_avx512\n",
        "",
    ],
)
def test_names_outside_the_table_are_refused(symbol):
    with pytest.raises(KeyError):
        row(symbol)


def test_a_target_without_the_features_is_refused():
    bare = cpu_target("x86_64-unknown-linux-gnu", frozenset({"sse2"}))
    with pytest.raises(ValueError, match="does not run"):
        object_code("gemm_f32_4x16_avx2", bare)
    assert isa_of(bare) == "scalar"


def test_ir_defines_exactly_its_symbol():
    for symbol in ("gemm_f32_14x32_avx512", "gemm_f32_2x4_scalar", "gemm_f32_1to3x8_avx2"):
        module = binding.parse_assembly(microkernels.ir(symbol))
        module.verify()
        names = [(f.name, f.linkage.name) for f in module.functions if not f.is_declaration]
        assert [name for name, linkage in names if linkage == "external"] == [symbol]


def back_end(target: Target) -> None:
    """Skip where this LLVM was built without the back end."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        binding.Target.from_triple(target.triple)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("symbol", X86_SYMBOLS)
def test_inner_loops_touch_no_stack_and_copy_no_register(symbol):
    kernel = row(symbol)
    target = X86 if kernel.isa == "avx512" else limited(X86, "avx2")
    back_end(target)
    loops = list(inner_loops(microkernels.assembly(symbol, target)))
    multiplies = [sum("vfmadd" in line for line in loop) for loop in loops]
    vectors = kernel.mr * kernel.nr // ISAS[kernel.isa].lanes
    assert sorted(multiplies) == [vectors, vectors * (4 if vectors <= 16 else 2)]
    for line in (line for loop in loops for line in loop):
        assert "rsp" not in line, line
        assert not re.match(r"\s+vmov[au]ps\s+%[xyz]mm\d+, %[xyz]mm", line), line


def inner_loops(assembly: str):
    """The bodies of loops with multiply-adds that contain no other loop."""
    lines = assembly.splitlines()
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if line.startswith(".L")}
    spans = []
    for end, line in enumerate(lines):
        jump = re.match(r"\s+j\w+\s+(\.L\w+)", line)
        if jump and labels[jump[1]] < end:
            spans.append((labels[jump[1]], end))
    for start, end in spans:
        if any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans):
            continue
        body = lines[start : end + 1]
        if any("vfmadd" in line for line in body):
            yield body


@pytest.mark.parametrize(
    "triple, isa",
    [
        ("aarch64-unknown-linux-gnu", "neon"),
        ("arm64-apple-darwin", "neon"),
        ("aarch64-unknown-linux-gnu", "scalar"),
        ("x86_64-pc-windows-msvc", "scalar"),
        ("riscv64-unknown-linux-gnu", "scalar"),
    ],
)
def test_rows_assemble_for_other_machines(triple, isa):
    target = cpu_target(triple, frozenset())
    back_end(target)
    for kernel in rows(isa):
        assert kernel.runs_on(target)
        for symbol in (kernel.symbol, gemm(kernel.mr, kernel.nr, isa, any_rows=True)):
            code = binding.ObjectFileRef.from_data(object_code(symbol, target))
            assert sum(section.size() for section in code.sections() if section.is_text()) > 100


@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
@pytest.mark.parametrize("m", [1, 2, 3, 7, 14, 15, 28, 43, 56, 197, 1000])
@pytest.mark.parametrize("n", [1, 8, 48, 64, 100, 1000, None])
def test_select_covers_exactly_and_no_other_cover_is_cheaper(isa, m, n):
    cover = select(m, n, limited(X86, isa))
    kernels = [cover.main, *([cover.tail] if cover.tail else [])]
    assert {kernel.nr for kernel in kernels} == {cover.nr}
    assert {kernel.isa for kernel in kernels} == {isa}
    assert not any(kernel.any_rows for kernel in kernels)
    assert m % cover.main.mr == (cover.tail.mr if cover.tail else 0)
    assert cover.uneven == (cover.tail is not None)
    if n is not None:
        assert 0 <= cover.panels * cover.nr - n < cover.nr
    for other in rows(isa):
        if other.mr <= m:
            rest = m % other.mr
            cycles = m // other.mr * other.cycles
            cycles += row(gemm(rest, other.nr, isa)).cycles if rest else 0
            cycles *= -(-n // other.nr) if n is not None else 1 / other.nr
            assert cover.cycles <= cycles * (1 + 1e-12)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
def test_select_symbolic_rows_take_one_function_for_every_remainder(isa):
    cover = select(None, 256, limited(X86, isa))
    assert cover.main.any_rows and cover.tail is None and cover.uneven


def test_select_prefers_the_tiles_that_measure_best():
    assert select(56, 64, X86).main.symbol == "gemm_f32_14x32_avx512"
    assert select(6, 64, X86, widths=(64,)).main.symbol == "gemm_f32_6x64_avx512"
    assert select(None, 16, limited(X86, "avx2")).main.symbol == "gemm_f32_1to6x16_avx2"
    assert select(1, 48, X86).nr == 48
    with pytest.raises(ValueError, match="width"):
        select(4, 4, X86, widths=(5,))
    with pytest.raises(ValueError, match="cover"):
        select(0, 4, X86)


def test_target_follows_feature_flags(monkeypatch):
    monkeypatch.delenv("ONNXJIT_ISA", raising=False)
    here = host()
    assert here.kind == "cpu" and here.cores >= 1 and here.l1 >= 8 << 10
    assert X86.vector_bytes == 64
    assert limited(X86, "avx2").vector_bytes == 32
    scalar = limited(X86, "scalar")
    assert scalar.vector_bytes == 16 and not scalar.features & {"avx", "avx2", "fma"}
    assert len({t.code_key for t in (X86, limited(X86, "avx2"), scalar)}) == 3
    assert cpu_target("arm64-apple-darwin", frozenset()).arch == "aarch64"
    for isa in ("scalar", "avx2", "avx512"):
        monkeypatch.setenv("ONNXJIT_ISA", isa)
        assert host() == limited(here, isa)
    monkeypatch.setenv("ONNXJIT_ISA", "sse9")
    with pytest.raises(ValueError, match="sse9"):
        host()


def test_importing_the_table_does_not_import_numba():
    code = "import onnxjit.codegen.microkernels, sys; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
