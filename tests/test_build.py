"""Building kernels in worker processes, and loading the object files."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnxjit.codegen import build_worker, dialect, microkernels
from onnxjit.codegen.build import (
    NICE,
    Builder,
    BuildError,
    CompileError,
    Source,
    WorkerError,
    key,
    symbol_of,
    tile_key,
)
from onnxjit.codegen.cache import Cache
from onnxjit.codegen.dialect_table import linked
from onnxjit.codegen.target import host, limited
from onnxjit.runtime.link import Library, LinkError, link

SCALE = """
def kernel(ptrs, ints, scratch, begin, end):
    x0 = buffer_float32(ptrs, 0)
    x1 = buffer_float32(ptrs, 1)
    for i in range(begin, end):
        x1[i] = max_(x0[i] * float32({0}), float32(0.0))
"""
KERNEL = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
)


def scale(factor: float, name: str = "scale") -> Source:
    return Source(SCALE.format(factor), name=name)


def call(address: int, *arrays: np.ndarray, end: int, ints: Sequence[int] = ()) -> None:
    pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    KERNEL(address)(pointers, (ctypes.c_int64 * len(ints))(*ints), None, 0, end)


def check_scale(library: Library, symbol: str, factor: float) -> None:
    x = np.linspace(-1, 1, 77, dtype=np.float32)
    y = np.full(80, 7, dtype=np.float32)
    call(library.address(symbol), x, y, end=77)
    np.testing.assert_array_equal(y[:77], np.maximum(x * np.float32(factor), 0))
    np.testing.assert_array_equal(y[77:], 7)


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    with Builder(jobs=2) as shared:
        shared.start()
        yield shared


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_build_link_and_run(builder: Builder) -> None:
    sources = [scale(factor) for factor in (0.5, 2.0, 3.0)]
    calls: list[tuple[int, int]] = []
    objects = builder.build(sources, progress=lambda *counts: calls.append(counts))
    assert set(objects) == {key(source, builder.target) for source in sources}
    assert calls == [(1, 3), (2, 3), (3, 3)]
    library = link(list(objects.values()))
    for source, factor in zip(sources, (0.5, 2.0, 3.0), strict=True):
        symbol = symbol_of(key(source, builder.target))
        assert symbol in library.symbols
        check_scale(library, symbol, factor)


def test_compiling_in_this_process_gives_the_same_object(builder: Builder) -> None:
    with Builder(jobs=0) as here:
        assert here.build([scale(2.0)]) == builder.build([scale(2.0)])


def test_settings_of_numba_do_not_reach_the_workers(
    builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    monkeypatch.setenv("NUMBA_OPT", "0")
    with Builder(jobs=1) as other:
        assert other.build([scale(2.0)]) == builder.build([scale(2.0)])


def test_equal_kernels_are_built_once(cache: Cache) -> None:
    with Builder(jobs=0, cache=cache) as builder:
        assert len(builder.build([scale(2.0, "first"), scale(2.0, "second")])) == 1
        builder.build([scale(2.0, "third")])
        assert builder.compiled == 1


def test_cache_hit_compiles_nothing_and_starts_nothing(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = microkernels.gemm(1, 4, "scalar")
    with Builder(jobs=0, cache=cache) as builder:
        objects = builder.build([scale(2.0)])
        tiles = builder.tile_objects([tile])
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with Builder(jobs=1, cache=cache) as warm:
        assert warm.build([scale(2.0)]) == objects
        assert warm.tile_objects([tile]) == tiles
        assert warm.compiled == 0


def test_source_lies_beside_the_object(cache: Cache) -> None:
    with Builder(jobs=0, cache=cache) as builder:
        (own,) = builder.build([scale(2.0)])
    assert cache.source_path("kernels", own).read_text() == scale(2.0).text


@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_damaged_object_is_rebuilt(cache: Cache, how: str) -> None:
    with Builder(jobs=0, cache=cache) as builder:
        ((own, image),) = builder.build([scale(2.0)]).items()
    path = cache.root / "kernels" / f"{own}.o"
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    else:
        del data[-100:]
    path.write_bytes(data)
    with Builder(jobs=0, cache=cache) as builder:
        assert builder.build([scale(2.0)]) == {own: image}
        assert builder.compiled == 1
    assert cache.get("kernels", own) == image


def test_key_is_what_decides_the_machine_code() -> None:
    target = host()
    source = scale(2.0)
    same = key(source, target)
    assert same == key(replace(source, name="other"), target)
    others = [
        key(scale(3.0), target),
        key(replace(source, symbols=("gemm_f32_1x4_scalar",)), target),
        key(replace(source, wide=True), target),
        key(source, target._replace(features=target.features | {"imaginary"})),
        tile_key(source.text, target),
    ]
    assert len({same, *others}) == 1 + len(others)


def test_kernel_calls_a_micro_kernel(builder: Builder) -> None:
    symbol = microkernels.gemm(2, 4, "scalar")
    source = Source(
        f"""
