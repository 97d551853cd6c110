"""Loops and merging values in LLVM IR that is written by hand: the micro-kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

_I64 = ir.IntType(64)


def phis(build: ir.IRBuilder, values: Sequence[Any], block: ir.Block) -> list[Any]:
    """Merging values at the builder's place, so far `values` coming from `block`."""
    result = [build.phi(value.type) for value in values]
    join(result, values, block)
    return result


def join(merged: Sequence[Any], values: Sequence[Any], block: ir.Block) -> None:
    """Let `values` come from `block` as well."""
    for phi, value in zip(merged, values, strict=True):
        phi.add_incoming(value, block)


def counted(
    build: ir.IRBuilder,
    start: Any,
    stop: Any,
    step: int,
    values: Sequence[Any],
    body: Callable[[Any, list[Any]], Sequence[Any]],
) -> tuple[Any, list[Any]]:
    """`for k in range(start, stop, step): values = body(k, values)`; k and the values behind it."""
    before = build.block
    head, inside, after = (
        build.function.append_basic_block(n) for n in ("head", "inside", "after")
    )
    build.branch(head)
    build.position_at_end(head)
    k, *carried = phis(build, [start, *values], before)
    build.cbranch(build.icmp_signed("<", k, stop), inside, after)
    build.position_at_end(inside)
    new = body(k, carried)
    join([k, *carried], [build.add(k, ir.Constant(_I64, step)), *new], build.block)
    build.branch(head)
    build.position_at_end(after)
    return k, carried


__all__ = ["counted", "join", "phis"]
