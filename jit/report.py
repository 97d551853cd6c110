"""Text for people: the report of a compiled model, and the table of a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxjit.kernels import spelled
from onnxjit.runtime.plan import Expression, HostStep, Plan, Step

if TYPE_CHECKING:
    from onnxjit.compiled import CompiledModel
    from onnxjit.runtime.executor import Executable


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """One step: its fastest time in seconds, its share of the whole, and its rates (0: unknown)."""

    name: str
    seconds: float
    share: float
    gflops: float
    gbytes: float
    tiles: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Steps in running order; `str` gives a table, slowest first."""

    rows: tuple[ProfileRow, ...]
    runs: int

    @property
    def seconds(self) -> float:
        """The sum over all steps."""
        return sum(row.seconds for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'kernel':<36} {'us':>10} {'%':>6} {'GFLOP/s':>9} {'GB/s':>8} {'chunks':>7}"]
        lines += [
            f"{r.name:<36.36} {r.seconds * 1e6:>10.2f} {r.share * 100:>6.1f} {r.gflops:>9.2f} "
            f"{r.gbytes:>8.2f} {r.chunks:>7}"
            for r in sorted(self.rows, key=lambda r: -r.seconds)
        ]
        lines.append(f"{'all':<36} {self.seconds * 1e6:>10.2f}")
        return "\n".join(lines)


def profile(executable: Executable, arrays: Sequence[Any], runs: int) -> Profile:
    """Run `runs` times with a clock around each step."""
    if runs < 1:
        raise ValueError(f"runs must be positive, not {runs}")
    executable(*arrays)
    tables = [executable.profile(arrays)[1] for _ in range(runs)]
    best = [min(steps, key=lambda s: s.seconds) for steps in zip(*tables, strict=True)]
    total = sum(s.seconds for s in best) or 1.0
    rows = (
        ProfileRow(s.name or s.kernel, s.seconds, s.seconds / total, s.gflops, s.gbytes, s.tiles,
                   s.chunks)
        for s in best
    )  # fmt: skip
    return Profile(tuple(rows), runs)


def report(model: CompiledModel) -> str:
    """What was compiled: partition, kernels, memory, assumptions, specialisations."""
    plan, kernels = model.plan, model.kernels
    native = [s for s in plan.steps if isinstance(s, Step)]
    hosts = [s for s in plan.steps if isinstance(s, HostStep)]
    constants = [plan.buffers[b].nbytes for b in plan.constants()]
    how = "loaded from the cache" if model.from_cache else "compiled"
    lines = [
        repr(model)[1:-1],
        f"{how} in {model.seconds:.2f} s for the CPU, {model.threads} thread(s)",
        "",
        f"partition: {len(native)} kernel steps of {len(set(s.kernel for s in native))} kernels, "
        f"{len(hosts)} host steps; all on the CPU, nothing is copied between devices",
    ]
    lines += [f"  host step {s.name} runs in Python between kernels" for s in hosts]
    lines += ["", "kernels:"]
    for name, k in kernels.items():
        lines.append(
            f"  {name:<32} {k.rule:<16} {_amount(k.flops, plan, 'FLOP'):>16} "
            f"{_amount(k.bytes, plan, 'B'):>14}  {_shortened(', '.join(k.origin))}"
            + ("  (edited)" if k.original is not None else "")
        )
    tuned = [k for k in kernels.values() if k.variant and k.original is None]
    if tuned:
        lines += ["", "tuned, and how many times as fast as usual, measured alone:"]
        lines += [f"  {k.name:<32} {k.gain:.2f}x  {spelled(k.variant)}" for k in tuned]
    total = sum(n for n in constants if isinstance(n, int))
    lines += [
        "",
        "memory:",
        f"  constants {_scaled(total)}B in {len(constants)} arrays",
        f"  working memory {_scaled(model.arena_bytes())}B held by the runs so far",
        "",
        "assumptions about free sizes:",
    ]
    labels = {d.name: d.label for d in plan.dims}
    assumed = [c for c in plan.checks if c.assumed]
    lines += [
        f"  {_spelled(c.left, labels)} {c.relation} {_spelled(c.right, labels)}: {c.message}"
        for c in assumed
    ] or ["  none: any sizes run this code"]
    if model.specialisations:
        lines += ["", "specialised for other sizes:"]
        lines += [f"  {', '.join(map(str, shapes))}" for shapes in model.specialisations]
    return "\n".join(lines)


def passes(model: Any, overrides: Mapping[str, int] | None = None) -> list[tuple[str, str]]:
    """The program after each pass, as (name, text): the passes run for this alone."""
    from onnxjit.codegen.target import host
    from onnxjit.importer import import_model
    from onnxjit.passes import run_pipeline

    found: list[tuple[str, str]] = []
    graph = import_model(model, overrides=overrides)
    run_pipeline(graph, host(), lambda name, program: found.append((name, str(program))))
    return found


def _spelled(e: Expression, labels: dict[str, str]) -> str:
    from onnxjit.compiler import labelled

    return str(labelled(e, labels))


def _amount(e: Expression, plan: Plan, unit: str) -> str:
    return f"{_scaled(e)}{unit}" if isinstance(e, int) else "by size"


def _scaled(n: int) -> str:
    for factor, prefix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= factor:
            return f"{n / factor:.1f} {prefix}"
    return f"{n} "


def _shortened(text: str, most: int = 70) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