def kernel(ptrs, ints, scratch, begin, end):
    a = buffer_float32(ptrs, 0)
    b = buffer_float32(ptrs, 1)
    c = buffer_float32(ptrs, 2)
    segments = buffer_int64(ptrs, 3)
    {symbol}(a, 0, 3, segments, 0, 1, 3, b, 0, c, 0, 4, 0, b, 0)
""",
        symbols=(symbol,),
    )
    objects = builder.build([source])
    with pytest.raises(LinkError, match=f"missing symbols: '{linked(symbol)}'"):
        link(list(objects.values()))
    tile = builder.tile_object(symbol)
    library = link([*objects.values(), tile])
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    b = np.arange(12, dtype=np.float32).reshape(3, 4) - 5
    c = np.zeros((2, 4), dtype=np.float32)
    call(library.address(symbol_of(next(iter(objects)))), a, b, c, np.zeros(1, np.int64), end=1)
    np.testing.assert_array_equal(c, a @ b)


def tiles_in_turn(first: str, second: str) -> Source:
    """c = a @ b by two micro-kernels, the second of which begins at row ints[0]."""
    text = f"""
def kernel(ptrs, ints, scratch, begin, end):
    a = buffer_float32(ptrs, 0)
    b = buffer_float32(ptrs, 1)
    c = buffer_float32(ptrs, 2)
    d = buffer_int64(ptrs, 3)
    n = ints[0]
    {first}(a, 0, 3, d, 0, 1, 3, b, 0, c, 0, 4, 0, b, 0)
    {second}(a, n * 3, 3, d, 0, 1, 3, b, 0, c, n * 4, 4, 0, b, 0)
