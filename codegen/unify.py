"""Sources that differ in sizes alone become one, which is passed those sizes.

A fixed size is a constant of a kernel's source, so the layers of a network that do the same at
several widths are as many sources, each of which takes Numba and LLVM a fifth of a second. Where a
constant above `LARGEST` differs between sources that are otherwise equal, it becomes an integer
argument. Smaller ones (the sides of tiles and filters, the lengths of unrolled loops), divisors and
the elements of data decide what machine code looks like, and stay.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence

from onnxjit.codegen.dialect_table import DTYPES

LARGEST = 32
"""Constants up to this one stay what they are."""

_DIVISIONS = ("udiv_", "umod_", "floordiv", "mod_floor", "mod_trunc")
_MEMORY = ("buffer_", "stack_")


def unified(sources: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
    """For each source the one that stands for it and the integers that it is passed after its own
    ones. Sources that no other one is like are returned as they are, without integers."""
    groups: dict[str, list[int]] = {}
    spans = [list(_constants(text)) for text in sources]
    for n, text in enumerate(sources):
        groups.setdefault(_replaced(text, ((at, "#") for at, _ in spans[n])), []).append(n)
    result: list[tuple[str, tuple[int, ...]]] = [(text, ()) for text in sources]
    for members in groups.values():
        columns = list(zip(*([value for _, value in spans[n]] for n in members), strict=True))
        differing = dict.fromkeys(c for c in columns if len(set(c)) > 1)
        if not differing:
            continue
        text = sources[members[0]]
        own = text.count(" = ints[")
        names = {column: f"n{own + k}" for k, column in enumerate(differing)}
        changes = [
            (at, names[column])
            for (at, _), column in zip(spans[members[0]], columns, strict=True)
            if column in names
        ]
        text = _declared(_replaced(text, changes), list(names.values()), own)
        for k, n in enumerate(members):
            result[n] = text, tuple(column[k] for column in differing)
    return result


Span = tuple[int, int]
"""The first character of a constant, and the one after it."""


def _constants(text: str) -> Iterator[tuple[Span, int]]:
    """The constants that may become arguments, in the order of the text."""
    lines = [0]
    for line in text.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found = []
    for node in _free(ast.parse(text)):
        first = lines[node.lineno - 1]
        span = first + node.col_offset, first + (node.end_col_offset or 0)
        found.append((span, int(node.value)))  # type: ignore[arg-type]
    yield from sorted(found)


def _free(node: ast.AST) -> Iterator[ast.Constant]:
    if isinstance(node, ast.Constant):
        if type(node.value) is int and node.value > LARGEST:
            yield node
        return
    below: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        if node.value.id == "ints":
            return
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = node.func.id
        if name.startswith(_MEMORY):
            return
        if name.startswith("scratch_"):
            below = node.args[1:2]
        elif name in _DIVISIONS:
            below = node.args[:1]
        elif name == "range":
            below = node.args[:2]
        elif name in DTYPES:
            below = [a for a in node.args if not isinstance(a, ast.Constant)]
    for child in below:
        yield from _free(child)


def _replaced(text: str, changes: Iterable[tuple[Span, str]]) -> str:
    parts, done = [], 0
    for (start, stop), new in changes:
        parts += [text[done:start], new]
        done = stop
    return "".join([*parts, text[done:]])


def _declared(text: str, names: Sequence[str], first: int) -> str:
    """The text with its arguments assigned to names before anything else."""
    head = "def kernel(ptrs, ints, scratch, begin, end):\n"
    lines = "".join(f"    {name} = ints[{first + k}]\n" for k, name in enumerate(names))
    before, after = text.split(head)
    return f"{before}{head}{lines}{after}"


__all__ = ["unified"]
