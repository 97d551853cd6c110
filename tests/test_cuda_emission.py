"""CUDA kernels from the same definitions: simulated, compiled to PTX, assembled, run on a GPU."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_checks import CHECKS, Check, fused, is_tiny, sample

from onnxjit.codegen import build_cuda
from onnxjit.codegen.dialect_cuda import memory_dtype
from onnxjit.codegen.emit_cuda import emit
from onnxjit.codegen.evaluate import evaluate_int

RUNNER = Path(__file__).parent / "cuda_simulator_runner.py"


# --- simulator ---------------------------------------------------------------------------------


class Simulator:
    """A process with Numba's CUDA simulator that runs one job after the other."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(RUNNER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        )

    def run(self, job: Any) -> Any:
        """The buffers after the job, or the text of what a kernel raised."""
        assert self.process.stdin is not None and self.process.stdout is not None
        pickle.dump(job, self.process.stdin)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0
        self.process.stdout.close()

    def verify(self, check: Check) -> None:
        result = self.run(check.job())
        assert not isinstance(result, str), result
        check.verify(result)


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    needs_toolchain()
    simulator = Simulator()
    yield simulator
    simulator.close()


def needs_toolchain() -> None:
    problem = build_cuda.toolchain_problem()
    if problem:
        pytest.skip(problem)


@pytest.mark.parametrize("name", CHECKS)
def test_simulated(name: str, simulator: Simulator) -> None:
    simulator.verify(CHECKS[name])


def test_simulated_fused_models(simulator: Simulator) -> None:
    assert len(fused()) >= 6
    for check in fused().values():
        simulator.verify(check)


@pytest.mark.parametrize("part", range(4))
def test_simulated_operator_cases(part: int, simulator: Simulator) -> None:
    names = [n for n, c in sample().items() if is_tiny(c)][part::4]
    assert len(names) > 10
    wrong = {}
    for name in names:
        try:
            simulator.verify(sample()[name])
        except AssertionError as e:
            wrong[name] = str(e)[-500:]
    assert not wrong, wrong


def test_the_simulator_sees_wrong_indices(simulator: Simulator) -> None:
    """A kernel that writes one element too far, and one that reads before its buffer."""
    source = emit(CHECKS["add_large"].nests()[0][1])
    buffers, calls = CHECKS["add_large"].job()
    assert source.count("b2[ei]") == source.count("b0[ei]") == 1
    for bad in (source.replace("b2[ei]", "b2[ei + 1]"), source.replace("b0[ei]", "b0[ei - 1]")):
        result = simulator.run((buffers, [(bad, *calls[0][1:])]))
        assert "IndexError" in result


# --- PTX and cubins ----------------------------------------------------------------------------


@cache
def build(source: str) -> str:
    """PTX of a source, also assembled for two architectures."""
    ptx, cubins = build_cuda.build(source, ("sm_80", "sm_90"))
    assert cubins.keys() == {"sm_80", "sm_90"}
    assert all(c.startswith(b"\x7fELF") for c in cubins.values())
    return ptx


@pytest.mark.parametrize("name", CHECKS)
def test_builds(name: str) -> None:
    needs_toolchain()
    for _, nest in CHECKS[name].nests(threads=256):
        ptx = build(emit(nest))
        assert f".entry {build_cuda.entry_name(ptx)}(" in ptx
        assert ".target sm_80" in ptx


@pytest.mark.parametrize("part", range(4))
def test_operator_cases_and_fused_models_build(part: int) -> None:
    needs_toolchain()
    checks = [*list(sample().values())[::7], *fused().values()]
    sources = sorted({emit(nest) for c in checks for _, nest in c.nests(threads=256)})
    assert len(sources) > 18
    assert all(build(s) for s in sources[part::4])


def test_ptx_for_a_newer_architecture() -> None:
    needs_toolchain()
    (source,) = [emit(n) for _, n in CHECKS["softmax"].nests(threads=256)]
    assert ".target sm_90" in build_cuda.compile_ptx(source, (9, 0))


def test_unknown_name_is_an_error() -> None:
    needs_toolchain()
    with pytest.raises(Exception, match="nonsense"):
        build_cuda.compile_ptx(
            'BUFFERS = ("float32",)\nTHREADS = 32\ndef kernel(b0):\n    b0[0] = nonsense(b0[1])\n'
        )


# --- schedules and launches --------------------------------------------------------------------


def rule_of(name: str) -> str:
    return CHECKS[name].nests(threads=256)[-1][1].rule


