"""The machine that code is generated for: instruction set features, caches and cores.

Decisions are taken from feature flags, never from a processor's name: LLVM may not know the
processor, and a virtual machine may hide features that the name implies. For the same reason the
`cpu` handed to LLVM is one of the generic levels below, which only chooses tuning and a baseline
that the flags already contain.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from llvmlite import binding

AVX2_FEATURES = frozenset({"avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe"})
AVX512_FEATURES = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
_SSE42_FEATURES = frozenset({"sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "cx16", "sahf"})

# Generic levels of x86-64, widest first: (LLVM's name, features that the level switches on).
_X86_LEVELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("x86-64-v4", _SSE42_FEATURES | AVX2_FEATURES | AVX512_FEATURES),
    ("x86-64-v3", _SSE42_FEATURES | AVX2_FEATURES),
    ("x86-64-v2", _SSE42_FEATURES),
    ("x86-64", frozenset()),
)

# ONNXJIT_ISA keeps the features that do not start with one of these.
_AVX512_PREFIXES = ("avx512", "avx10", "amx", "evex512")
_AVX_PREFIXES = ("avx", "amx", "evex512", "fma", "f16c", "vaes", "vpclmul", "xop", "sha512", "sm3",
                 "sm4")  # fmt: skip
_ISA_LIMITS: dict[str, tuple[str, ...]] = {
    "avx512": (),
    "avx2": _AVX512_PREFIXES,
    "scalar": _AVX_PREFIXES,
}

# Features that arithmetic and data movement can use, by the names of Linux and of LLVM.
_LINUX_X86 = {
    "pni": "sse3", "ssse3": "ssse3", "sse4_1": "sse4.1", "sse4_2": "sse4.2", "popcnt": "popcnt",
    "cx16": "cx16", "lahf_lm": "sahf", "movbe": "movbe", "f16c": "f16c", "fma": "fma",
    "avx": "avx", "avx2": "avx2", "bmi1": "bmi", "bmi2": "bmi2", "abm": "lzcnt", "adx": "adx",
    "3dnowprefetch": "prfchw", "gfni": "gfni", "vaes": "vaes", "vpclmulqdq": "vpclmulqdq",
    "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512cd": "avx512cd", "avx512dq": "avx512dq",
    "avx512vl": "avx512vl", "avx512ifma": "avx512ifma", "avx512vbmi": "avx512vbmi",
    "avx512_vbmi2": "avx512vbmi2", "avx512_vnni": "avx512vnni", "avx512_bitalg": "avx512bitalg",
    "avx512_vpopcntdq": "avx512vpopcntdq", "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16", "avx_vnni": "avxvnni", "amx_tile": "amx-tile",
    "amx_int8": "amx-int8", "amx_bf16": "amx-bf16",
}  # fmt: skip

_DEFAULT_L1 = 32 << 10
_DEFAULT_L2 = 512 << 10
_DEFAULT_L3 = 8 << 20


class Target(NamedTuple):
    """A machine: `kind` is "cpu" or "cuda"; `features` are LLVM's names of what is present.

    `vector_bytes` is the widest vector register; `l1`, `l2` (per core) and `l3` (shared) are data
    cache sizes in bytes, 0 where there is none; `cores` are the CPUs this process may use.
    """

    kind: str
    triple: str
    cpu: str
    features: frozenset[str]
    vector_bytes: int
    l1: int
    l2: int
    l3: int
    cores: int

    @property
    def code_key(self) -> str:
        """Everything here that changes the machine code of a given source, as one line."""
        return f"{self.kind} {self.triple} {self.cpu} {','.join(sorted(self.features))}"

    @property
    def kept(self) -> int:
        """Bytes of constants that the last cache keeps from one run of a model to the next: other
        data passes through it, too, and some constants grow when they are packed."""
        return self.l3 // 2

    def has(self, features: frozenset[str]) -> bool:
        """Whether every one of `features` is present."""
        return features <= self.features

    @property
    def arch(self) -> str:
        """The first part of the triple with its spelling variants merged: "x86_64", "aarch64"…"""
        name = self.triple.split("-", 1)[0].lower()
        return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def host() -> Target:
    """The machine this process runs on, limited by ONNXJIT_ISA (scalar, avx2 or avx512)."""
    return _host(os.environ.get("ONNXJIT_ISA", ""))


@cache
def _host(limit: str) -> Target:
    triple, features = linux_x86() or _llvm_host()
    l1, l2, l3 = _caches()
    whole = cpu_target(triple, features, l1=l1, l2=l2, l3=l3, cores=_cores())
    return limited(whole, limit) if limit else whole


def linux_x86(table: str | os.PathLike[str] = "/proc/cpuinfo") -> tuple[str, frozenset[str]] | None:
    """The triple and the features of a Linux on x86-64, None elsewhere.

    LLVM says the same; its library takes longer to load than a warm start has. The kernel lists
    a feature only if it saves the registers that the feature adds.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return None
    try:
        with open(table) as lines:
            flags = next(line for line in lines if line.startswith("flags")).split()
    except (OSError, StopIteration):
        return None
    found = frozenset(_LINUX_X86[flag] for flag in flags if flag in _LINUX_X86)
    return "x86_64-unknown-linux-gnu", found


