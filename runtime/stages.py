"""Static analysis of a plan: stages, storage, and one generated function per stage for its numbers.

A stage is a run of steps whose sizes are all known when it begins. Sizes read from inputs belong to
the first stage; a host step that defines sizes ends its stage. Everything of a stage that depends
on sizes is listed as an expression in one flat table, each distinct one once; `Stage.evaluate`
fills it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from onnxjit.runtime.memory import ArenaLayout
from onnxjit.runtime.plan import (
    KINDS,
    Buffer,
    Dim,
    Expression,
    HostStep,
    Plan,
    PlanError,
    Step,
    names_of,
)


class Table:
    """Distinct expressions.

    `evaluate` gives their values as an int64 array for values of the sizes.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self._known = frozenset(known)
        self._index: dict[Expression, int] = {}
        self._template: np.ndarray | None = None
        self._code: Callable[..., tuple[int, ...]] | None = None
        self._where = np.zeros(0, np.intp)

    def add(self, expression: Expression) -> int:
        """Position of an expression's value. Raises `PlanError` if it reads an unknown size."""
        at = self._index.get(expression)
        if at is None:
            unknown = names_of(expression) - self._known
            if unknown:
                raise PlanError(f"{expression!r} reads {sorted(unknown)} before they are known")
            at = self._index[expression] = len(self._index)
        return at

    def add_all(self, expressions: Iterable[Expression]) -> np.ndarray:
        return np.array([self.add(e) for e in expressions], np.intp)

    def freeze(self, dims: Sequence[str]) -> None:
        """End of additions; `evaluate` then takes values of `dims` in this order."""
        symbolic = [e for e in self._index if isinstance(e, str)]
        self._template = np.array([0 if isinstance(e, str) else e for e in self._index], np.int64)
        self._where = np.array([self._index[e] for e in symbolic], np.intp)
        if symbolic:
            self._code = _function(symbolic, dims)

    def evaluate(self, dims: Sequence[int]) -> np.ndarray:
        assert self._template is not None
        if self._code is None:
            return self._template
        values = self._template.copy()
        values[self._where] = self._code(*dims)
        return values


_TOKEN = re.compile(r"[()]|[^()]+")


def _function(expressions: Sequence[str], dims: Sequence[str]) -> Callable[..., tuple[int, ...]]:
    """The values of expressions as a function of sizes, which computes equal parts once: they say
    the same over and over, and Python takes longer to compile them than to compute them.

    `names_of` has admitted nothing but arithmetic over generated names.
    """
    parts: dict[str, str] = {}
    outer: list[str] = []
    text = ""
    for token in _TOKEN.findall("".join(f"{e}," for e in expressions)):
        if token == "(":
            outer.append(text)
            text = ""
        elif token == ")":
            part, text = f"({text})", outer.pop()
            if text.endswith(("min", "max")):
                part, text = text[-3:] + part, text[:-3]
            text += parts.setdefault(part, f"t{len(parts)}")
        else:
            text += token
    lines = [f"def sizes({','.join(dims)}):", *(f" {name}={part}" for part, name in parts.items())]
    scope: dict[str, Any] = {"min": min, "max": max}
    exec("\n".join([*lines, f" return ({text})"]), scope)
    function: Callable[..., tuple[int, ...]] = scope["sizes"]
    return function


class Part(NamedTuple):
    """Consecutive native steps [begin, end) of a stage's step table, or one host step."""

    begin: int
    end: int
    host: HostStep | None = None


class Stage:
    """The native steps and host steps between two points where sizes become known."""

    def __init__(
        self, plan: Plan, storage: Storage, known: list[Dim], begin: int, end: int
    ) -> None:
        self.dims = [d.name for d in known]
        items = plan.steps[begin:end]
        self.steps = [s for s in items if isinstance(s, Step)]
        self.parts = _parts(items)
        table = self.table = Table(self.dims)
        add = table.add_all
        self.arena = [
            b for b, (first, _) in storage.lives.items()
            if plan.buffers[b].kind == "arena" and begin <= first < end
        ]  # fmt: skip
        lives = [storage.lives[b] for b in self.arena]
        self.layout = ArenaLayout([f for f, _ in lives], [last for _, last in lives])
        self.arena_bytes = add(plan.buffers[b].nbytes for b in self.arena)
        place = {b: i for i, b in enumerate(self.arena)}
        self.extents = np.array(
            [
                (place[root], table.add(offset), table.add(plan.buffers[b].nbytes))
                for b, (root, offset) in storage.roots.items()
                if root in place and b != root
            ],
            np.intp,
        ).reshape(-1, 3)

        uses = [b for step in self.steps for b in step.buffers]
        self.use_root = np.array([storage.roots[b][0] for b in uses], np.intp)
        self.use_offset = add(storage.roots[b][1] for b in uses)
        counts = [len(s.buffers) for s in self.steps]
        self.first_use = np.cumsum([0, *counts])[:-1]
        self.ints = add(e for s in self.steps for e in s.ints)
        self.first_int = np.cumsum([0, *(len(s.ints) for s in self.steps)])[:-1]
        self.tiles = add(s.tiles for s in self.steps)
        self.scratch = add({s.scratch: None for s in self.steps})
        self.flops = add(s.flops for s in self.steps)
        self.bytes = add(s.bytes for s in self.steps)
        self.rounds = add(s.rounds for s in self.steps)

        # Roots whose address is only known when a run is under way, with the uses of each.
        fixed = {*self.arena, *(i for i, b in enumerate(plan.buffers) if b.kind == "constant")}
        outside = [*storage.inputs, *storage.outputs]
        outside += [r for r in dict.fromkeys(self.use_root.tolist()) if r not in fixed]
        self.outside = list(dict.fromkeys(outside))
        self.outside_uses = {r: np.flatnonzero(self.use_root == r) for r in self.outside}

        wanted = {b for p in self.parts if p.host for b in p.host.inputs if b >= 0}
        self.new_outputs = [b for b in storage.outputs if storage.stage_of_output(b, begin, end)]
        wanted.update(self.new_outputs)
        if end == len(plan.steps):
            wanted.update(b for b in plan.outputs if not _object(plan.buffers[b]))
        if begin == 0:
            wanted.update(storage.inputs)
        self.shapes = {
            b: add(plan.buffers[b].shape or ())
            for b in sorted(wanted)
            if plan.buffers[b].kind != "host" or plan.buffers[b].alias is not None
        }
        self.offsets = {b: table.add(storage.roots[b][1]) for b in self.shapes}
        for b in self.shapes:
            if plan.buffers[b].shape is None and not _object(plan.buffers[b]):
                raise PlanError(f"buffer {b} needs a shape: a host step or the caller sees it")
        self.checks = [c for c in plan.checks if _stage_of(c, known, begin, storage) == begin]
        self.check_left = add(c.left for c in self.checks)
        self.check_right = add(c.right for c in self.checks)
        table.freeze(self.dims)


