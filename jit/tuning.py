"""Measures the variants of a program's kernels on this machine and keeps the fastest.

Kernel by kernel, the one with the largest estimated share of a run first: the variants that differ
from the best so far in one choice are built, checked against the output of the usual schedule, and
timed in turns; then their neighbours, until none is faster. Weights rotate through as many copies
as the model's constants take in the caches, because in a model other layers have evicted them.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxjit.artifact import ALIGNMENT
from onnxjit.bench import Timing, take_turns
from onnxjit.codegen.build import Builder
from onnxjit.codegen.build_process import BuildError
from onnxjit.codegen.cache import Cache
from onnxjit.codegen.evaluate import evaluate_int
from onnxjit.codegen.packing import Packing
from onnxjit.codegen.schedule import NoSchedule, Variant
from onnxjit.codegen.signature import Signature, signature
from onnxjit.codegen.tuned import Table, Tuned
from onnxjit.codegen_calls import Generated, Planned, ScheduledCall, generate, planned
from onnxjit.errors import InputError
from onnxjit.kernel_check import agree, rounds_to_integers
from onnxjit.kernel_run import Loaded, Misuse, Problem, random_problem
from onnxjit.kernel_sizes import Sizes, Space, small_sizes, space
from onnxjit.kernel_source import Built
from onnxjit.kernel_time import timed_call
from onnxjit.program import Program
from onnxjit.runtime.threads import aligned

LEAST_SECONDS = 5e-6
"""Kernels that take less time are left as they are."""

MARGIN = 1.03
"""How many times as fast as usual a variant must be: an engine timed against itself differs by up
to 3 %."""

ROUNDS = 4
"""Steps from one best variant to the next."""

PROMISING = 0.99
"""An option is tried again with other choices if it took less than this part of the time."""

FINALISTS = 5
"""Variants that are timed again, after a first glance at all."""

GLANCE, FINAL, DUEL = (0.003, 2), (0.01, 5), (0.02, 7, 0.3)
"""Seconds of a turn, rounds and seconds in all: of the first glance, of the finalists, and of the
winner against the usual schedule."""

MOST_COPIES = 64
L3_SHARE = 1.25
"""Weights come from memory where a model's constants take more than the last cache: so many times
its size are then rotated."""

IMAGE, SEQUENCE = 224, 128
"""Sizes of free dimensions that nobody has told: height and width of an image, and others."""

FLOPS, BANDWIDTH = 60e9, 10e9
"""Assumed rates, to order kernels by their share of a run."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Budget:
    """How a model is tuned: for about `seconds` (kernels are compiled and measured meanwhile), as
    it runs on `threads`, at `sizes` of free dimensions, by the model's names of them."""

    seconds: float
    threads: int
    sizes: Mapping[str, int] = field(default_factory=dict)


def tune(
    program: Program,
    builder: Builder,
    cache: Cache | None,
    table: Table,
    budget: Budget,
    progress: Progress | None = None,
) -> None:
    """Add to `table` what is measured of the program's kernels that it does not know yet."""
    end = time.perf_counter() + budget.seconds
    usual = generate(program, builder.target)
    waiting = by_share(program, usual, budget)
    waiting = [k for k in waiting if k.structure not in table.rows]
    constants = sum(b.nbytes for b in usual.plan.buffers
                    if b.kind == "constant" and isinstance(b.nbytes, int))  # fmt: skip
    limit = int(L3_SHARE * (builder.target.l3 or builder.target.l2))
    for number, kernel in enumerate(waiting):
        if time.perf_counter() >= end:
            break
        one = _Kernel(kernel, program, usual, budget, builder, cache, min(constants, limit))
        found = one.fastest(end)
        if found is not None:
            table.remember(kernel.structure, found)
        if progress is not None:
            progress(number + 1, len(waiting))


def by_share(program: Program, usual: Generated, budget: Budget) -> list[Planned]:
    """The program's kernels, each structure once, largest estimated share of a run first."""
    calls = Counter(id(c.nest) for c in usual.scheduled if isinstance(c, ScheduledCall))
    sizes = guessed(program, budget.sizes)
    cost: dict[str, float] = {}
    for k in usual.planned:
        flops, moved = k.request.kernel.flops(), k.request.kernel.bytes_moved()
        once = max(evaluate_int(flops, sizes) / FLOPS, evaluate_int(moved, sizes) / BANDWIDTH)
        cost[k.structure] = cost.get(k.structure, 0.0) + once * calls[id(k.nest)]
    first = {k.structure: k for k in reversed(usual.planned)}
    return sorted(first.values(), key=lambda k: -cost[k.structure])


