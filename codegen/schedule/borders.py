"""Border conditions of padded reads: conjunctions of comparisons that become loop bounds."""

from __future__ import annotations

from collections.abc import Iterator

from onnxjit.codegen.expr import INDEX, ONE, Apply, Axis, Expr, as_int
from onnxjit.codegen.schedule.axes import coefficient, without


def conjuncts(cond: Expr) -> Iterator[Expr]:
    """The conditions that all have to hold."""
    if isinstance(cond, Apply) and cond.fn == "logical_and":
        for part in cond.args:
            yield from conjuncts(part)
    else:
        yield cond


def slack(cond: Expr) -> Expr | None:
    """What must not be negative for a comparison of indices to hold; None for other conditions."""
    if not (isinstance(cond, Apply) and cond.fn in ("lt", "le") and cond.args[0].dtype == INDEX):
        return None
    left, right = cond.args
    return right - left if cond.fn == "le" else right - left - 1


def loop_bound(cond: Expr, a: Axis) -> tuple[str, Expr] | None:
    """The bound on `a` that a comparison amounts to: ("low", first) or ("high", end)."""
    room = slack(cond)
    c = coefficient(room, a) if room is not None else None
    if room is None or c is None:
        return None
    rest = without(room, [a])
    if c is ONE:
        return "low", -rest
    if as_int(c) == -1:
        return "high", rest + 1
    return None


__all__ = ["conjuncts", "loop_bound", "slack"]