def test_rules() -> None:
    assert rule_of("add") == "elements"
    assert rule_of("concat") == "elements"
    assert rule_of("sum_rows") == "reduction: one block an output"
    assert rule_of("sum_columns") == "elements"
    assert rule_of("max_pool") == "elements"
    assert rule_of("softmax") == "rows: one block a row"
    assert rule_of("softmax_inner") == "rows: one thread a row"
    assert rule_of("matmul").startswith("contraction")
    assert rule_of("conv").startswith("contraction")
    assert rule_of("conv_depthwise") == "elements"


def test_launch_sizes() -> None:
    kernel = CHECKS["add_symbolic"]
    ((_, nest),) = kernel.nests(threads=256)
    at = {"n3": 30, "n5": 50, "n7": 70}
    assert build_cuda.launch(nest, at) == build_cuda.Launch(-(-30 * 50 * 70 // 1024), 256)
    assert build_cuda.launch(nest, {**at, "n5": 0}).blocks == 0
    with pytest.raises(ValueError, match="48 threads"):
        build_cuda.cuda_target(threads=48)


def test_shared_memory_fits() -> None:
    for check in [*CHECKS.values(), *fused().values()]:
        for _, nest in check.nests(threads=256):
            total = sum(
                evaluate_int(x.count, {}) * np.dtype(memory_dtype(x.dtype)).itemsize
                for x in nest.locals
            )
            assert total <= 48 << 10
            assert nest.threads in (32, 64, 128, 256)


def test_source_of_a_kernel() -> None:
    (source,) = [emit(n) for _, n in CHECKS["add_symbolic"].nests(threads=256)]
    assert source.split() == ADD.split()


ADD = '''\
"""Schedule: elements."""

BUFFERS = ("float32", "float32", "float32",)
THREADS = 256


def kernel(b0, b1, b2, n0, n1, n2, n3):
    thread = int64(cuda.threadIdx.x)
    for tile in range(int64(cuda.blockIdx.x), n3, int64(cuda.gridDim.x)):
        for ei in range((thread + tile*1024), min_((tile*1024 + 1024), (n0*n1*n2)), 256):
            i2 = umod_(ei, n2)
            i1 = umod_(udiv_(ei, n2), n0)
            i0 = udiv_(udiv_(ei, n2), n0)
            b2[(i0*n0*n2 + i1*n2 + i2)] = (b0[(i0*n2 + i2)] + b1[i1])
'''


def test_device_problem() -> None:
    """One clear sentence, or a device that the driver really has."""
    problem = build_cuda.device_problem()
    if problem is None:
        import cupy

        assert cupy.cuda.runtime.getDeviceCount() > 0
    else:
        assert problem.startswith('device="cuda" cannot be used: ')
        assert problem.count(". ") == 0


def test_asking_for_a_device_imports_nothing_heavy() -> None:
    code = (
        "import sys; from onnxjit.codegen import build_cuda; build_cuda.device_problem();"
        "print([m for m in ('numba', 'cupy', 'onnx', 'llvmlite') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --- a real device -----------------------------------------------------------------------------

GUARD = 64


def run_on_device(check: Check) -> dict[str, np.ndarray]:
    """Runs a check through CuPy, each buffer between guard bands that must stay as they were."""
    import cupy

    held, device = {}, {}
    for b, data in check.buffers().items():
        band = np.full(GUARD, 0x5A, np.uint8).view(data.dtype)
        held[b] = cupy.asarray(np.concatenate([band, data, band]))
        device[b] = held[b][band.size : band.size + data.size]
    capability = cupy.cuda.Device().compute_capability  # "90"
    cc = (int(capability[:-1]), int(capability[-1]))
    for _, nest in check.nests(threads=256):
        sizes = build_cuda.launch(nest, dict(check.dims))
        if sizes.blocks == 0:
            continue
        ptx = build_cuda.compile_ptx(emit(nest), min(cc, (9, 0)))
        cubin = build_cuda.assemble(ptx, f"sm_{cc[0]}{cc[1]}")
        module = cupy.cuda.function.Module()
        module.load(cubin)
        function = module.get_function(build_cuda.entry_name(ptx))
        arguments = [device[p.buffer] for p in nest.params]
        dims = [np.int64(evaluate_int(e, check.dims)) for e in nest.sizes]
        function((sizes.blocks,), (sizes.threads,), (*arguments, *dims))
    cupy.cuda.Device().synchronize()
    for b, whole_buffer in held.items():
        raw = cupy.asnumpy(whole_buffer).view(np.uint8)
        assert (raw[:GUARD] == 0x5A).all() and (raw[-GUARD:] == 0x5A).all(), f"{b} was left"
    return {b: cupy.asnumpy(d) for b, d in device.items()}


@pytest.mark.cuda
@pytest.mark.parametrize("name", CHECKS)
def test_on_device(name: str) -> None:
    problem = build_cuda.device_problem()
    if problem:
        pytest.skip(problem)
    CHECKS[name].verify(run_on_device(CHECKS[name]))
