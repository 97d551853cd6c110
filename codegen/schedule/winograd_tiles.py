"""What all steps of minimal filtering share: how tiles are divided into blocks, and their place."""

from __future__ import annotations

from collections.abc import Callable

from onnxjit.codegen import instruction_sets
from onnxjit.codegen.expr import ONE, ZERO, Expr, Load, Var, apply, as_int, index, poly_mul
from onnxjit.codegen.loops import Assign, Local, Stmt
from onnxjit.codegen.schedule.axes import ceil_div, coefficient
from onnxjit.codegen.schedule.request import Request
from onnxjit.codegen.schedule.winograd_cost import Choice
from onnxjit.codegen.schedule.winograd_match import Correlation

F = "float32"
LANES = 16
"""Channels in scratch are padded to a multiple of this, so that no transform has a remainder."""

RUN = 64
"""Channels of row-major data that are transposed and transformed at a time: the pixels of a row of
tiles stay in L2 beside the transformed patches."""


class Tiles:
    """A correlation, the choice of algorithm and block, and the sizes that follow."""

    def __init__(self, r: Request, c: Correlation, choice: Choice) -> None:
        self.r, self.c, self.choice = r, c, choice
        self.alg = choice.algorithm
        self.m, self.a = self.alg.m, self.alg.a
        self.mr, self.nr = choice.tile.mr, choice.tile.nr
        depth, columns = as_int(c.k.extent), as_int(c.n.extent)
        assert depth is not None and columns is not None
        self.depth, self.columns = depth, columns
        self.isa = instruction_sets.ISAS[choice.tile.isa]
        self.locals: list[Local] = []
        self.symbols = [choice.tile.symbol]
        vectors = -(-depth // LANES)
        self.windowed = self.transposed()
        self.runs = -(-vectors * LANES // RUN) if self.windowed else 1
        self.run = -(-vectors // self.runs) * LANES  # channels transformed at a time
        self.step = self.runs * self.run  # channels of a tile's element in scratch
        if self.step % 256 == 0:
            self.step += LANES  # rows a multiple of 1 KB apart would share few sets of L1
        self.panels = -(-columns // self.nr)

        self.sizes: list[Stmt] = []
        self.row_blocks, self.width_blocks = self.divide(lambda name, e: e)
        self.part_rows = self.rows
        self.divide(self.named)
        self.whole_width = self.width_blocks is ONE
        self.x0: Expr = ZERO if self.whole_width else Var("x0")
        self.x1: Expr = self.tile_columns if self.whole_width else Var("x1")
        tiles = as_int(poly_mul(self.rows, self.width))
        self.tiles = -(-(tiles or choice.tiles) // self.mr) * self.mr
        self.plane = self.tiles * self.step + LANES
        self.line_pixels = (as_int(self.width) or choice.tiles) * self.m

    def transposed(self) -> bool:
        """Whether the input is contiguous along pixels, not along channels."""
        c = self.c
        if c.contiguous or not isinstance(c.pixel, Load):
            return False
        offset = c.pixel.index[0]
        return coefficient(offset, c.pw) is ONE and coefficient(offset, c.k) is not None

    def divide(self, named: Callable[[str, Expr], Expr]) -> tuple[Expr, Expr]:
        """Divides the tiles into blocks of `rows` rows of `width` tiles, at most `choice.tiles` in
        all; returns the numbers of blocks. `named` may put run-time sizes into variables."""
        c, most = self.c, index(self.choice.tiles)
        batch = c.batch.extent if c.batch is not None else ONE
        self.tile_rows = named("high", ceil_div(c.row.extent, self.m))
        self.tile_columns = named("wide", ceil_div(c.column.extent, self.m))
        self.all_rows = named("count", poly_mul(batch, self.tile_rows))
        width_blocks = named("wide_parts", ceil_div(self.tile_columns, self.choice.tiles))
        self.width = named("width", even_size(self.tile_columns, width_blocks))
        fits = apply("floordiv", most, self.width)
        height = named("height", apply("max", fits, 1))
        row_blocks = named("parts", apply("floordiv", self.all_rows + height - 1, height))
        self.rows = named("block", even_size(self.all_rows, row_blocks))
        return row_blocks, width_blocks

    def named(self, name: str, e: Expr) -> Expr:
        """A run-time size as a variable that the body sets first."""
        if as_int(e) is not None:
            return e
        self.sizes.append(Assign(Var(name), e))
        return Var(name)

    def image(self) -> dict[Expr, Expr]:
        return {self.c.batch: Var("image")} if self.c.batch is not None else {}

    def place(self) -> tuple[Stmt, ...]:
        """Image and tile row of the row `g` of all images' tiles."""
        g, ty = Var("g"), Var("ty")
        if self.c.batch is None:
            return (Assign(ty, g),)
        return (
            Assign(Var("image"), apply("floordiv", g, self.tile_rows)),
            Assign(ty, apply("mod", g, self.tile_rows)),
        )


def even_size(extent: Expr, parts: Expr) -> Expr:
    """The size of even parts of an extent, at least 1."""
    size = apply("floordiv", extent + parts - 1, apply("max", parts, 1))
    return apply("max", size, 1)


__all__ = ["LANES", "F", "Tiles"]
