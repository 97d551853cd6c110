"""Fusion by substitution: index maps and elementwise work move into the kernels around them.

Calls are visited in execution order; each one first takes in its producers that are pure index
functions, then, when it is elementwise itself, becomes the epilogue of a producer that reduces.
"""

from __future__ import annotations

from collections.abc import Callable

from onnxjit.codegen.expr import (
    INDEX,
    ONE,
    ZERO,
    Apply,
    Axis,
    Const,
    Expr,
    Load,
    Reduce,
    as_int,
    axes_of,
    loads,
    map_loads,
    poly_terms,
    substitute,
    walk,
)
from onnxjit.codegen.kernel import (
    Kernel,
    Stage,
    inline,
    product,
    stored,
    used_inputs,
)
from onnxjit.codegen.schedule import Declined
from onnxjit.codegen.schedule.axes import typical
from onnxjit.codegen.schedule.recognised import Recogniser
from onnxjit.codegen.schedule.row_stages import align_rows
from onnxjit.codegen.target import Target
from onnxjit.program import Call, KernelCall, Program

LARGEST = 400
"""Most nodes of a fused expression: bounds compile time."""

DEEPEST = 100
"""Most levels of a fused expression: printers and rewriters recurse over it."""

MOST_BUFFERS = 24
MOST_STAGES = 12


def fuse(p: Program, target: Target) -> Program:
    """Merges kernels where that saves a pass over memory and duplicates no real work."""
    return _Fusion(p, target).program()


