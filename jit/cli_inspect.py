"""`onnxjit inspect`: what became of a model, from the graph down to the assembly of a kernel."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from onnxjit.cli_output import (
    Dims,
    Json,
    Model,
    Threads,
    compiling,
    fail,
    print_json,
    print_table,
    print_text,
    sizes,
    spell_bytes,
)

WHAT = ("source", "definition", "schedule", "llvm", "asm")


def inspect(
    model: Model,
    kernel: Annotated[
        str | None, typer.Option(help="Print this kernel (a name of the kernels table).")
    ] = None,
    what: Annotated[str, typer.Option(help=f"With --kernel: {', '.join(WHAT)}.")] = "source",
    graph: Annotated[
        bool, typer.Option("--graph", help="Print the imported graph, node by node.")
    ] = False,
    passes: Annotated[
        bool, typer.Option("--passes", help="Print the program after each pass.")
    ] = False,
    dim: Dims = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show the graph, the partition, the kernels and the memory plan of a model."""
    if what not in WHAT:
        fail(f"--what takes {', '.join(WHAT)}, not {what!r}")
    if graph:
        from onnxjit.graph_text import graph_to_text
        from onnxjit.importer import import_model

        print_text(graph_to_text(import_model(model)).rstrip())
        return
    if passes:
        from onnxjit.report import passes as passes_of

        for name, program in passes_of(model):
            print_text(f"# after {name}\n{program}\n")
        return
    import onnxjit

    with compiling("compiling") as progress:
        compiled = onnxjit.compile(model, threads=threads, progress=progress)
    if kernel is not None:
        _print_kernel(compiled, kernel, what)
        return
    facts = describe(compiled, model, sizes(dim))
    if as_json:
        print_json(facts)
    else:
        _print_tables(facts)


def _print_kernel(compiled: Any, name: str, what: str) -> None:
    found = kernel_of(compiled, name)
    if what == "source":
        print_text(str(found))
    else:
        part = {"asm": "assembly", "schedule": "nest"}.get(what, what)
        print_text(getattr(found, part))


def kernel_of(compiled: Any, name: str) -> Any:
    """The kernel of a compiled model that is called `name`; fails with names that are like it."""
    found = compiled.kernels.get(name)
    if found is None:
        close = [n for n in compiled.kernels if name in n][:8] or list(compiled.kernels)[:8]
        fail(f"the model has no kernel {name!r}; it has {', '.join(close)}, ...")
    return found


def describe(compiled: Any, model: str, dims: dict[str, int]) -> dict[str, Any]:
    """Everything `inspect` prints, as JSON has it; free dimensions that `dims` lacks are 1."""
    from onnxjit.importer import import_model
    from onnxjit.runtime.plan import HostStep

    imported = import_model(model)
    operators = Counter(str(node.op) for node in imported.nodes)
    labels = {d.label for d in compiled.plan.dims}
    for name in dims:
        if name not in labels:
            has = ", ".join(sorted(map(repr, labels))) or "none"
            fail(f"the model has no free dimension {name!r}; it has {has}")
    used = {d.label or d.name: dims.get(d.label, 1) for d in compiled.plan.dims}
    rows, memory = _numbers(compiled, dims)
    return {
        "inputs": [v._asdict() for v in compiled.inputs],
        "outputs": [v._asdict() for v in compiled.outputs],
        "dims": used,
        "nodes": len(imported.nodes),
        "operators": dict(operators.most_common()),
        "partition": {
            "kernel steps": len(compiled.kernels),
            "distinct kernels": len({k.key for k in compiled.kernels.values()}),
            "host steps": [s.name for s in compiled.plan.steps if isinstance(s, HostStep)],
        },
        "kernels": rows,
        "memory": memory,
    }


