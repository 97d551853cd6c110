"""The runtime on hand-made kernels: it needs neither the compiler nor ONNX."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
import time

import llvmlite.binding as llvm
import numpy as np
import pytest

from onnxjit.codegen.sync_intrinsics import executor_ir
from onnxjit.runtime import layout
from onnxjit.runtime import threads as threads_module
from onnxjit.runtime.executor import Executable, InputError
from onnxjit.runtime.executor_source import SOURCE, SYMBOLS
from onnxjit.runtime.link import link
from onnxjit.runtime.plan import (
    Alias,
    Buffer,
    Check,
    Dim,
    HostStep,
    Plan,
    PlanError,
    Source,
    Step,
)
from onnxjit.runtime.profile import table
from onnxjit.runtime.stages import Table
from onnxjit.runtime.threads import available_threads, pool

# out[i] = first[i] OP second[i] over tiles of ints[1] elements of ints[0].
BINARY = """
define void @{name}(ptr %ptrs, ptr %ints, ptr %scratch, i64 %begin, i64 %end) {{
entry:
  %a = load ptr, ptr %ptrs
  %b.at = getelementptr ptr, ptr %ptrs, i64 1
  %b = load ptr, ptr %b.at
  %c.at = getelementptr ptr, ptr %ptrs, i64 2
  %c = load ptr, ptr %c.at
  %n = load i64, ptr %ints
  %size.at = getelementptr i64, ptr %ints, i64 1
  %size = load i64, ptr %size.at
  %first = mul i64 %begin, %size
  %stop = mul i64 %end, %size
  %short = icmp slt i64 %stop, %n
  %last = select i1 %short, i64 %stop, i64 %n
  br label %head
head:
  %i = phi i64 [ %first, %entry ], [ %next, %body ]
  %more = icmp slt i64 %i, %last
  br i1 %more, label %body, label %exit
body:
  %pa = getelementptr float, ptr %a, i64 %i
  %pb = getelementptr float, ptr %b, i64 %i
  %pc = getelementptr float, ptr %c, i64 %i
  %x = load float, ptr %pa
  %y = load float, ptr %pb
  %z = {op} float %x, %y
  store float %z, ptr %pc
  %next = add i64 %i, 1
  br label %head
exit:
  ret void
}}
"""

# Uses its scratch: writes begin there, reads it back into out[begin..end).
SCRATCH = """
define void @through_scratch(ptr %ptrs, ptr %ints, ptr %scratch, i64 %begin, i64 %end) {
entry:
  %out = load ptr, ptr %ptrs
  br label %head
head:
  %i = phi i64 [ %begin, %entry ], [ %next, %body ]
  %more = icmp slt i64 %i, %end
  br i1 %more, label %body, label %exit
body:
  store volatile i64 %i, ptr %scratch
  %p = getelementptr i64, ptr %out, i64 %i
  %v = load volatile i64, ptr %scratch
  store i64 %v, ptr %p
  %next = add i64 %i, 1
  br label %head
exit:
  ret void
}

