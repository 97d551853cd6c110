"""What a measurement was made on: processor, clock, memory, versions, and how busy it was."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

_PACKAGES = ("onnxjit", "numba", "llvmlite", "numpy", "onnx")
_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")
_CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")


def machine() -> dict[str, Any]:
    """Processor and the instruction sets that matter here, cores, caches, memory in bytes, clock,
    versions, load average, date. What the system does not tell is None."""
    from onnxjit.bench.engines import ENGINES
    from onnxjit.codegen.target import host

    facts = _cpuinfo()
    target = host()
    engines = [package for engine in ENGINES.values() for package in engine.packages]
    flags = facts.get("flags", facts.get("Features", "")).split()
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "isa_limit": os.environ.get("ONNXJIT_ISA"),
        "cores": target.cores,
        "caches": {"l1": target.l1, "l2": target.l2, "l3": target.l3},
        "memory": _memory(),
        "virtual": "hypervisor" in flags,
        "governor": _text(_CPUFREQ / "scaling_governor"),
        "clock": {
            "nominal": _scaled(facts.get("cpu MHz"), 1e6),
            "least": _scaled(_text(_CPUFREQ / "scaling_min_freq"), 1e3),
            "most": _scaled(_text(_CPUFREQ / "scaling_max_freq"), 1e3),
        },
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "packages": {
            name: found
            for name in dict.fromkeys([*_PACKAGES, *engines])
            if (found := _version(name)) is not None
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def describe(facts: dict[str, Any]) -> list[str]:
    """The record of a machine as a few short lines; also of one that lacks the newer entries."""
    caches = facts.get("caches", {})
    sizes = " + ".join(f"{name.upper()} {size >> 10} KiB" for name, size in caches.items() if size)
    clock = (facts.get("clock") or {}).get("nominal")
    parts = [facts["cpu"], f"{facts['cores']} cores", sizes, " ".join(facts.get("flags", []))]
    lines = [", ".join(filter(None, parts))]
    governor = facts.get("governor") or "not told by the system"
    told = [f"governor {governor}"]
    if clock:
        told.append(f"clock {clock / 1e9:.2f} GHz as the system has it")
    if facts.get("virtual"):
        told.append("a virtual machine")
    if facts.get("load"):
        told.append(f"load average {facts['load'][0]:.2f} at the time of writing")
    lines.append(", ".join(told))
    packages = {"python": facts.get("python"), **facts.get("packages", {})}
    lines.append(", ".join(f"{name} {v}" for name, v in packages.items() if v))
    lines.append(", ".join(filter(None, [facts.get("system"), facts.get("date")])))
    return lines


def key_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for times of two records to be comparable."""
    return {name: facts.get(name) for name in ("cpu", "cores", "flags", "isa_limit")}


def _cpuinfo() -> dict[str, str]:
    """The entries of the first processor in /proc/cpuinfo; empty where there is none."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return found


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _scaled(text: str | None, unit: float) -> float | None:
    try:
        return None if text is None else float(text) * unit
    except ValueError:
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
