"""Formulas: what a kernel computes between two variables goes through Numba as one call.

Most of Numba's time goes into single operations: each is some instructions of bytecode, a variable,
constraints on its type, a stack slot. Nothing in a tree of operations needs that, for its operands
are at hand in the source. So every expression of several operations, and every store of one, is
replaced by a call of a `Formula` on the variables in it. Numba types and lowers variables, loops
and branches; the operations in a formula are typed and emitted by the same table as others.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import CodeType
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate

from onnxjit.codegen.dialect_convert import llvm_type
from onnxjit.codegen.dialect_types import EMITTERS, Callee, Operation, resolve

FEWEST = 2
"""Operations that a formula has at least: Numba has one by itself for each of them."""

_OPERATORS: dict[type[ast.AST], Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
    ast.LShift: operator.lshift, ast.RShift: operator.rshift,
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
    ast.Invert: operator.invert,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip

_Step = tuple[Any, ...]
"""("argument", position), ("number", value), or ("operation", key, steps of the operands)."""

_KEPT = 4096


class Formula:
    """Operations on arguments, each operation behind those that it needs; the last is the result.

    Equal formulas are one object, so that one kernel's types serve the next one.
    """

    def __init__(self, steps: tuple[_Step, ...]) -> None:
        self.steps = steps
        self.callee = Callee(type("Dialect", (AbstractTemplate,), {"key": self}))
        self._known: dict[tuple[types.Type, ...], tuple[Any, list[Any]]] = {}

    def resolve(self, args: Sequence[types.Type]) -> Any:
        """The signature on arguments of types `args`. Raises TypingError if there is none."""
        return self._typed(tuple(args))[0]

    def emit(self, context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        """The instructions, as an emitter of the dialect's table."""
        _, typed = self._typed(tuple(sig.args))
        values: list[Any] = []
        for (kind, *rest), own in zip(self.steps, typed, strict=True):
            if kind == "argument":
                values.append(args[rest[0]])
            elif kind == "number":
                values.append(ir.Constant(llvm_type(types.unliteral(own)), rest[0]))
            else:
                key, operands = rest
                given = [
                    context.cast(builder, values[k], _type(typed[k]), wanted)
                    for k, wanted in zip(operands, own.args, strict=True)
                ]
                values.append(EMITTERS[key](context, builder, own, given))
        return values[-1]

    def _typed(self, args: tuple[types.Type, ...]) -> tuple[Any, list[Any]]:
        """The signature, and for each step its type, for operations their signature."""
        if args not in self._known:
            typed: list[Any] = []
            for kind, *rest in self.steps:
                if kind == "argument":
                    typed.append(args[rest[0]])
                elif kind == "number":
                    typed.append(_type_of_number(rest[0]))
                else:
                    key, operands = rest
                    typed.append(resolve(key, [_type(typed[k]) for k in operands], {}))
            self._known[args] = signature(_type(typed[-1]), *args), typed
        return self._known[args]


def _type(typed: Any) -> types.Type:
    return typed if isinstance(typed, types.Type) else typed.return_type


def _type_of_number(value: Any) -> types.Type:
    return types.float64 if isinstance(value, float) else types.literal(value)


_formula = lru_cache(_KEPT)(Formula)


def compiled(source: str, filename: str, scope: dict[str, object]) -> CodeType:
    """The code of a kernel source in which calls of formulas, which `scope` gets, stand for its
    expressions."""
    tree = ast.parse(source, filename)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if ":=" not in source:  # which makes variables between operations
        for node in functions:
            _Rewriting(node, scope).body(node)
    return compile(tree, filename, "exec")


