"""A kernel under standard names, so that kernels that are equal but for names become the same."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from onnxjit.codegen.expr import Axis, Expr, Load, Reduce, rebuild, walk
from onnxjit.codegen.kernel import Kernel, Stage, TensorType


@dataclass(frozen=True, slots=True)
class Canonical:
    """`kernel` with buffers b0, b1, … and axes x0, x1, … by first appearance; `buffers` gives the
    original name of each."""

    kernel: Kernel
    buffers: dict[str, str]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for kernels that are the same but for names."""
        k = self.kernel
        return k.name, k.inputs, k.outputs, k.stages, k.clock, tuple(k.types.items())


_known: WeakKeyDictionary[Kernel, Canonical] = WeakKeyDictionary()
"""Every pass asks for the same kernels."""


def canonical(kernel: Kernel) -> Canonical:
    """The kernel under standard names (sizes keep theirs)."""
    found = _known.get(kernel)
    if found is None:
        found = _known[kernel] = _canonical(kernel)
    return found


def _canonical(kernel: Kernel) -> Canonical:
    order = dict.fromkeys((*kernel.inputs, *kernel.outputs, *(s.buffer for s in kernel.stages)))
    names = {b: f"b{n}" for n, b in enumerate(order)}
    axes: dict[Expr, Expr] = {}

    def number(a: Axis) -> None:
        if a not in axes:
            axes[a] = Axis(f"x{len(axes)}", a.extent)

    for s in kernel.stages:
        for a in s.axes:
            number(a)
        for x in walk(s.value):
            if isinstance(x, Reduce):
                for a in x.axes:
                    number(a)
    memo: dict[Expr, Expr] = dict(axes)

    def go(x: Expr) -> Expr:
        done = memo.get(x)
        if done is None:
            if isinstance(x, Load):
                done = Load(names[x.buffer], [go(i) for i in x.index], x.dtype)
            else:
                done = rebuild(x, go)
            memo[x] = done
        return done

    stages = tuple(
        Stage(
            names[s.buffer],
            tuple(axes[a] for a in s.axes),  # type: ignore[misc]
            go(s.value),
            tuple(go(i) for i in s.index),
        )
        for s in kernel.stages
    )
    types: dict[str, TensorType] = {names[b]: kernel.types[b] for b in order}
    made = Kernel(
        kernel.name,
        tuple(names[b] for b in kernel.inputs),
        tuple(names[b] for b in kernel.outputs),
        stages,
        types,
        None if kernel.clock is None else axes[kernel.clock],  # type: ignore[arg-type]
    )
    return Canonical(made, {n: b for b, n in names.items()})