def guessed(program: Program, told: Mapping[str, int]) -> Sizes:
    """Free sizes as told, or typical ones: batch 1, images and sequences of medium size."""
    sizes = {}
    for d in program.dims:
        rank = program.types[d.value].rank if d.value in program.types else 1
        usual = 1 if d.axis == 0 else IMAGE if rank == 4 and d.axis > 1 else SEQUENCE
        sizes[d.name] = told.get(d.label, max(1, (usual - d.offset) // d.factor))
    return sizes


@dataclass(slots=True)
class _Candidate:
    """A variant with its code, ready to run."""

    variant: Variant
    planned: Planned
    signature: Signature
    built: Built
    call: Callable[[], Any] | None = None
    repeats: int = 1


class _Kernel:
    """One kernel on its way to its fastest variant."""

    def __init__(
        self, kernel: Planned, program: Program, usual: Generated, budget: Budget,
        builder: Builder, cache: Cache | None, rotated: int,
    ) -> None:  # fmt: skip
        self.kernel, self.builder, self.cache = kernel, builder, cache
        self.threads, self.rotated = budget.threads, rotated
        self.name = kernel.source.name
        names = [d.name for d in program.dims]
        self.space: Space = space(self.sign(kernel), usual.plan, names)
        self.sizes = self.measured(guessed(program, budget.sizes))
        self.wanted: list[tuple[Problem, list[np.ndarray]]] = []
        self.copies: dict[tuple[str, Packing | None], list[np.ndarray]] = {}
        self.tried: set[tuple[object, ...]] = set()
        self.ratios: dict[tuple[str, int], float] = {}

    def sign(self, made: Planned) -> Signature:
        return signature(made.request.kernel, made.nest, made.request.layouts)

    def measured(self, sizes: Sizes) -> Sizes:
        """The sizes to measure at, or the largest small ones that the kernel's code serves."""
        own = {name: sizes[name] for name in self.space.dims}
        if not self.space.broken(own):
            return own
        return max(small_sizes(self.space), key=lambda s: sum(s.values()))

    def fastest(self, end: float) -> Tuned | None:
        """The fastest variant; None when time was up before anything could be said."""
        labels = {self.space.labels[name]: n for name, n in self.sizes.items()}
        schedulable = self.distinct([{}], self.kernel)
        options = self.distinct(self.kernel.request.neighbours(), self.kernel)
        if not options:
            return Tuned({}, kernel=self.name, sizes=labels)
        made = self.build(schedulable, end)
        if not made:
            return None
        best = usual = made[0]
        self.expect(usual)
        (first,) = self.times([usual], *GLANCE)
        if first.minimum < LEAST_SECONDS:
            return Tuned({}, kernel=self.name, sizes=labels)
        done = False
        for _ in range(ROUNDS):
            better = self.better(best, self.build(options, end))
            done = time.perf_counter() < end
            if better is best or not done:
                best = better
                break
            best = better
            options = self.distinct(self.hopeful(best.planned), best.planned)
            if not options:
                break
        duel = self.times([usual, best], *DUEL) if best is not usual else []
        if duel and faster(*duel):
            before, after = (t.minimum for t in duel)
            return Tuned(dict(best.variant), after, before, self.name, labels)
        return Tuned({}, kernel=self.name, sizes=labels) if done else None

    # --- candidates -----------------------------------------------------------------------------

    def distinct(self, variants: Sequence[Variant], near: Planned) -> list[tuple[Variant, Planned]]:
        """The variants whose code, or whose sizes for it, are new."""
        found = []
        for variant in variants:
            try:
                request = replace(near.request, variant=variant, offered={})
                made = planned(request, self.name, near.structure)
            except NoSchedule:
                continue
            nest = made.nest
            own = (made.source, nest.sizes, nest.tiles, nest.rounds)
            if own not in self.tried:
                self.tried.add(own)
                found.append((variant, made))
        return found

    def hopeful(self, best: Planned) -> list[dict[str, int]]:
        """The neighbours of a variant by options that are new, or made the kernel faster before."""
        here = best.request.variant
        return [
            v
            for v in best.request.neighbours()
            if all(self.ratios.get(c, 0.0) < PROMISING for c in v.items() - here.items())
        ]

    def build(self, wanted: Sequence[tuple[Variant, Planned]], end: float) -> list[_Candidate]:
        """Those of `wanted` that are built before time is up and compute what they should."""
        keys = []
        for _, made in wanted:
            if time.perf_counter() >= end:
                break
            keys.append(self.builder.submit(made.source))
        ready = self.builder.ready(keys, end - time.perf_counter())
        found = []
        for name, (variant, made) in zip(keys, wanted, strict=False):
            if name not in ready or (self.wanted and time.perf_counter() >= end):
                continue
            try:
                tiles = self.builder.tile_objects(made.source.symbols)
                built = Built(name, self.builder.result(name), tiles)
            except BuildError as error:
                warnings.warn(f"a variant of {self.name} is left out: {error}", stacklevel=2)
                continue
            candidate = _Candidate(variant, made, self.sign(made), built)
            if self.right(candidate):
                found.append(candidate)
        return found

    # --- results --------------------------------------------------------------------------------

    def expect(self, usual: _Candidate) -> None:
        """Note the outputs that variants must have: at the measured sizes, and where sizes are
        free, at small ones with 0, 1 and odd ones among them."""
        loaded = Loaded(usual.built)
        sizes = [self.sizes]
        if self.space.dims:
            try:
                sizes += small_sizes(self.space)
            except InputError:  # no small size fits the model's conditions
                pass
        for at in sizes:
            problem = random_problem(usual.signature, at)
            self.wanted.append((problem, problem.native(loaded.entry)))

    def right(self, candidate: _Candidate) -> bool:
        """Whether a candidate has those outputs and stores nowhere else."""
        rounds = rounds_to_integers(candidate.signature.definition)
        loaded = Loaded(candidate.built)
        for problem, wanted in self.wanted:
            try:
                got = replace(problem, signature=candidate.signature).native(loaded.entry)
            except Misuse as misuse:
                problem_text = str(misuse)
            else:
                if all(agree(a, b, rounds).all() for a, b in zip(got, wanted, strict=True)):
                    continue
                problem_text = "computes something else"
            warnings.warn(f"a variant of {self.name}, {dict(candidate.variant)}, is left out: it "
                          f"{problem_text}", stacklevel=2)  # fmt: skip
            return False
        return True

    # --- times ----------------------------------------------------------------------------------

    def better(self, best: _Candidate, others: Sequence[_Candidate]) -> _Candidate:
        """The fastest of all by a glance, then of the finalists by more turns."""
        if not others:
            return best
        glance = self.times([best, *others], *GLANCE)
        for one, timing in zip(others, glance[1:], strict=True):
            changed = [*(one.variant.items() - best.variant.items())]
            if len(changed) == 1:
                self.ratios[changed[0]] = timing.minimum / glance[0].minimum
        ranked = sorted(zip(glance[1:], others, strict=True), key=lambda pair: pair[0].minimum)
        finalists = [best, *(one for _, one in ranked[:FINALISTS])]
        times = self.times(finalists, *FINAL)
        return finalists[int(np.argmin([t.minimum for t in times]))]

    def times(
        self, among: Sequence[_Candidate], burst: float, rounds: int, seconds: float = 0.0
    ) -> list[Timing]:
        """The times of one execution of each, in turns."""
        calls = {}
        for number, one in enumerate(among):
            if one.call is None:
                one.call, one.repeats = self.timed(one)
            calls[str(number)] = one.call
        taken = take_turns(calls, seconds, burst, rounds).values()
        return [each(t, one.repeats) for t, one in zip(taken, among, strict=True)]

    def timed(self, candidate: _Candidate) -> tuple[Callable[[], Any], int]:
        problem = replace(self.wanted[0][0], signature=candidate.signature)
        constants = self.kernel.request.constants
        inputs = [p.buffer for p in candidate.signature.params if not p.written]
        own = sum(problem.physical(b).nbytes for b in inputs if b in constants)
        copies = min(max(1, -(-self.rotated // max(1, own))), MOST_COPIES)
        arrays = {}
        for b in inputs:
            array, wanted = problem.physical(b), copies if b in constants else 1
            held = self.copies.setdefault((b, candidate.signature.packings.get(b)), [])
            held += [aligned_copy(array) for _ in range(wanted - len(held))]
            arrays[b] = held[:wanted]
        return timed_call(problem, candidate.built, self.threads, self.cache, arrays)


def each(t: Timing, repeats: int) -> Timing:
    """The timing of one of `repeats` executions."""
    return Timing(
        t.minimum / repeats, t.median / repeats, t.lower / repeats, t.upper / repeats, t.runs
    )


def faster(usual: Timing, other: Timing) -> bool:
    """Whether the other one is beyond doubt, by least times and by lower quartiles."""
    return min(usual.minimum / other.minimum, usual.lower / other.lower) >= MARGIN


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """A copy on a cache line of its own, as a model's constants and buffers are."""
    memory = aligned(array.nbytes, ALIGNMENT)
    copy = memory[: array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