; Each number is one more than its mirror image in the round before; ints: numbers of a round.
define void @relay(ptr %ptrs, ptr %ints, ptr %scratch, i64 %begin, i64 %end) {
entry:
  %out = load ptr, ptr %ptrs
  %n = load i64, ptr %ints
  br label %head
head:
  %i = phi i64 [ %begin, %entry ], [ %next, %stored ]
  %more = icmp slt i64 %i, %end
  br i1 %more, label %body, label %exit
body:
  %first = icmp slt i64 %i, %n
  br i1 %first, label %stored, label %later
later:
  %round = sdiv i64 %i, %n
  %twice = mul i64 %round, 2
  %ends = mul i64 %twice, %n
  %mirror = sub i64 %ends, 1
  %source = sub i64 %mirror, %i
  %from = getelementptr i64, ptr %out, i64 %source
  %old = load volatile i64, ptr %from
  %new = add i64 %old, 1
  br label %stored
stored:
  %value = phi i64 [ 0, %body ], [ %new, %later ]
  %p = getelementptr i64, ptr %out, i64 %i
  store i64 %value, ptr %p
  %next = add i64 %i, 1
  br label %head
exit:
  ret void
}
define void @nothing(ptr %ptrs, ptr %ints, ptr %scratch, i64 %begin, i64 %end) {
  ret void
}
"""

TILE = 64


@pytest.fixture(scope="module")
def code():
    """Kernels and the executor, compiled and linked."""
    text = [BINARY.format(name=n, op=o) for n, o in (("add", "fadd"), ("mul", "fmul"))]
    return link([emit(executor_ir(SOURCE, SYMBOLS)), emit("\n".join([*text, SCRATCH]))], {})


def emit(text: str) -> bytes:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        opt=2, reloc="pic", codemodel="small"
    )
    module = llvm.parse_assembly(text)
    module.verify()
    return machine.emit_object(module)


def buffer(kind: str, *shape, dtype: str = "float32", **more) -> Buffer:
    size = np.dtype(dtype).itemsize if dtype not in ("string", "object") else 8
    terms = "*".join(f"({d})" for d in shape) or "1"
    whole = all(isinstance(d, int) for d in shape)
    nbytes = int(np.prod(shape, dtype=int)) * size if whole else f"{size}*{terms}"
    return Buffer(kind, dtype, nbytes, tuple(shape), **more)


def step(kernel: str, a: int, b: int, c: int, n, **more) -> Step:
    tiles = -(-n // TILE) if isinstance(n, int) else f"-(-({n})//{TILE})"
    return Step(kernel, (a, b, c), (n, TILE), tiles, **more)


def two_steps(shape=(8,), n=8, dims=(), **more) -> Plan:
    """out = (x + y) * y."""
    return Plan(
        (
            buffer("input", *shape, label="x"),
            buffer("input", *shape, label="y"),
            buffer("arena", *shape),
            buffer("output", *shape),
        ),
        (step("add", 0, 1, 2, n, **more), step("mul", 2, 1, 3, n, **more)),
        (0, 1),
        (3,),
        dims,
    )


BATCH = Dim("d0", Source(0, 0), "batch")


def arrays(*shape, count=2, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.random(shape, np.float32) for _ in range(count)]


def test_executor_ir_refers_to_nothing(code):
    assert {SYMBOLS[name] for name in SYMBOLS} <= set(code.symbols)
    image = emit(executor_ir(SOURCE, SYMBOLS))
    for word in (b"numba", b"Py", b"pthread", b"NRT"):
        assert word not in image


def test_two_steps(code):
    run = Executable(two_steps(), code, threads=1)
    x, y = arrays(8)
    for _ in range(3):
        (out,) = run(x, y)
        np.testing.assert_array_equal(out, (x + y) * y)
    first, second = run(x, y)[0], run(x, y)[0]
    assert not np.shares_memory(first, second)


def test_new_arrays_in_each_call(code):
    run = Executable(two_steps(), code, threads=1)
    for seed in range(20):
        x, y = arrays(8, seed=seed)
        np.testing.assert_array_equal(run.run([x, y])[0], (x + y) * y)


def test_inputs_that_must_be_copied(code):
    run = Executable(two_steps((4, 6), 24), code, threads=1)
    x, y = arrays(4, 6)
    want = (x + y) * y
    wide = np.zeros((4, 12), np.float32)
    wide[:, ::2] = x
    shifted = np.zeros(4 * 24 + 1, np.uint8)[1:].view(np.float32).reshape(4, 6)
    shifted[:] = x

    class Sub(np.ndarray):
        pass

    for form in (wide[:, ::2], np.asfortranarray(x), shifted, x.view(Sub), x.astype(">f4")):
        for _ in range(2):
            np.testing.assert_array_equal(run(form, y)[0], want)
            np.testing.assert_array_equal(run(x, y)[0], want)


@pytest.mark.parametrize("fast", [True, False])
def test_symbolic_sizes(code, fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(layout, "TABLE", None)
    run = Executable(two_steps(("d0", 3), "3*d0", (BATCH,)), code, threads=1)
    for size in [1, 5, 0, 1000, 5, 5, 1, 0, 70, 70]:
        x, y = arrays(size, 3, seed=size)
        (out,) = run(x, y)
        assert out.shape == (size, 3)
        np.testing.assert_array_equal(out, (x + y) * y)


def test_affine_size(code):
    plan = Plan(
        (buffer("input", "2*d0 + 1", label="x"), buffer("output", "d0")),
        (Step("add", (0, 0, 1), ("d0", TILE), f"-(-d0//{TILE})"),),
        (0,),
        (1,),
        (Dim("d0", Source(0, 0, 2, 1), "half", minimum=1),),
    )
    run = Executable(plan, code, threads=1)
    x = np.arange(11, dtype=np.float32)
    np.testing.assert_array_equal(run(x)[0], 2 * x[:5])
    with pytest.raises(InputError, match=r"input 'x': axis 0 must be 2\*half \+ 1, got 10"):
        run(x[:10])
    with pytest.raises(InputError, match="half = 0; it must be at least 1"):
        run(x[:1])


def test_error_messages(code):
    run = Executable(two_steps(("d0", 3), "3*d0", (BATCH,)), code, threads=1)
    x, y = arrays(4, 3)
    for _ in range(2):  # before and after the fast path has been set up
        with pytest.raises(InputError, match=r"expected 2 inputs \(input 'x', input 'y'\), got 1"):
            run(x)
        with pytest.raises(InputError, match=r"expected 2 inputs .*, got 3"):
            run(x, y, y)
        with pytest.raises(InputError, match="input 'y': expected float32, got float64"):
            run(x, y.astype(np.float64))
        with pytest.raises(InputError, match=r"'x': expected 2 axes, shape \(batch, 3\), got 1"):
            run(x[0], y)
        with pytest.raises(InputError, match=r"input 'x': axis 1 must be 3, got 2; .*\(4, 2\)"):
            run(x[:, :2], y)
        with pytest.raises(
            InputError,
            match=r"input 'y': axis 0 must be 4 \(batch; batch is read from input 'x' axis 0\), "
            r"got 2",
        ):
            run(x, y[:2])
        with pytest.raises(InputError, match="input 'x': expected a NumPy array, got list"):
            run([[1.0]], y)
        run(x, y)


def test_checks(code):
    checks = (Check("d0%2", "==", 0, "pairs only"),)
    plan = two_steps(("d0", 3), "3*d0", (BATCH,))._replace(checks=checks)
    run = Executable(plan, code, threads=1)
    run(*arrays(4, 3))
    with pytest.raises(InputError, match=r"pairs only \(sizes batch=3: 1 == 0 does not hold\)"):
        run(*arrays(3, 3))


def test_rank_zero(code):
    run = Executable(two_steps((), 1), code, threads=1)
    x, y = np.float32(2), np.array(3, np.float32)
    for _ in range(2):
        (out,) = run(x, y)
        assert out.shape == () and out == 15
        assert run(np.array(x), y)[0] == 15


def test_constants_and_aliases(code):
    """t = x + c; u (in place of t) = t * c; out = u[2:] + x[:4] (views by alias)."""
    plan = Plan(
        (
            buffer("input", 6),
            buffer("constant", 6),
            buffer("arena", 6),
            buffer("arena", 6, alias=Alias(2)),
            buffer("arena", 4, alias=Alias(3, 8)),
            buffer("input", 4, alias=Alias(0, 0)),
            buffer("output", 4),
        ),
        (step("add", 0, 1, 2, 6), step("mul", 2, 1, 3, 6), step("add", 4, 5, 6, 4)),
        (0,),
        (6,),
    )
    x, c = arrays(6)
    run = Executable(plan, code, [c], threads=1)
    for _ in range(3):
        np.testing.assert_array_equal(run(x)[0], ((x + c) * c)[2:] + x[:4])


def test_unusual_outputs(code):
    """The same output twice, an input, a constant, an arena value and a view of an output."""
    plan = Plan(
        (
            buffer("input", 4),
            buffer("constant", 4),
            buffer("arena", 4),
            buffer("output", 4),
            buffer("output", 2, 2, alias=Alias(3)),
        ),
        (step("add", 0, 1, 2, 4), step("mul", 2, 0, 3, 4)),
        (0,),
        (3, 0, 1, 2, 3, 4, 0),
    )
    x, c = arrays(4)
    run = Executable(plan, code, [c], threads=1)
    for _ in range(2):
        results = run(x)
        t = x + c
        for got, want in zip(
            results, (t * x, x, c, t, t * x, (t * x).reshape(2, 2), x), strict=True
        ):
            np.testing.assert_array_equal(got, want)
        for one, other in itertools.combinations([*results, x, c], 2):
            assert one is other or not np.shares_memory(one, other)


def test_arena_output_aliasing_output_storage(code):
    """An arena value may live in an output's array: out = t * x in place of t."""
    plan = Plan(
        (buffer("input", 4), buffer("arena", 4, alias=Alias(2)), buffer("output", 4)),
        (step("add", 0, 0, 1, 4), step("mul", 1, 0, 2, 4)),
        (0,),
        (2,),
    )
    (x,) = arrays(4, count=1)
    run = Executable(plan, code, threads=1)
    for _ in range(2):
        np.testing.assert_array_equal(run(x)[0], (x + x) * x)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_parallel_steps(code, threads):
    n = 100_003
    plan = two_steps(("d0",), "d0", (BATCH,), flops="d0*100")
    run = Executable(plan, code, threads=threads)
    for size in (n, n, 7, n):
        x, y = arrays(size, seed=size)
        for _ in range(5):
            np.testing.assert_array_equal(run(x, y)[0], (x + y) * y)


