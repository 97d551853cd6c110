"""What this machine can do, measured anew: multiply-adds per dtype and instruction set, bandwidth
per level of the memory hierarchy. See `onnxjit.bench.roofline`."""

from __future__ import annotations

from argparse import Namespace

from benchmarks.record import write
from onnxjit.bench.roofline import roofline


def main(arguments: Namespace) -> None:
    rows = []
    for threads in arguments.threads:
        found = roofline(threads, again=True)
        rows.append(found.to_json())
        print(f"{threads} thread(s), one of them seen at {found.frequency / 1e9:.2f} GHz")
        for name, peak in found.peaks.items():
            print(f"  {name:<18} {peak / 1e9:8.1f} G multiplications and additions/s")
        for b in found.bandwidths:
            print(
                f"  {b.level:<8} {b.footprint >> 10:>8} KiB  read {b.read / 1e9:7.1f} GB/s  "
                f"copy {b.copy / 1e9:7.1f} GB/s"
            )
    write(arguments, {"rows": rows})
