"""Sources that differ in constants alone become one, which is passed those constants.

A fixed size is a constant of a kernel's source, and so is a scale that a model's author has frozen:
the layers of a network that do the same at several widths are as many sources, each of which takes
Numba and LLVM a fifth of a second. Where a constant differs between sources that are otherwise
equal, it becomes an integer argument (of a float32, its bits). Constants that decide what the
machine code looks like stay: small bounds and strides of innermost loops, divisors, sizes of
arrays, integers that are data.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxjit.codegen.dialect_table import DTYPES, FAMILIES

SMALL = 32
"""Bounds and strides of innermost loops up to this one stay what they are."""

_DIVISIONS = ("udiv_", "umod_", "floordiv", "mod_floor", "mod_trunc", "divide_by")
_MEMORY = ("buffer_", "stack_")
_HEAD = "def kernel(ptrs, ints, scratch, begin, end):\n"


@dataclass(frozen=True, slots=True)
class _Constant:
    """A constant that may become an argument: where it is in the text, and the argument."""

    start: int
    stop: int
    argument: int
    real: bool


def unified(sources: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
    """For each source the one that stands for it and the integers that it is passed after its own
    ones. Sources that no other one is like are returned as they are, without integers."""
    groups: dict[str, list[int]] = {}
    constants = [_constants(text) for text in sources]
    for n, text in enumerate(sources):
        holes = [(c, "real" if c.real else "whole") for c in constants[n]]
        groups.setdefault(_replaced(text, holes), []).append(n)
    result: list[tuple[str, tuple[int, ...]]] = [(text, ()) for text in sources]
    for members in groups.values():
        here = constants[members[0]]
        columns = [
            (c[0].real, tuple(x.argument for x in c))
            for c in zip(*(constants[n] for n in members), strict=True)
        ]
        differing = list(dict.fromkeys(c for c in columns if len(set(c[1])) > 1))
        if not differing:
            continue
        text = sources[members[0]]
        first = text.count(" = ints[")
        names = {c: f"{'f' if c[0] else 'n'}{first + k}" for k, c in enumerate(differing)}
        lines = [
            f"    {name} = bitcast_float32(int32(ints[{first + k}]))\n"
            if real
            else f"    {name} = ints[{first + k}]\n"
            for k, ((real, _), name) in enumerate(names.items())
        ]
        changes = [(c, names[x]) for c, x in zip(here, columns, strict=True) if x in names]
        before, after = _replaced(text, changes).split(_HEAD)
        text = "".join([before, _HEAD, *lines, after])
        for k, n in enumerate(members):
            result[n] = text, tuple(values[k] for _, values in differing)
    return result


def _replaced(text: str, changes: Iterable[tuple[_Constant, str]]) -> str:
    parts, done = [], 0
    for constant, new in changes:
        parts += [text[done : constant.start], new]
        done = constant.stop
    return "".join([*parts, text[done:]])


def _constants(text: str) -> list[_Constant]:
    """The constants that may become arguments, in the order of the text."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node in _free(ast.parse(text), frozenset(), 1):
        at, to = node.col_offset, node.end_col_offset or 0
        start, stop = starts[node.lineno - 1] + at, starts[(node.end_lineno or 0) - 1] + to
        real = isinstance(node, ast.Call)
        value = ast.literal_eval(node.args[0] if isinstance(node, ast.Call) else node)
        argument = int(np.float32(value).view(np.int32)) if real else value
        found.append(_Constant(start, stop, argument, real))
    return sorted(found, key=lambda c: c.start)


def _free(node: ast.AST, inner: frozenset[str], small: int) -> Iterator[ast.Constant | ast.Call]:
    """The nodes of constants that may become arguments, of integers those above `small`; `inner`
    are variables of innermost loops. 0 and 1 leave no trace in an index: they are of its form."""
    below: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.Constant):
        if type(node.value) is int and node.value > small:
            yield node
        return
    if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and _innermost(node):
        yield from _free(node.iter, inner, SMALL)
        inner, below = inner | {node.target.id}, node.body
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        if any(isinstance(x, ast.Name) and x.id in inner for x in (node.left, node.right)):
            small = SMALL
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "ints":
        return
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = node.func.id
        if name == "float32" and _is_number(node.args[0]):
            yield node
            return
        if name.startswith(_MEMORY):
            return
        if name.startswith("scratch_"):
            below = node.args[1:2]
        elif name in _DIVISIONS:
            below = node.args[:1]
        elif name == "range":
            below = node.args[:2]
        elif name in DTYPES:
            below = [a for a in node.args if not _is_number(a)]
    for child in below:
        yield from _free(child, inner, small)


def _innermost(loop: ast.For) -> bool:
    """Whether a loop has neither loops nor calls of micro-kernels inside."""
    return not any(
        isinstance(x, ast.For)
        or (isinstance(x, ast.Name) and any(f.pattern.fullmatch(x.id) for f in FAMILIES))
        for statement in loop.body
        for x in ast.walk(statement)
    )


def _is_number(node: ast.AST) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant)


__all__ = ["unified"]
