"""Dimensions of a value's shape: integers, symbols, and the small arithmetic that models write.

A model names its free dimensions with text ("batch", "16*h16", "past + 1", "?"). The text is parsed
once, into a tree over symbols with identifiers of our own (d0, d1, ...); the model's spelling is
kept for messages only.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "//",
}
# Also keeps out what makes the Python parser warn, such as a number that runs into a word.
_ARITHMETIC = re.compile(r"(?!.*\b[0-9]+[A-Za-z_])[A-Za-z0-9_+\-*/() ]*", re.ASCII)
_ANONYMOUS = frozenset({"", "?", "*", "None"})
_LONGEST_EXPRESSION = 200
_LARGEST_CONSTANT = 2**31


@dataclass(frozen=True, slots=True)
class DimSymbol:
    """A free dimension: our identifier and the model's name of it ("" when it has none)."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class DimExpr:
    """A dimension that is not a constant.

    `op` is "symbol" (`args` is the one symbol id) or one of + - * // (`args` are two of
    `DimExpr | int`). `text` is the model's spelling; it takes no part in equality.
    """

    op: str
    args: tuple[DimExpr | int | str, ...]
    text: str = field(default="", compare=False)

    def __str__(self) -> str:
        if self.op == "symbol":
            return str(self.args[0])
        return f"({self.args[0]} {self.op} {self.args[1]})"


# A later pass may put its own hashable objects in place of DimExpr, hence Any.
Dim: TypeAlias = int | DimExpr | Any


def symbol(id: str, text: str = "") -> DimExpr:
    """The dimension that is just the symbol `id`."""
    return DimExpr("symbol", (id,), text)


def dim_symbols(dim: DimExpr | int) -> Iterator[str]:
    """The symbol ids in `dim`, left to right, repeated where they are."""
    if isinstance(dim, DimExpr):
        if dim.op == "symbol":
            yield str(dim.args[0])
        else:
            for arg in dim.args:
                assert not isinstance(arg, str)
                yield from dim_symbols(arg)


def evaluate_dim(dim: DimExpr | int, bindings: Mapping[str, int]) -> int:
    """The value of `dim` with each symbol id bound; KeyError names an id that is not bound."""
    if not isinstance(dim, DimExpr):
        return dim
    if dim.op == "symbol":
        return bindings[str(dim.args[0])]
    left, right = (evaluate_dim(arg, bindings) for arg in dim.args)  # type: ignore[arg-type]
    return _apply(dim.op, left, right)


def parse_arithmetic(text: str, name: Callable[[str], DimExpr | int]) -> DimExpr | int | None:
    """Parse `text` over identifiers, integers and + - * //; None when it is anything else.

    `name` gives the dimension of an identifier. Constant sub-expressions are folded.
    """
    if not _ARITHMETIC.fullmatch(text):
        return None
    try:
        return _convert(ast.parse(text.strip(), mode="eval").body, name)
    except (SyntaxError, ValueError, RecursionError, MemoryError, ZeroDivisionError):
        return None


def _convert(tree: ast.expr, name: Callable[[str], DimExpr | int]) -> DimExpr | int:
    match tree:
        case ast.Name(id=identifier):
            return name(identifier)
        case ast.Constant(value=int() as value) if type(value) is int:
            if value < _LARGEST_CONSTANT:
                return value
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
            op = _OPERATORS[type(operator)]
            a, b = _convert(left, name), _convert(right, name)
            if isinstance(a, int) and isinstance(b, int):
                return _apply(op, a, b)
            return DimExpr(op, (a, b))
    raise ValueError("not dimension arithmetic")


def _apply(op: str, left: int, right: int) -> int:
    match op:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "//":
            return left // right
    raise ValueError(f"unknown dimension operator {op!r}")


class DimTable:
    """Assigns ids to the dimension names of one model, in order of first appearance.

    `overrides` fixes a free dimension by the model's name of it, either a name inside an
    expression or the whole text of a dimension.
    """

    def __init__(self, overrides: Mapping[str, int] | None = None) -> None:
        self._overrides = dict(overrides or {})
        self._used: set[str] = set()
        self._ids: dict[str, DimExpr] = {}
        self._texts: dict[str, DimExpr | int] = {}
        self._symbols: list[DimSymbol] = []

    @property
    def symbols(self) -> tuple[DimSymbol, ...]:
        """Every symbol so far."""
        return tuple(self._symbols)

    @property
    def unused_overrides(self) -> tuple[str, ...]:
        """Overrides whose name no dimension has had so far."""
        return tuple(name for name in self._overrides if name not in self._used)

    def fresh(self, name: str) -> DimExpr:
        """A new symbol that equals no other, whatever its name."""
        made = DimSymbol(f"d{len(self._symbols)}", name)
        self._symbols.append(made)
        return symbol(made.id, name)

    def dim(self, text: str) -> DimExpr | int:
        """The dimension that a model writes as `text`."""
        if text in self._overrides:
            return self._name(text)
        if text in _ANONYMOUS or (text.startswith("-") and text[1:].isdigit()):
            return self.fresh(text)
        if text not in self._texts:
            self._texts[text] = self._parse(text)
        return self._texts[text]

    def _parse(self, text: str) -> DimExpr | int:
        if text.isidentifier() or len(text) > _LONGEST_EXPRESSION:
            return self._name(text)
        names: list[str] = []

        def seen(name: str) -> DimExpr:
            names.append(name)
            return symbol(name)

        # A first parse decides whether the text is arithmetic, so that an opaque text
        # does not leave symbols behind that no dimension uses.
        if parse_arithmetic(text, seen) is None or not names:
            return self._name(text)
        parsed = parse_arithmetic(text, self._name)
        if parsed is None:
            return self._name(text)
        if isinstance(parsed, DimExpr):
            return DimExpr(parsed.op, parsed.args, text)
        return parsed

    def _name(self, name: str) -> DimExpr | int:
        if name in self._overrides:
            self._used.add(name)
            return self._overrides[name]
        if name not in self._ids:
            self._ids[name] = self.fresh(name)
        return self._ids[name]
