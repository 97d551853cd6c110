"""Compiles functions over 64-bit words: a few lines of Python syntax straight to LLVM IR.

The language of the plan executor, which must be there before any model can run: going through
Numba would cost seconds. Every value is an int64 (a truth value is 0 or 1), addresses included.
There are assignments, `if`, `while`, `for ... in range(...)`, `break`, `continue`, `return`,
integer arithmetic, comparisons, `and`, `or`, `not`, `min`, calls of functions of the same text and
of `operations`, and constants of the module. Anything else is a SyntaxError.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from llvmlite import ir

I1, I64 = ir.IntType(1), ir.IntType(64)

Operation = Callable[..., ir.Value | None]
"""Emits the IR of a call: builder and argument values in, the result or None out."""

_BINARY = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.BitAnd: "and_", ast.BitOr: "or_",
    ast.BitXor: "xor", ast.LShift: "shl", ast.RShift: "ashr",
}  # fmt: skip
_COMPARE = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
}  # fmt: skip


def compile_words(
    source: str,
    symbols: Mapping[str, str],
    operations: Mapping[str, Operation],
    triple: str,
) -> ir.Module:
    """A module with the functions of `source`: those in `symbols` (name -> C symbol) are external
    and take and return int64, the others are internal. Raises SyntaxError."""
    tree = ast.parse(source)
    module = ir.Module(name="words")
    module.triple = triple
    constants: dict[str, int] = {}
    bodies: dict[str, tuple[ast.FunctionDef, ir.Function]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            arity = len(node.args.args)
            kind = ir.FunctionType(I64, [I64] * arity)
            function = ir.Function(module, kind, symbols.get(node.name, f"words.{node.name}"))
            function.attributes.add("nounwind")
            if node.name not in symbols:
                function.linkage = "internal"
            bodies[node.name] = node, function
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = int(ast.literal_eval(node.value))
        elif not _is_docstring(node):
            _refuse(node)
    missing = symbols.keys() - bodies.keys()
    if missing:
        raise SyntaxError(f"the source does not define {sorted(missing)}")
    functions = {name: function for name, (_, function) in bodies.items()}
    for node, function in bodies.values():
        _Function(node, function, constants, functions, operations).compile()
    return module


class _Function:
    """One function on its way to IR: variables live in memory, which LLVM turns into registers."""

    def __init__(
        self,
        node: ast.FunctionDef,
        function: ir.Function,
        constants: Mapping[str, int],
        functions: Mapping[str, ir.Function],
        operations: Mapping[str, Operation],
    ) -> None:
        self.node = node
        self.constants = constants
        self.functions = functions
        self.operations = operations
        self.entry = function.append_basic_block("entry")
        self.function = function
        self.builder = ir.IRBuilder(function.append_basic_block("body"))
        self.slots: dict[str, ir.Value] = {}
        self.loops: list[tuple[ir.Block, ir.Block]] = []  # (after an iteration, after the loop)

    def compile(self) -> None:
        for argument, value in zip(self.node.args.args, self.function.args, strict=True):
            self.builder.store(value, self.slot(argument.arg))
        self.block(self.node.body)
        if not self.builder.block.is_terminated:
            self.builder.ret(I64(0))
        ir.IRBuilder(self.entry).branch(self.function.blocks[1])

    def slot(self, name: str) -> ir.Value:
        if name not in self.slots:
            self.slots[name] = ir.IRBuilder(self.entry).alloca(I64, name=name)
        return self.slots[name]

    def block(self, statements: list[ast.stmt]) -> None:
        for node in statements:
            if self.builder.block.is_terminated:
                _refuse(node)
            self.statement(node)

    def statement(self, node: ast.stmt) -> None:
        b = self.builder
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                b.store(self.word(value), self.slot(name))
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                old = b.load(self.variable(node, name))
                b.store(self.binary(node, op, old, self.word(value)), self.slot(name))
            case ast.Return(value=value):
                b.ret(I64(0) if value is None else self.word(value))
            case ast.Expr(value=ast.Call() as call):
                self.call(call)
            case ast.If():
                self.choose(node)
            case ast.While(test=test, body=body, orelse=[]):
                self.loop(lambda: self.truth(test), body, lambda: None)
            case ast.For(
                target=ast.Name(id=name),
                iter=ast.Call(func=ast.Name(id="range"), args=args, keywords=[]),
                body=body,
                orelse=[],
            ):
                self.count(name, args, body)
            case ast.Break() if self.loops:
                b.branch(self.loops[-1][1])
            case ast.Continue() if self.loops:
                b.branch(self.loops[-1][0])
            case _:
                if not _is_docstring(node):
                    _refuse(node)

    def choose(self, node: ast.If) -> None:
        b = self.builder
        then, otherwise, after = (self.function.append_basic_block() for _ in range(3))
        b.cbranch(self.truth(node.test), then, otherwise)
        reached = False
        for block, body in ((then, node.body), (otherwise, node.orelse)):
            b.position_at_end(block)
            self.block(body)
            if not b.block.is_terminated:
                b.branch(after)
                reached = True
        b.position_at_end(after)
        if not reached:
            b.unreachable()

    def loop(
        self, test: Callable[[], ir.Value], body: list[ast.stmt], step: Callable[[], None]
    ) -> None:
        b = self.builder
        head, inside, again, after = (self.function.append_basic_block() for _ in range(4))
        b.branch(head)
        b.position_at_end(head)
        b.cbranch(test(), inside, after)
        b.position_at_end(inside)
        self.loops.append((again, after))
        self.block(body)
        self.loops.pop()
        if not b.block.is_terminated:
            b.branch(again)
        b.position_at_end(again)
        step()
        b.branch(head)
        b.position_at_end(after)

    def count(self, name: str, args: list[ast.expr], body: list[ast.stmt]) -> None:
        b = self.builder
        first = self.word(args[0]) if len(args) == 2 else I64(0)
        last = self.word(args[-1])
        counter = self.slot(f"{name}.{len(self.slots)}")  # the body may change the variable
        b.store(first, counter)
        variable = self.slot(name)

        def test() -> ir.Value:
            value = b.load(counter)
            b.store(value, variable)
            return b.icmp_signed("<", value, last)

        self.loop(test, body, lambda: b.store(b.add(b.load(counter), I64(1)), counter))

    def variable(self, node: ast.AST, name: str) -> ir.Value:
        if name not in self.slots:
            _refuse(node)
        return self.slots[name]

    def word(self, node: ast.expr) -> ir.Value:
        """The value of an expression as an int64."""
        value = self.value(node)
        return self.builder.zext(value, I64) if value.type == I1 else value

    def truth(self, node: ast.expr) -> ir.Value:
        """Whether an expression is not 0, as an i1."""
        value = self.value(node)
        return value if value.type == I1 else self.builder.icmp_signed("!=", value, I64(0))

    def value(self, node: ast.expr) -> ir.Value:
        b = self.builder
        match node:
            case ast.Constant(value=bool() as value):
                return I1(int(value))
            case ast.Constant(value=int() as value):
                return I64(value)
            case ast.Name(id=name) if name in self.slots:
                return b.load(self.slots[name])
            case ast.Name(id=name) if name in self.constants:
                return I64(self.constants[name])
            case ast.BinOp(left=left, op=op, right=right):
                return self.binary(node, op, self.word(left), self.word(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return b.neg(self.word(operand))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return b.not_(self.truth(operand))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                return b.icmp_signed(_COMPARE[type(op)], self.word(left), self.word(right))
            case ast.BoolOp(op=op, values=values):
                return self.short_circuit(isinstance(op, ast.And), values)
            case ast.Call():
                result = self.call(node)
                if result is not None:
                    return result
        _refuse(node)

    def binary(self, node: ast.AST, op: ast.operator, x: ir.Value, y: ir.Value) -> ir.Value:
        b = self.builder
        if type(op) in _BINARY:
            return getattr(b, _BINARY[type(op)])(x, y)
        if isinstance(op, ast.FloorDiv):
            quotient, rest = b.sdiv(x, y), b.srem(x, y)
            below = b.and_(
                b.icmp_signed("!=", rest, I64(0)), b.icmp_signed("<", b.xor(rest, y), I64(0))
            )
            return b.sub(quotient, b.zext(below, I64))
        _refuse(node)

    def short_circuit(self, all_of: bool, values: list[ast.expr]) -> ir.Value:
        b = self.builder
        after = self.function.append_basic_block()
        ends = []
        for node in values[:-1]:
            truth = self.truth(node)
            following = self.function.append_basic_block()
            ends.append(b.block)
            b.cbranch(truth, *((following, after) if all_of else (after, following)))
            b.position_at_end(following)
        last = self.truth(values[-1])
        final = b.block
        b.branch(after)
        b.position_at_end(after)
        phi = b.phi(I1)
        for block in ends:
            phi.add_incoming(I1(int(not all_of)), block)
        phi.add_incoming(last, final)
        return phi

    def call(self, node: ast.Call) -> ir.Value | None:
        b = self.builder
        if not isinstance(node.func, ast.Name) or node.keywords:
            _refuse(node)
        name, args = node.func.id, [self.word(a) for a in node.args]
        if name == "min" and len(args) == 2:
            return b.select(b.icmp_signed("<", *args), *args)
        if name in self.functions and len(args) == len(self.functions[name].args):
            return b.call(self.functions[name], args)
        if name not in self.operations:
            _refuse(node)
        try:
            return self.operations[name](b, *args)
        except TypeError as error:
            raise SyntaxError(f"line {node.lineno}: {name}: {error}") from error


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _refuse(node: Any) -> NoReturn:
    raise SyntaxError(f"line {node.lineno}: not in the language of words: {ast.unparse(node)}")
