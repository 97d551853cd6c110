"""What a schedule rule is given, and how rules are tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnxjit.codegen.expr import Dim, Expr, leaves
from onnxjit.codegen.kernel import Kernel
from onnxjit.codegen.loops import Address, Assign, Call, For, If, Param, Stmt, Store, statements
from onnxjit.codegen.schedule.axes import Layout, strides
from onnxjit.codegen.target import Target


@dataclass(frozen=True, slots=True)
class Request:
    """A kernel, the physical axis order of its buffers (row-major unless listed) and the target.

    `packed` names inputs whose contents are compile-time constants and may be re-laid out.
    """

    kernel: Kernel
    layouts: Mapping[str, Layout]
    target: Target
    constants: frozenset[str] = field(default=frozenset())

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


__all__ = ["Declined", "Request", "dims_of", "expressions"]
