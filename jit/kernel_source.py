"""Edited kernel sources: read, checked against the rules of the dialect, and built."""

from __future__ import annotations

import ast
import os
import re
import symtable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnxjit.codegen.build import Builder, Source, symbol_of
from onnxjit.codegen.build_process import CompileError
from onnxjit.codegen.dialect_python import python_namespace
from onnxjit.codegen.dialect_table import CALLABLE
from onnxjit.codegen.target import host
from onnxjit.errors import KernelSourceError

if TYPE_CHECKING:
    from onnxjit.codegen.cache import Cache

PARAMETERS = ("ptrs", "ints", "scratch", "begin", "end")


@dataclass(frozen=True, slots=True)
class Text:
    """A source and the file that it was read from, None for a text."""

    text: str
    path: Path | None = None

    @property
    def where(self) -> str:
        return "the kernel source" if self.path is None else str(self.path)


def read_text(source: str | os.PathLike[str]) -> Text:
    """`source` is the text of a kernel, or a path: a `PathLike`, or a string of one line.

    Raises `KernelSourceError` for a file that cannot be read.
    """
    if isinstance(source, str) and "\n" in source:
        return Text(source)
    path = Path(source).absolute()
    try:
        return Text(path.read_text(), path)
    except (OSError, ValueError) as error:
        raise KernelSourceError(f"cannot read the kernel source {str(path)!r}: {error}") from error


def edited_source(given: Text, name: str, wide: bool) -> Source:
    """The source to build, with the micro-kernels that it calls.

    Raises `KernelSourceError`, with the line, for a syntax error, another module than one that
    defines `kernel`, and a name that the dialect does not have.
    """
    tree = _parsed(given)
    _check_module(tree, given)
    symbols = []
    for free, line in _free_names(tree, given).items():
        if _is_micro_kernel(free):
            symbols.append(free)
        elif free not in python_namespace():
            raise KernelSourceError(
                f"{given.where}, line {line}: the kernel dialect has no name {free!r}"
            )
    return Source(given.text, tuple(sorted(symbols)), name, wide or bool(symbols))


def called_micro_kernels(given: Text) -> tuple[str, ...]:
    """The micro-kernels that a source names. Raises `KernelSourceError` for a syntax error."""
    names = {node.id for node in ast.walk(_parsed(given)) if isinstance(node, ast.Name)}
    return tuple(sorted(filter(_is_micro_kernel, names)))


def _is_micro_kernel(name: str) -> bool:
    return CALLABLE.fullmatch(name) is not None


def _parsed(given: Text) -> ast.Module:
    try:
        return ast.parse(given.text, given.where)
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        raise KernelSourceError(f"{given.where}{line}: {what}") from error


def _check_module(tree: ast.Module, given: Text) -> None:
    kernel = None
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if isinstance(statement, ast.FunctionDef) and statement.name == "kernel":
            kernel = statement
        elif not (
            isinstance(statement, ast.Assign)
            and [ast.unparse(target) for target in statement.targets] == ["FASTMATH"]
        ):
            raise KernelSourceError(
                f"{given.where}, line {statement.lineno}: a kernel source holds the function "
                "kernel, and FASTMATH at most"
            )
    if kernel is None or ast.unparse(kernel.args) != ", ".join(PARAMETERS):
        raise KernelSourceError(
            f"{given.where} must define kernel({', '.join(PARAMETERS)}), without defaults"
        )


def _free_names(tree: ast.Module, given: Text) -> dict[str, int]:
    """The names that `kernel` takes from outside, each with the line that uses it first."""
    module = symtable.symtable(given.text, given.where, "exec")
    kernel = next(t for t in module.get_children() if t.get_name() == "kernel")
    if kernel.get_children():
        raise KernelSourceError(
            f"{given.where}, line {kernel.get_children()[0].get_lineno()}: "
            "the kernel dialect has no functions, classes or comprehensions inside of kernel"
        )
    free = {s.get_name() for s in kernel.get_symbols() if s.is_global()}
    lines: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in free:
            lines[node.id] = min(node.lineno, lines.get(node.id, node.lineno))
    return dict(sorted(lines.items(), key=lambda item: item[1]))


@dataclass(frozen=True, slots=True)
class Built:
    """Machine code: the object file of the kernel, and those of the micro-kernels by symbol."""

    key: str
    image: bytes
    tiles: dict[str, bytes]

    @property
    def symbol(self) -> str:
        return symbol_of(self.key)


def build(source: Source, cache: Cache | None, where: str = "the kernel source") -> Built:
    """Compile a source in this process, or find it in the cache under its content's key.

    Raises `KernelSourceError` when the compiler refuses it, or a micro-kernel that there is not, or
    not for this processor.
    """
    with Builder(host(), jobs=0, cache=cache) as builder:
        try:
            key = builder.submit(source)
            return Built(key, builder.result(key), builder.tile_objects(source.symbols))
        except CompileError as error:
            raise KernelSourceError(_reason(str(error), where)) from error


# Numba says where it was in lines that begin with "During:". A KeyError's text stands in double
# quotes where it has single ones.
_RAISED = re.compile(r"^(?!During)[A-Za-z_][\w.]*: \"?(.*?)\"?$", re.MULTILINE)
_LINE = re.compile(r'File "<k_\w+>", line (\d+)')


def _reason(report: str, where: str) -> str:
    """What the compiler says and of which line, out of its traceback."""
    raised = [m for m in _RAISED.finditer(report) if m.start()]
    if not raised:
        return f"{where} cannot be compiled: {report}"
    last = raised[-1]
    line = _LINE.search(report, last.end())
    place = f"{where}, line {line[1]}" if line else where
    return f"{place}: cannot be compiled: {last[1]}"
