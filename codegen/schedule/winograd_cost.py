"""Chooses the algorithm, block and register tile of a 3x3 correlation by estimated cycles.

The estimates are those of one thread, with filters that another layer has evicted from the caches
unless the last one holds all weights of the model, and these filters as they are transformed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import hypot

from onnxjit.codegen import instruction_sets, microkernels
from onnxjit.codegen.expr import as_int
from onnxjit.codegen.microkernels import MicroKernel
from onnxjit.codegen.minimal_filtering import F2, F4, Algorithm
from onnxjit.codegen.schedule.axes import typical
from onnxjit.codegen.schedule.request import Declined, Request
from onnxjit.codegen.schedule.winograd_match import TAPS, Correlation
from onnxjit.codegen.target import Target

GAIN = 0.95
"""Part of the direct convolution's estimate that minimal filtering must stay below."""

FEWEST = 16
"""Channels of the input or output below which a transform has no full vector."""

AROUND = 2
"""Options on either side of the cheapest that are offered to a variant."""

BLOCKS = (14, 21, 28, 42, 49, 56, 64)
"""Tiles per block that are tried."""

SIDE = 56
"""Assumed run-time height and width; the assumed batch is 1."""

THREADS = 4
"""Threads that a choice should suit as well as one."""

CLAIMS = 4
"""Calls in which a thread computes its share, if there are as many parts."""

# Cycles on Cascade Lake, fitted to the stages of convolutions of 64 to 512 channels. Filters come
# from memory while products are computed: the two overlap in part, for which the hypotenuse stands.
# With that, of the choices that were measured for 35 convolutions of 24 to 1024 channels on Zen 3,
# the one taken needs 1.02 times the time of the fastest (mean; at most 1.2).
CALL = 40.0
"""A register tile's call, its accumulators aside."""
COLD = 0.2
"""A byte from memory (0.32 on Cascade Lake, 0.16 on Zen 3)."""
NEAR = 0.05
"""A byte of an operand that stays in L3."""
NEAR_BYTES = 4 << 20
"""Part of L3 that one operand can expect to keep."""
TRANSFORMS = {F2: (170.0, 90.0), F4: (320.0, 260.0)}
"""Transforming 16 input channels and 16 output channels of one tile."""
COPY = 1.0
"""Filling 16 channels of one pixel of the direct convolution's window."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Algorithm, tiles per block (at most), register tile, and the parts of a block: groups of so
    many panels, each call transforming the inputs again, or (0) its rows of tiles, each call
    reading all filters."""

    algorithm: Algorithm
    tiles: int
    tile: MicroKernel
    group: int
    cycles: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """Extents, run-time ones as assumed."""

    batch: int
    rows: int
    columns: int
    depth: int
    n: int
    kept: int = 0
    """Bytes of filters that stay in the last cache from one run to the next."""

    def first_read(self, filters: int) -> float:
        """Cycles for the first read of a byte of so many bytes of filters."""
        return NEAR if filters <= self.kept else COLD


def choose(c: Correlation, r: Request) -> Choice:
    """The cheapest choice, or `Declined` where the direct convolution is about as fast.

    A variant says m, 0 for the direct convolution; block, tile and parts are the cheapest for what
    it says of the others.
    """
    depth, n = as_int(c.k.extent), as_int(c.n.extent)
    assert depth is not None and n is not None
    if min(depth, n) < FEWEST:
        raise Declined(f"{depth} to {n} channels are too few")
    batch = as_int(c.batch.extent) if c.batch is not None else 1
    rows, columns = (max(1, typical(a.extent, SIDE)) for a in (c.row, c.column))
    images = 1 if batch is None else max(1, batch)
    sizes = Sizes(images, rows, columns, depth, n, r.target.kept if r.resident else 0)
    every = list(choices(sizes, r.target))
    best = cheapest(every)
    direct = direct_cycles(sizes, r.target)
    usual = best.algorithm.m if best.cycles <= GAIN * direct else 0
    m = r.choice("filtering", usual, (0, F2.m, F4.m))
    if m == 0:
        raise Declined(
            f"{best.algorithm.name} is estimated at {best.cycles / direct:.2f} "
            "of the direct convolution's time"
        )
    left = [one for one in every if one.algorithm.m == m]
    for name, of in PARTS.items():
        usual, options = of(cheapest(left)), sorted({of(one) for one in left})
        at = options.index(usual)
        chosen = r.choice(name, usual, options[max(0, at - AROUND) : at + AROUND + 1])
        left = [one for one in left if of(one) == chosen]
    return cheapest(left)


PARTS: dict[str, Callable[[Choice], int]] = {
    "tile_columns": lambda one: one.tile.nr,
    "block_tiles": lambda one: one.tiles,
    "part_panels": lambda one: one.group,
}
"""What a variant says beside the algorithm."""


def cheapest(among: Sequence[Choice]) -> Choice:
    return min(among, key=lambda one: one.cycles)


