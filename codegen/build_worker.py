"""From a kernel's source to its object file, and the loop of the processes that do it.

The IR of a kernel arrives unoptimised and is optimised here, with our own pipeline: Numba's would
run its reference counting passes, verify twice and keep the module for Python callers.

A worker process reads jobs from its standard input and answers on its standard output, one frame
each: the lengths of a JSON header and of a body as two little-endian 32-bit numbers, then both.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import json
import os
import struct
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any, BinaryIO

from onnxjit.codegen.dialect_table import linked
from onnxjit.codegen.target import Target, host, target_machine

FRAME = struct.Struct("<II")

_MATH = (
    "acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp2 expm1 "
    "fabs floor fma fmax fmin fmod hypot ldexp lgamma log log10 log1p log2 lrint nearbyint pow "
    "remainder rint round roundeven sin sincos sinh sqrt tan tanh tgamma trunc"
).split()
# What a kernel may call without saying so: LLVM makes these calls out of loops and intrinsics.
LIBRARY_SYMBOLS = frozenset(
    ["bzero", "__bzero", "memcpy", "memmove", "memset", "memset_pattern16"]
    + [name + suffix for name in _MATH for suffix in ("", "f")]
)


def perform(job: Mapping[str, Any], target: Target) -> bytes:
    """The result of one job, whose field "do" says what to make.

    - "tile": the object file of the micro-kernel `symbol`.
    - "words": the object file of the functions `symbols` of the text `text`, in the language of
      `word_compiler`.
    - "object": an object file that defines `symbol`, the function `kernel` of the source `text`,
      called `file` in tracebacks. `externals` are the micro-kernels it may call, and what object
      files call them; `wide` lets LLVM choose 512-bit vectors.
    - "llvm", "asm": that kernel's optimised LLVM IR, or its assembly, in UTF-8.

    Raises ValueError when a kernel needs other symbols than its micro-kernels and the functions of
    libc and libm, and whatever the dialect raises on a bad source.
    """
    if job["do"] == "tile":
        from onnxjit.codegen import microkernels

        return bytes(microkernels.object_code(job["symbol"], target, linked(job["symbol"])))
    if job["do"] == "words":
        from onnxjit.codegen.sync_intrinsics import object_code

        return object_code(job["text"], job["symbols"], target)
    machine = _machine(target, job["wide"])
    module = _optimised(job, target, machine)
    if job["do"] == "llvm":
        return str(module).encode()
    if job["do"] == "asm":
        return str(machine.emit_assembly(module)).encode()
    image = bytes(machine.emit_object(module))
    if target.triple == host().triple:
        _check_linkable(image, job)
    return image


def read_frame(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next frame of a pipe, None at its end."""
    head = stream.read(FRAME.size)
    if len(head) < FRAME.size:
        return None
    header_bytes, body_bytes = FRAME.unpack(head)
    content = stream.read(header_bytes + body_bytes)
    if len(content) < header_bytes + body_bytes:
        return None
    return json.loads(content[:header_bytes]), content[header_bytes:]


def write_frame(stream: BinaryIO, header: Mapping[str, Any], body: bytes = b"") -> None:
    """Send a frame; raises OSError when the other side is gone."""
    encoded = json.dumps(dict(header)).encode()
    stream.write(FRAME.pack(len(encoded), len(body)) + encoded + body)
    stream.flush()


def pack_target(target: Target) -> dict[str, Any]:
    """A target in JSON's types."""
    return {**target._asdict(), "features": sorted(target.features)}


def unpack_target(fields: dict[str, Any]) -> Target:
    """The inverse of `pack_target`."""
    return Target(**{**fields, "features": frozenset(fields["features"])})


