"""`onnxjit bench-kernel`: one kernel of a model against the clock, an edited source beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from onnxjit.cli_inspect import kernel_of
from onnxjit.cli_output import (
    FOUND,
    Dims,
    Json,
    Model,
    Seed,
    compiling,
    fail,
    print_json,
    print_table,
    print_text,
    sizes,
    spell_seconds,
)


def bench_kernel(
    model: Model,
    name: Annotated[str, typer.Argument(help="A kernel, as `onnxjit inspect` lists it.")],
    source: Annotated[
        Path | None, typer.Option(help="An edited source, checked and timed beside the kernel.")
    ] = None,
    dim: Dims = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to spend on runs.")] = 1.0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time one kernel alone on random data, and check and time an edited source beside it."""
    import onnxjit
    from onnxjit.errors import KernelMismatch

    with compiling("compiling") as progress:
        compiled = onnxjit.compile(model, threads=threads, progress=progress)
    kernel = kernel_of(compiled, name)
    wanted = sizes(dim)
    labels = {d.label for d in compiled.plan.dims}
    for label in wanted:
        if label not in labels:
            has = ", ".join(sorted(map(repr, labels))) or "none"
            fail(f"the model has no free dimension {label!r}; it has {has}")
    verdict: dict[str, Any] = {}
    if source is not None:
        try:
            checked = kernel.check(source)
            verdict = {"right": True, "elements": checked.elements, "sizes": checked.sizes}
        except KernelMismatch as mismatch:
            verdict = {"right": False, "problem": str(mismatch)}
    times = kernel.time(source, dims=wanted, threads=threads, seconds=seconds, seed=seed)
    rows = [
        {"source": "as compiled" if what == "kernel" else str(source), "minimum": t.minimum,
         "median": t.median, "runs": t.runs, "gflops": t.gflops, "gbytes": t.gbytes}
        for what, t in times.items()
    ]  # fmt: skip
    if as_json:
        one = next(iter(times.values()))
        print_json(
            {"kernel": name, "rule": kernel.rule, "threads": threads, "dims": wanted,
             "flops": one.flops, "bytes": one.bytes, "times": rows, "check": verdict or None}
        )  # fmt: skip
    else:
        table = [
            [r["source"], spell_seconds(r["minimum"]), spell_seconds(r["median"]), r["runs"],
             f"{r['gflops']:.1f}", f"{r['gbytes']:.1f}"]
            for r in rows
        ]  # fmt: skip
        columns = ["source", "minimum", "median", "runs", "GFLOP/s", "GB/s"]
        print_table(f"{name} ({kernel.rule}), {threads} thread(s)", columns, table)
        if verdict:
            print_text(_spelled(verdict))
    if verdict and not verdict["right"]:
        raise typer.Exit(FOUND)


def _spelled(verdict: dict[str, Any]) -> str:
    if not verdict["right"]:
        return str(verdict["problem"])
    return (
        f"The edited source agrees with the kernel's definition: {verdict['elements']} elements "
        f"compared, at {len(verdict['sizes'])} size(s)."
    )
