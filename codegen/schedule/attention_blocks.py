"""The sizes of an attention nest: register tile, blocks of keys, blocks of rows, memory."""

from __future__ import annotations

from onnxjit.codegen import instruction_sets
from onnxjit.codegen.expr import (
    FALSE,
    ONE,
    ZERO,
    Axis,
    Expr,
    Var,
    apply,
    as_int,
    index,
)
from onnxjit.codegen.kernel import rename_axes
from onnxjit.codegen.loops import Local
from onnxjit.codegen.schedule.attention_match import Attention
from onnxjit.codegen.schedule.axes import ceil_div, coefficient
from onnxjit.codegen.schedule.register_tile import register_tile
from onnxjit.codegen.schedule.request import Request

PACKED_BYTES = 128 * 1024
"""Packed keys and values of one block: an eighth of L2 beside the rows that pass over them."""

MOST_KEYS = 384
"""Longest block of keys: a strip of 14 rows is then 21 KB of L1."""

ROWS = 256
"""Most query rows of a tile. Packing a block costs about as much as 20 rows of products."""

TILES = 8
"""Parallel tiles wanted, so that two to four threads finish together."""

FEW = 4
"""Fewer query rows than this read keys and values where they are: packing would cost more."""

CONFLICT = 1024
"""Row strides in elements that map every row to the same L1 sets (see contraction_operands)."""

FLOAT = "float32"


class Blocks:
    """Everything about an attention nest that is decided before its statements are written."""

    def __init__(self, r: Request, found: Attention) -> None:
        self.r = r
        live = [a for a in (*found.batch, found.row, found.column, found.key, found.depth) if a]
        table: dict[Expr, Expr] = {a: Axis(f"i{n}", a.extent) for n, a in enumerate(live)}

        def name(e: Expr) -> Expr:
            return rename_axes(e, table)

        def axis(a: Axis) -> Axis:
            return table[a]  # type: ignore[return-value]

        self.batch = [axis(a) for a in found.batch]
        self.row = axis(found.row) if found.row is not None else None
        self.column, self.key, self.d = axis(found.column), axis(found.key), axis(found.depth)
        self.query, self.source = name(found.query.index[0]), found.query.buffer
        self.keys, self.key_buffer = name(found.keys.index[0]), found.keys.buffer
        self.values, self.value_buffer = name(found.values.index[0]), found.values.buffer
        self.score, self.result = name(found.score), name(found.result)
        self.offset, self.buffer, self.no_nan = name(found.offset), found.buffer, found.no_nan
        self.empty = name(found.empty) if found.empty is not None else None

        self.m = self.row.extent if self.row is not None else ONE
        self.n = self.key.extent
        self.depth, self.width = as_int(self.d.extent) or 0, as_int(self.column.extent) or 0
        self.cover = register_tile(r, as_int(self.m), as_int(self.n))
        self.isa = self.cover.main.isa
        self.mr, self.nr = self.cover.main.mr, self.cover.nr
        lanes = instruction_sets.ISAS[self.isa].lanes
        widths = range(lanes, self.nr + 1, lanes)
        self.vr = min(widths, key=lambda w: (-(-self.width // w) * w, -w))
        self.value_panels = -(-self.width // self.vr)
        self.height: Expr = Var("height") if self.cover.main.any_rows else index(self.mr)
        self.plan_keys()
        self.plan_rows()
        self.few = self.few_rows()
        self.first, self.last = Var("mt0"), Var("mt1")
        self.slot: Expr = ZERO if self.single else Var("mt") - self.first
        self.line = self.value_panels * self.vr
        self.symbols: list[str] = []
        self.locals = [
            Local("segments", "int64", ONE),
            Local("keys", FLOAT, index(self.keys_in_block * self.depth), False),
            Local("values", FLOAT, index(self.keys_in_block * self.line), False),
            Local("strip", FLOAT, index(self.mr * self.strip), False),
            Local("out", FLOAT, index(self.rows_kept * self.line), False),
            Local("highest", FLOAT, index(self.mr)),
            Local("sums", FLOAT, index(self.mr)),
        ]
        if not self.single:
            self.locals.append(Local("maxima", FLOAT, index(self.rows_kept), False))
            self.locals.append(Local("total", FLOAT, index(self.rows_kept), False))

    def plan_keys(self) -> None:
        most = PACKED_BYTES // (4 * (self.depth + self.width))
        longest = self.r.choice("most_keys", MOST_KEYS, (192, 512))
        most = max(self.nr, min(most, longest) // self.nr * self.nr)
        n = as_int(self.n)
        if n is not None:
            count = -(-n // most)
            most = round_up(-(-n // count), self.nr)
        self.keys_in_block = most
        self.key_blocks = ceil_div(self.n, most)
        self.single = n is not None and n <= most
        # One vector more than the keys, so that rows do not start a multiple of 1 KB apart.
        self.strip = most + 16

    def plan_rows(self) -> None:
        tiles = ceil_div(self.m, self.mr)
        rows = self.r.choice("most_rows", ROWS, (128, 512))
        most = self.most_tiles = max(1, rows // self.mr)
        outer = 1
        for a in self.batch:
            outer *= as_int(a.extent) or 1
        wanted = -(-TILES // max(1, outer))
        blocks = apply("max", ceil_div(tiles, most), apply("min", index(wanted), tiles))
        self.row_blocks = apply("max", blocks, 1)
        self.block = apply("floordiv", tiles + self.row_blocks - 1, self.row_blocks)
        self.row_tiles = tiles
        self.rows_kept = self.mr if self.single else most * self.mr

    def few_rows(self) -> Expr:
        """Whether there are so few rows that nothing is packed; decoding has one."""
        ways = coefficient(self.keys, self.d), coefficient(self.values, self.column)
        if any(c is not ONE for c in ways):
            return FALSE
        return apply("lt", self.m, FEW)


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


__all__ = ["CONFLICT", "FLOAT", "Blocks"]
