"""Definitions of recurrences: stages over a clock, which are computed step by step.

Before the clock runs, states get their initial values; while it runs, every materialized tensor,
`State.set` and `record` is a stage of each step; afterwards states can be read.

    h = state(initial, slots=2)
    with steps(count) as now:
        z = T.reduce_over(...h.before...)   # a product reads all of the state of the step before
        h.set(T.elementwise("tanh", x_at(now) + z))
        y = record(shape, dtype, h.after, lambda *i: (now, *i))
    return y, h.last
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from onnxjit.codegen.expr import Axis, Expr, Load, fresh_axis, index
from onnxjit.codegen.kernel import Stage, TensorType
from onnxjit.codegen.tensor import Tensor, current, new_name


@contextmanager
def steps(count: Expr | int) -> Iterator[Axis]:
    """Runs the clock of the current trace over [0, count); there is one in a definition."""
    t = current()
    assert t.clock is None, "a definition has one clock"
    t.clock, t.running = fresh_axis(index(count), "t"), True
    try:
        yield t.clock
    finally:
        t.running = False


class State:
    """A tensor that lives from one step to the next, in `slots` copies that take turns.

    With two slots a step reads what the step before has set (`before`) while it sets its own
    (`after`): needed where an element depends on others of the state. With one, each element may
    depend on itself alone, and both names are the same storage.
    """

    def __init__(self, initial: Tensor, slots: int = 1) -> None:
        t = current()
        assert not t.running, "a state begins before the clock runs"
        self.name = new_name("s")
        self.shape, self.dtype, self.slots = initial.shape, initial.dtype, slots
        t.types[self.name] = TensorType(self.dtype, (index(slots), *self.shape))
        t.states.append(self.name)
        for slot in range(slots):
            axes = tuple(fresh_axis(d) for d in self.shape)
            where = (index(slot), *axes)
            t.stages.append(Stage(self.name, axes, initial.at(*axes), where))

    def _slot(self, count: Expr) -> Expr:
        return index(0) if self.slots == 1 else count % self.slots

    def _read(self, slot: Expr) -> Tensor:
        name, dtype = self.name, self.dtype
        return Tensor(self.shape, dtype, lambda idx: Load(name, (slot, *idx), dtype))

    @property
    def before(self) -> Tensor:
        """What the state was when the step began."""
        return self._read(self._slot(_clock()))

    @property
    def after(self) -> Tensor:
        """What the step has set."""
        return self._read(self._slot(_clock() + 1))

    @property
    def last(self) -> Tensor:
        """What the last step has set, the initial value if there was no step."""
        return self._read(self._slot(_clock().extent))

    def set(self, value: Tensor) -> None:
        """What the state is from now on."""
        t = current()
        axes = tuple(fresh_axis(d) for d in self.shape)
        where = (self._slot(_clock() + 1), *axes)
        t.stages.append(Stage(self.name, (_clock(), *axes), value.at(*axes), where))


def record(
    shape: Sequence[Expr | int], value: Tensor, where: Callable[..., tuple[Expr, ...]]
) -> Tensor:
    """The tensor of `shape` to which each step, or after the clock one stage, stores `value`,
    element (i, …) at `where(i, …)`."""
    t = current()
    name = new_name("y")
    t.types[name] = TensorType(value.dtype, tuple(index(d) for d in shape))
    t.recorded.add(name)
    axes = tuple(fresh_axis(d) for d in value.shape)
    over = (_clock(), *axes) if t.running else axes
    t.stages.append(Stage(name, over, value.at(*axes), where(*axes)))
    return Tensor(shape, value.dtype, lambda idx: Load(name, idx, value.dtype), buffer=name)


def _clock() -> Axis:
    clock = current().clock
    assert clock is not None, "the clock has not been started"
    return clock


__all__ = ["State", "record", "steps"]
