"""`onnxjit bench`: a model in turns with other engines, and its kernels against the machine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxjit.cli_inputs import feeds_for
from onnxjit.cli_output import (
    FOUND,
    Dims,
    Inputs,
    Json,
    Model,
    Seed,
    Tune,
    compiling,
    errors,
    fail,
    print_json,
    print_table,
    print_text,
    sizes,
    spell_seconds,
)

if TYPE_CHECKING:
    from onnxjit.bench.against import Change, Verdict
    from onnxjit.bench.kernels import KernelTable
    from onnxjit.bench.roofline import Roofline

_PICTURES = "Needs matplotlib, which the extra `bench` installs."


def bench(
    model: Model,
    inputs: Inputs = None,
    dim: Dims = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every engine.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to spend on runs.")] = 3.0,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            help="Compare with this engine only; repeatable. By default onnxruntime, OpenVINO and "
            "whatever else is installed of tract, iree, tvm and torch.",
        ),
    ] = None,
    kernels: Annotated[int, typer.Option(min=0, help="How many kernels to list.")] = 15,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with tables and plots.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"Write the plots. {_PICTURES}")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one run as a Chrome trace (Perfetto opens it)."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="OLD.json",
            help="Compare with an earlier result (of --json, or one in benchmarks/results).",
        ),
    ] = None,
    asserted: Annotated[
        list[str] | None,
        typer.Option(
            "--assert",
            metavar="[PEER=]RATIO",
            help="Exit with 1 if onnxjit is not RATIO times as fast as PEER: by default the "
            "fastest one; `against=RATIO` is about the earlier result. Repeatable.",
        ),
    ] = None,
    measure_machine: Annotated[
        bool,
        typer.Option("--measure-machine", help="Measure the roofline again, not from the cache."),
    ] = False,
    tune: Tune = 0.0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time a model in turns with other engines, and its kernels against the machine's roofline."""
    import onnxjit
    from onnxjit.bench import against as verdicts
    from onnxjit.bench.engines import onnxjit_loaded, wanted
    from onnxjit.bench.kernels import kernel_table
    from onnxjit.bench.machine import describe, machine
    from onnxjit.bench.measure import measure, summaries
    from onnxjit.bench.roofline import roofline

    try:
        engines = wanted(engine)
        earlier = None if against is None else verdicts.load(against)
        claims = list(asserted or ())
        for text in claims:
            if verdicts.parse(text).what == verdicts.EARLIER and earlier is None:
                fail(f"--assert {text} needs --against")
    except KeyError as error:
        fail(f"--engine: {error.args[0]}")
    except ValueError as error:
        fail(str(error))
    if png is not None:
        _require_matplotlib()
    if earlier is not None and not any(
        verdicts.parse(text).what == verdicts.EARLIER for text in claims
    ):
        claims.append(f"{verdicts.EARLIER}={verdicts.ALLOWANCE}")
    with compiling("compiling") as progress:
        compiled = onnxjit.compile(
            model, threads=threads, progress=progress, tune=tune, sizes=sizes(dim)
        )
    feeds = feeds_for(compiled.inputs, inputs, dim, seed)
    with _working() as say:
        row = measure(
            model, feeds, threads, engines, seconds,
            label=Path(model).stem, own=onnxjit_loaded(compiled), progress=say,
        )  # fmt: skip
        say("measuring the machine")
        roof = roofline(threads, again=measure_machine)
        say("profiling the kernels")
        arrays = [feeds[v.name] for v in compiled.inputs]
        table = kernel_table(compiled, arrays, roof)
    facts = machine()
    changes = verdicts.compare([row], earlier) if earlier is not None else []
    found = verdicts.judge(claims, [row], changes)
    data: dict[str, Any] = {
        "machine": facts,
        "about": describe(facts),
        "sizes": {name: list(array.shape) for name, array in feeds.items()},
        "summary": summaries([row]),
        "rows": [row],
        "roofline": roof.to_json(),
        "kernels": table.to_json(),
        "verdicts": [
            {"assertion": v.assertion, "found": v.found, "holds": v.holds, "text": str(v)}
            for v in found
        ],
    }
    written = _write(data, table, html, png, trace)
    if as_json:
        print_json(data)
    else:
        _print(row, table, roof, kernels)
        if earlier is not None:
            _print_changes(changes, verdicts.other_machine(earlier, facts))
        _print_verdicts(found)
        for path in written:
            print_text(f"written to {path}")
    if row["alone"] or not all(v.holds for v in found):
        raise typer.Exit(FOUND)