def test_scratch_belongs_to_a_thread(code):
    n = 200_000
    plan = Plan(
        (buffer("output", n, dtype="int64"),),
        (Step("through_scratch", (0,), (), n, 8, flops=n * 50),),
        (),
        (0,),
    )
    run = Executable(plan, code, threads=3)
    for _ in range(20):
        np.testing.assert_array_equal(run()[0], np.arange(n))


def test_long_chain_of_parallel_steps(code):
    """Many barriers, and workers that park and wake in between."""
    n, count = 4096, 300
    buffers = [buffer("input", n), *[buffer("arena", n) for _ in range(count - 1)]]
    steps = [step("add", i, 0, i + 1, n, flops=n * 100) for i in range(count)]
    plan = Plan((*buffers, buffer("output", n)), tuple(steps), (0,), (count,))
    run = Executable(plan, code, threads=2)
    x = np.ones(n, np.float32)
    for pause in (0, 0, 0.001, 0.01, 0):
        time.sleep(pause)
        np.testing.assert_array_equal(run(x)[0], np.full(n, count + 1, np.float32))
    assert run.arena_bytes() <= 2 * n * 4 + 64, "a chain needs two buffers"


def test_idle_workers_park(code):
    run = Executable(two_steps((50_000,), 50_000, flops=10**8), code, threads=2)
    run(*arrays(50_000))
    assert pool().workers >= 1
    limit = time.monotonic() + 5
    while pool().parked < pool().workers and time.monotonic() < limit:
        time.sleep(0.01)
    assert pool().parked == pool().workers


