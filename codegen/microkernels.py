"""The table of micro-kernels: register tiles that are object files of their own.

A row is named by its symbol, and the name says everything:

    gemm_f32_{mr}x{nr}_{isa}

    void f(const float* a, int64 rs, const int64* segs, int64 nseg, int64 run,
           const float* b, float* c, int64 ldc, int64 more, const float* ahead)
    C[i, j] = sum(s < nseg, k < run) a[i*rs + segs[s] + k] * b[(s*run + k)*nr + j]
    c[i*ldc + j] = C[i, j], or += where `more` is not 0,       for i < mr, j < nr

`rs`, `segs`, `ldc` count elements. A GEMM is one segment at offset 0; a direct convolution on
channels-last rows is a segment per (kh) with run KW*C, or per (kh, kw) with run C, and rs the
stride between output pixels. B is packed [k][nr] and zero padded. With no segment, or run 0,
nothing is read and the sum is zero. Nothing outside the elements named above is touched; the only
alignment needed is that of the elements (B and C run best on 64 bytes). `ahead` is a hint, and may
point anywhere: a quarter (half for more than 16 accumulators) as much as B has is prefetched from
there on, so that four tiles prefetch what the tiles behind them share; where it is `b`, a tile that
has its B to itself prefetches that.

    gemm_f32_1to{mr}x{nr}_{isa}

takes the number of rows, 1 to mr, as an additional last argument: for extents that are only known
at run time.

    pack_f32_{nr}_{isa}     a transposing copy into a panel of B (see microkernel_pack)
    winograd_in_f32_{m}_{isa}, winograd_out_f32_{m}_{isa}
                            the transforms of minimal filtering (see microkernel_filtering)
    softmax_f32_{isa}       rows to exponentials and their sums (see microkernel_softmax)

Rows of A that lie a multiple of 4096 bytes apart share a set of the L1 cache: on Cascade Lake the
14x32 tile then runs at 0.45 (stride 16 KB) to 0.75 (4 KB) of its usual speed, 6x64 and 9x48 at 0.65
to 0.95. Pad the stride or pack A where there is a choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from math import ceil, hypot
from typing import TYPE_CHECKING

from onnxjit.codegen.dialect_table import WINDOW_SYMBOL, WINOGRAD_SYMBOL
from onnxjit.codegen.instruction_sets import ISAS, Isa, isa_of, runs
from onnxjit.codegen.target import Target, target_machine

if TYPE_CHECKING:
    from llvmlite import binding
    from llvmlite import ir as ir_types

    from onnxjit.codegen.microkernel_gemm import Tile


# The dtypes of (a, b, c) by the name used in symbols. A further dtype is a row here and a
# generator in `_module`.
DTYPES: dict[str, tuple[str, str, str]] = {"f32": ("float32", "float32", "float32")}


@dataclass(frozen=True, slots=True)
class MicroKernel:
    """One row: an mr x nr tile of C, or with `any_rows` one of at most mr rows; `a`, `b`, `c` are
    the dtypes of the operands.

    `features` are the target features it needs, `cycles` estimates the time of one step of k (see
    `step_cycles`), `near_cycles` that where B is in L1. A tile of few rows that has its B to itself
    runs at memory's bandwidth; with AVX2 (Zen 3) the hardware's prefetchers reach that alone, where
    prefetching as well takes 1.15 times as long; from four rows on prefetching is up to 1.2 times
    as fast. What tiles of two or three rows share makes 1.25 times as fast with prefetching.
    """

    symbol: str
    dtype: str
    a: str
    b: str
    c: str
    mr: int
    nr: int
    isa: str
    features: frozenset[str]
    any_rows: bool
    cycles: float
    near_cycles: float

    @property
    def throughput(self) -> float:
        """The estimated fraction of the machine's peak multiply-adds."""
        return self.mr * (self.nr // ISAS[self.isa].lanes) / 2 / self.cycles

    def runs_on(self, target: Target) -> bool:
        """Whether `target` can execute this row."""
        return runs(ISAS[self.isa], target)


@dataclass(frozen=True, slots=True)
class Cover:
    """How to cover an m x n block: `main` repeated, then `tail`, over `panels` panels of nr.

    Both have the same nr, hence share one packing of B. For a symbolic m, `main` takes any number
    of rows and there is no tail. `panels` is None where n is symbolic. `cycles` is the estimate for
    one step of k over the whole block (per row of a symbolic m, per column of a symbolic n).
    """

    main: MicroKernel
    tail: MicroKernel | None
    panels: int | None
    cycles: float

    @property
    def nr(self) -> int:
        return self.main.nr

    @property
    def uneven(self) -> bool:
        """Whether some tile has fewer rows than `main.mr`."""
        return self.main.any_rows or self.tail is not None


_PACK = re.compile(r"pack_f32_([1-9]\d*)_([a-z0-9]+)")
_SOFTMAX = re.compile(r"softmax_f32_([a-z0-9]+)")
_SYMBOL = re.compile(r"gemm_([a-z0-9]+)_(1to)?([1-9]\d*)x([1-9]\d*)_([a-z0-9]+)")


@cache
def row(symbol: str) -> MicroKernel:
    """The row that `symbol` names. Raises KeyError where the table has none."""
    match = _SYMBOL.fullmatch(symbol)
    if match is None:
        raise KeyError(f"{symbol!r} does not name a micro-kernel")
    dtype, least, mr, nr, name = match.groups()
    if dtype not in DTYPES or name not in ISAS:
        raise KeyError(f"{symbol!r}: no rows of {dtype} for {name}")
    isa = ISAS[name]
    vectors, rest = divmod(int(nr), isa.lanes)
    if rest or not 1 <= vectors <= isa.vectors or int(mr) > max_rows(isa, vectors):
        raise KeyError(f"{symbol!r}: the tile does not fit the registers of {name}")
    a, b, c = DTYPES[dtype]
    return MicroKernel(
        symbol=symbol,
        dtype=dtype,
        a=a,
        b=b,
        c=c,
        mr=int(mr),
        nr=int(nr),
        isa=name,
        features=isa.features,
        any_rows=least is not None,
        cycles=step_cycles(isa, int(mr), vectors),
        near_cycles=step_cycles(isa, int(mr), vectors, near=True),
    )


def gemm(mr: int, nr: int, isa: str, dtype: str = "f32", *, any_rows: bool = False) -> str:
    """The symbol of a GEMM row; `row` tells whether it exists."""
    return f"gemm_{dtype}_{'1to' * any_rows}{mr}x{nr}_{isa}"


def pack(nr: int, isa: str) -> str:
    """The symbol of the transposing copy that makes panels of `nr` columns (microkernel_pack)."""
    return f"pack_f32_{nr}_{isa}"


def winograd(direction: str, m: int, isa: str) -> str:
    """The symbol of a transform of F(m x m, 3 x 3): of inputs ("in") or outputs ("out")."""
    return f"winograd_{direction}_f32_{m}_{isa}"


def softmax(isa: str) -> str:
    """The symbol of the exponentials of rows and their sums (microkernel_softmax)."""
    return f"softmax_f32_{isa}"


def rows(isa: str, dtype: str = "f32") -> Iterator[MicroKernel]:
    """Every row of an instruction set with a fixed number of rows."""
    for vectors in range(1, ISAS[isa].vectors + 1):
        for mr in range(1, max_rows(ISAS[isa], vectors) + 1):
            yield row(gemm(mr, vectors * ISAS[isa].lanes, isa, dtype))


def max_rows(isa: Isa, vectors: int) -> int:
    """The most rows whose accumulators leave registers for a row of B and one element of A."""
    return min(isa.rows, (isa.registers - vectors - 1) // vectors)


def step_cycles(isa: Isa, mr: int, vectors: int, *, near: bool = False) -> float:
    """Estimated cycles of one step of k, with A in L1 and B streaming from L2, or `near`: in L1.

    Two multiply-adds a cycle; L1 delivers an element of A or a vector of B every 0.58 cycles, and
    L2 a 64-byte line of B every 1.6. The last overlaps with the rest only in part, for which the
    hypotenuse stands. The constants are fitted on Cascade Lake at K = 256; at K = 512 they give
    the measured speed of AVX-512 tiles within 14 %, that of one-row tiles 20 to 40 % too low.
    They rank shapes; they are no prediction for another machine.
    """
    compute = max(mr * vectors / 2, 0.58 * (mr + vectors))
    lines = 0.0 if near else vectors * isa.lanes * 4 / 64
    return 1.05 * hypot(compute, 1.6 * lines)


def ir(symbol: str) -> str:
    """LLVM IR text that defines exactly `symbol`, without a triple. Raises KeyError as `row`."""
    return str(_kind(symbol)[1]())


def assembly(symbol: str, target: Target) -> str:
    """The machine code of `object_code` as assembly text."""
    machine, module = _parsed(symbol, target)
    return machine.emit_assembly(module)


def object_code(symbol: str, target: Target, name: str | None = None) -> bytes:
    """A relocatable object file that exports `symbol`, as `name`, without undefined symbols.

    Raises KeyError if there is no such row, ValueError if `target` cannot run it.
    """
    machine, module = _parsed(symbol, target)
    module.get_function(symbol).name = name or symbol
    return machine.emit_object(module)


def select(
    m: int | None, n: int | None, target: Target, *, widths: tuple[int, ...] | None = None
) -> Cover:
    """The cheapest cover of an m x n block of C by rows that `target` runs.

    m is the extent of one run of rows (None: symbolic), n the number of columns (None: symbolic);
    `widths` restricts nr. The cost is the sum of `step_cycles` over all tiles, so that idle padded
    columns and slow narrow tiles both count. A static m takes `main` m // mr times and at most one
    tail with exactly the rows that remain.
    Raises ValueError on an extent below 1 or if no row has one of `widths`.
    """
    return covers(m, n, target, widths=widths)[0]


def covers(
    m: int | None, n: int | None, target: Target, *, widths: tuple[int, ...] | None = None
) -> tuple[Cover, ...]:
    """All covers that `select` weighs, cheapest first. Raises as `select`."""
    if (m is not None and m < 1) or (n is not None and n < 1):
        raise ValueError(f"cannot cover {m} x {n}")
    return _covers(m, n, isa_of(target), widths)


@cache
def _covers(
    m: int | None, n: int | None, isa: str, widths: tuple[int, ...] | None
) -> tuple[Cover, ...]:
    found = [
        _cover(main, m, n)
        for main in rows(isa)
        if (m is None or main.mr <= m) and (widths is None or main.nr in widths)
    ]
    if not found:
        raise ValueError(f"{isa} has no rows of width {widths}")
    # Equal estimates: the wider tile reads A less often.
    return tuple(sorted(found, key=lambda cover: (cover.cycles, -cover.nr)))


def _cover(main: MicroKernel, m: int | None, n: int | None) -> Cover:
    panels = None if n is None else ceil(n / main.nr)
    share = 1 / main.nr if panels is None else panels
    if m is None:
        symbol = gemm(main.mr, main.nr, main.isa, main.dtype, any_rows=True)
        return Cover(row(symbol), None, panels, main.cycles / main.mr * share)
    count, rest = divmod(m, main.mr)
    tail = row(gemm(rest, main.nr, main.isa, main.dtype)) if rest else None
    cycles = count * main.cycles + (tail.cycles if tail else 0)
    return Cover(main, tail, panels, cycles * share)


def _module(kernel: MicroKernel) -> ir_types.Module:
    from onnxjit.codegen import microkernel_gemm

    if not kernel.any_rows:
        return microkernel_gemm.module(kernel.symbol, _tile(kernel, kernel.mr))
    tiles = [_tile(kernel, mr) for mr in range(1, kernel.mr + 1)]
    return microkernel_gemm.switch(kernel.symbol, tiles)


def _tile(kernel: MicroKernel, mr: int) -> Tile:
    from onnxjit.codegen import microkernel_gemm

    isa = ISAS[kernel.isa]
    vectors = kernel.nr // isa.lanes
    size = mr * vectors
    # Eight multiply-adds are in flight at once (latency 4, two ports); a fifth to eighth set of a
    # single accumulator costs more in the tail than it gains.
    sets = 1
    while size * sets < 8 and sets < 4 and 2 * size * sets + vectors < isa.registers:
        sets *= 2
    # AVX-512 reads a single-use element of A as an operand of the multiply-add, which an order
    # imposed on loads and multiply-adds would prevent.
    return microkernel_gemm.Tile(
        mr=mr,
        nv=vectors,
        lanes=isa.lanes,
        sets=sets,
        unroll=4 if size <= 16 else 2,
        alone=mr >= isa.prefetching,
        fused=isa.fused,
        scaled_index=isa.scaled_index,
        register=isa.register if vectors > 1 or isa.lanes < 16 else "",
    )


def _kind(symbol: str) -> tuple[Isa, Callable[[], ir_types.Module]]:
    """The instruction set of a symbol, and what makes its module. Raises KeyError as `row`."""
    if WINDOW_SYMBOL.fullmatch(symbol):
        from onnxjit.codegen import microkernel_depthwise

        isa = microkernel_depthwise.window(symbol).isa
        return isa, partial(microkernel_depthwise.module, symbol)
    if match := _PACK.fullmatch(symbol):
        from onnxjit.codegen import microkernel_pack

        isa = _isa(symbol, match[2])
        vectors, rest = divmod(int(match[1]), isa.lanes)
        if rest:
            raise KeyError(f"{symbol!r} does not name a micro-kernel")
        panel = microkernel_pack.Panel(vectors, isa.lanes)
        return isa, partial(microkernel_pack.module, symbol, panel)
    if match := WINOGRAD_SYMBOL.fullmatch(symbol):
        from onnxjit.codegen import microkernel_filtering
        from onnxjit.codegen.minimal_filtering import ALGORITHMS

        isa = _isa(symbol, match["isa"])
        algorithm = ALGORITHMS[int(match["m"])]
        make = microkernel_filtering.module
        return isa, partial(make, symbol, match["direction"], algorithm, isa.lanes)
    if match := _SOFTMAX.fullmatch(symbol):
        from onnxjit.codegen import microkernel_softmax

        isa = _isa(symbol, match[1])
        vector = microkernel_softmax.Vector(isa.lanes, isa.registers // 8, isa.fused)
        return isa, partial(microkernel_softmax.module, symbol, vector)
    kernel = row(symbol)
    return ISAS[kernel.isa], partial(_module, kernel)


def _isa(symbol: str, name: str) -> Isa:
    if name not in ISAS:
        raise KeyError(f"{symbol!r} does not name a micro-kernel")
    return ISAS[name]


def _parsed(symbol: str, target: Target) -> tuple[binding.TargetMachine, binding.ModuleRef]:
    from llvmlite import binding

    if not runs(_kind(symbol)[0], target):
        raise ValueError(f"{symbol} does not run on {target.triple} with {target.cpu} features")
    machine = target_machine(target, wide=True)
    module = binding.parse_assembly(ir(symbol))
    module.triple = target.triple
    module.data_layout = str(machine.target_data)
    module.verify()
    return machine, module
