"""Drives a compilation: import, passes, code generation, parallel build, packing, linking."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnxjit.codegen.build import Builder, Source
from onnxjit.codegen.cache import Cache
from onnxjit.codegen.packing import pack
from onnxjit.codegen.target import Target, host, target_machine
from onnxjit.codegen_calls import Generated, generate
from onnxjit.importer import import_model
from onnxjit.passes import run_pipeline
from onnxjit.program import Program

Progress = Callable[[int, int], None]

_executor_lock = threading.Lock()


def executor_object(target: Target, cache: Cache | None) -> bytes:
    """The plan executor's object file, built once per machine and cached."""
    from onnxjit.codegen.build import key
    from onnxjit.runtime.executor_source import SOURCE, SYMBOLS

    name = key(Source(SOURCE, tuple(sorted(SYMBOLS.values()))), target)
    found = cache.get("kernels", name) if cache is not None else None
    if found is not None:
        return found
    with _executor_lock:
        import llvmlite.binding as llvm

        from onnxjit.codegen.sync_intrinsics import executor_ir

        machine = target_machine(target)
        module = llvm.parse_assembly(executor_ir(SOURCE, SYMBOLS))
        module.triple = target.triple
        options = llvm.create_pipeline_tuning_options(speed_level=3)
        builder = llvm.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
        data = machine.emit_object(module)
    if cache is not None:
        cache.put("kernels", name, data, source=SOURCE)
    return data


class Artifacts:
    """All parts of a compiled model, before it is loaded."""

    def __init__(
        self,
        program: Program,
        generated: Generated,
        objects: dict[str, bytes],
        constants: list[np.ndarray],
    ) -> None:
        self.program = program
        self.generated = generated
        self.objects = objects
        self.constants = constants


def build_model(
    model: Any,
    *,
    overrides: Mapping[str, int] | None = None,
    target: Target | None = None,
    cache: Cache | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
    observe: Callable[[str, Program], None] | None = None,
) -> tuple[Any, Artifacts]:
    """Compiles a model; returns the imported graph and the artifacts."""
    target = target or host()
    with Builder(target, jobs, cache) as builder:
        builder.start()
        graph = import_model(model, overrides=overrides)
        program = run_pipeline(graph, target, observe)
        generated = generate(program, target)
        distinct = {s.text: s for s in generated.sources}
        ordered = sorted(distinct.values(), key=lambda s: -len(s.text))
        keys = [builder.submit(s) for s in ordered]
        symbols = sorted({x for s in ordered for x in s.symbols})
        constants = pack_constants(program, generated)
        objects: dict[str, bytes] = {}
        for n, k in enumerate(keys):
            objects[k] = builder.result(k)
            if progress is not None:
                progress(n + 1, len(keys))
        objects.update(builder.tile_objects(symbols))
        objects["executor"] = executor_object(target, cache)
    return graph, Artifacts(program, generated, objects, constants)


def pack_constants(program: Program, generated: Generated) -> list[np.ndarray]:
    """The plan's constants as flat or shaped C-contiguous arrays."""
    out = []
    for v in generated.constants:
        q = generated.packings.get(v)
        if q is None:
            data = program.constants[v]
            out.append(data if data.flags.c_contiguous else np.ascontiguousarray(data))
        else:
            source = program.constants[q.buffer]
            flat = source.reshape(-1) if source.flags.c_contiguous else np.ravel(source)
            out.append(pack(flat, q))
    return out
