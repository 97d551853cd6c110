"""Asks whether kernels are contractions, once for all kernels that are equal but for names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

from onnxjit.codegen.canonical import canonical
from onnxjit.codegen.kernel import Kernel
from onnxjit.codegen.schedule.axes import Layout
from onnxjit.codegen.schedule.contraction_match import recognise
from onnxjit.codegen.schedule.request import Declined, Request
from onnxjit.codegen.target import Target


class Operands(NamedTuple):
    """Buffers of a contraction: the operand of its rows and the one of its columns."""

    x: str
    y: str


_Question = tuple[tuple[tuple[str, Layout], ...], frozenset[str], Target]
_known: WeakKeyDictionary[Kernel, dict[_Question, Operands | None]] = WeakKeyDictionary()
"""By canonical kernel; the passes ask one after the other."""


class Recogniser:
    """Answers for the kernels of one program; `constants` are its constant values."""

    def __init__(self, target: Target, constants: frozenset[str]) -> None:
        self._target = target
        self._constants = constants

    def operands(self, k: Kernel, layouts: Mapping[str, Layout]) -> Operands | None:
        """The operands of the contraction that `k` is; None if it is none."""
        if len(k.stages) > 2 or len(k.stages[-1].reduces) != 1:
            return None  # the cheap half of the question comes first
        same = canonical(k)
        own = {b: layouts[v] for b, v in same.buffers.items() if v in layouts}
        constants = frozenset(b for b, v in same.buffers.items() if v in self._constants)
        answers = _known.setdefault(same.kernel, {})
        question = (tuple(own.items()), constants, self._target)
        if question not in answers:
            try:
                c = recognise(Request(same.kernel, own, self._target, constants))
                answers[question] = Operands(c.x.buffer, c.y.buffer)
            except Declined:
                answers[question] = None
        found = answers[question]
        return found and Operands(same.buffers[found.x], same.buffers[found.y])