class _Fusion:
    def __init__(self, p: Program, target: Target) -> None:
        self.p, self.target = p, target
        self.calls: list[Call | None] = list(p.calls)
        self.maker: dict[str, int] = {}
        self.users: dict[str, set[int]] = {}
        self.outputs = set(p.outputs)
        self.recogniser = Recogniser(target, frozenset(p.constants))
        for k, c in enumerate(p.calls):
            for v in c.outputs:
                self.maker[v] = k
            for v in c.inputs:
                if v:
                    self.users.setdefault(v, set()).add(k)

    def program(self) -> Program:
        for k in range(len(self.calls)):
            c = self.calls[k]
            if isinstance(c, KernelCall) and c.kernel.clock is None:
                self.absorb(k)
                self.epilogue(k)
                while self.join_rows(k):
                    self.absorb(k)
        return self.p.replace(calls=tuple(c for c in self.calls if c is not None))

    # --- bookkeeping --------------------------------------------------------------------------

    def kernel(self, k: int) -> Kernel:
        c = self.calls[k]
        assert isinstance(c, KernelCall)
        return c.kernel

    def set(self, k: int, kernel: Kernel, origin: tuple[str, ...]) -> None:
        old = self.calls[k]
        if old is not None:
            for v in old.inputs:
                self.users.get(v, set()).discard(k)
        for v in kernel.inputs:
            self.users.setdefault(v, set()).add(k)
        for v in kernel.outputs:
            self.maker[v] = k
        self.calls[k] = KernelCall(kernel, origin)

    def drop_if_unused(self, k: int) -> None:
        c = self.calls[k]
        if c is None or any(self.users.get(v) or v in self.outputs for v in c.outputs):
            return
        self.calls[k] = None
        for v in c.inputs:
            self.users.get(v, set()).discard(k)

    def producer(self, v: str) -> int | None:
        """The call of a kernel, but no recurrence, that makes `v`."""
        k = self.maker.get(v)
        c = self.calls[k] if k is not None else None
        return k if isinstance(c, KernelCall) and c.kernel.clock is None else None

    def only_user(self, v: str, k: int) -> bool:
        return v not in self.outputs and self.users.get(v, set()) == {k}

    # --- producers into their reader ----------------------------------------------------------

    def absorb(self, k: int) -> None:
        tried: set[str] = set()
        while True:
            kernel = self.kernel(k)
            v = next(
                (b for b in kernel.inputs if b not in tried and self.producer(b) is not None), None
            )
            if v is None:
                return
            tried.add(v)
            source = self.producer(v)
            assert source is not None
            merged = self.merged(k, v, source)
            if merged is None:
                continue
            c, s = self.calls[k], self.calls[source]
            assert c is not None and s is not None
            self.set(k, merged, (*s.origin, *c.origin))
            self.drop_if_unused(source)
            tried.clear()

    def merged(self, k: int, v: str, source: int) -> Kernel | None:
        """The kernel of call `k` with the producer of `v` taken in, or None."""
        reader, maker = self.kernel(k), self.kernel(source)
        if not maker.is_map:
            return None
        stage = maker.stages[0]
        moves = is_movement(stage.value)
        if not moves and not self.only_user(v, k):
            return None
        if moves and has_data_index(stage.value) and not self.only_user(v, k):
            return None
        reads = [(s, x) for s in reader.stages for x in loads(s.value) if x.buffer == v]
        if any(x.buffer == v for s in reader.stages for i in s.index for x in loads(i)):
            return None
        if reader.is_map or not any(s.reduces for s in reader.stages):
            if not moves and self.expands(maker, reader, reads):
                return None
            return limited(substituted(reader, stage, maker))
        if len(reader.stages) == 1 or is_window(reader):
            return self.into_reduction(reader, maker, reads, moves)
        if moves or (len(reads) == 1 and not self.expands(maker, reader, reads)):
            return limited(substituted(reader, stage, maker))
        return self.as_row_stage(reader, maker, v)

    def expands(self, maker: Kernel, reader: Kernel, reads: list[tuple[Stage, Load]]) -> bool:
        """Whether substitution would evaluate non-trivial work more often than once an element."""
        made = typical(maker.types[maker.outputs[0]].elements)
        work = weight(maker.stages[0].value)
        if work <= 2:
            return False
        return any(typical(product(a.extent for a in s.axes)) > 2 * made for s, _ in reads)

    def into_reduction(
        self, reader: Kernel, maker: Kernel, reads: list[tuple[Stage, Load]], moves: bool
    ) -> Kernel | None:
        product_of_two = self.recogniser.operands(reader, {}) is not None
        new = limited(substituted(reader, maker.stages[0], maker))
        if new is None:
            return None
        if product_of_two:
            if not moves:
                return None
            return new if self.recogniser.operands(new, {}) is not None else None
        points = max(
            typical(
                product(
                    [*(a.extent for a in s.axes), *(a.extent for r in s.reduces for a in r.axes)]
                )
            )
            for s, _ in reads
        )
        made = typical(maker.types[maker.outputs[0]].elements)
        if moves:
            # A window reads each element several times: only where that stays as cheap.
            return new if points <= 2 * made or is_simple(maker.stages[0].value) else None
        return new if len(reads) == 1 and points <= 2 * made else None

    def as_row_stage(self, reader: Kernel, maker: Kernel, v: str) -> Kernel | None:
        """Takes in a producer that several stages read, as a stage of its own local to the row."""
        stages = (maker.stages[0], *reader.stages)
        types = {**maker.types, **reader.types}
        try:
            rows, _ = align_rows(stages, set(reader.outputs))
        except Declined:
            return None
        if not any(a.extent is not ONE for a in rows) and typical(product(types[v].shape)) > 65536:
            return None
        candidates = tuple(b for b in dict.fromkeys((*maker.inputs, *reader.inputs)) if b != v)
        return Kernel(reader.name, used_inputs(stages, candidates), reader.outputs, stages, types)

    # --- elementwise work into the kernel before it --------------------------------------------

    def epilogue(self, k: int) -> None:
        kernel = self.kernel(k)
        if not kernel.is_map:
            return
        found = sorted(
            (s for b in kernel.inputs if (s := self.producer(b)) is not None), reverse=True
        )
        for source in found:
            maker = self.kernel(source)
            if len(maker.outputs) != 1 or not self.only_user(maker.outputs[0], k):
                continue
            if not any(s.reduces for s in maker.stages):
                continue
            if sum(s.buffer == maker.outputs[0] for s in maker.stages) > 1:
                continue
            new = with_epilogue(maker, kernel) or self.row_epilogue(maker, kernel)
            if new is None:
                continue
            reader, writer = self.calls[k], self.calls[source]
            assert reader is not None and writer is not None
            self.set(k, new, (*writer.origin, *reader.origin))
            self.drop_if_unused(source)
            return

    def row_epilogue(self, maker: Kernel, kernel: Kernel) -> Kernel | None:
        """`y = f(x, reduce(x))`: the reduction and its elementwise reader as one row kernel."""
        if is_window(maker):
            return None
        final = maker.stages[-1]
        reader = kernel.stages[0]
        if maker.outputs[0] not in {x.buffer for x in loads(reader.value)} or final.index:
            return None
        if not reader.axes or typical(maker.types[final.buffer].elements) < 2:
            return None
        if self.recogniser.operands(maker, {}) is not None:
            return None
        if len(maker.stages) == 1 and not _reduces_last(maker):
            return None
        stages = (*maker.stages, reader)
        try:
            rows, _ = align_rows(stages, {reader.buffer})
        except Declined:
            return None
        last = reader.axes[-1]
        if last in rows or not any(a.extent is not ONE for a in rows):
            return None
        types = {**maker.types, **kernel.types}
        candidates = tuple(
            b for b in dict.fromkeys((*maker.inputs, *kernel.inputs)) if b != final.buffer
        )
        if len(candidates) > MOST_BUFFERS:
            return None
        return Kernel(kernel.name, used_inputs(stages, candidates), kernel.outputs, stages, types)

    # --- two row kernels into one ---------------------------------------------------------------

    def join_rows(self, k: int) -> bool:
        """Takes in a row kernel that only this row kernel reads, where both have the same rows."""
        kernel = self.kernel(k)
        if not self.is_rows(kernel):
            return False
        for v in kernel.inputs:
            source = self.producer(v)
            if source is None or not self.only_user(v, k):
                continue
            maker = self.kernel(source)
            if len(maker.outputs) != 1 or not self.is_rows(maker):
                continue
            stages = (*maker.stages, *kernel.stages)
            types = {**maker.types, **kernel.types}
            candidates = dict.fromkeys((*maker.inputs, *kernel.inputs))
            inputs = used_inputs(stages, (b for b in candidates if b != v))
            if len(inputs) > MOST_BUFFERS or len(stages) > MOST_STAGES:
                continue
            rows = row_count(stages, kernel)
            if rows is None or rows is not row_count(kernel.stages, kernel):
                continue
            if rows is not row_count(maker.stages, maker):
                continue
            reader, writer = self.calls[k], self.calls[source]
            assert reader is not None and writer is not None
            merged = Kernel(kernel.name, inputs, kernel.outputs, stages, types)
            self.set(k, merged, (*writer.origin, *reader.origin))
            self.drop_if_unused(source)
            return True
        return False

    def is_rows(self, kernel: Kernel) -> bool:
        if len(kernel.stages) < 2 or is_window(kernel) or any(s.index for s in kernel.stages):
            return False
        reduces = any(s.reduces for s in kernel.stages)
        return reduces and self.recogniser.operands(kernel, {}) is None


