"""How a contraction is cut into blocks of the result, strips, and blocks of k.

A block is some lines (image rows, or row tiles where there are none) of some panels of columns. Its
lines are the parallel tiles (its panels, where those are packed at run time): a call computes as
many as its thread has claimed, which is all that one thread is left alone with. Inside it, a
*strip* of lines meets one panel after the other, and of each panel one block of k after the other:

    for strip: for depth block: for panel: for block of k: for row tile: micro-kernel

so a block of a panel stays in L1 while all row tiles of the strip use it, the rows of the strip
(in one depth block) stay in L2, and each panel is streamed from memory once per strip. See Goto and
van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from onnxjit.codegen.expr import ONE, Expr, apply, as_int, index, poly_mul
from onnxjit.codegen.schedule.axes import typical
from onnxjit.codegen.schedule.request import Request

STRIP_TILES = 12
"""Row tiles that share a block of a panel in L1."""

STRIP_BYTES = 512 * 1024
"""Rows of a strip in one depth block: half of L2."""

WINDOW_BYTES = 320 * 1024
"""Padded input that is copied for a block."""

RESIDENT_BYTES = 384 * 1024
"""Panels that stay in L2 from one strip to the next."""

K_BYTES = 32 * 1024
"""A block of a panel. L1 has as much; measured, half or twice of it change little."""

DEPTH = 768
"""Longest k of a depth block when a strip has all its tiles."""

SUMS_BYTES = 160 * 1024
"""Unfinished sums between depth blocks."""

TILES = 16
"""Parallel tiles wanted, so that two to four threads finish together."""

COPY = 8
"""Bytes that stream from beyond L2 under the products in the time that copying one takes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The sizes above, or what a variant says instead."""

    strip_tiles: int = STRIP_TILES
    strip_bytes: int = STRIP_BYTES
    window_bytes: int = WINDOW_BYTES
    tiles: int = TILES


def limits(r: Request, copied: bool) -> Limits:
    """The limits for a request whose blocks copy their rows, or do not."""
    kilo = 1024
    tiles = r.choice("strip_tiles", STRIP_TILES, (6, 24))
    wanted = r.choice("parallel_tiles", TILES, (2, 32))
    if copied:
        window = r.choice("window_kb", WINDOW_BYTES // kilo, (160, 640))
        return Limits(tiles, STRIP_BYTES, window * kilo, wanted)
    strip = r.choice("strip_kb", STRIP_BYTES // kilo, (256, 1024))
    return Limits(tiles, strip * kilo, WINDOW_BYTES, wanted)


@dataclass(frozen=True, slots=True)
class Shape:
    """What blocking needs to know.

    There are `lines` lines of `line_tiles` row tiles of at most `mr` rows. A line brings
    `line_bytes` of x. A block copies, with `copied`, a window of its lines (and `halo` lines more),
    with `gathered` its rows, with `packed` its panels.
    """

    lines: Expr
    line_tiles: Expr
    mr: int
    line_bytes: Expr
    copied: bool
    packed: bool
    gathered: bool
    halo: int
    panels: Expr
    nr: int
    depth: Expr
    outer: int
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Blocking:
    """A block has `block` lines and `group` panels, at most `most_panels`; a strip has
    `strip` lines, at most `most_tiles` row tiles where that is known; k is cut into
    `depth_blocks`."""

    block: Expr
    strip: Expr
    group: Expr
    most_panels: int
    most_tiles: int | None
    depth_blocks: int


def choose(s: Shape) -> Blocking:
    """The blocking of a shape; sizes that are only known at run time give expressions."""
    depth = max(1, typical(s.depth))
    panels = max(1, typical(s.panels))
    lines, tiles, line_bytes = as_int(s.lines), as_int(s.line_tiles), as_int(s.line_bytes)
    fixed = lines is not None and tiles is not None and line_bytes is not None
    block, strip, parts = _fixed(s, depth, panels) if fixed else _symbolic(s, depth, panels)
    few = as_int(parts)
    group: Expr = apply("floordiv", s.panels + parts - 1, parts)
    most = panels if few is None else -(-panels // few)
    blocks = 1
    most_tiles = as_int(poly_mul(strip, s.line_tiles))
    if most_tiles is None and s.line_tiles is ONE:
        most_tiles = s.limits.strip_tiles
    rows = (most_tiles or s.limits.strip_tiles) * s.mr
    _, strip_bytes = _strip_limits(s, depth)
    if as_int(s.depth) is not None and not s.copied and rows * depth * 4 > strip_bytes:
        blocks = max(1, -(-rows * depth * 4 // strip_bytes))
        most = min(most, max(1, SUMS_BYTES // (rows * s.nr * 4)))
        group = apply("min", group, most)
    if as_int(s.panels) is None:
        # Panels that are packed at run time: what a block packs stays in L2.
        most = min(panels, max(1, RESIDENT_BYTES // (depth * s.nr * 4)))
        group = index(most)
    return Blocking(block, strip, group, most, most_tiles, blocks)


def _strip_limits(s: Shape, depth: int) -> tuple[int, int]:
    """The row tiles of a strip and the bytes of its rows in one depth block.

    Where k must be cut anyway, long strips pay: weights stream by once, and rows come from L3 at a
    sixth of the rate of the products (197x3072 by 3072x768: 1.04 times as fast)."""
    tiles, size = s.limits.strip_tiles, s.limits.strip_bytes
    in_place = not (s.copied or s.gathered or s.packed)
    deep = in_place and tiles * s.mr * depth * 4 > size
    return (3 * tiles, 2 * size) if deep else (tiles, size)


def _fixed(s: Shape, depth: int, panels: int) -> tuple[Expr, Expr, Expr]:
    lines, tiles, line_bytes = as_int(s.lines), as_int(s.line_tiles), as_int(s.line_bytes)
    assert lines is not None and tiles is not None and line_bytes is not None
    if not lines:
        return ONE, ONE, ONE
    strip_tiles, strip_bytes = _strip_limits(s, depth)
    strip = max(1, strip_tiles // max(1, tiles))
    if not s.copied:
        k = min(depth, DEPTH)
        strip = min(strip, max(1, strip_bytes // max(1, tiles * s.mr * k * 4)))
    most = lines if s.packed else strip
    if s.copied:
        most = max(1, s.limits.window_bytes // max(1, line_bytes))
    best = min(
        (_traffic(s, depth, panels, strip, n, parts), n, parts)
        for n, parts in _cuts(s, lines, most, panels, _least(s, depth, panels))
    )
    block = -(-lines // best[1])
    strip = -(-block // -(-block // min(strip, block)))
    return index(block), index(strip), index(best[2])


def _cuts(s: Shape, lines: int, most: int, panels: int, least: int) -> Iterator[tuple[int, int]]:
    """Numbers of line blocks and of panel groups; more groups where lines are too few tiles."""
    fewest = -(-lines // most)
    counts = {fewest, *(-(-lines // b) for b in range(1, min(most, lines) + 1))}
    groups = 1 if s.packed else -(-s.limits.tiles // (lines * s.outer))
    for n in sorted(c for c in counts if c >= fewest):
        yield n, min(panels, max(least, groups))


def _traffic(s: Shape, depth: int, panels: int, strip: int, blocks: int, parts: int) -> float:
    """Bytes moved from beyond L2, roughly, with a charge for tiles that are missing."""
    lines, line_bytes = as_int(s.lines) or 0, as_int(s.line_bytes) or 0
    block = -(-lines // blocks)
    panel_bytes = panels * s.nr * depth * 4
    strips = -(-block // strip)
    if -(-panels // parts) * s.nr * depth * 4 <= RESIDENT_BYTES:
        strips = 1
    weight = 2 if s.copied else COPY if s.gathered else 1
    rows = (lines + blocks * s.halo) * line_bytes * weight
    packing = COPY * blocks * panel_bytes if s.packed else 0
    count = blocks * parts * s.outer
    tiles = s.outer * (blocks * panels if s.packed else parts * lines)
    missing = max(1.0, s.limits.tiles / tiles) ** 0.5
    return (blocks * strips * panel_bytes + packing + parts * rows) * missing + 2000 * count


def _symbolic(s: Shape, depth: int, panels: int) -> tuple[Expr, Expr, Expr]:
    """Blocks for one line or thousands: where few lines are too few tiles, panels are cut."""
    wanted = s.limits.tiles
    some = apply("max", s.panels, 1)
    if s.line_tiles is ONE and not s.copied:
        most = s.limits.strip_tiles
        strips = apply("max", (s.lines + (most - 1)) // most, 1)
        block = strip = apply("max", apply("floordiv", s.lines + strips - 1, strips), 1)
        if s.packed:
            blocks = apply("min", strips, apply("floordiv", s.panels + (wanted - 1), some))
            block = apply("max", apply("floordiv", s.lines + blocks - 1, blocks), 1)
    else:
        fits = apply("floordiv", index(s.limits.strip_tiles), apply("max", s.line_tiles, 1))
        strip = apply("max", fits, 1)
        block = strip
        if s.copied:
            fits = apply("floordiv", index(s.limits.window_bytes), apply("max", s.line_bytes, 1))
            block = apply("max", apply("min", fits, s.lines), 1)
            strip = apply("min", strip, block)
    if s.packed:
        return block, strip, index(_least(s, depth, panels))
    tiles = apply("max", s.lines, 1) * s.outer
    parts = apply("floordiv", tiles + (wanted - 1), tiles)
    return block, strip, apply("min", parts, panels)


def _least(s: Shape, depth: int, panels: int) -> int:
    """Groups of panels, so many that what a block packs stays in L2."""
    return -(-panels * s.nr * depth * 4 // RESIDENT_BYTES) if s.packed else 1


__all__ = ["K_BYTES", "Blocking", "Limits", "Shape", "choose", "limits"]