def serve(hello: dict[str, Any]) -> None:
    """The life of a worker: jobs in, answers out, until the pipe closes or the parent is gone."""
    os.nice(hello["nice"])
    faulthandler.enable()
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    # Whatever prints, prints to the log that the parent reads when this process dies.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    target = unpack_target(hello["target"])
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        write_frame(answers, {"file": os.path.abspath(__file__)})
        _warm_up(target)
        # What is there stays. The objects of a compilation refer to each other, and most of them
        # are alive until it ends: looking for garbage before that is in vain.
        gc.freeze()
        gc.disable()
        while (frame := read_frame(sys.stdin.buffer)) is not None:
            try:
                header, body = {"ok": True}, perform(frame[0], target)
            except BaseException:
                header, body = {"ok": False}, traceback.format_exc().encode()
            write_frame(answers, header, body)
            gc.collect(0)


def _warm_up(target: Target) -> None:
    """Import what the first job needs, while the parent is still busy with its model."""
    from onnxjit.codegen import dialect

    del dialect
    _machine(target, False)


def _watch_parent(parent: int) -> None:
    # The pipe's end does not tell when a fork of the parent holds it open, nor during a compile.
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


@functools.lru_cache(8)
def _machine(target: Target, wide: bool) -> Any:
    _interleave_long_loops()
    return target_machine(target, wide=wide)


INTERLEAVED_COST = 300
"""LLVM's estimate of a loop body up to which the vectoriser interleaves iterations."""


@functools.cache
def _interleave_long_loops() -> None:
    """Let long loop bodies be interleaved as short ones are, as far as registers last.

    An elementary function is one chain of dependent operations, each of which waits for the one
    before it; of a body of 30 the scheduler of a core sees three iterations at a time, too few to
    fill the ports. With two or more in turns, exp runs 1.8, erf 1.6, tanh 1.5 times as fast.
    """
    import llvmlite.binding as llvm

    llvm.set_option("onnxjit", f"-small-loop-cost={INTERLEAVED_COST}")


def _optimised(job: Mapping[str, Any], target: Target, machine: Any) -> Any:
    import llvmlite.binding as llvm

    from onnxjit.codegen import dialect

    text = dialect.compile_ir(job["text"], job["externals"], job["file"])
    # A context of its own, so that types and constants go with the module.
    module = llvm.parse_assembly(text, llvm.create_context())
    module.triple = target.triple
    module.data_layout = str(machine.target_data)
    for function in module.functions:
        if function.name == "kernel":
            function.name = job["symbol"]
            function.linkage = "external"
        elif function.name in job["externals"]:
            function.name = job["externals"][function.name]
        elif not function.is_declaration:
            function.linkage = "internal"
        if not function.name.startswith("llvm."):
            # Nothing raises, so no unwind tables: a fifth of the object, and time when linking.
            function.add_function_attribute("nounwind")
    for variable in module.global_variables:
        if not variable.is_declaration:
            variable.linkage = "internal"
    module.verify()
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = True
    tuning.slp_vectorization = True
    tuning.loop_interleaving = True
    # Unrolling runs before vectorisation and turns short constant loops into scalar code.
    tuning.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    _check_symbols(module, job)
    return module


def _check_symbols(module: Any, job: Mapping[str, Any]) -> None:
    values = [*module.functions, *module.global_variables]
    known = LIBRARY_SYMBOLS.union(job["externals"].values())
    foreign = [
        value.name
        for value in values
        if value.is_declaration and not value.name.startswith("llvm.") and value.name not in known
    ]
    if foreign:
        raise ValueError(f"the kernel refers to undefined symbols: {', '.join(foreign)}")
    if not any(value.name == job["symbol"] and not value.is_declaration for value in values):
        raise ValueError("the dialect's IR defines no function called kernel")


def _check_linkable(image: bytes, job: Mapping[str, Any]) -> None:
    """Find the calls that the code generator made up itself, such as those to compiler-rt."""
    import llvmlite.binding as llvm

    jit = llvm.create_lljit_compiler(use_jit_link=True, suppress_errors=True)
    library = llvm.JITLibraryBuilder().add_object_img(image).add_current_process()
    for symbol in job["externals"].values():
        library.import_symbol(symbol, 1)
    try:
        library.export_symbol(job["symbol"]).link(jit, job["symbol"])
    except RuntimeError as error:
        raise ValueError(f"the kernel's object file cannot be linked: {error}") from error