def row_count(stages: tuple[Stage, ...], kernel: Kernel) -> Expr | None:
    """How many rows the stages share; None when they share none."""
    try:
        rows, _ = align_rows(stages, set(kernel.outputs))
    except Declined:
        return None
    return product(a.extent for a in rows) if rows else None


def _reduces_last(maker: Kernel) -> bool:
    """Whether the reduction runs over the contiguous axis of what it reads (row-major)."""
    for red in maker.stages[-1].reduces:
        for x in loads(red.body):
            if x.index and set(red.axes) & axes_of(x.index[-1]):
                return True
    return False


def is_movement(e: Expr) -> bool:
    """A plain read: the operator only re-indexes."""
    return isinstance(e, Load | Const)


def is_simple(e: Expr) -> bool:
    """A read whose every index is a constant or one axis plus a constant."""
    if not isinstance(e, Load):
        return isinstance(e, Const)
    for i in e.index:
        terms = [t for t in poly_terms(i).items() if t[0]]
        if len(terms) > 1 or any(c != 1 or not isinstance(a[0], Axis) for a, c in terms):
            return False
    return True


def has_data_index(e: Expr) -> bool:
    return isinstance(e, Load) and any(loads(i) for i in e.index)


def is_window(k: Kernel) -> bool:
    """A contraction that reads a padded copy of its input."""
    return len(k.stages) == 2 and not k.stages[0].reduces and k.stages[0].buffer.startswith("pad")