class Storage:
    """Which buffer owns the bytes of each buffer, from where, and from which to which step."""

    def __init__(self, plan: Plan) -> None:
        self.inputs = [b for b in plan.inputs]
        self.outputs = [
            i for i, b in enumerate(plan.buffers) if b.kind == "output" and b.alias is None
        ]
        self.roots: dict[int, tuple[int, Expression]] = {}
        self.starts: list[int] = []
        self.dim_stage: dict[str, int] = {}
        for i, buffer in enumerate(plan.buffers):
            if buffer.kind not in KINDS:
                raise PlanError(f"buffer {i} is of no known kind: {buffer.kind!r}")
            self.roots[i] = self._root(plan, i)
        for b in plan.inputs:
            if plan.buffers[b].kind != "input" or plan.buffers[b].alias is not None:
                raise PlanError(f"buffer {b} is listed as an input but is {plan.buffers[b].kind}")
        self.lives = self._lives(plan)

    def _root(self, plan: Plan, buffer: int) -> tuple[int, Expression]:
        offset: Expression = 0
        for _ in plan.buffers:
            alias = plan.buffers[buffer].alias
            if alias is None:
                return buffer, offset
            if offset == 0:
                offset = alias.offset
            elif alias.offset != 0:
                both = isinstance(offset, int) and isinstance(alias.offset, int)
                offset = offset + alias.offset if both else f"({offset})+({alias.offset})"  # type: ignore[operator]
            buffer = alias.buffer
        raise PlanError(f"the aliases of buffer {buffer} form a ring")

    def _lives(self, plan: Plan) -> dict[int, tuple[int, int]]:
        lives: dict[int, tuple[int, int]] = {}
        for at, step in enumerate(plan.steps):
            used = step.buffers if isinstance(step, Step) else (*step.inputs, *step.outputs)
            for b in filter(lambda b: b >= 0, used):
                root = self.roots[b][0]
                first, _ = lives.get(root, (at, at))
                lives[root] = (first, at)
        for b in plan.outputs:
            root = self.roots[b][0]
            if plan.buffers[root].kind == "arena":
                if root not in lives:
                    raise PlanError(f"output {b} is never written")
                lives[root] = (lives[root][0], len(plan.steps))
        return lives

    def stage_of_output(self, buffer: int, begin: int, end: int) -> bool:
        """Whether an output array is made in the stage of steps [begin, end)."""
        first = self.lives.get(buffer, (max(self.starts, default=0),))[0]
        return begin <= first < max(end, begin + 1)


def stages_of(plan: Plan) -> tuple[Storage, list[Stage]]:
    """A plan's stages in order. Raises `PlanError` where the plan contradicts itself."""
    storage = Storage(plan)
    for i, dim in enumerate(plan.dims):
        if dim.name != f"d{i}":
            raise PlanError(f"size {i} is called {dim.name!r}, not 'd{i}'")
    from_inputs = [d for d in plan.dims if plan.buffers[d.source.buffer].kind == "input"]
    cuts: list[tuple[int, list[Dim]]] = [(0, from_inputs)]
    for at, step in enumerate(plan.steps):
        if isinstance(step, HostStep):
            defined = [d for d in plan.dims if d.source.buffer in step.outputs]
            if defined:
                cuts.append((at + 1, cuts[-1][1] + defined))
    missing = {d.name for d in plan.dims} - {d.name for d in cuts[-1][1]}
    if missing:
        raise PlanError(f"no input or host step defines {sorted(missing)}")
    storage.starts = [at for at, _ in cuts]
    for at, known in reversed(cuts):
        storage.dim_stage.update({d.name: at for d in known})
    ends = [*storage.starts[1:], len(plan.steps)]
    return storage, [
        Stage(plan, storage, known, begin, end)
        for (begin, known), end in zip(cuts, ends, strict=True)
    ]


def _parts(items: Sequence[Step | HostStep]) -> list[Part]:
    parts: list[Part] = []
    native = begin = 0
    for step in items:
        if isinstance(step, Step):
            native += 1
            continue
        if native > begin:
            parts.append(Part(begin, native))
        parts.append(Part(native, native, step))
        begin = native
    if native > begin:
        parts.append(Part(begin, native))
    return parts


def _object(buffer: Buffer) -> bool:
    return buffer.dtype == "object"


def _stage_of(check, known: list[Dim], begin: int, storage: Storage) -> int:
    names = names_of(check.left) | names_of(check.right)
    if not names <= {d.name for d in known}:
        return -1
    return max((storage.dim_stage[n] for n in names), default=0)
