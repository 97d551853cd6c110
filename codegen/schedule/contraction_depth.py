"""How the k of a contraction is cut: depth blocks, and in them blocks of a panel that fit in L1."""

from __future__ import annotations

from dataclasses import dataclass

from onnxjit.codegen.expr import ONE, ZERO, Expr, Var, apply, as_int, index
from onnxjit.codegen.schedule.contraction_blocking import K_BYTES
from onnxjit.codegen.schedule.contraction_operands import Operand

DEPTH_BLOCK = Var("kd")


@dataclass(frozen=True, slots=True)
class KBlocks:
    """One block of k, as the micro-kernel sees it.

    `loops` run over the blocks of a depth block. A block takes `segments` segments from number
    `segment` on, `run` elements of each, `shift` elements further on in the rows, and starts at
    step `start` of k. `more` is 0 for the first block, `last` true for the last (None: the only
    one). A depth block starts `depth_start` elements on in the rows, at step `depth_offset` of k,
    and has `depth_run` steps, at most `depth_length`.
    """

    loops: tuple[tuple[Var, Expr], ...] = ()
    shift: Expr = ZERO
    start: Expr = ZERO
    segment: Expr = ZERO
    segments: Expr = ONE
    run: Expr = ONE
    more: Expr = ZERO
    last: Expr | None = None
    depth_blocks: int = 1
    depth_start: Expr = ZERO
    depth_offset: Expr = ZERO
    depth_run: Expr = ONE
    depth_length: int = 0


def k_blocks(x: Operand, nr: int, depth_blocks: int, *, few: bool) -> KBlocks:
    """The blocks of an operand's k. With `few` row tiles to share a block, k is not cut."""
    size = K_BYTES // (4 * nr) // 16 * 16
    count, run = as_int(x.count), as_int(x.run)
    if run is not None and count == 1 and depth_blocks > 1:
        return _deep(run, size, depth_blocks)
    whole = KBlocks(segments=x.count, run=x.run, depth_run=x.run, depth_length=run or 0)
    if few or count is None or (run is None and count != 1):
        return whole
    if run is None:
        return _parts(whole, x.run, size, 1)
    if 2 * count * run <= 3 * size:
        return whole
    if 2 * run > size:
        parts = max(1, round(run / size))
        step = -(-run // parts)
        return _parts(whole, x.run, -(-step // 16) * 16, count)
    blocks = -(-count * run // size)
    each = -(-count // blocks)
    blocks = -(-count // each)
    at = Var("ks")
    left = index(each) if count % each == 0 else apply("min", index(each), index(count) - at * each)
    return KBlocks(
        loops=((at, index(blocks)),),
        start=at * (each * run),
        segment=at * each,
        segments=left,
        run=x.run,
        more=apply("min", at, 1),
        last=apply("eq", at, blocks - 1),
        depth_run=x.run,
        depth_length=run,
    )


def _parts(whole: KBlocks, run: Expr, step: int, count: int) -> KBlocks:
    """Each segment in parts of `step` steps."""
    ks, kp = Var("ks"), Var("kp")
    parts = apply("max", (run + (step - 1)) // step, 1)
    loops = [(kp, parts)] if parts is not ONE else []
    part: Expr = kp if loops else ZERO
    segment: Expr = ZERO
    last = [apply("eq", part, parts - 1)] if loops else []
    if count > 1:
        loops.insert(0, (ks, index(count)))
        segment = ks
        last.append(apply("eq", ks, count - 1))
    even = as_int(run) is not None and (as_int(run) or 0) % step == 0
    return KBlocks(
        loops=tuple(loops),
        shift=part * step,
        start=segment * run + part * step,
        segment=segment,
        run=index(step) if even else apply("min", index(step), run - part * step),
        more=apply("min", segment + part, 1),
        last=apply("logical_and", *last) if len(last) == 2 else last[0],
        depth_run=whole.depth_run,
        depth_length=whole.depth_length,
    )


def _deep(run: int, size: int, depth_blocks: int) -> KBlocks:
    """One segment in depth blocks of several parts."""
    per = max(1, round(run / depth_blocks / size))
    step = -(-run // (depth_blocks * per))
    step = -(-step // 16) * 16
    length = step * per
    depth_blocks = -(-run // length)
    kp, kd = Var("kp"), DEPTH_BLOCK
    # The last depth block may end before its last part, which then has nothing to add.
    left = apply("max", index(run) - kd * length - kp * step, 0)
    even = run % length == 0
    return KBlocks(
        loops=((kp, index(per)),),
        shift=kp * step,
        start=kp * step,
        run=index(step) if even else apply("min", index(step), left),
        more=apply("min", kd + kp, 1),
        last=apply("logical_and", apply("eq", kd, depth_blocks - 1), apply("eq", kp, per - 1)),
        depth_blocks=depth_blocks,
        depth_start=kd * length,
        depth_offset=kd * length,
        depth_run=index(length) if even else apply("min", index(length), index(run) - kd * length),
        depth_length=length,
    )


__all__ = ["DEPTH_BLOCK", "KBlocks", "k_blocks"]