def _llvm_host() -> tuple[str, frozenset[str]]:
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return binding.get_process_triple(), frozenset(name for name, on in features.items() if on)


def cpu_target(
    triple: str,
    features: frozenset[str],
    *,
    l1: int = _DEFAULT_L1,
    l2: int = _DEFAULT_L2,
    l3: int = _DEFAULT_L3,
    cores: int = 1,
) -> Target:
    """A CPU target from its triple and LLVM feature names; the rest follows from those."""
    bare = Target("cpu", triple, "generic", features, 16, l1, l2, l3, cores)
    cpu, vector_bytes = "generic", 16
    if bare.arch == "x86_64":
        cpu = next(name for name, needed in _X86_LEVELS if needed <= features)
        if features >= AVX512_FEATURES:
            vector_bytes = 64
        elif features >= {"avx2", "fma"}:
            vector_bytes = 32
    return Target("cpu", triple, cpu, features, vector_bytes, l1, l2, l3, cores)


def limited(target: Target, isa: str) -> Target:
    """`target` without the x86 features above `isa` ("scalar", "avx2" or "avx512").

    Raises ValueError on another name. Features of other architectures are kept.
    """
    if isa not in _ISA_LIMITS:
        raise ValueError(f"ONNXJIT_ISA is {isa!r}; it takes one of {', '.join(_ISA_LIMITS)}")
    if target.arch != "x86_64":
        return target
    prefixes = _ISA_LIMITS[isa]
    kept = frozenset(name for name in target.features if not name.startswith(prefixes))
    return cpu_target(
        target.triple, kept, l1=target.l1, l2=target.l2, l3=target.l3, cores=target.cores
    )


def target_machine(target: Target, *, wide: bool = False) -> binding.TargetMachine:
    """A new LLVM target machine for `target`: optimisation level 3, position independent.

    With `wide`, LLVM's vectoriser may choose 512-bit vectors where the target has them; without,
    it prefers 256 bits (explicit 512-bit vectors in the IR stay as they are). Raises RuntimeError
    if this LLVM has no back end for the triple.
    """
    from llvmlite import binding

    _initialize(target.triple == binding.get_process_triple())
    flags = [f"+{name}" for name in sorted(target.features)]
    if target.vector_bytes >= 64:
        flags.append("-prefer-256-bit" if wide else "+prefer-256-bit")
    return binding.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=",".join(flags), opt=3, reloc="pic", codemodel="small"
    )


@cache
def _initialize(native: bool) -> None:
    from llvmlite import binding

    if native:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
    else:
        binding.initialize_all_targets()
        binding.initialize_all_asmprinters()


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cores() -> int:
    """CPUs this process may use: affinity, capped by the cgroup's quota (rounded up)."""
    cpus = len(_allowed_cpus())
    try:
        quota, period = _text("/sys/fs/cgroup/cpu.max").split()
    except (OSError, ValueError):
        return cpus
    if quota == "max":
        return cpus
    return max(1, min(cpus, math.ceil(int(quota) / int(period))))


def _caches() -> tuple[int, int, int]:
    """Data cache sizes (L1, L2, L3) in bytes, from Linux's sysfs, else from safe defaults.

    The defaults are at or below what machines of the last ten years have, so that a block sized
    for them still fits. A level that sysfs does not list is 0 when it lists any other.
    """
    if platform.system() != "Linux":
        return _DEFAULT_L1, _DEFAULT_L2, _DEFAULT_L3
    sizes: dict[int, int] = {}
    folder = f"/sys/devices/system/cpu/cpu{_allowed_cpus()[0]}/cache"
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        try:
            if _text(f"{folder}/{name}/type") != "Instruction":
                level = int(_text(f"{folder}/{name}/level"))
                sizes[level] = _bytes(_text(f"{folder}/{name}/size"))
        except (OSError, ValueError):
            continue
    if 1 not in sizes:
        return _DEFAULT_L1, _DEFAULT_L2, _DEFAULT_L3
    return sizes[1], sizes.get(2, 0), sizes.get(3, 0)


def _text(path: str) -> str:
    with open(path) as file:
        return file.read().strip()


def _bytes(text: str) -> int:
    """Bytes of a sysfs size such as "32K" or "8M"."""
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
    return int(text[:-1]) * scale if scale else int(text)