def test_concurrent_calls(code):
    run = Executable(two_steps(("d0",), "d0", (BATCH,), flops="d0*50"), code, threads=2)
    wrong: list[str] = []

    def hammer(number: int) -> None:
        for i in range(150):
            x, y = arrays((97, 30_000)[(i + number) % 2] + number % 3, seed=i)
            if not np.array_equal(run(x, y)[0], (x + y) * y):
                wrong.append(f"thread {number}, call {i}")

    workers = [threading.Thread(target=hammer, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_a_round_begins_when_the_one_before_has_ended(code, threads):
    # Element i of round r reads element n - 1 - i of round r - 1: another thread's, if any shares.
    n, rounds = 24, 300
    relay = Step("relay", (0,), (n,), n * rounds, rounds=rounds, flops=rounds * 10**6)
    plan = Plan((buffer("output", rounds, n, dtype="int64"),), (relay,), (), (0,))
    run = Executable(plan, code, threads=threads)
    for _ in range(20):
        (out,) = run()
        assert (out == np.arange(rounds)[:, None]).all()
    chunks = run.profile(())[1][0].chunks
    assert (chunks > 1) == (threads > 1)


def test_releases_the_gil(code):
    n = 4_000_000
    count = 8
    steps = [step("add", 0, 1, 2, n) for _ in range(count)]
    plan = Plan(
        (buffer("input", n), buffer("input", n), buffer("output", n)), tuple(steps), (0, 1), (2,)
    )
    run = Executable(plan, code, threads=1)
    x, y = arrays(n)
    run(x, y)
    ticks = []
    worker = threading.Thread(target=lambda: run(x, y))
    start = time.perf_counter()
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter() - start)
        time.sleep(0.0005)
    assert len(ticks) > 5, "this thread never ran while the kernels did"


def test_results_outlive_the_executable(code):
    run = Executable(two_steps(), code, threads=1)
    x, y = arrays(8)
    (out,) = run(x, y)
    del run
    gc.collect()
    np.testing.assert_array_equal(out, (x + y) * y)


def test_profile(code):
    run = Executable(two_steps((100_000,), 100_000, flops=10**6, bytes=1_200_000), code, threads=2)
    x, y = arrays(100_000)
    outputs, rows = run.profile([x, y])
    np.testing.assert_array_equal(outputs[0], (x + y) * y)
    assert [row.kernel for row in rows] == ["add", "mul"]
    for row in rows:
        assert 0 < row.seconds < 1 and row.flops == 10**6
        assert row.gflops == pytest.approx(1e-3 / row.seconds)
        assert len(row.busy) == 2 and 0 < max(row.busy) <= row.seconds * 1.01
    assert "add" in table(rows)
    np.testing.assert_array_equal(run(x, y)[0], (x + y) * y)


def filter_plan() -> Plan:
    """t = x + x; kept = t[t > 1] on the host; out = kept * kept, of a size known only then."""
    return Plan(
        (
            buffer("input", "d0", label="x"),
            buffer("arena", "d0"),
            buffer("host", "d1", label="kept"),
            buffer("output", "d1"),
            buffer("arena", "d1"),
        ),
        (
            step("add", 0, 0, 1, "d0"),
            HostStep("keep", (1,), (2,), {"above": 1.0}),
            step("mul", 2, 2, 4, "d1"),
            step("add", 4, 2, 3, "d1"),
        ),
        (0,),
        (3,),
        (BATCH, Dim("d1", Source(2, 0), "kept")),
    )


def keep(values, attributes):
    return [values[0][values[0] > attributes["above"]]]


def test_host_step_that_defines_a_size(code):
    run = Executable(filter_plan(), code, threads=1, host={"keep": keep})
    for size in (10, 3, 10, 0, 5000):
        (x,) = arrays(size, count=1, seed=size)
        t = (x + x)[(x + x) > 1]
        np.testing.assert_array_equal(run(x)[0], t * t + t)
    _, rows = run.profile([x])
    assert [row.kernel for row in rows] == ["add", "keep", "mul", "add"]


def test_host_step_size_from_a_value_and_python_objects(code):
    """Host steps next to each other, a size read from a value, an object in between."""
    plan = Plan(
        (
            buffer("input", 4),
            Buffer("host", "object", 0),
            buffer("host", dtype="int64"),
            buffer("host", "d0"),
            buffer("output", "d0"),
        ),
        (
            HostStep("pack", (0,), (1, 2)),
            HostStep("unpack", (1,), (3,)),
            step("add", 3, 3, 4, "d0"),
        ),
        (0,),
        (4, 3),
        (Dim("d0", Source(2, None), "count"),),
    )
    host = {
        "pack": lambda values, _: [[values[0][:3]], np.array(3)],
        "unpack": lambda values, _: [values[0][0]],
    }
    (x,) = arrays(4, count=1)
    out, kept = Executable(plan, code, threads=1, host=host)(x)
    np.testing.assert_array_equal(out, 2 * x[:3])
    np.testing.assert_array_equal(kept, x[:3])


def test_host_views_do_not_leak_the_arena(code):
    """A host function that returns its argument must not hand out memory of the next run."""
    plan = Plan(
        (buffer("input", 4), buffer("arena", 4), buffer("host", 4)),
        (step("add", 0, 0, 1, 4), HostStep("same", (1,), (2,))),
        (0,),
        (2,),
    )
    run = Executable(plan, code, threads=1, host={"same": lambda values, _: values})
    x, y = arrays(4)
    (first,) = run(x)
    run(y)
    np.testing.assert_array_equal(first, x + x)


def test_strings_through_a_host_step(code):
    plan = Plan(
        (Buffer("input", "string", 0, (2,)), Buffer("host", "string", 0, (2,))),
        (HostStep("upper", (0,), (1,)),),
        (0,),
        (1,),
    )
    host = {"upper": lambda values, _: [np.array([v.upper() for v in values[0]], object)]}
    run = Executable(plan, code, threads=1, host=host)
    assert run(np.array(["a", "bc"]))[0].tolist() == ["A", "BC"]


def test_host_error_leaves_the_executable_usable(code):
    def failing(values, attributes):
        if values[0].size == 3:
            raise RuntimeError("three")
        return keep(values, attributes)

    run = Executable(filter_plan(), code, threads=1, host={"keep": failing})
    with pytest.raises(RuntimeError, match="three"):
        run(np.ones(3, np.float32))
    np.testing.assert_array_equal(run(np.ones(2, np.float32))[0], [6, 6])


def test_json_round_trip(code):
    for plan in (two_steps(("d0", 3), "3*d0", (BATCH,)), filter_plan()):
        assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="version"):
        Plan.from_json('{"format": 0}')


