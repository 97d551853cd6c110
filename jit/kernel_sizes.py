"""Sizes to run a kernel at by itself: given ones, and a few small ones to check it at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxjit.codegen.evaluate import evaluate_int
from onnxjit.codegen.expr import Apply, Axis, Dim, Expr, leaves
from onnxjit.codegen.kernel import Kernel
from onnxjit.codegen.signature import Signature
from onnxjit.errors import InputError
from onnxjit.runtime.inputs import RELATIONS
from onnxjit.runtime.plan import Check, Plan, names_of
from onnxjit.runtime.plan import Dim as PlanDim
from onnxjit.runtime.stages import Table

Sizes = dict[str, int]

EQUAL = (3, 1, 2, 0, 7, 17)
"""All sizes the same: this fits most models, and 0 and 1 are where kernels go wrong."""

MIXED = (0, 1, 2, 3, 5, 8, 13, 16, 33)
TRIES, WANTED = 300, 8

BUDGET = 3 * 10**7
"""Operations of all sizes together: NumPy takes a few seconds for them. Of products that are summed
up, which BLAS does, and of bytes, that many count as one:"""

PRODUCTS, BYTES = 20, 10


@dataclass(frozen=True, slots=True)
class Space:
    """The sizes that a kernel depends on: those of the plan by their names in the signature, and
    the plan's conditions on them."""

    signature: Signature
    dims: Mapping[str, PlanDim]
    checks: tuple[Check, ...]

    @property
    def labels(self) -> dict[str, str]:
        """What the model calls each size."""
        return {name: d.label or d.name for name, d in self.dims.items()}

    def broken(self, sizes: Sizes) -> str:
        """What is wrong with `sizes`, "" where the kernel's code serves them."""
        for name, d in self.dims.items():
            if sizes[name] < d.minimum or (d.maximum is not None and sizes[name] > d.maximum):
                return f"{self.labels[name]}={sizes[name]} is not within the model's limits"
        table = Table([d.name for d in self.dims.values()])
        ends = [(table.add(c.left), table.add(c.right)) for c in self.checks]
        table.freeze([d.name for d in self.dims.values()])
        try:
            values = table.evaluate([sizes[name] for name in self.dims])
        except ZeroDivisionError:
            return "no shapes follow from these sizes"
        for check, (left, right) in zip(self.checks, ends, strict=True):
            if not RELATIONS[check.relation](values[left], values[right]):
                return check.message
        if any(evaluate_int(e, sizes) < 0 for e in _extents(self.signature.definition)):
            return "an extent would be negative"
        return ""

    def spelled(self, sizes: Sizes) -> str:
        """Sizes as the model calls them: "batch=3, heads=2"."""
        return ", ".join(f"{self.labels[name]}={n}" for name, n in sizes.items())


def space(signature: Signature, plan: Plan, names: Sequence[str]) -> Space:
    """The space of a kernel's sizes; `names[k]` is what signatures call size k of the plan."""
    known = {d.name: d for d in plan.dims}
    by_name = {f"d{k}": name for k, name in enumerate(names)}
    used = {f"d{names.index(e.name)}" for e in _dims(signature)}
    checks: list[Check] = []
    rest = [c for c in plan.checks if names_of(c.left) | names_of(c.right)]
    while touching := [c for c in rest if used & (names_of(c.left) | names_of(c.right))]:
        for check in touching:
            used |= names_of(check.left) | names_of(check.right)
        checks += touching
        rest = [c for c in rest if c not in touching]
    dims = {by_name[name]: known[name] for name in sorted(used, key=lambda n: int(n[1:]))}
    return Space(signature, dims, tuple(checks))


def given_sizes(space: Space, wanted: Mapping[str, int]) -> Sizes:
    """The sizes `wanted` by the model's names of them, 1 where nothing is said.

    Raises `InputError` for sizes that the kernel's code does not serve.
    """
    labels = space.labels
    sizes = {name: wanted.get(labels[name], 1) for name in space.dims}
    problem = space.broken(sizes)
    if problem:
        raise InputError(f"the kernel does not run at {space.spelled(sizes)}: {problem}")
    return sizes


def small_sizes(space: Space, seed: int = 0) -> list[Sizes]:
    """A few small sizes that the kernel's code serves, 0, 1 and odd ones among them where it can.

    They stay within `BUDGET`, but one of them leaves something to compute whatever it takes.
    """
    if not space.dims:
        return [{}]
    left = BUDGET
    chosen: list[Sizes] = []
    full: list[tuple[int, Sizes]] = []
    for sizes in _candidates(list(space.dims), seed):
        if sizes in chosen or space.broken(sizes):
            continue
        cost, empty = _cost(space.signature.definition, sizes)
        if not empty:
            full.append((cost, sizes))
        if cost <= left:
            chosen.append(sizes)
            left -= cost
        if len(chosen) == WANTED:
            break
    if full and not any(sizes in chosen for _, sizes in full):
        chosen.append(min(full, key=lambda pair: pair[0])[1])
    if not chosen:
        names = ", ".join(space.labels.values())
        raise InputError(f"found no sizes that the kernel runs at; give them: {names}")
    return chosen


def _candidates(names: list[str], seed: int) -> Iterator[Sizes]:
    for n in EQUAL:
        yield dict.fromkeys(names, n)
    rng = np.random.default_rng(seed)
    for _ in range(TRIES):
        yield dict(zip(names, rng.choice(MIXED, len(names)).tolist(), strict=True))


def _cost(kernel: Kernel, sizes: Sizes) -> tuple[int, bool]:
    """What evaluating a kernel takes, and whether all of its outputs are empty."""
    flops, nbytes = (evaluate_int(e, sizes) for e in (kernel.flops(), kernel.bytes_moved()))
    bodies = [r.body for s in kernel.stages for r in s.reduces if r.fn == "sum"]
    if any(isinstance(body, Apply) and body.fn == "mul" for body in bodies):
        flops //= PRODUCTS
    empty = all(evaluate_int(kernel.types[b].elements, sizes) == 0 for b in kernel.outputs)
    return flops + nbytes // BYTES, empty


def _extents(kernel: Kernel) -> list[Expr]:
    """The extents of all buffers and all axes."""
    found: dict[Expr, None] = {}
    for t in kernel.types.values():
        found.update(dict.fromkeys(t.shape))
    for s in kernel.stages:
        for e in (s.value, *s.index, *s.axes):
            found.update((a.extent, None) for a in leaves(e) if isinstance(a, Axis))
    return list(found)


def _dims(signature: Signature) -> set[Dim]:
    kernel = signature.definition
    exprs = [e for s in kernel.stages for e in (s.value, *s.index)]
    exprs += [*_extents(kernel), *signature.sizes, signature.tiles, signature.scratch]
    return {x for e in exprs for x in leaves(e) if isinstance(x, Dim)}
