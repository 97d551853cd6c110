"""What a second thread gains, and what there is to gain: 1 to 2 threads, in processes of their own.

Two cores share their last cache, memory and power, so that not even two programs that know nothing
of each other run twice as fast as one. So there are three kinds of run of each engine, in turns:

- one process with one thread, alone;
- one process with two threads: its speed over that of the first is the *scaling*;
- two processes with one thread each at the same time: their speeds together over that of the first
  are the *ceiling*, what two threads could gain if they never waited and shared no data.

Least times over all turns, as of a quiet machine: a run on two threads waits for whatever
interrupts either. By default on models that compute long enough to be worth dividing.
"""

from __future__ import annotations

import multiprocessing
import time
from argparse import Namespace
from collections.abc import Mapping
from multiprocessing.connection import Connection
from statistics import geometric_mean
from typing import Any

import numpy as np

from benchmarks import zoo
from benchmarks.record import write
from onnxjit.bench.engines import ENGINES
from onnxjit.runtime.threads import available_threads

COMPARED = ("onnxjit", "onnxruntime")
MODELS = """light_densenet121 light_vgg19 resnet50 mobilenetv2 convnext_tiny swin_tiny
    vit_base16_dyn bert_base_dyn whisper_tiny_encoder unet32_dyn""".split()
TURNS = 10
REST = 0.02  # seconds in which spinning threads of the engine before come to rest


def main(arguments: Namespace) -> None:
    if available_threads() < 2:
        raise SystemExit("two cores are needed")
    arguments.only = arguments.only or MODELS
    rows = []
    for name in zoo.selected(arguments):
        model = zoo.path(arguments.models, name)
        assert model is not None
        inputs = zoo.inputs(arguments.models, name)
        row: dict[str, Any] = {"model": name, "engines": {}, "failures": {}}
        for engine in COMPARED:
            try:
                row["engines"][engine] = measure(engine, model, inputs, arguments.seconds / TURNS)
            except EOFError:
                row["failures"][engine] = "its process failed"
        rows.append(row)
        cells = [
            f"{engine} {found['scaling']:.2f} of {found['ceiling']:.2f}"
            for engine, found in row["engines"].items()
        ]
        print(f"{name:<24} {'; '.join([*cells, *row['failures'].values()])}", flush=True)
    summary = {
        engine: {
            fact: geometric_mean(
                [r["engines"][engine][fact] for r in rows if engine in r["engines"]]
            )
            for fact in ("scaling", "ceiling")
        }
        for engine in COMPARED
        if any(engine in r["engines"] for r in rows)
    }
    print("geometric means", summary)
    write(arguments, {"summary": summary, "rows": rows})


def measure(
    engine: str, model: str, inputs: Mapping[str, np.ndarray], seconds: float
) -> dict[str, float]:
    """Scaling and ceiling of an engine; `seconds` is what each kind of run takes in a turn."""
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    for threads in (1, 1, 2):
        mine, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, engine, model, dict(inputs), threads), daemon=True
        )
        process.start()
        theirs.close()
        ends.append(mine)
        processes.append(process)
    try:
        for end in ends:
            end.recv()
        first, second, both = ends
        turns = [
            (*_timed([first], seconds), *_timed([both], seconds), *_timed([first, second], seconds))
            for _ in range(TURNS)
        ]
        alone, threads, *together = map(min, zip(*turns, strict=True))
        ceiling = sum(alone / t for t in together)
        return {"scaling": alone / threads, "ceiling": ceiling, "seconds": alone}
    finally:
        for process in processes:
            process.kill()


def _timed(ends: list[Connection], seconds: float) -> list[float]:
    """Least seconds of a run in each process, all at the same time."""
    time.sleep(REST)
    for end in ends:
        end.send(seconds)
    return [end.recv() for end in ends]


def _serve(
    end: Connection, engine: str, model: str, inputs: dict[str, np.ndarray], threads: int
) -> None:
    call = ENGINES[engine].load(model, threads).bind(inputs)
    call()
    end.send(None)
    while True:
        stop, times = time.perf_counter() + end.recv(), []
        while not times or time.perf_counter() < stop:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        end.send(min(times))
