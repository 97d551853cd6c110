"""Numba's typed IR -> LLVM IR, without what Numba does for Python objects and for debuggers.

Numba keeps every variable that is used in two blocks in a stack slot. Here one with a single
definition, in front of all its uses, is an LLVM value, or whatever else an emitter returns for it,
as the parts of a range. That is half the IR to print, to parse and to optimise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llvmlite import ir
from numba.core import ir as numba_ir
from numba.core.errors import LoweringError, new_error_context
from numba.core.lowering import Lower


class Lowering(Lower):
    """Lowers one function; `lower` fills the module of its library."""

    def _find_singly_assigned_variable(self) -> None:
        self._single = single_definitions(self.func_ir.blocks)
        self._values: dict[str, Any] = {}

    def lower_block(self, block: numba_ir.Block) -> None:
        for inst in block.body:
            self.loc = inst.loc
            try:
                self.lower_inst(inst)
            except Exception:
                with new_error_context(
                    'lowering "{inst}" at {loc}', inst=inst, loc=inst.loc, errcls_=LoweringError
                ):
                    raise

    def lower_inst(self, inst: Any) -> None:
        """Assignments without Numba's traces, for which it prints every instruction."""
        if not isinstance(inst, numba_ir.Assign):
            super().lower_inst(inst)
            return
        name = inst.target.name
        value = self.lower_assign(self.typeof(name), inst)
        if name in self._single:
            self._values[name] = value
        else:
            self.builder.store(value, self._slot(name))

    def loadvar(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        return self.builder.load(self._slot(name))

    def _slot(self, name: str) -> ir.Instruction:
        if name not in self.varmap:
            try:
                type_ = self.context.get_value_type(self.typeof(name))
            except KeyError:
                known = f"{self.typeof(name)} can have one definition only"
                raise TypeError(f"a variable that is {known}") from None
            with self.builder.goto_entry_block():
                self.varmap[name] = slot = self.builder.alloca(type_, name=name)
                self.builder.store(ir.Constant(type_, None), slot)
        return self.varmap[name]


def single_definitions(blocks: Mapping[int, numba_ir.Block]) -> set[str]:
    """The variables with one assignment, which comes before all uses on every way to them, and in
    the order in which blocks are lowered."""
    places: dict[str, tuple[int, int]] = {}
    excluded: set[str] = set()
    for offset, block in blocks.items():
        for n, inst in enumerate(block.body):
            if isinstance(inst, numba_ir.Assign):
                name = inst.target.name
                if name in places:
                    excluded.add(name)
                places[name] = offset, n
    above = dominators(blocks)
    for offset, block in blocks.items():
        for n, inst in enumerate(block.body):
            for name in _used(inst):
                home, position = places.get(name, (-1, 0))
                early = position < n if home == offset else home < offset
                if not (early and home in above[offset]):
                    excluded.add(name)
    return places.keys() - excluded


def _used(inst: Any) -> Iterator[str]:
    value = inst.value if isinstance(inst, numba_ir.Assign) else inst
    if isinstance(value, numba_ir.Var):
        yield value.name
    elif isinstance(value, numba_ir.Expr | numba_ir.Stmt):
        for variable in value.list_vars():
            yield variable.name


def dominators(blocks: Mapping[int, numba_ir.Block]) -> dict[int, set[int]]:
    """The blocks on every way from the first to each one, itself among them.

    Source: Aho, Lam, Sethi, Ullman, Compilers, 2nd edition, algorithm 9.38.
    """
    order = sorted(blocks)
    before: dict[int, list[int]] = {offset: [] for offset in order}
    for offset in order:
        for target in blocks[offset].terminator.get_targets():
            before[target].append(offset)
    result = {offset: set(order) for offset in order}
    result[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for offset in order[1:]:
            new = {offset}.union(set.intersection(*(result[b] for b in before[offset])))
            if new != result[offset]:
                result[offset], changed = new, True
    return result
