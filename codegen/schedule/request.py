"""What a schedule rule is given, and how rules are tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnxjit.codegen.expr import Dim, Expr, leaves
from onnxjit.codegen.kernel import Kernel
from onnxjit.codegen.loops import Address, Assign, Call, For, If, Param, Stmt, Store, statements
from onnxjit.codegen.schedule.axes import (
    FlatStage,
    Layout,
    flatten_stage,
    split_axes,
    strides,
)
from onnxjit.codegen.target import Target

Variant = Mapping[str, int]
"""Choices by name that a kernel takes instead of what its rules' cost models say."""


@dataclass(frozen=True, slots=True)
class Request:
    """A kernel, the physical axis order of its buffers (row-major unless listed) and the target.

    `constants` names inputs whose contents are compile-time constants and may be re-laid out;
    `resident` says that the last cache holds those of the whole model from one run to the next.
    `offered` collects the choices that rules make on their way to a nest, with their options.
    """

    kernel: Kernel
    layouts: Mapping[str, Layout]
    target: Target
    constants: frozenset[str] = field(default=frozenset())
    variant: Variant = field(default_factory=dict)
    offered: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False)
    resident: bool = False

    def choice(self, name: str, usual: int, options: Sequence[int]) -> int:
        """What to take of `options`: what the variant says if it is one of them, or else `usual`,
        the cost model's.

        So each choice is declared where it is made, and nothing but a known option reaches a nest.
        """
        self.offered[name] = tuple(dict.fromkeys((usual, *options)))
        wanted = self.variant.get(name, usual)
        return wanted if wanted in self.offered[name] else usual

    def neighbours(self) -> list[dict[str, int]]:
        """The variants that differ from the one of this request, once it has been scheduled, in
        one of the choices that were made."""
        taken = {n: v for n, v in self.variant.items() if v in self.offered.get(n, ())[1:]}
        found = []
        for name, (usual, *others) in self.offered.items():
            for value in (usual, *others):
                if value != taken.get(name, usual):
                    rest = {n: v for n, v in taken.items() if n != name}
                    found.append(rest if value == usual else {**rest, name: value})
        return found

    def params(self) -> tuple[Param, ...]:
        k = self.kernel
        return (
            *(Param(b, k.types[b].dtype) for b in k.inputs),
            *(Param(b, k.types[b].dtype, True) for b in k.outputs),
        )

    def strides(self, buffer: str) -> tuple[Expr, ...]:
        return strides(self.kernel.types[buffer], self.layouts.get(buffer))


class Declined(Exception):
    """A rule does not apply; the message is the reason."""


def single_stage(r: Request) -> FlatStage:
    """The only stage of a kernel over flat offsets, its axes split; `Declined` if it has more."""
    k = r.kernel
    if len(k.stages) != 1:
        raise Declined("more than one stage")
    return split_axes(flatten_stage(k.stages[0], k.types, r.layouts))


def expressions(body: tuple[Stmt, ...]) -> list[Expr]:
    """Every expression that occurs in a body, in order."""
    out: list[Expr] = []
    for s in statements(body):
        if isinstance(s, For):
            out += [s.start, s.stop]
        elif isinstance(s, If):
            out.append(s.cond)
        elif isinstance(s, Assign):
            out.append(s.value)
        elif isinstance(s, Store):
            out += [s.offset, s.value]
        elif isinstance(s, Call):
            where = [a.offset if isinstance(a, Address) else a for a in s.args]
            out += [e for e in where if e is not None]
    return out


def dims_of(*exprs: Expr) -> tuple[str, ...]:
    """The symbolic sizes that expressions mention, sorted."""
    return tuple(sorted({x.name for e in exprs for x in leaves(e) if isinstance(x, Dim)}))


__all__ = ["Declined", "Request", "Variant", "dims_of", "expressions", "single_stage"]