class _Rewriting(ast.NodeTransformer):
    """Replaces the expressions of one function."""

    def __init__(self, function: ast.FunctionDef, scope: dict[str, object]) -> None:
        self.scope = scope
        self.locals = {a.arg for a in function.args.args}
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                self.locals.add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.Lambda) and node is not function:
                self.locals.update(scope)  # names of an inner function could be any

    def body(self, function: ast.FunctionDef) -> None:
        function.body = [self.visit(statement) for statement in function.body]

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.BinOp | ast.UnaryOp | ast.Compare | ast.Call | ast.Subscript):
            if not isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
                return self.call(node, lambda tree: tree.add(node))
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.stmt:
        match node.targets:
            case [ast.Subscript(value=buffer, slice=place)]:
                operands = buffer, place, node.value
                made = self.call(node, lambda tree: tree.operation(operator.setitem, operands))
                return made if made is node else ast.copy_location(ast.Expr(made), node)
        return self.generic_visit(node)  # type: ignore[return-value]

    def call(self, node: Any, build: Any) -> Any:
        """The call of a formula that computes `node`, or `node` with its parts replaced."""
        tree = _Tree(self)
        build(tree)
        if tree.operations < FEWEST:
            return self.generic_visit(node)
        formula = _formula(tuple(tree.steps))
        name = f".{id(formula)}"  # no name of the source
        self.scope[name] = formula
        arguments = [a if isinstance(a, ast.Name) else self.visit(a) for a in tree.arguments]
        callee = ast.copy_location(ast.Name(name, ast.Load()), node)
        return ast.copy_location(ast.Call(callee, arguments, []), node)


class _Tree:
    """The steps of a formula, as they are found."""

    def __init__(self, owner: _Rewriting) -> None:
        self.scope: Mapping[str, object] = owner.scope
        self.locals = owner.locals
        self.steps: list[_Step] = []
        self.arguments: list[ast.expr] = []
        self.names: dict[str, int] = {}
        self.operations = 0

    def add(self, node: ast.expr) -> int:
        """The step that computes `node`."""
        number = _number(node)
        if number is not None:
            return self.step("number", number)
        match node:
            case ast.Name(id=name) if name in self.locals:
                if name not in self.names:
                    self.names[name] = self.argument(node)
                return self.names[name]
            case ast.Name(id=name) if isinstance(self.scope.get(name), float):
                return self.step("number", self.scope[name])
            case ast.BinOp(left, op, right):
                return self.operation(_OPERATORS.get(type(op)), (left, right), node)
            case ast.UnaryOp(op, operand):
                return self.operation(_OPERATORS.get(type(op)), (operand,), node)
            case ast.Compare(left, [op], [right]):
                return self.operation(_OPERATORS.get(type(op)), (left, right), node)
            case ast.Subscript(buffer, place) if not isinstance(place, ast.Slice | ast.Tuple):
                return self.operation(operator.getitem, (buffer, place), node)
            case ast.Call(ast.Name(id=name), operands, []) if name not in self.locals:
                known = self.scope.get(name)
                key = known if isinstance(known, Operation) else None
                return self.operation(key, tuple(operands), node)
        return self.argument(node)

    def operation(
        self, key: Any, operands: Sequence[ast.expr], node: ast.expr | None = None
    ) -> int:
        if key is None or any(isinstance(x, ast.Starred) for x in operands):
            assert node is not None
            return self.argument(node)
        self.operations += 1
        return self.step("operation", key, tuple(self.add(x) for x in operands))

    def argument(self, node: ast.expr) -> int:
        self.arguments.append(node)
        return self.step("argument", len(self.arguments) - 1)

    def step(self, *step: Any) -> int:
        if step[0] == "number":  # for Python 1 and 1.0 are equal, as are 0.0 and -0.0
            step = (*step, type(step[1]), math.copysign(1.0, step[1]))
        self.steps.append(step)
        return len(self.steps) - 1


def _number(node: ast.expr) -> int | float | None:
    """The value of a literal, or of what Python computes of literals when it compiles."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(ast.USub(), operand):
            inner = _number(operand)
            return None if inner is None else -inner
        case ast.BinOp(left, ast.Add() | ast.Sub() | ast.Mult() as op, right):
            a, b = _number(left), _number(right)
            if isinstance(a, int) and isinstance(b, int):
                value = _OPERATORS[type(op)](a, b)
                assert isinstance(value, int)
                return value
    return None