@contextlib.contextmanager
def _working() -> Iterator[Any]:
    """A line on standard error that says what is done now."""
    with errors.status("starting") as status:
        yield lambda text: status.update(text)


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        fail("--png needs matplotlib: pip install 'onnxjit[bench]'")


def _write(
    data: dict[str, Any], table: KernelTable, html: Path | None, png: Path | None,
    trace: Path | None,
) -> list[Path]:  # fmt: skip
    """Write the files that were asked for."""
    if html is not None:
        from onnxjit.bench.page import page

        html.write_text(page(data), encoding="utf-8")
    if png is not None:
        from onnxjit.bench.plots import model_figure

        model_figure(data, png)
    if trace is not None:
        from onnxjit.bench.trace import trace as trace_of

        trace.write_text(json.dumps(trace_of(table, data["rows"][0]["model"])))
    return [path for path in (html, png, trace) if path is not None]


def _print(row: dict[str, Any], table: KernelTable, roof: Roofline, kernels: int) -> None:
    rows: list[list[Any]] = []
    for name, t in row["engines"].items():
        own = name == "onnxjit"
        rows.append(
            [name, t["version"], spell_seconds(t["minimum"]), spell_seconds(t["median"]),
             f"{spell_seconds(t['lower'])} - {spell_seconds(t['upper'])}", t["runs"],
             "-" if own else f"{t['ratio']:.2f}", "-" if own else f"{t['difference']:.1e}",
             t["note"]]
        )  # fmt: skip
    columns = ["engine", "version", "minimum", "median", "quartiles", "runs", "ratio",
               "difference", ""]  # fmt: skip
    print_table(f"one run, {row['threads']} thread(s)", columns, rows)
    for name, why in row["failures"].items():
        print_text(f" {name} is not compared: {why}")
    if row["fastest"]:
        ratio = row["ratios"]["fastest"]
        print_text(f"\n{ratio:.2f} times the fastest peer, {row['fastest']}, by the least times")
    if not kernels:
        return
    cells = [
        [k.name, spell_seconds(k.seconds), f"{k.share * 100:.1f}", f"{k.gflops:.1f}",
         f"{k.gbytes:.1f}", "-" if k.intensity is None else f"{k.intensity:.1f}",
         "-" if k.of_roof is None else f"{k.of_roof * 100:.0f}", k.limit]
        for k in table.slowest()[:kernels]
    ]  # fmt: skip
    columns = ["kernel", "time", "%", "GFLOP/s", "GB/s", "FLOP/B", "% of roof", "limit"]
    print_text("")
    print_table(f"the slowest of {len(table.rows)} steps", columns, cells)
    print_text("\n" + roofline_line(roof))
    shares = ", ".join(f"{limit} {share * 100:.0f} %" for limit, share in table.limits().items())
    print_text(f"limits, by time: {shares}")
    # Of contractions alone: the work of windows that reach beyond their input is overcounted.
    above = [
        k
        for k in table.rows
        if k.rule.startswith("contraction") and k.flops > 1.05 * k.seconds * roof.peak(k.dtype)
    ]
    if above:
        print_text(
            f"{above[0].name} exceeds the measured peak: the machine was busy when it was "
            "measured; repeat with --measure-machine"
        )


def roofline_line(roof: Roofline) -> str:
    """The machine's figures that matter most, in a line."""
    levels = ", ".join(f"{b.level} {b.best / 1e9:.0f}" for b in roof.bandwidths)
    return (
        f"this machine, {roof.threads} thread(s): {roof.peak('float32') / 1e9:.0f} GFLOP/s "
        f"float32; GB/s: {levels}; {roof.frequency / 1e9:.2f} GHz seen"
    )


def _print_changes(changes: Sequence[Change], differs: Sequence[str]) -> None:
    if differs:
        print_text(f"\nthe earlier result is of another machine: {'; '.join(differs)}")
    if not changes:
        print_text("\nthe earlier result has no row for this model with so many threads")
        return
    rows = [
        [c.model, c.threads, spell_seconds(c.before), spell_seconds(c.now), f"{c.time:.3f}",
         "-" if c.relative is None else f"{c.relative:.3f}"]
        for c in changes
    ]  # fmt: skip
    columns = ["model", "threads", "before", "now", "times as fast", "relative to the peers"]
    print_text("")
    print_table("against the earlier result", columns, rows)


def _print_verdicts(found: Sequence[Verdict]) -> None:
    for verdict in found:
        print_text(str(verdict))