def _numbers(compiled: Any, dims: dict[str, int]) -> tuple[list[Any], dict[str, Any]]:
    """Kernel rows and the memory plan at sizes `dims`; of a part of the plan whose sizes depend on
    data, nothing is known before a run."""
    import numpy as np

    from onnxjit.runtime.binding import Binding
    from onnxjit.runtime.stages import stages_of

    plan, kernels = compiled.plan, compiled.kernels
    from_inputs = {d.name: d for d in plan.dims if plan.buffers[d.source.buffer].kind == "input"}
    storage, stages = stages_of(plan)
    rows: list[dict[str, Any]] = []
    buffers: list[dict[str, Any]] = []
    arena = scratch = 0
    for stage in stages:
        binding = None
        if all(name in from_inputs for name in stage.dims):
            values = stage.table.evaluate(
                tuple(dims.get(from_inputs[name].label, 1) for name in stage.dims)
            )
            addresses = np.zeros(len(stage.steps), np.int64)
            binding = Binding(stage, values, addresses, compiled.threads)
            arena += binding.arena_bytes
            scratch = max(scratch, binding.scratch_bytes)
            sized = zip(stage.arena, binding.offsets.tolist(), stage.arena_bytes, strict=True)
            for b, offset, at in sized:
                first, last = storage.lives[b]
                buffers.append(
                    {"value": plan.buffers[b].label, "bytes": int(values[at]), "offset": offset,
                     "first": first, "last": last}
                )  # fmt: skip
        for position, step in enumerate(stage.steps):
            k = kernels[step.name]
            rows.append(
                {
                    "name": k.name,
                    "rule": k.rule,
                    "declined": dict(k.declined),
                    "notes": list(k.notes),
                    "origin": list(k.origin),
                    "flops": int(binding.flops[position]) if binding else None,
                    "bytes": int(binding.bytes[position]) if binding else None,
                    "tiles": int(binding.tiles[position]) if binding else None,
                    "key": k.key,
                }
            )
    constants = sum(int(plan.buffers[b].nbytes) for b in plan.constants())
    memory = {
        "constants": constants,
        "arena": int(arena),
        "scratch": int(scratch),
        "buffers": buffers,
    }
    return rows, memory


def _print_tables(facts: dict[str, Any]) -> None:
    def interface(side: str) -> list[list[Any]]:
        return [
            [side[:-1], v["name"], v["dtype"], f"({', '.join(map(str, v['shape']))})"]
            for v in facts[side]
        ]

    print_table(
        "interface", ["", "name", "dtype", "shape"], interface("inputs") + interface("outputs")
    )
    ops = ", ".join(f"{count} {name}" for name, count in facts["operators"].items())
    print_text(f"\ngraph: {facts['nodes']} nodes: {ops}")
    part = facts["partition"]
    hosts = part["host steps"]
    print_text(
        f"partition: {part['kernel steps']} kernel steps on the CPU "
        f"({part['distinct kernels']} distinct kernels), {len(hosts)} host steps"
        + (f": {', '.join(hosts)}" if hosts else "")
    )
    if facts["dims"]:
        print_text("sizes: " + ", ".join(f"{n}={v}" for n, v in facts["dims"].items()))
    rows = [
        [k["name"], k["rule"], _scaled(k["flops"]), _scaled(k["bytes"]), k["tiles"],
         _shortened(", ".join(k["origin"]))]
        for k in facts["kernels"]
    ]  # fmt: skip
    print_text("")
    print_table("kernels", ["name", "rule", "FLOP", "bytes", "tiles", "computes"], rows)
    memory = facts["memory"]
    print_text(
        f"\nmemory: constants {spell_bytes(memory['constants'])}, "
        f"arena {spell_bytes(memory['arena'])} for {len(memory['buffers'])} values of "
        f"{spell_bytes(sum(b['bytes'] for b in memory['buffers']))}, "
        f"scratch {spell_bytes(memory['scratch'])} a thread"
    )
    largest = sorted(memory["buffers"], key=lambda b: -b["bytes"])[:10]
    table = [
        [b["value"], spell_bytes(b["bytes"]), b["offset"], f"{b['first']}..{b['last']}"]
        for b in largest
    ]
    if table:
        print_table("the largest values", ["value", "size", "offset", "live in steps"], table)


def _scaled(n: int | None) -> str:
    if n is None:
        return "by data"
    for factor, prefix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= factor:
            return f"{n / factor:.1f} {prefix}"
    return str(n)


def _shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