"""
    return Source(text, tuple(sorted({first, second})))


@pytest.mark.parametrize("jobs", [0, 2])
def test_kernels_that_differ_in_micro_kernels_are_compiled_once(cache: Cache, jobs: int) -> None:
    heights = [(2, 3), (3, 2), (1, 4), (2, 2), (4, 4)]
    sources = [
        tiles_in_turn(*(microkernels.gemm(m, 4, "scalar") for m in pair)) for pair in heights
    ]
    symbols = {symbol for source in sources for symbol in source.symbols}
    with Builder(jobs=jobs, cache=cache) as builder:
        objects = builder.build(sources)
        tiles = builder.tile_objects(symbols)
        assert builder.compiled == 2 + len(symbols)
    assert len(set(objects.values())) == len(sources)
    library = link([*objects.values(), *tiles.values()])
    rng = np.random.default_rng(1)
    b = rng.standard_normal((3, 4), np.float32)
    for pair, source, own in zip(heights, sources, objects, strict=True):
        a = rng.standard_normal((sum(pair), 3), np.float32)
        c = np.zeros((sum(pair) + 1, 4), np.float32)
        address, zero = library.address(symbol_of(own)), np.zeros(1, np.int64)
        call(address, a, b, c, zero, end=1, ints=pair[:1])
        np.testing.assert_allclose(c[:-1], a @ b, rtol=1e-5, atol=1e-6)
        assert not c[-1].any()
        assert cache.source_path("kernels", own).read_text() == source.text
    with Builder(jobs=0, cache=cache) as warm:
        assert warm.build(sources) == objects
        assert warm.compiled == 0


def test_a_kernel_outlives_one_that_is_like_it() -> None:
    first, second = (tiles_in_turn(*[microkernels.gemm(m, 4, "scalar")] * 2) for m in (1, 2))
    with Builder(jobs=1) as builder:
        busy = builder.submit(Source("import time\ntime.sleep(1)\n" + " " * 1000))
        dropped, kept = builder.submit(first), builder.submit(second)
        assert builder.ready([dropped], 0.0) == set()
        assert symbol_of(kept).encode() in builder.result(kept)
        with pytest.raises(BuildError, match="dropped"):
            builder.result(dropped)
        with pytest.raises(CompileError):
            builder.result(busy)


def test_a_refused_kernel_refuses_those_that_are_like_it(builder: Builder) -> None:
    first, second = (
        tiles_in_turn(*[microkernels.gemm(m, 4, "scalar")] * 2).text.replace("n * 3", "nonsense")
        for m in (1, 2)
    )
    for _ in range(2):
        for m, text in ((1, first), (2, second)):
            own = builder.submit(Source(text, (microkernels.gemm(m, 4, "scalar"),)))
            with pytest.raises(CompileError, match="nonsense"):
                builder.result(own)


def test_inspect(builder: Builder) -> None:
    symbol = symbol_of(key(scale(2.0), builder.target))
    assert f"define void @{symbol}(" in builder.inspect(scale(2.0), "llvm")
    assert f"{symbol}:" in builder.inspect(scale(2.0), "asm")
    with pytest.raises(ValueError, match="llvm or asm"):
        builder.inspect(scale(2.0), "ptx")


def test_objects_carry_no_unwind_tables(builder: Builder) -> None:
    (image,) = builder.build([scale(2.0)]).values()
    assert b"eh_frame" not in image


def test_target_is_the_builders() -> None:
    target = limited(host(), "scalar")
    with Builder(target, jobs=1) as builder:
        text = builder.inspect(scale(2.0), "asm")
    assert "ymm" not in text and "zmm" not in text


@pytest.mark.parametrize("jobs", [0, 1])
def test_compile_error_names_the_kernel(cache: Cache, jobs: int) -> None:
    bad = Source(scale(1.0).text.replace("max_", "no_such_name"), name="relu 3")
    with Builder(jobs=jobs, cache=cache) as builder:
        with pytest.raises(CompileError) as caught:
            builder.build([bad])
        path = cache.source_path("kernels", key(bad, builder.target))
        report = str(caught.value)
        assert "relu 3" in report and str(path) in report and "no_such_name" in report
        assert path.read_text() == bad.text
        assert cache.verify() == []
        assert len(builder.build([scale(2.0)])) == 1


FOREIGN = """
declare void @{0}()
define void @kernel(ptr %p, ptr %i, ptr %s, i64 %b, i64 %e) {{
  call void @{0}()
  ret void
}}
"""


def test_undefined_symbol_is_a_compile_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialect, "compile_ir", lambda text, *_: FOREIGN.format(text))
    with Builder(jobs=0) as builder:
        with pytest.raises(CompileError, match="undefined symbols: numba_unpickle"):
            builder.build([Source("numba_unpickle")])
        assert len(builder.build([Source("memset")])) == 1


def test_ir_without_a_kernel_is_a_compile_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialect, "compile_ir", lambda *_: "define void @other() { ret void }")
    with Builder(jobs=0) as builder, pytest.raises(CompileError, match="no function called kernel"):
        builder.build([Source("")])


def test_crash_of_a_worker_names_the_kernel_and_not_the_others() -> None:
    crash = "import os, sys\nprint('last words', file=sys.stderr)\nos.kill(os.getpid(), {0})\n"
    with Builder(jobs=1) as builder:
        for signal, name in ((9, "SIGKILL .*lack of memory"), (11, "SIGSEGV")):
            bad = Source(crash.format(signal), name="conv 7")
            with pytest.raises(WorkerError, match=rf"(?s)killed by {name}.*conv 7.*last words"):
                builder.build([bad])
        assert len(builder.build([scale(2.0)])) == 1


def test_output_of_a_worker_does_not_mix_with_its_answers(builder: Builder) -> None:
    noise = "import os\nprint('x' * 99999, flush=True)\nos.write(1, b'x')\n"
    noisy = noise + SCALE.format(9.0)
    ((own, image),) = builder.build([Source(noisy)]).items()
    check_scale(link([image]), symbol_of(own), 9.0)


def test_the_worker_without_a_core_of_its_own_yields() -> None:
    said = "import os\nassert os.nice(0) == {0}\n" + SCALE.format(2.0)
    here = os.nice(0)
    for cores, nice in ((1, min(19, here + NICE)), (2, here)):
        with Builder(host()._replace(cores=cores), jobs=1) as builder:
            assert len(builder.build([Source(said.format(nice))])) == 1
    with Builder(host()._replace(cores=2), jobs=3) as builder:
        builder.start()
        assert [worker._hello["nice"] for worker in builder._workers] == [0, NICE, 0]


def test_process_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with Builder(jobs=1) as builder, pytest.raises(WorkerError, match=r"nonexistent.*jobs=0"):
        builder.build([scale(2.0)])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Builder(jobs=1) as builder:
        for factor in (2.0, 3.0):
            with pytest.raises(WorkerError, match=r"ended with status 1 before its first job"):
                builder.build([scale(factor)])


def test_full_disk_is_a_warning(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Cache, "put", full)
    with Builder(jobs=0, cache=cache) as builder:
        with pytest.warns(UserWarning, match="No space left"):
            assert len(builder.build([scale(2.0)])) == 1


def test_close_ends_a_build() -> None:
    with Builder(jobs=1) as builder:
        endless = Source("import time\ntime.sleep(60)\n")
        waiting = [builder.submit(endless), builder.submit(scale(2.0))]
        threading.Timer(0.2, builder.close).start()
        began = time.monotonic()
        for own in waiting:
            with pytest.raises(BuildError, match="closed"):
                builder.result(own)
        assert time.monotonic() - began < 10
        with pytest.raises(BuildError, match="closed"):
            builder.submit(scale(3.0))


def test_failure_drops_what_has_not_begun() -> None:
    with Builder(jobs=1) as builder:
        many = [scale(float(number)) for number in range(40)]
        with pytest.raises(CompileError):
            builder.build([Source("raise ValueError" + " " * 500), *many])
        assert builder.compiled < 10
        assert len(builder.build(many[:2])) == 2


# A user's script: no __main__ guard, run from a folder whose modules must not be picked up.
SCRIPT = """
import json, os, sys
from onnxjit.codegen.build import Builder, Source
from onnxjit.codegen.cache import Cache
with Builder(jobs=2, cache=Cache(sys.argv[1])) as builder:
    builder.start()
    (own,) = builder.build([Source(sys.argv[2])])
    assert "numba" not in sys.modules
    pids = [worker._process.pid for worker in builder._workers]
    print(json.dumps([own, pids]), flush=True)
    if len(sys.argv) > 3:
        os.kill(os.getpid(), 9)
