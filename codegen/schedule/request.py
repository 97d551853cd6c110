"""What a schedule rule is given, and how rules are tried."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from onnxjit.codegen.expr import INDEX, Apply, Const, Dim, Expr, Poly
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

SIZE_FUNCTIONS = ("floordiv", "mod", "min", "max")
"""Functions of sizes that a plan computes."""

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


def sizes_of(exprs: Iterable[Expr]) -> tuple[Expr, ...]:
    """The largest parts of expressions that a plan can compute from sizes before the kernel runs:
    sizes themselves, then their quotients, remainders, minima and maxima, by first appearance."""
    found: dict[Expr, None] = {}
    seen: set[Expr] = set()

    def visit(e: Expr) -> None:
        if e in seen:
            return
        seen.add(e)
        if isinstance(e, Dim) or (isinstance(e, Apply) and _is_size(e)):
            found[e] = None
        else:
            for c in e.kids:
                visit(c)

    for e in exprs:
        visit(e)
    return tuple(sorted(found, key=lambda e: not isinstance(e, Dim)))


def _is_size(e: Expr) -> bool:
    if isinstance(e, Const | Dim):
        return True
    if isinstance(e, Apply) and (e.fn not in SIZE_FUNCTIONS or e.dtype != INDEX):
        return False
    return isinstance(e, Apply | Poly) and all(map(_is_size, e.kids))


__all__ = ["Declined", "Request", "Variant", "expressions", "single_stage", "sizes_of"]
