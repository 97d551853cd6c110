"""GFLOP/s of every register tile that this machine can run, on operands in the L1 and L2 caches.

`share` is the fraction of the measured peak of multiply-adds with the same instruction set; for
the portable tiles, of the best of them.
"""

from __future__ import annotations

import ctypes
from argparse import Namespace

import numpy as np
from llvmlite import binding

from benchmarks.record import write
from onnxjit.bench import take_turns
from onnxjit.bench.roofline import roofline
from onnxjit.codegen import instruction_sets, microkernels
from onnxjit.codegen.microkernels import MicroKernel
from onnxjit.codegen.target import host
from onnxjit.runtime.threads import aligned

DEPTH = 256  # k of the timed tile: a panel of 32 columns is 32 KiB
CALLS = 200

# Calls `tile` CALLS times: a call from Python takes as long as a small tile.
REPEAT = f"""
define void @repeat(ptr %tile, ptr %a, i64 %rs, ptr %segs, i64 %depth, ptr %b, ptr %c, i64 %ldc) {{
entry:
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %j, %loop ]
  call void %tile(ptr %a, i64 %rs, ptr %segs, i64 1, i64 %depth, ptr %b, ptr %c, i64 %ldc, i64 0,
                  ptr %a)
  %j = add i64 %i, 1
  %more = icmp ult i64 %j, {CALLS}
  br i1 %more, label %loop, label %done
done:
  ret void
}}"""


def main(arguments: Namespace) -> None:
    target = host()
    machine_peaks = roofline(1, again=True).peaks
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    jit = binding.create_lljit_compiler(machine)
    repeat = binding.JITLibraryBuilder().add_ir(REPEAT).export_symbol("repeat").link(jit, "repeat")
    kept, rows = [], []
    for isa in instruction_sets.ISAS.values():
        kernels = [k for k in microkernels.rows(isa.name) if k.runs_on(target)]
        speeds: dict[str, float] = {}
        for kernel in kernels:
            code = microkernels.object_code(kernel.symbol, target)
            builder = binding.JITLibraryBuilder().add_object_img(code)
            tracker = builder.export_symbol(kernel.symbol).link(jit, kernel.symbol)
            kept.append(tracker)  # the code lives as long as its tracker
            speeds[kernel.symbol] = speed(
                kernel, repeat["repeat"], tracker[kernel.symbol], arguments.seconds / 20
            )
        best = max(speeds.values(), default=1.0)
        # The portable tiles are compiled for whatever the machine has: no instruction set's peak.
        peak = machine_peaks[f"float32/{isa.name}"] / 1e9 if kernels and isa.fused else best
        for kernel in kernels:
            found = speeds[kernel.symbol]
            row = {"symbol": kernel.symbol, "isa": isa.name, "gflops": found,
                   "share": found / peak, "estimate": kernel.throughput}  # fmt: skip
            rows.append(row)
            print(
                f"{kernel.symbol:<28} {found:8.1f} GFLOP/s  {row['share']:5.2f} of the peak, "
                f"estimated {kernel.throughput:5.2f}",
                flush=True,
            )
    write(arguments, {"depth": DEPTH, "rows": rows})


def speed(kernel: MicroKernel, repeat: int, tile: int, seconds: float) -> float:
    """GFLOP/s of the tile at address `tile`, after its result was compared with NumPy's; `repeat`
    is the address of `REPEAT`."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    prototype = ctypes.CFUNCTYPE(
        None, pointer, pointer, integer, pointer, integer, pointer, pointer, integer
    )
    function = prototype(repeat)
    rng = np.random.default_rng(0)
    # An odd stride in cache lines: rows a multiple of 4 KiB apart would share a set of L1.
    stride = DEPTH + 16
    a, b, c = (
        aligned(4 * n).view(np.float32)
        for n in (kernel.mr * stride, DEPTH * kernel.nr, kernel.mr * kernel.nr)
    )
    a[:] = rng.standard_normal(a.size)
    b[:] = rng.standard_normal(b.size)
    segments = np.zeros(1, np.int64)
    arguments = (
        tile, a.ctypes.data, stride, segments.ctypes.data, DEPTH, b.ctypes.data, c.ctypes.data,
        kernel.nr,
    )  # fmt: skip
    function(*arguments)
    want = a.reshape(kernel.mr, stride)[:, :DEPTH] @ b.reshape(DEPTH, kernel.nr)
    np.testing.assert_allclose(c.reshape(kernel.mr, kernel.nr), want, rtol=1e-3, atol=1e-3)
    timing = take_turns({"tile": lambda: function(*arguments)}, seconds, burst=0.005, rounds=3)
    return 2 * kernel.mr * kernel.nr * DEPTH * CALLS / timing["tile"].minimum * 1e-9