def weight(e: Expr) -> int:
    """Work of one evaluation, functions weighted by their cost."""
    from onnxjit.codegen.scalar_functions import FUNCTIONS

    total = 0
    for x in walk(e):
        if isinstance(x, Apply) and x.dtype != INDEX:
            total += FUNCTIONS[x.fn].cost
        elif isinstance(x, Reduce):
            total += 1000
    return total


def substituted(reader: Kernel, stage: Stage, maker: Kernel) -> Kernel:
    """Every read of the stage's buffer replaced by the stage's value."""
    stages = tuple(Stage(s.buffer, s.axes, inline(s.value, stage), s.index) for s in reader.stages)
    types = {**maker.types, **reader.types}
    candidates = tuple(
        b for b in dict.fromkeys((*reader.inputs, *maker.inputs)) if b != stage.buffer
    )
    return Kernel(reader.name, used_inputs(stages, candidates), reader.outputs, stages, types)


def limited(k: Kernel) -> Kernel | None:
    if len(k.inputs) > MOST_BUFFERS:
        return None
    for s in k.stages:
        if sum(1 for _ in walk(s.value)) > LARGEST or depth(s.value) > DEEPEST:
            return None
    return k


def depth(e: Expr) -> int:
    """Levels of an expression."""
    memo: dict[Expr, int] = {}

    def go(x: Expr) -> int:
        if x not in memo:
            memo[x] = 1 + max(map(go, x.kids), default=0)
        return memo[x]

    return go(e)


def with_epilogue(maker: Kernel, kernel: Kernel) -> Kernel | None:
    """The maker with the elementwise kernel applied to each element as it is stored."""
    final, reader = maker.stages[-1], kernel.stages[0]
    reads = {x for x in loads(reader.value) if x.buffer == final.buffer}
    if len(reads) != 1:
        return None
    (read,) = reads
    varying = [i for i in read.index if as_int(i) != 0]
    axes = [a for a in reader.axes if a.extent is not ONE]
    if len(set(varying)) != len(varying) or set(varying) != set(axes):
        return None
    if not all(isinstance(i, Axis) for i in varying):
        return None
    shape = maker.types[final.buffer].shape
    for d, i in zip(shape, read.index, strict=True):
        if d is not (i.extent if isinstance(i, Axis) else ONE):
            return None
    # The reader in terms of the maker's axes: its axis at position p is what the maker stores to p.
    table: dict[Expr, Expr] = {a: ZERO for a in reader.axes if a.extent is ONE}
    table.update(
        {i: w for i, w in zip(read.index, final.store, strict=True) if isinstance(i, Axis)}
    )
    put: Callable[[Load], Expr | None] = lambda x: final.value if x is inner else None  # noqa: E731
    inner = substitute(read, table)
    value = map_loads(substitute(reader.value, table), put)
    index = tuple(substitute(a, table) for a in reader.axes)
    merged = stored(reader.buffer, final.axes, value, index)
    stages = (*maker.stages[:-1], merged)
    types = {**maker.types, **kernel.types}
    candidates = tuple(
        b for b in dict.fromkeys((*maker.inputs, *kernel.inputs)) if b != final.buffer
    )
    new = Kernel(kernel.name, used_inputs(stages, candidates), kernel.outputs, stages, types)
    return limited(new)


__all__ = ["fuse"]
