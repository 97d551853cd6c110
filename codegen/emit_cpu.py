"""In which syntax: prints a loop nest as the Python source of a Numba CPU kernel.

Every identifier is made here from axis, buffer and temporary numbers; nothing that a model
contains can reach the text. The names a kernel may use are those of `dialect.namespace()`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from onnxjit.codegen.expr import (
    INDEX,
    ONE,
    Apply,
    Axis,
    Const,
    Dim,
    Expr,
    Load,
    Poly,
    Var,
    apply,
    as_int,
    leaves,
    loads,
    poly_mul,
    substitute,
    walk,
)
from onnxjit.codegen.loops import (
    FIRST_PART,
    LAST_PART,
    TILE,
    Address,
    Assign,
    Call,
    For,
    If,
    LoopNest,
    Stmt,
    Store,
)
from onnxjit.codegen.simplify import is_nonneg

_INFIX = {
    "lt": "<", "le": "<=", "eq": "==", "ne": "!=",
}  # fmt: skip
_FLOAT_INFIX = {"add": "+", "sub": "-", "mul": "*"}
_CALLS = {"min": "min_", "max": "max_", "pow": "pow_", "abs": "abs_", "round": "round_"}


LONGEST = 140
"""Expressions longer than this one become a variable of their own."""

_DIGITS = re.compile(r"[0-9.]*[0-9](e-?[0-9]+)?")

DATA = ("acc", "scalar", "v")
"""How variables that hold data (accumulators, row results) begin; they may be negative."""


class Printer:
    """Prints statements and expressions; subclasses choose the target's spelling."""

    def __init__(self, nest: LoopNest) -> None:
        self.nest = nest
        self.lines: list[str] = []
        self.depth = 1
        self.names = {p.buffer: f"b{k}" for k, p in enumerate(nest.params)}
        self.dtypes = {p.buffer: p.dtype for p in nest.params}
        for k, x in enumerate(nest.locals):
            self.names[x.buffer] = f"s{k}"
            self.dtypes[x.buffer] = x.dtype
        self.sizes = {e: f"n{k}" for k, e in enumerate(nest.sizes)}
        self.scopes: list[dict[Expr, str]] = [dict(self.sizes)]
        self.temps = 0

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    # --- statements ---------------------------------------------------------------------------

    def block(self, body: Sequence[Stmt]) -> None:
        self.depth += 1
        self.scopes.append({})
        for s in body:
            self.statement(s)
        if not body:
            self.line("pass")
        self.scopes.pop()
        self.depth -= 1

    def statement(self, s: Stmt) -> None:
        if isinstance(s, For):
            self.for_(s)
        elif isinstance(s, If):
            self.line(f"if {self.expression(s.cond)}:")
            self.block(s.then)
            if s.orelse:
                self.line("else:")
                self.block(s.orelse)
        elif isinstance(s, Assign):
            value = self.value(s.value)
            self.forget(s.var)
            self.line(f"{s.var.name} = {value}")
        elif isinstance(s, Store):
            value = self.value(s.value)
            self.line(f"{self.names[s.buffer]}[{self.expression(s.offset)}] = {value}")
            self.forget_loads(s.buffer)
        elif isinstance(s, Call):
            self.call(s)
        else:
            raise TypeError(f"a CPU kernel has no {type(s).__name__}")

    def for_(self, s: For) -> None:
        if s.stop - s.start is ONE:  # no loop, and none for LLVM to find that out of
            self.line(f"{s.var.name} = {self.expression(s.start)}")
            self.scopes.append({})
            for inner in s.body:
                self.statement(inner)
            self.scopes.pop()
            return
        start, stop = self.expression(s.start), self.expression(s.stop)
        bounds = stop if start == "0" else f"{start}, {stop}"
        if s.step != 1:
            bounds = f"{start}, {stop}, {s.step}"
        self.line(f"for {s.var.name} in range({bounds}):")
        self.block(s.body)

    def call(self, s: Call) -> None:
        args = []
        for a in s.args:
            if isinstance(a, Address):
                args.append(self.names[a.buffer])
                if a.offset is not None:
                    args.append(self.expression(a.offset))
            else:
                args.append(self.expression(a))
        self.line(f"{s.fn}({', '.join(args)})")
        self.scopes[-1].clear()

    def forget(self, var: Var) -> None:
        for scope in self.scopes:
            for e in [e for e in scope if var in leaves(e)]:
                del scope[e]

    def forget_loads(self, buffer: str) -> None:
        for scope in self.scopes:
            for e in [
                e for e in scope if any(isinstance(x, Load) and x.buffer == buffer for x in walk(e))
            ]:
                del scope[e]

    # --- expressions --------------------------------------------------------------------------

    def value(self, e: Expr) -> str:
        """An expression, with shared and deep parts computed into temporaries first."""
        uses: dict[Expr, int] = {}
        self._count(e, uses)
        self.uses = uses
        return self.expression(e)

    def _count(self, e: Expr, uses: dict[Expr, int]) -> None:
        uses[e] = uses.get(e, 0) + 1
        if uses[e] == 1:
            for c in e.kids:
                self._count(c, uses)

    uses: dict[Expr, int]

    def expression(self, e: Expr) -> str:
        for scope in reversed(self.scopes):
            if e in scope:
                return scope[e]
        if isinstance(e, Axis | Var):
            return e.name
        if isinstance(e, Const):
            return self.constant(e)
        if isinstance(e, Apply) and e.fn == "select" and self.is_guarded(e):
            return self.branch(e)
        if isinstance(e, Apply) and e.fn == "logical_and":
            for guard, rest in (e.args, e.args[::-1]):
                if not _has_loads(guard) and _has_loads(rest):
                    return self.conjunction(e, guard, rest)
        text = self._plain(e)
        shared = getattr(self, "uses", {}).get(e, 0) > 1
        if (shared and self.is_work(e)) or _length(text) > LONGEST:
            return self.temporary(e, text)
        return text

    def is_work(self, e: Expr) -> bool:
        return isinstance(e, Load) or (
            isinstance(e, Apply) and not (e.dtype == INDEX and not _has_loads(e))
        )

    def temporary(self, e: Expr, text: str) -> str:
        name = f"t{self.temps}"
        self.temps += 1
        self.line(f"{name} = {text}")
        self.scopes[-1][e] = name
        return name

    def is_guarded(self, e: Apply) -> bool:
        """Whether a selection must not evaluate both sides: its condition guards an index."""
        if not any(_has_loads(a) for a in e.args[1:]):
            return False
        return any(
            isinstance(x, Apply) and x.fn in ("lt", "le", "eq", "ne") and not _has_loads(x)
            for x in walk(e.args[0])
        )

    def branch(self, e: Apply) -> str:
        name = f"t{self.temps}"
        self.temps += 1
        self.line(f"if {self.expression(e.args[0])}:")
        for k, a in enumerate(e.args[1:]):
            if k:
                self.line("else:")
            self.depth += 1
            self.scopes.append({})
            self.line(f"{name} = {self.expression(a)}")
            self.scopes.pop()
            self.depth -= 1
        self.scopes[-1][e] = name
        return name

    def conjunction(self, e: Expr, guard: Expr, rest: Expr) -> str:
        """`guard and rest` without evaluating `rest`, whose reads the guard may protect."""
        name = f"t{self.temps}"
        self.temps += 1
        self.line(f"{name} = {self.expression(guard)}")
        self.line(f"if {name}:")
        self.depth += 1
        self.scopes.append({})
        self.line(f"{name} = {self.expression(rest)}")
        self.scopes.pop()
        self.depth -= 1
        self.scopes[-1][e] = name
        return name

    def _plain(self, e: Expr) -> str:
        if isinstance(e, Load):
            return f"{self.names[e.buffer]}[{self.expression(e.index[0])}]"
        if isinstance(e, Poly):
            return self.polynomial(e)
        assert isinstance(e, Apply), f"{type(e).__name__} cannot be printed in a nest"
        return self.function(e)

    def polynomial(self, e: Poly) -> str:
        """Ordered by what is printed, so that equal sums of other sizes have equal texts."""
        terms = [(sorted(self.expression(a) for a in atoms), c) for atoms, c in e.terms]
        parts: list[str] = []
        for names, c in sorted(terms, key=lambda term: (-len(term[0]), term[0])):
            if not names:
                text = str(abs(c))
            elif abs(c) == 1:
                text = "*".join(names)
            else:
                text = "*".join([*names, str(abs(c))])
            sign = "-" if c < 0 else "+"
            parts.append(f" {sign} {text}" if parts else ("-" + text if c < 0 else text))
        return "(" + "".join(parts) + ")"

    def constant(self, e: Const) -> str:
        if e.dtype == INDEX:
            return str(e.value)
        if e.dtype == "bool":
            return str(e.value)
        if isinstance(e.value, float):
            if e.value != e.value:
                return f"{self.real(e.dtype)}(nan)"
            if e.value in (float("inf"), float("-inf")):
                return f"{self.real(e.dtype)}({'inf' if e.value > 0 else '-inf'})"
            return f"{self.real(e.dtype)}({e.value!r})"
        return f"{e.dtype}({e.value})"

    def real(self, dtype: str) -> str:
        return "float64" if dtype == "float64" else "float32"

    def function(self, e: Apply) -> str:
        args = [self.expression(a) for a in e.args]
        kind = e.args[0].dtype if e.fn != "select" else e.dtype
        if e.fn == "cast":
            return self.cast(e, args[0])
        if e.fn in _INFIX:
            return f"({args[0]} {_INFIX[e.fn]} {args[1]})"
        if e.fn in _FLOAT_INFIX and (kind in ("float32", "float64", INDEX)):
            return f"({args[0]} {_FLOAT_INFIX[e.fn]} {args[1]})"
        if e.fn in _FLOAT_INFIX and kind.startswith(("int", "uint")):
            return f"{kind}({args[0]} {_FLOAT_INFIX[e.fn]} {args[1]})"
        if e.fn == "neg":
            return f"(-{args[0]})" if kind.startswith("float") else f"{kind}(-{args[0]})"
        if e.fn in ("floordiv", "mod") and e.dtype == INDEX and self.unsigned(e):
            return f"{'udiv_' if e.fn == 'floordiv' else 'umod_'}({args[0]}, {args[1]})"
        name = {"floordiv": "floordiv", "mod": "mod_floor", "fmod": "mod_trunc"}.get(e.fn, e.fn)
        name = _CALLS.get(name, name)
        return f"{name}({', '.join(args)})"

    def unsigned(self, e: Apply) -> bool:
        k = as_int(e.args[1])
        divisor = (k is not None and k > 0) or (k is None and is_nonneg(e.args[1]))
        return divisor and _nonneg(e.args[0])

    def cast(self, e: Apply, arg: str) -> str:
        source = e.args[0].dtype
        if e.dtype in ("float16", "bfloat16"):
            wide = (
                arg
                if source == "float32" or source in ("float16", "bfloat16")
                else f"float32({arg})"
            )
            return f"round_{e.dtype}({wide})"
        if source in ("float16", "bfloat16") and e.dtype == "float32":
            return arg
        return f"{'bool_' if e.dtype == 'bool' else e.dtype}({arg})"