def choices(s: Sizes, target: Target) -> Iterator[Choice]:
    """Every choice with its cycles, the mean of one thread's and of all that `THREADS` spend which
    share it evenly: for each block and width of a tile the height with the fastest products.
    Limits that give equal blocks are one choice."""
    rows = list(microkernels.rows(instruction_sets.isa_of(target)))
    tiles_of = {w: [t for t in rows if t.nr == w] for w in sorted({t.nr for t in rows})}
    seen = set()
    for algorithm, limit, wide in product((F2, F4), BLOCKS, tiles_of):
        m = algorithm.m
        tile_rows, tile_columns = s.batch * -(-s.rows // m), -(-s.columns // m)
        width = even(tile_columns, limit)
        height = even(tile_rows, max(1, limit // width))
        if (algorithm.m, wide, width, height) in seen:
            continue
        seen.add((algorithm.m, wide, width, height))
        blocks = -(-tile_columns // width) * -(-tile_rows // height)
        block = min(
            (Block(s, algorithm, t, blocks, height, width, target) for t in tiles_of[wide]),
            key=Block.products,
        )
        for group in (0, *groups(panels(s.n, block.tile))):
            cycles = (block.thread(1, group) + THREADS * block.thread(THREADS, group)) / 2
            yield Choice(algorithm, limit, block.tile, group, cycles)


@dataclass(frozen=True, slots=True)
class Block:
    """One of `blocks` blocks of `height` rows of `width` tiles, and the register tile."""

    s: Sizes
    algorithm: Algorithm
    tile: MicroKernel
    blocks: int
    height: int
    width: int
    target: Target

    def products(self) -> float:
        """Cycles of one element's products."""
        rows = row_tiles(self.height * self.width, self.tile)
        return rows * panels(self.s.n, self.tile) * self.product()

    def product(self) -> float:
        """Cycles of a register tile; a panel of at most half of L1 is there for the next tile."""
        t, depth = self.tile, self.s.depth
        near = depth * t.nr * 4 <= self.target.l1 // 2
        return depth * (t.near_cycles if near else t.cycles) + t.mr * t.nr / 16 + CALL

    def call(self, rows: int, some: int) -> float:
        """Some rows of tiles and panels of the block, without the filters' way to the core."""
        per_input, per_output = TRANSFORMS[self.algorithm]
        elements, tiles = self.algorithm.a**2, self.width * rows
        patches = elements * tiles * self.s.depth * 4
        inputs = tiles * -(-self.s.depth // 16) * per_input
        products = elements * row_tiles(tiles, self.tile) * self.product()
        outputs = tiles * self.tile.nr / 16 * per_output
        spilled = NEAR * patches if patches > 0.6 * self.target.l2 else 0.0
        return inputs + some * (products + outputs + spilled)

    def thread(self, threads: int, group: int) -> float:
        """What one of so many threads computes."""
        count = panels(self.s.n, self.tile)
        parts = -(-count // group) if group else self.height
        own = -(-self.blocks * parts // threads)
        each = -(-own // min(own, CLAIMS if threads > 1 else 1))
        whole, rest = divmod(each, parts)
        last, read = 0.0, count * whole
        if rest:
            rows, some = (self.height, min(rest * group, count)) if group else (rest, count)
            last, read = self.call(rows, some), read + some
        calls = own / each
        filters = self.algorithm.a**2 * self.s.depth * self.tile.nr * 4
        once = self.s.first_read(filters * count)
        again = NEAR if filters * count <= NEAR_BYTES else COLD
        # Of what all threads read, each brings its share from memory.
        first = min(calls * read, count / threads)
        computing = calls * (whole * self.call(self.height, count) + last)
        repeated = filters * again * (calls * read - first)
        return hypot(computing, filters * once * first) + repeated


def even(extent: int, most: int) -> int:
    """The even size of the fewest parts of at most `most`."""
    parts = -(-extent // most)
    return -(-extent // parts)


def row_tiles(rows: int, t: MicroKernel) -> int:
    return -(-rows // t.mr)


def panels(n: int, t: MicroKernel) -> int:
    return -(-n // t.nr)


def groups(count: int) -> list[int]:
    """Panels per part for 1, 2, 3 … parts, each number of panels once."""
    sizes = [-(-count // parts) for parts in range(1, count + 1)]
    return [a for a, b in pairwise([*sizes, 0]) if a != b]


def direct_cycles(s: Sizes, target: Target) -> float:
    """The estimate for the `contraction` rule."""
    cover = microkernels.select(s.columns, s.n, target)
    taps, lines = TAPS * TAPS, s.batch * s.rows
    products = lines * (cover.cycles * taps * s.depth + CALL * (cover.panels or 1))
    copied = COPY * lines * s.columns * s.depth / 16
    filters = taps * s.depth * s.n * 4
    return hypot(products + copied, s.first_read(filters) * filters)


__all__ = ["Choice", "choose"]
