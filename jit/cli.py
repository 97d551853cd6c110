"""The command line: `onnxjit run | inspect | compare | bench | bench-kernel | ops | cache | demo`.

Exit status: 0, 1 when a check found a difference or damage, 2 when the command could not be done.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from onnxjit import cli_bench, cli_bench_kernel, cli_cache, cli_inspect, cli_ops
from onnxjit.cli_inputs import feeds_for
from onnxjit.cli_output import (
    FOUND,
    Dims,
    Inputs,
    Json,
    Model,
    Seed,
    Threads,
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

app = typer.Typer(
    name="onnxjit",
    help="Compiles ONNX models to machine code for this machine's processor.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_cache.app, name="cache")
app.command("inspect")(cli_inspect.inspect)
app.command("bench")(cli_bench.bench)
app.command("ops")(cli_ops.ops)
app.command("bench-kernel")(cli_bench_kernel.bench_kernel)


def main() -> None:
    """Runs the command line; errors that onnxjit raises on purpose become one message."""
    from onnxjit.codegen.private_files import CacheError
    from onnxjit.errors import OnnxJitError

    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        try:
            app()
        except (OnnxJitError, CacheError, FileNotFoundError, PermissionError) as error:
            fail(str(error))
    except typer.Exit as stop:  # `fail` outside of a command
        raise SystemExit(stop.exit_code) from None


def _version(wanted: bool) -> None:
    if wanted:
        from onnxjit import __version__

        print(f"onnxjit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _compiled(model: str, threads: int | None, tune: float, dim: list[str] | None) -> Any:
    import onnxjit

    with compiling("compiling") as progress:
        return onnxjit.compile(
            model, threads=threads, progress=progress, tune=tune, sizes=sizes(dim)
        )


def _call(compiled: Any, feeds: Mapping[str, np.ndarray]) -> list[Any]:
    return compiled.run([feeds[v.name] for v in compiled.inputs])


@app.command()
def run(
    model: Model,
    inputs: Inputs = None,
    dim: Dims = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the outputs, as 0.npy, 1.npy, ...")
    ] = None,
    threads: Threads = None,
    tune: Tune = 0.0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compile a model and run it once."""
    compiled = _compiled(model, threads, tune, dim)
    results = _call(compiled, feeds_for(compiled.inputs, inputs, dim, seed))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (info, value) in enumerate(zip(compiled.outputs, results, strict=True)):
        row: dict[str, Any] = {"name": info.name, **_describe(value)}
        if output is not None and isinstance(value, np.ndarray):
            # Numbered: a name of the model is no safe file name.
            row["file"] = str(output / f"{number}.npy")
            np.save(row["file"], value, allow_pickle=value.dtype == object)
        rows.append(row)
    if as_json:
        print_json(rows)
        return
    columns = ["name", "dtype", "shape", "min", "mean", "max"] + ["file"] * (output is not None)
    table = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    print_table("outputs", columns, table)


def _describe(value: Any) -> dict[str, Any]:
    if not isinstance(value, np.ndarray):
        return {"dtype": type(value).__name__, "shape": []}
    facts: dict[str, Any] = {"dtype": value.dtype.name, "shape": list(value.shape)}
    if value.size and value.dtype.kind not in "OUST":
        wide = value.astype(np.float64)
        facts.update(min=float(wide.min()), mean=float(wide.mean()), max=float(wide.max()))
    return facts


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


@app.command()
def compare(
    model: Model,
    inputs: Inputs = None,
    dim: Dims = None,
    against: Annotated[
        str, typer.Option(help="onnx (the reference evaluator, slow) or onnxruntime.")
    ] = "onnx",
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Largest difference over the largest value; by default 1e-4 for float32, "
            "1e-7 float64, 1e-2 float16, 5e-2 bfloat16, 0 integers.",
        ),
    ] = None,
    threads: Threads = None,
    seed: Seed = 0,
    show_all: Annotated[
        bool, typer.Option("--all", help="Print every value, not just those that differ.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare every intermediate value with a reference and name the first that differs."""
    from dataclasses import asdict

    from onnxjit.compare import REFERENCES, load_model
    from onnxjit.compare import compare as compare_values
    from onnxjit.importer import import_model

    if against not in REFERENCES:
        fail(f"--against takes {' or '.join(REFERENCES)}, not {against!r}")
    proto = load_model(model)
    feeds = feeds_for(_interface(import_model(model)), inputs, dim, seed)
    with compiling("compiling") as progress:
        found = compare_values(proto, feeds, against, tolerance, threads, progress)
    first = found.first
    if as_json:
        print_json(
            {
                "same": found.same,
                "first": first and first.name,
                "outputs": [asdict(row) for row in found.outputs],
                "values": [asdict(row) for row in found.values],
            }
        )
    else:
        columns = ["value", "made by", "dtype", "shape", "difference", ""]
        for title, rows in (("outputs", found.outputs), ("all values", found.values)):
            shown = [row for row in rows if show_all or title == "outputs" or not row.same][:50]
            if not shown:
                continue
            cells = [
                [r.name, r.node, r.dtype, list(r.shape), f"{r.error:.2e}",
                 r.note or ("" if r.same else "differs")]
                for r in shown
            ]  # fmt: skip
            print_table(title, columns, cells)
        print_text(_verdict(found, against))
    if not found.same:
        raise typer.Exit(FOUND)


def _verdict(found: Any, against: str) -> str:
    if found.same:
        return f"all {len(found.values)} values agree with {against}"
    if found.first is not None:
        row = found.first
        return f"first divergence from {against}: {row.name!r}, made by {row.node}"
    return (
        f"every value alone agrees with {against}, the whole model does not: "
        "look at fusion, layouts and memory, not at a node"
    )


def _interface(graph: Any) -> list[Any]:
    """The inputs of an imported graph, with the model's names for free dimensions."""
    from onnxjit.artifact import TensorInfo
    from onnxjit.dims import DimExpr

    def dim(d: Any) -> int | str | None:
        return (d.text or None) if isinstance(d, DimExpr) else d

    return [TensorInfo(v.name, v.dtype, tuple(map(dim, v.shape or ()))) for v in graph.inputs]


@app.command()
def demo(
    threads: Annotated[int, typer.Option(min=1, help="Threads of every engine.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to spend on runs.")] = 3.0,
    as_json: Json = False,
) -> None:
    """Compile the ResNet-50 that ships inside the onnx package, check it and time it."""
    from dataclasses import asdict

    from onnxjit.demo import TOLERANCE, demonstrate

    with errors.status("starting") as status:
        results = demonstrate(threads, seconds, lambda text: status.update(text))
    same = all(r.difference is None or r.difference <= TOLERANCE for r in results)
    if as_json:
        print_json({"same": same, "threads": threads, "engines": [asdict(r) for r in results]})
    else:
        rows = [
            [r.engine, r.version, spell_seconds(r.ready),
             spell_seconds(r.timing.minimum) if r.timing else "-",
             spell_seconds(r.timing.median) if r.timing else "-",
             "-" if r.difference is None else f"{r.difference:.1e}"]
            for r in results
        ]  # fmt: skip
        columns = ["engine", "version", "ready after", "minimum", "median", "difference"]
        print_table(f"ResNet-50, one image, {threads} thread(s)", columns, rows)
        print_text(
            "The outputs agree." if same else f"The outputs differ by more than {TOLERANCE}."
        )
    if not same:
        raise typer.Exit(FOUND)
