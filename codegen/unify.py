"""Sources that differ in constants alone become one, which is passed those constants.

A fixed size is a constant of a kernel's source, and so is a scale that a model's author has frozen:
the layers of a network that do the same at several widths are as many sources, each of which takes
Numba and LLVM a fifth of a second. Where a constant differs between sources that are otherwise
equal, it becomes an integer argument (of a float32, its bits). Constants that decide what the
machine code looks like stay: small bounds and strides of innermost loops, their divisors, integers
that are data. Arrays get the largest size. What micro-kernels are called may differ: `Builder`
compiles such sources once.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxjit.codegen.dialect_table import CALLABLE, DTYPES, places_of_calls

SMALL = 32
"""Bounds and strides of innermost loops up to this one stay what they are."""

_DIVISIONS = ("udiv_", "umod_", "floordiv", "mod_floor", "mod_trunc", "divide_by")
_REAL = re.compile(r"\bfloat32\([^()]*\)")
_NUMBER = re.compile(r"\b\d[\d.]*(?:e-?\d+)?")
_HEAD = "def kernel(ptrs, ints, scratch, begin, end):\n"


_Node = ast.Constant | ast.Call | ast.Name
_EMPTY = ast.Name, ast.expr_context, ast.operator, ast.unaryop


@dataclass(frozen=True, slots=True)
class _Place:
    """What may differ at a place of the text, and what is there as an integer.

    A "whole" or "real" constant may become an argument, of a "size" of an array the largest serves
    all; any other `kind` is the place of a micro-kernel, which the text's own one keeps.
    """

    start: int
    stop: int
    kind: str
    value: int = 0


def unified(sources: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
    """For each source one that others share, but for the micro-kernels they call, and the integers
    that it is passed after its own ones. Sources that no other one is like are returned as they
    are, without integers."""
    result: list[tuple[str, tuple[int, ...]]] = [(text, ()) for text in sources]
    alike: dict[str, list[int]] = {}
    for n, text in enumerate(sources):
        alike.setdefault(_outline(text), []).append(n)
    places: dict[int, list[_Place]] = {}
    groups: dict[str, list[int]] = {}
    for candidates in alike.values():
        for n in candidates if len(candidates) > 1 else ():
            places[n] = _places(sources[n])
            shape = _replaced(sources[n], [(p, p.kind) for p in places[n]])
            groups.setdefault(shape, []).append(n)
    for members in groups.values():
        columns = [
            (same[0].kind, tuple(p.value for p in same))
            for same in zip(*(places[n] for n in members), strict=True)
        ]
        differing = list(dict.fromkeys(c for c in columns if len(set(c[1])) > 1))
        arguments = [c for c in differing if c[0] != "size"]
        first = sources[members[0]].count(" = ints[")
        new = {c: str(max(c[1])) for c in differing if c[0] == "size"}
        lines = []
        for k, (kind, values) in enumerate(arguments, first):
            name, argument = f"{'f' if kind == 'real' else 'n'}{k}", f"ints[{k}]"
            if kind == "real":
                argument = f"bitcast_float32(int32({argument}))"
            new[kind, values] = name
            lines.append(f"    {name} = {argument}\n")
        for k, n in enumerate(members):
            changes = [(p, new[c]) for p, c in zip(places[n], columns, strict=True) if c in new]
            before, after = _replaced(sources[n], changes).split(_HEAD)
            text = "".join([before, _HEAD, *lines, after])
            result[n] = text, tuple(values[k] for _, values in arguments)
    return result


def _outline(text: str) -> str:
    """A source without its numbers and micro-kernels: only those of one outline can become one."""
    return _NUMBER.sub("0", CALLABLE.sub("", _REAL.sub("0", text)))


def _replaced(text: str, changes: Iterable[tuple[_Place, str]]) -> str:
    parts, done = [], 0
    for place, new in changes:
        parts += [text[done : place.start], new]
        done = place.stop
    return "".join([*parts, text[done:]])


def _places(text: str) -> list[_Place]:
    """The places where sources that become one may differ, in the order of the text."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    called = places_of_calls(text)
    nodes: list[tuple[_Node, str]] = []
    _free(ast.parse(text), frozenset(), 1, nodes)
    found = []
    for node, kind in nodes:
        at, to = node.col_offset, node.end_col_offset or 0
        start, stop = starts[node.lineno - 1] + at, starts[(node.end_lineno or 0) - 1] + to
        if isinstance(node, ast.Name):
            place = _Place(start, stop, called[node.id])
        elif isinstance(node, ast.Call):
            bits = int(np.float32(ast.literal_eval(node.args[0])).view(np.int32))
            place = _Place(start, stop, kind, bits)
        else:
            place = _Place(start, stop, kind, ast.literal_eval(node))
        found.append(place)
    return sorted(found, key=lambda place: place.start)


def _free(node: ast.AST, inner: frozenset[str], small: int, found: list[tuple[_Node, str]]) -> None:
    """Adds the nodes that may differ, and how: micro-kernels, and constants, of integers those
    above `small`; `inner` are variables of innermost loops. 0 and 1 leave no trace in an index:
    they are of its form."""
    below: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.Constant):
        if type(node.value) is int and node.value > small:
            found.append((node, "whole"))
        return
    if isinstance(node, ast.BinOp):
        below = node.left, node.right
        if isinstance(node.op, ast.Mult):
            if any(isinstance(x, ast.Name) and x.id in inner for x in below):
                small = SMALL
    elif isinstance(node, ast.For) and isinstance(node.target, ast.Name) and _innermost(node):
        _free(node.iter, inner, SMALL, found)
        inner, below = inner | {node.target.id}, node.body
    elif (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == "ints"
    ):
        return
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name, below = node.func.id, node.args
        if name == "float32" and _is_number(node.args[0]):
            found.append((node, "real"))
            return
        if name.startswith("buffer_"):
            return
        if name.startswith("stack_"):
            found.append((node.args[0], "size"))  # type: ignore[arg-type]
            return
        if CALLABLE.fullmatch(name):
            found.append((node.func, "micro-kernel"))
        elif name.startswith("scratch_"):
            below = node.args[1:2]
        elif name in _DIVISIONS and inner:
            below = node.args[:1]
        elif name == "range":
            below = node.args[:2]
        elif name in DTYPES:
            below = [a for a in node.args if not _is_number(a)]
    for child in below:
        if not isinstance(child, _EMPTY):
            _free(child, inner, small, found)


def _innermost(loop: ast.For) -> bool:
    """Whether a loop has neither loops nor calls of micro-kernels inside."""
    return not any(
        isinstance(x, ast.For) or (isinstance(x, ast.Name) and CALLABLE.fullmatch(x.id))
        for statement in loop.body
        for x in ast.walk(statement)
    )


def _is_number(node: ast.AST) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant)


__all__ = ["unified"]
