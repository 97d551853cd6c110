"""Whether an edited kernel source computes what the kernel is defined to compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxjit.codegen.expr import INDEX, Apply, walk
from onnxjit.codegen.kernel import Kernel
from onnxjit.compare import TOLERANCES
from onnxjit.errors import KernelMismatch
from onnxjit.kernel_run import Loaded, Misuse, Problem, random_problem
from onnxjit.kernel_sizes import Sizes, Space, small_sizes

ROUNDED_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check has compared: at which sizes, and how many elements of outputs."""

    sizes: tuple[dict[str, int], ...]
    elements: int


def check(
    name: str,
    space: Space,
    original: Loaded,
    edited: Loaded,
    sizes: Sequence[Sizes] = (),
    seed: int = 0,
) -> Checked:
    """Compare `edited` with the definition on random data, at `sizes` or at a few small ones.

    An element may differ from the definition by the tolerance of its dtype (see `agree`), or by
    more where the original code gives the same as the edited one. Raises `KernelMismatch` for the
    first output that has another element.
    """
    labels = space.labels
    elements = 0
    used = list(sizes) or small_sizes(space, seed)
    for number, at in enumerate(used):
        for positive in (False, True):
            problem = random_problem(space.signature, at, seed + number, positive)
            elements += _compare(name, space, problem, original, edited, seed + number)
    return Checked(tuple({labels[d]: n for d, n in at.items()} for at in used), elements)


def _compare(
    name: str, space: Space, problem: Problem, original: Loaded, edited: Loaded, seed: int
) -> int:
    at = space.spelled(problem.sizes)
    at = f" at {at}" if at else ""
    try:
        got = problem.native(edited.entry, seed)
    except Misuse as misuse:
        raise KernelMismatch(f"the edited source of {name!r} {misuse}{at}") from None
    rounds = rounds_to_integers(problem.signature.definition)
    elements = 0
    before: list[np.ndarray] | None = None
    for number, (result, want) in enumerate(zip(got, problem.expected(), strict=True)):
        elements += want.size
        right = agree(result, want, rounds)
        if right.all():
            continue
        if before is None:
            before = problem.native(original.entry, seed)
        right |= agree(result, before[number], rounds)
        if right.all():
            continue
        where = np.argwhere(~right)
        first = tuple(where[0].tolist())
        place = f"element [{', '.join(map(str, first))}] of " if first else ""
        raise KernelMismatch(
            f"the edited source of {name!r} does not compute what the kernel defines{at}: "
            f"{place}output {number} ({want.dtype}{list(want.shape)}) is {result[first]}, "
            f"expected {want[first]}; {len(where)} of {want.size} elements differ"
        )
    return elements


def agree(got: np.ndarray, want: np.ndarray, rounded: bool = False) -> np.ndarray:
    """For each element, whether it is right: as far from `want` as the dtype's tolerance times the
    sum of its own and the typical (median) size. NaN and infinities must be in the same places.

    Integers and booleans must be equal; if they are `rounded` from floats, one in a hundred may
    have been rounded to the neighbour.
    """
    if want.dtype.kind == "b":
        return got.view(np.uint8) == want.view(np.uint8)
    if want.dtype.kind in "iu":
        same = got == want
        if rounded and not same.all():
            near = np.abs(got.astype(np.float64) - want.astype(np.float64)) <= 1
            if (near & ~same).sum() <= max(1, ROUNDED_SHARE * want.size):
                return near
        return same
    a, b = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(b)
    sizes = np.abs(b[finite & (b != 0)])
    typical = float(np.median(sizes)) if sizes.size else 0.0
    with np.errstate(all="ignore"):
        near = np.abs(a - b) <= TOLERANCES[want.dtype.name] * (np.abs(b) + typical)
    return np.where(finite, near, (a == b) | (np.isnan(a) & np.isnan(b)))


def rounds_to_integers(kernel: Kernel) -> bool:
    """Whether a kernel makes integers of floats that it has computed."""
    casts: list[Any] = [
        x
        for s in kernel.stages
        for x in walk(s.value)
        if isinstance(x, Apply) and x.fn == "cast" and x.dtype != INDEX
    ]
    return any("float" in x.args[0].dtype and "int" in x.dtype for x in casts)
