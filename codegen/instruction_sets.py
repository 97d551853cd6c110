"""The instruction sets that micro-kernels are written for."""

from __future__ import annotations

from typing import NamedTuple

from onnxjit.codegen.target import AVX512_FEATURES, Target


class Isa(NamedTuple):
    """An instruction set as the generator sees it; `arch` is None where any will do.

    `rows` and `vectors` cap mr and nr / lanes beside the limit that `registers` sets; `fused`,
    `scaled_index` and `register` are those of `microkernel_gemm.Tile`. Tiles of fewer than
    `prefetching` rows prefetch nothing of a B that no other tile shares (see
    `microkernels.MicroKernel`).
    """

    name: str
    arch: str | None
    features: frozenset[str]
    lanes: int
    registers: int
    rows: int
    vectors: int
    fused: bool
    scaled_index: bool
    register: str
    prefetching: int = 1


def runs(isa: Isa, target: Target) -> bool:
    """Whether `target` can execute code for `isa`."""
    return target.kind == "cpu" and isa.arch in (None, target.arch) and target.has(isa.features)


# Best first: the first that a target has is the one that `select` draws from. The scalar rows are
# four-lane vectors without assumptions, which LLVM turns into what the target has.
ISAS: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa("avx512", "x86_64", AVX512_FEATURES, 16, 32, 16, 4, True, True, "v"),
        Isa("avx2", "x86_64", frozenset({"avx2", "fma"}), 8, 16, 14, 4, True, True, "x", 4),
        Isa("neon", "aarch64", frozenset(), 4, 32, 8, 3, True, False, ""),
        Isa("scalar", None, frozenset(), 4, 16, 4, 2, False, False, ""),
    )
}


def isa_of(target: Target) -> str:
    """The widest instruction set of the table that `target` has."""
    return next(name for name, isa in ISAS.items() if runs(isa, target))
