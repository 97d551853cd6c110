"""What is computed: a `Kernel` is a list of stages, expressions over indices without loops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from onnxjit.codegen.expr import (
    INDEX,
    ONE,
    ZERO,
    Apply,
    Axis,
    Expr,
    Load,
    Reduce,
    apply,
    as_int,
    fresh_axis,
    index,
    loads,
    map_loads,
    poly_mul,
    rebuild,
    substitute,
    to_text,
    walk,
)
from onnxjit.codegen.scalar_functions import FUNCTIONS, numpy_dtype


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element dtype (NumPy name) and logical shape (int64 expressions over dims)."""

    dtype: str
    shape: tuple[Expr, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def elements(self) -> Expr:
        return product(self.shape)

    @property
    def nbytes(self) -> Expr:
        return poly_mul(self.elements, index(numpy_dtype(self.dtype).itemsize))

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(to_text(d) for d in self.shape)}]"


def product(dims: Iterable[Expr]) -> Expr:
    total: Expr = ONE
    for d in dims:
        total = poly_mul(total, d)
    return total


@dataclass(frozen=True, slots=True)
class Stage:
    """`buffer[index] = value` for all values of `axes`.

    Several stages may write disjoint parts of one buffer (a concatenation); together they cover it.
    """

    buffer: str
    axes: tuple[Axis, ...]
    value: Expr
    index: tuple[Expr, ...] = ()

    @property
    def store(self) -> tuple[Expr, ...]:
        return self.index or self.axes

    @property
    def reduces(self) -> list[Reduce]:
        return [x for x in walk(self.value) if isinstance(x, Reduce)]

    def __str__(self) -> str:
        axes = ", ".join(f"{a.name}<{to_text(a.extent)}" for a in self.axes)
        where = ", ".join(to_text(i) for i in self.store)
        return f"for {axes or '()'}: {self.buffer}[{where}] = {to_text(self.value)}"


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Kernel:
    """Stages in execution order; `types` gives every buffer's type; the rest are temporaries.

    A recurrence has a `clock`: the stages over that axis are computed one after the other at each
    of its values in turn, so that they may read what they or later ones have stored before.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stages: tuple[Stage, ...]
    types: Mapping[str, TensorType] = field(hash=False)
    clock: Axis | None = None

    @property
    def temporaries(self) -> tuple[str, ...]:
        known = {*self.inputs, *self.outputs}
        return tuple(dict.fromkeys(s.buffer for s in self.stages if s.buffer not in known))

    def __str__(self) -> str:
        head = f"kernel {self.name}({', '.join(f'{b}: {self.types[b]}' for b in self.inputs)})"
        outs = ", ".join(f"{b}: {self.types[b]}" for b in self.outputs)
        over = f", over {self.clock.name} in order" if self.clock is not None else ""
        return "\n".join([f"{head} -> {outs}{over}", *(f"  {s}" for s in self.stages)])

    @property
    def is_map(self) -> bool:
        """One stage, no reduction: a pure index function that can be substituted anywhere."""
        (first, *more) = self.stages
        return not more and not first.reduces and not first.index and self.clock is None

    def renamed(self, table: Mapping[str, str]) -> Kernel:
        """The same kernel over other buffer names."""
        if all(k == v for k, v in table.items()):
            return self

        def name(b: str) -> str:
            return table.get(b, b)

        def move(x: Load) -> Expr:
            return Load(name(x.buffer), x.index, x.dtype)

        stages = tuple(
            replace(s, buffer=name(s.buffer), value=map_loads(s.value, move)) for s in self.stages
        )
        types = {name(b): t for b, t in self.types.items()}
        ins = tuple(dict.fromkeys(name(b) for b in self.inputs))
        outs = tuple(name(b) for b in self.outputs)
        return Kernel(self.name, ins, outs, stages, types, self.clock)

    def flops(self) -> Expr:
        """Arithmetic operations (a fused multiply-add counts two, every function one)."""
        total: Expr = index(0)
        for s in self.stages:
            total = total + product(a.extent for a in s.axes) * count_flops(s.value)
        return total

    def bytes_moved(self) -> Expr:
        """Bytes of every input read once and every output written once."""
        total: Expr = index(0)
        for b in (*self.inputs, *self.outputs):
            total = total + self.types[b].nbytes
        return total


def count_flops(e: Expr) -> Expr:
    """Operations on data (not index arithmetic) for one evaluation of `e`."""
    total: Expr = index(0)
    inside: set[Expr] = set()
    for x in walk(e):
        if isinstance(x, Reduce):
            inside.update(walk(x.body))
            total = total + product(a.extent for a in x.axes) * (count_flops(x.body) + 1)
        elif x not in inside and isinstance(x, Apply) and x.dtype != INDEX:
            if FUNCTIONS[x.fn].result == "same" and x.fn not in ("select", "cast"):
                total = total + 1
    return total


def parts_in_time(k: Kernel) -> tuple[list[Stage], list[Stage], list[Stage]]:
    """The stages of a recurrence before its clock runs, while it does, and after."""
    over = [k.clock in s.axes for s in k.stages]
    first, last = over.index(True), len(over) - over[::-1].index(True)
    stages = list(k.stages)
    assert all(over[first:last]), "a stage between those of the clock is not over it"
    return stages[:first], stages[first:last], stages[last:]


def stored(buffer: str, axes: tuple[Axis, ...], value: Expr, where: tuple[Expr, ...]) -> Stage:
    """A stage that stores to `where`; a mere permutation of the axes becomes their new order."""
    plain = [i for i in where if isinstance(i, Axis)]
    fixed = [i for i in where if not isinstance(i, Axis)]
    loop_axes = {a for a in axes if a.extent is not ONE}
    if len(set(plain)) == len(plain) and {*plain} >= loop_axes and all(i is ZERO for i in fixed):
        order = tuple(i if isinstance(i, Axis) else fresh_axis(ONE) for i in where)
        gone: dict[Expr, Expr] = {a: ZERO for a in axes if a not in order}
        return Stage(buffer, order, substitute(value, gone))
    return Stage(buffer, axes, value, where)


def split_reader(s: Stage, read: Load) -> tuple[Stage, Load]:
    """Splits axes that a read divides by a constant (`a // c`, `a % c`), so that the read becomes
    plain; the stage then stores through an index map."""
    value, where, axes = s.value, s.store, list(s.axes)
    for _ in range(8):
        divided = [
            x
            for i in read.index
            for x in walk(i)
            if isinstance(x, Apply)
            and x.fn in ("floordiv", "mod")
            and x.args[0] in axes
            and as_int(x.args[1])
            and apply("mod", x.args[0].extent, x.args[1]) is ZERO  # type: ignore[attr-defined]
        ]
        if not divided:
            break
        a, c = divided[0].args
        assert isinstance(a, Axis)
        outer, inner = fresh_axis(a.extent // c), fresh_axis(c)
        table: dict[Expr, Expr] = {a: outer * c + inner}
        k = axes.index(a)
        axes[k : k + 1] = [outer, inner]
        value, where = substitute(value, table), tuple(substitute(i, table) for i in where)
        read = substitute(read, table)  # type: ignore[assignment]
    if len(axes) == len(s.axes):
        return s, read
    return Stage(s.buffer, tuple(axes), value, where), read


def inline(e: Expr, producer: Stage) -> Expr:
    """Replaces every load of the producer's buffer by the producer's value at that index."""

    def put(x: Load) -> Expr | None:
        if x.buffer != producer.buffer:
            return None
        return substitute(
            fresh_reductions(producer.value), dict(zip(producer.axes, x.index, strict=True))
        )

    return map_loads(e, put)


def fresh_reductions(e: Expr) -> Expr:
    """A copy of `e` whose reduced axes are new, so that two copies do not capture each other's."""
    found = [x for x in walk(e) if isinstance(x, Reduce)]
    if not found:
        return e
    table: dict[Expr, Expr] = {a: fresh_axis(a.extent, "r") for r in found for a in r.axes}
    return rename_axes(e, table)


def rename_axes(e: Expr, table: Mapping[Expr, Expr]) -> Expr:
    """Substitutes axes everywhere, binders of reductions included."""
    memo: dict[Expr, Expr] = dict(table)

    def go(x: Expr) -> Expr:
        done = memo.get(x)
        if done is None:
            done = memo[x] = rebuild(x, go)
        return done

    return go(e)


def used_inputs(stages: Iterable[Stage], candidates: Iterable[str]) -> tuple[str, ...]:
    """Those of `candidates` that some stage loads, in the given order."""
    seen = {x.buffer for s in stages for x in loads(s.value)}
    seen |= {x.buffer for s in stages for i in s.index for x in loads(i)}
    return tuple(b for b in candidates if b in seen)


def prune(stages: tuple[Stage, ...], wanted: Iterable[str]) -> tuple[Stage, ...]:
    """Drops stages whose buffer nothing needs."""
    need = set(wanted)
    known = -1
    while len(need) != known:  # stages of a recurrence read what later ones store
        known = len(need)
        for s in reversed(stages):
            if s.buffer in need:
                need |= {x.buffer for x in loads(s.value)}
                need |= {x.buffer for i in s.index for x in loads(i)}
    return tuple(s for s in stages if s.buffer in need)