@pytest.mark.parametrize("text", ["__import__('os')", "d0.real", "d0;d1", "[d0]", "a", "", "d0\n"])
def test_expressions_admit_arithmetic_only(code, text):
    with pytest.raises(PlanError):
        Executable(two_steps(("d0",), text, (BATCH,)), code, threads=1)


def test_plan_errors(code):
    with pytest.raises(PlanError, match="constants"):
        Executable(two_steps(), code, [np.zeros(1)], threads=1)
    with pytest.raises(PlanError, match="before they are known"):
        Executable(two_steps(("d0",), "d1", (BATCH,)), code, threads=1)
    with pytest.raises(PlanError, match="no host function"):
        Executable(filter_plan(), code, threads=1)
    with pytest.raises(KeyError):
        Executable(Plan((), (Step("absent", ()),), (), ()), code, threads=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork(code):
    x, y = arrays(60_000)
    run = Executable(two_steps((60_000,), 60_000, flops=10**8), code, threads=2)
    want = (x + y) * y
    np.testing.assert_array_equal(run(x, y)[0], want)
    child = os.fork()
    if child == 0:
        good = all(np.array_equal(run(x, y)[0], want) for _ in range(20))
        os._exit(0 if good and pool().workers == len(pool()._threads) > 0 else 1)
    limit = time.monotonic() + 20
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done or time.monotonic() > limit:
            break
        time.sleep(0.01)
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done and os.waitstatus_to_exitcode(status) == 0
    np.testing.assert_array_equal(run(x, y)[0], want)


def test_workers_start_again_after_stop(code):
    x, y = arrays(60_000)
    run = Executable(two_steps((60_000,), 60_000, flops=10**8), code, threads=2)
    run(x, y)
    pool().stop()
    assert pool().workers == 0
    for _ in range(3):
        np.testing.assert_array_equal(run(x, y)[0], (x + y) * y)
    assert pool().workers >= 1


def test_available_threads(tmp_path):
    assert 1 <= available_threads() <= (os.cpu_count() or 1)
    table = tmp_path / "cgroup"
    table.write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert threads_module._quota(str(tmp_path), str(table)) == 1.5
    table.write_text("4:cpu,cpuacct:/c\n3:memory:/c\n")
    (tmp_path / "cpu,cpuacct" / "c").mkdir(parents=True)
    (tmp_path / "cpu,cpuacct" / "c" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu,cpuacct" / "c" / "cpu.cfs_period_us").write_text("100000\n")
    assert threads_module._quota(str(tmp_path), str(table)) == 0.5


def test_warm_path_imports_no_compiler():
    names = "executor, executor_source, memory, plan, profile, threads, link, layout"
    text = f"from onnxjit.runtime import {names}; import sys; " \
        "print(sorted({'numba', 'onnx', 'ml_dtypes'} & sys.modules.keys()))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sizes_that_say_the_same_are_computed_once() -> None:
    """The function of a table gives what Python gives for each expression by itself."""
    rng = np.random.default_rng(3)

    def expression(depth: int) -> str:
        if depth == 0:
            return rng.choice(["d0", "d1", "7", "(-1)"])
        a, b = expression(depth - 1), expression(depth - 1)
        form = rng.choice(["({} + {})", "({}*{})", "max({}, {}, 1)", "min({}, {})", "({} // 3)"])
        return form.format(a, b)

    texts = list(dict.fromkeys(expression(depth) for depth in (0, 1, 2, 3, 4) for _ in range(20)))
    table = Table(["d0", "d1"])
    places = table.add_all([*texts, 42, *texts])
    table.freeze(["d0", "d1"])
    for dims in ((1, 1), (0, 5), (1000, 3)):
        scope = {"d0": dims[0], "d1": dims[1]}
        wanted = [eval(text, {"min": min, "max": max}, scope) for text in texts]
        np.testing.assert_array_equal(table.evaluate(dims)[places], [*wanted, 42, *wanted])