"""
LOADER = """
import ctypes, sys
from onnxjit.codegen.cache import Cache
from onnxjit.runtime.link import link
library = link([Cache(sys.argv[1]).get("kernels", sys.argv[2])])
x = (ctypes.c_float * 3)(-1, 2, 3)
kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2)(
    library.address("k_" + sys.argv[2]))
kernel((ctypes.c_void_p * 2)(ctypes.addressof(x), ctypes.addressof(x)), None, None, 0, 3)
assert list(x) == [0, 4, 6], list(x)
assert "numba" not in sys.modules and "onnx" not in sys.modules
"""


def run_script(tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for decoy in ("numba", "onnxjit", "llvmlite", "json"):
        (elsewhere / f"{decoy}.py").write_text("raise ImportError('decoy')")
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = [str(tmp_path / "cache"), scale(2.0).text, *more]
    return subprocess.run(
        [sys.executable, "../script.py", *arguments],
        cwd=elsewhere,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_script_without_main_guard_then_a_process_without_numba(tmp_path: Path) -> None:
    done = run_script(tmp_path)
    assert done.returncode == 0, done.stderr
    own, pids = json.loads(done.stdout)
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)
    command = [sys.executable, "-c", LOADER, str(tmp_path / "cache"), own]
    loaded = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert loaded.returncode == 0, loaded.stderr


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    done = run_script(tmp_path, "kill")
    assert done.returncode == -9, done.stderr
    pids = json.loads(done.stdout)[1]
    await_true(lambda: not any(alive(pid) for pid in pids))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(state.stdout.strip()) and not state.stdout.startswith("Z")


def await_true(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within ten seconds"
        time.sleep(0.05)


def test_link_refuses_what_is_no_object_or_twice_the_same(builder: Builder) -> None:
    (image,) = builder.build([scale(2.0)]).values()
    for bad in (b"", b"hello, this is no object file", image[:200], image[:-300]):
        with pytest.raises(LinkError, match="object 1 is not a whole object file"):
            link([image, bad])
    with pytest.raises(LinkError, match="objects 0 and 1 both define"):
        link([image, image])
    with pytest.raises(KeyError, match="nothing_like_it"):
        link([image]).address("nothing_like_it")


def test_externals_win_over_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    callback = ctypes.CFUNCTYPE(None)(lambda: calls.append(True))
    address = ctypes.cast(callback, ctypes.c_void_p).value or 0
    monkeypatch.setattr(dialect, "compile_ir", lambda text, *_: FOREIGN.format(text))
    with Builder(jobs=0) as builder:
        for symbol in ("sin", "memmove"):
            ((own, image),) = builder.build([Source(symbol)]).items()
            library = link([image], {symbol: address})
            call(library.address(symbol_of(own)), end=0)
    assert calls == [True, True]


def test_library_keeps_the_code_alive_and_lets_it_go(builder: Builder) -> None:
    ((own, image),) = builder.build([scale(2.0)]).items()
    libraries = [link([image]) for _ in range(20)]
    kept = libraries.pop()
    libraries.clear()
    check_scale(kept, symbol_of(own), 2.0)


@pytest.mark.parametrize("triple", ["x86_64-apple-macosx13", "arm64-apple-macosx13"])
def test_symbols_of_macho_objects(triple: str) -> None:
    import llvmlite.binding as llvm

    from onnxjit.runtime.link import macho_symbols

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(FOREIGN.format("other"))
    module.triple = triple
    image = llvm.Target.from_triple(triple).create_target_machine().emit_object(module)
    assert sorted(macho_symbols(image)) == [("kernel", True), ("other", False)]


def test_frames_survive_a_pipe() -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as source, os.fdopen(write, "wb") as sink:
        build_worker.write_frame(sink, {"a": [1, "é"]}, b"\0body")
        build_worker.write_frame(sink, {})
        sink.write(b"\x10\0\0\0")
        sink.close()
        assert build_worker.read_frame(source) == ({"a": [1, "é"]}, b"\0body")
        assert build_worker.read_frame(source) == ({}, b"")
        assert build_worker.read_frame(source) is None
