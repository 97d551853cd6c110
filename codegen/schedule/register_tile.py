"""The register tile of a product: the cheapest by estimate, or the one that a variant says."""

from __future__ import annotations

from onnxjit.codegen import microkernels
from onnxjit.codegen.microkernels import Cover
from onnxjit.codegen.schedule.request import Request

HEIGHTS = 3
"""Heights of a tile of one width that are offered, the cheapest ones by estimate."""


def register_tile(r: Request, m: int | None, n: int | None) -> Cover:
    """A cover of m x n (None: known at run time only)."""
    covers = microkernels.covers(m, n, r.target)
    nr = r.choice("tile_columns", covers[0].nr, sorted({c.nr for c in covers}))
    covers = tuple(c for c in covers if c.nr == nr)
    heights = [c.main.mr for c in covers[:HEIGHTS]]
    mr = r.choice("tile_rows", heights[0], heights)
    return next(c for c in covers if c.main.mr == mr)


__all__ = ["register_tile"]
