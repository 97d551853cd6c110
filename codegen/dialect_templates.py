"""Kernels that differ in integers and in micro-kernels only go through Numba once.

Numba's front end takes most of the time of a cold build, and the kernels of one network are often
the same text with other sizes. Such a literal becomes a plain integer in the unoptimised IR, and so
does a *marker*, a number that nothing else contains: the source with markers is compiled, and its
IR with each marker replaced by the kernel's own number is the kernel's IR.

That holds where nothing looks at the number while compiling, so a literal is only marked as an
operand, an index, or an argument that is known to be passed on (`_ARGUMENTS`). A variable that is
given a literal has it in its type, so those stay. What became of the markers is checked, and where
one was changed the kernel is compiled directly.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnxjit.codegen import dialect
from onnxjit.codegen.dialect_formulas import literal
from onnxjit.codegen.dialect_table import DTYPES, family_of

_FIRST, _STEP = 4_000_000_000_000_007, 10_000_019
"""Markers: far from each other, from sizes, and from the limits of integer types."""

_LARGE = re.compile(r"(?<![\w.])\d{13,}(?![\w.])")
_EXTERNAL = re.compile(r"\bexternal_\d+\b")
_BODY = re.compile(r'^define [^\n]*@"onnxjit\.body".*?^}', re.MULTILINE | re.DOTALL)
_REFERENCE = re.compile(r'@"(\w+)"')
_LIMITS = frozenset((2**63 - 1, 2**63, 2**64 - 1))
_MARKABLE = range(1, 10**12)
"""A step or a count of 0 decides something."""

_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod)
_ARGUMENTS = {
    **dict.fromkeys(("range", "udiv_", "umod_", "min_", "max_", "floordiv", "mod_floor"), range(3)),
    **{f"scratch_{dtype}": range(1, 2) for dtype in DTYPES},  # the last one is an alias scope
    **{f"stack_{dtype}": range(1) for dtype in DTYPES},
    "select": range(1, 3),
    **dict.fromkeys(("address", "offset", "zero"), range(1, 2)),
    "copy": range(2, 3),
}
"""Which arguments reach the IR unread: a range looks at the sign of its step only."""


@dataclass(frozen=True, slots=True)
class Template:
    """A source with markers for `numbers` and standard names for `symbols`, in order."""

    text: str
    numbers: tuple[int, ...]
    symbols: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Compiled:
    """The IR of a template, whose micro-kernels are called `symbols` there.

    Markers are in the body, the function that Numba made. The functions beside it are the same
    for all kernels, and may hold large numbers: bits of floats.
    """

    before: str
    body: str
    after: str
    symbols: tuple[str, ...]


_compiled: dict[tuple[str, tuple[str, ...]], _Compiled | None] = {}
"""By text and families of micro-kernels; None: does not survive its markers. Oldest first."""

_KEPT = 64


def compile_ir(source: str, symbols: Iterable[str] = (), filename: str = "<kernel>") -> str:
    """As `dialect.compile_ir`, sharing the work with sources seen before."""
    symbols = tuple(symbols)
    made = template(source, symbols)
    if made is None:
        return dialect.compile_ir(source, symbols, filename)
    key = made.text, tuple(family_of(symbol).name for symbol in made.symbols)
    if key not in _compiled:
        if len(_compiled) >= _KEPT:
            del _compiled[next(iter(_compiled))]
        _compiled[key] = _compile(made)
    shared = _compiled[key]
    if shared is None:
        return dialect.compile_ir(source, symbols, filename)
    return _instance(shared, made)


def template(source: str, symbols: Sequence[str] = ()) -> Template | None:
    """The template of a kernel source; None if there is nothing to share, or it is unusual.

    Nothing but the kernel may stand beside the docstring: Python would run it with markers.
    """
    if not source.isascii() or "\r" in source or _EXTERNAL.search(source):
        return None
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    *before, kernel = tree.body or [ast.Pass()]
    if ast.get_docstring(tree, clean=False) is not None:
        before = before[1:]
    if before or not isinstance(kernel, ast.FunctionDef) or kernel.decorator_list:
        return None
    marking = _Marking(frozenset(symbols))
    for statement in kernel.body:
        marking.visit(statement)
    if marking.unusual:
        return None
    if not marking.numbers and not marking.symbols:
        return None
    return Template(marking.applied(source), tuple(marking.numbers), tuple(marking.symbols))


def _markers(count: int) -> list[int]:
    return [_FIRST + _STEP * k for k in range(count)]


def _compile(made: Template) -> _Compiled | None:
    """The IR of a template, if all that became of its markers is themselves."""
    names = {_external(k): symbol for k, symbol in enumerate(made.symbols)}
    text = _EXTERNAL.sub(lambda found: names[found[0]], made.text)
    try:
        compiled = dialect.compile_ir(text, made.symbols, "<template>")
    except Exception:  # compiled directly, the kernel fails with its own text in the traceback
        return None
    body = _BODY.search(compiled)
    if body is None:
        return None
    found = {int(number) for number in _LARGE.findall(body[0])} - _LIMITS
    if found != set(_markers(len(made.numbers))):
        return None
    start, end = body.span()
    return _Compiled(compiled[:start], body[0], compiled[end:], made.symbols)


def _instance(shared: _Compiled, made: Template) -> str:
    markers = map(str, _markers(len(made.numbers)))
    numbers = dict(zip(markers, map(str, made.numbers), strict=True))
    body = _LARGE.sub(lambda found: numbers.get(found[0], found[0]), shared.body)
    text = f"{shared.before}{body}{shared.after}"
    if shared.symbols == made.symbols:
        return text
    symbols = dict(zip(shared.symbols, made.symbols, strict=True))
    return _REFERENCE.sub(lambda found: f'@"{symbols.get(found[1], found[1])}"', text)


def _external(k: int) -> str:
    return f"external_{k}"


class _Marking(ast.NodeVisitor):
    """Finds what a template replaces: (first line, column, last line, column, new text)."""

    def __init__(self, externals: frozenset[str]) -> None:
        self.externals = externals
        self.numbers: list[int] = []
        self.symbols: dict[str, str] = {}
        self.edits: list[tuple[int, int, int, int, str]] = []
        self.unusual = False  # a literal that could be taken for a marker

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, int) and node.value >= _MARKABLE.stop:
            self.unusual |= node.value not in _LIMITS

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self.externals:
            name = self.symbols.setdefault(node.id, _external(len(self.symbols)))
            self.edit(node, name)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.operands([node.left, node.right], isinstance(node.op, _OPERATORS))

    def visit_Compare(self, node: ast.Compare) -> None:
        self.operands([node.left, *node.comparators], True)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        self.operands([node.slice], True)

    def visit_Call(self, node: ast.Call) -> None:
        self.visit(node.func)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        places = range(len(node.args)) if name in self.externals else _ARGUMENTS.get(name, ())
        for place, argument in enumerate(node.args):
            self.operands([argument], place in places)

    def operands(self, nodes: Sequence[ast.expr], free: bool) -> None:
        for node in nodes:
            number = literal(node) if free else None
            if not isinstance(number, int) or abs(number) not in _MARKABLE:
                self.visit(node)
            else:
                marker = _FIRST + _STEP * len(self.numbers)
                self.numbers.append(abs(number))
                self.edit(node, f"-{marker}" if number < 0 else f"{marker}")

    def edit(self, node: ast.expr, text: str) -> None:
        assert node.end_lineno is not None and node.end_col_offset is not None
        place = node.lineno, node.col_offset, node.end_lineno, node.end_col_offset
        self.edits.append((*place, text))

    def applied(self, source: str) -> str:
        starts = [0]
        for line in source.split("\n"):
            starts.append(starts[-1] + len(line) + 1)
        parts, end = [], 0
        for first, column, last, last_column, text in sorted(self.edits):
            parts += [source[end : starts[first - 1] + column], text]
            end = starts[last - 1] + last_column
        return "".join([*parts, source[end:]])
