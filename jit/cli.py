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

from onnxjit import cli_bench_kernel, cli_cache, cli_inspect, cli_ops
from onnxjit.cli_output import (
    FOUND,
    Dims,
    Inputs,
    Json,
    Model,
    Seed,
    Threads,
    clean,
    compiling,
    errors,
    fail,
    pairs,
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


def feeds_for(
    inputs: Any, files: list[str] | None, dims: list[str] | None, seed: int
) -> dict[str, np.ndarray]:
    """Arrays for a model's inputs: the given files, and random ones for the others, whose free
    dimensions are those of the files where they share a name."""
    from onnxjit.bench import random_inputs

    paths = pairs(files, "--input")
    names = [v.name for v in inputs]
    for name in paths:
        if name not in names:
            fail(f"the model has no input {name!r}; it has {', '.join(map(repr, names))}")
    given = {name: _load(path) for name, path in paths.items()}
    known = sizes(dims)
    free = {d for v in inputs for d in v.shape if isinstance(d, str)}
    for name in known:
        if name not in free:
            has = ", ".join(sorted(map(repr, free))) or "none"
            fail(f"the model's inputs have no free dimension {name!r}; they have {has}")
    for v in inputs:
        if v.name in given and len(v.shape) == given[v.name].ndim:
            for dim, extent in zip(v.shape, given[v.name].shape, strict=True):
                if isinstance(dim, str):
                    known.setdefault(dim, extent)
    rest = random_inputs([v for v in inputs if v.name not in given], known, seed)
    return {name: given[name] if name in given else rest[name] for name in names}


def _load(path: str) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        fail(f"cannot read {path!r}: {error.strerror}")
    except (ValueError, EOFError):
        fail(f"{path!r} is not a .npy file of numbers")
    if not isinstance(array, np.ndarray):
        fail(f"{path!r} holds several arrays; one .npy file holds one input")
    return array


def _compiled(model: str, threads: int | None) -> Any:
    import onnxjit

    with compiling("compiling") as progress:
        return onnxjit.compile(model, threads=threads, progress=progress)


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
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compile a model and run it once."""
    compiled = _compiled(model, threads)
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
def bench(
    model: Model,
    inputs: Inputs = None,
    dim: Dims = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every engine.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to spend on runs.")] = 3.0,
    engine: Annotated[
        list[str] | None,
        typer.Option("--engine", help="Only these: onnxjit, onnxruntime, openvino."),
    ] = None,
    kernels: Annotated[int, typer.Option(min=0, help="How many kernels to list.")] = 15,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time a model, in turns with the other engines that are installed, and its kernels."""
    from onnxjit.bench import ENGINES, engine_version, take_turns
    from onnxjit.compare import difference

    for name in engine or ():
        if name not in ENGINES:
            fail(f"--engine takes {', '.join(ENGINES)}, not {name!r}")
        if engine_version(name) is None:
            fail(f"{name} is not installed")
    compiled = _compiled(model, threads)
    feeds = feeds_for(compiled.inputs, inputs, dim, seed)
    wanted = engine or [name for name in ENGINES if engine_version(name) is not None]
    own = _call(compiled, feeds)
    calls, far = {}, {}
    for name in wanted:
        try:
            call = ENGINES[name](model, threads).bind(feeds)
            pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(own, call(), strict=True)]
        except Exception as error:  # whatever an engine raises: the others are timed all the same
            if name == "onnxjit":
                raise
            errors.print(f"{name} cannot run the model: {clean(error)}", markup=False)
            continue
        calls[name] = call
        if name != "onnxjit":
            far[name] = max((difference(a, b) for a, b in pairs), default=0.0)
    timings = take_turns(calls, seconds)
    profile = compiled.profile(*[feeds[v.name] for v in compiled.inputs])
    data: dict[str, Any] = {
        "threads": threads,
        "engines": [
            {"engine": name, "version": engine_version(name), "minimum": t.minimum,
             "median": t.median, "runs": t.runs, "difference": far.get(name)}
            for name, t in timings.items()
        ],
        "kernels": [
            {"name": r.name, "seconds": r.seconds, "share": r.share, "gflops": r.gflops,
             "gbytes": r.gbytes}
            for r in sorted(profile.rows, key=lambda r: -r.seconds)
        ],
    }  # fmt: skip
    if as_json:
        print_json(data)
        return
    rows = [
        [name, engine_version(name), spell_seconds(t.minimum), spell_seconds(t.median), t.runs,
         f"{far[name]:.1e}" if name in far else "-"]
        for name, t in timings.items()
    ]  # fmt: skip
    columns = ["engine", "version", "minimum", "median", "runs", "difference"]
    print_table(f"one run, {threads} thread(s)", columns, rows)
    table = [
        [k["name"], spell_seconds(k["seconds"]), f"{k['share'] * 100:.1f}",
         f"{k['gflops']:.1f}", f"{k['gbytes']:.1f}"]
        for k in data["kernels"][:kernels]
    ]  # fmt: skip
    if kernels:
        columns = ["kernel", "time", "%", "GFLOP/s", "GB/s"]
        print_table(f"the slowest of {len(profile.rows)} kernel steps", columns, table)


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
