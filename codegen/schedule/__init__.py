"""Schedule rules: each looks at a kernel's axis structure and builds a loop nest, or declines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from onnxjit.codegen.loops import LoopNest
from onnxjit.codegen.schedule import cuda, cuda_recurrence
from onnxjit.codegen.schedule.attention import attention
from onnxjit.codegen.schedule.contraction import contraction
from onnxjit.codegen.schedule.depthwise import depthwise
from onnxjit.codegen.schedule.pointwise import pointwise
from onnxjit.codegen.schedule.recurrence import recurrence
from onnxjit.codegen.schedule.reduction import reduction
from onnxjit.codegen.schedule.request import Declined, Request, Variant
from onnxjit.codegen.schedule.row_windows import row_windows
from onnxjit.codegen.schedule.rows import rows
from onnxjit.codegen.schedule.scan import scan
from onnxjit.codegen.schedule.transposition import transposition
from onnxjit.codegen.schedule.winograd import winograd

Rule = Callable[[Request], LoopNest]

RULES: dict[str, tuple[Rule, ...]] = {
    "cpu": (
        winograd,
        contraction,
        transposition,
        pointwise,
        depthwise,
        row_windows,
        scan,
        reduction,
        attention,
        rows,
    ),
    "cuda": cuda.RULES,
}

RECURRENCES: dict[str, tuple[Rule, ...]] = {
    "cpu": (recurrence,),
    "cuda": (cuda_recurrence.recurrence,),
}
"""The rules for kernels with a clock, whose stages no other rule may take one by one."""


class NoSchedule(Exception):
    """No rule takes the kernel as it is; `reasons` says why, rule by rule."""

    def __init__(self, name: str, reasons: tuple[tuple[str, str], ...]) -> None:
        text = "; ".join(f"{rule}: {why}" for rule, why in reasons)
        super().__init__(f"no schedule for kernel {name} ({text})")
        self.reasons = reasons


def schedule(r: Request) -> LoopNest:
    """The nest of the first rule that applies, with the reasons of those that declined."""
    declined: list[tuple[str, str]] = []
    rules = RECURRENCES if r.kernel.clock is not None else RULES
    for rule in rules[r.target.kind]:
        try:
            nest = rule(r)
        except Declined as e:
            declined.append((rule.__name__, str(e)))
            continue
        return replace(nest, declined=tuple(declined))
    raise NoSchedule(r.kernel.name, tuple(declined))


__all__ = ["RULES", "Declined", "NoSchedule", "Request", "Variant", "schedule"]