def _length(text: str) -> int:
    """Characters of an expression, each of its numbers counted as one digit: sources that differ
    in sizes alone break at the same places."""
    return len(text) if len(text) <= LONGEST else len(_DIGITS.sub("0", text))


def _nonneg(e: Expr) -> bool:
    """Range proof in a nest: variables count tiles, rows and axes, except those that hold data."""
    counters = [v for v in leaves(e) if isinstance(v, Var) and v.dtype == INDEX]
    if any(v.name.startswith(DATA) for v in counters):
        return False
    table: dict[Expr, Expr] = {v: Dim(f"?{v.name}") for v in counters}
    return is_nonneg(substitute(e, table) if table else e)


def _has_loads(e: Expr) -> bool:
    return any(isinstance(x, Load) for x in walk(e))


class CpuPrinter(Printer):
    """Numba CPU: `kernel(ptrs, ints, scratch, begin, end)`."""

    def source(self) -> str:
        nest = self.nest
        self.depth = 0
        self.line(f'"""{self.header()}"""')
        self.line("")
        self.line("")
        self.line("def kernel(ptrs, ints, scratch, begin, end):")
        self.depth = 1
        for k, p in enumerate(nest.params):
            self.line(f"b{k} = buffer_{p.dtype}(ptrs, {k})")
        for k, name in enumerate(self.sizes.values()):
            self.line(f"{name} = ints[{k}]")
        scope = len(nest.params)
        offset = "0"
        for k, x in enumerate(nest.locals):
            scope += 1
            if x.stack:
                self.line(f"s{k} = stack_{x.dtype}({as_int(x.count)}, {scope})")
            else:
                self.line(f"s{k} = scratch_{x.dtype}(scratch, {offset}, {scope})")
                nbytes = self.expression(x.nbytes)
                offset = nbytes if offset == "0" else f"{offset} + {nbytes}"
        if nest.parts is ONE:
            self.line("for tile in range(begin, end):")
            self.block(nest.body)
        else:
            blocks = apply("floordiv", Var("end") + (nest.parts - 1), nest.parts)
            at = poly_mul(TILE, nest.parts)
            body = (
                Assign(FIRST_PART, apply("max", Var("begin") - at, 0)),
                Assign(LAST_PART, apply("min", Var("end") - at, nest.parts)),
                *nest.body,
            )
            self.for_(For(TILE, apply("floordiv", Var("begin"), nest.parts), blocks, body))
        return "\n".join(self.lines) + "\n"

    def function(self, e: Apply) -> str:
        if e.fn == "div" and e.dtype == "float32" and has_normal_reciprocal(e.args[1]):
            return f"divide_by({self.expression(e.args[0])}, {self.expression(e.args[1])})"
        if e.fn == "sub" and e.dtype in ("float32", "float64") and is_difference(e.args[0]):
            return f"minus({self.expression(e.args[0])}, {self.expression(e.args[1])})"
        return super().function(e)

    def header(self) -> str:
        return f"Schedule: {self.nest.rule}."


def has_normal_reciprocal(e: Expr) -> bool:
    """Whether `e` is a constant, or a number of elements, that `divide_by` can divide by."""
    if isinstance(e, Apply) and e.fn == "cast":
        return e.args[0].dtype == INDEX and not loads(e.args[0])
    return isinstance(e, Const) and 2.0**-120 < abs(e.value) < 2.0**120


def is_difference(e: Expr) -> bool:
    """Whether `e` may be small beside what it is the difference of: a - b - c is then not to be
    computed as a - (b + c)."""
    return isinstance(e, Apply) and e.fn == "sub"


def emit(nest: LoopNest) -> str:
    """The Python source of a CPU kernel."""
    return CpuPrinter(nest).source()
