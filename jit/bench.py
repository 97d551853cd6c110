"""Times engines on one model: in turns, in one process, so that all meet the same conditions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import numpy as np

Feeds = Mapping[str, np.ndarray]
Call = Callable[[], Sequence[Any]]

_POLL = 0.002
_QUIET = 0.05  # share of a poll: below it no thread spins any more
_PATIENCE = 0.25


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model inside an engine. `bind(feeds)` gives a call without arguments that runs it once;
    `outputs` are the names of what the call returns; `model` is the engine's own object."""

    bind: Callable[[Feeds], Call]
    outputs: tuple[str, ...]
    model: Any


def load_onnxjit(path: str, threads: int) -> Loaded:
    """onnxjit on the CPU with `threads` threads."""
    import onnxjit

    model = onnxjit.compile(path, threads=threads)
    names = [v.name for v in model.inputs]
    single = len(model.outputs) == 1

    def bind(feeds: Feeds) -> Call:
        arrays = [feeds[n] for n in names]
        if single:
            return lambda: (model(*arrays),)
        return lambda: model(*arrays)

    return Loaded(bind, tuple(v.name for v in model.outputs), model)


def load_onnxruntime(path: str, threads: int) -> Loaded:
    """ONNX Runtime's CPU provider with all optimisations and `threads` threads."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def bind(feeds: Feeds) -> Call:
        given = dict(feeds)
        return lambda: session.run(None, given)

    return Loaded(bind, tuple(v.name for v in session.get_outputs()), session)


def load_openvino(path: str, threads: int) -> Loaded:
    """OpenVINO's CPU plugin in float32 (its default may be bfloat16) with `threads` threads."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()
    names = tuple(o.get_any_name() for o in compiled.outputs)

    def bind(feeds: Feeds) -> Call:
        given = dict(feeds)

        def call() -> Sequence[Any]:
            request.infer(given, share_inputs=True)
            return [request.get_output_tensor(i).data for i in range(len(names))]

        return call

    return Loaded(bind, names, compiled)


ENGINES: dict[str, Callable[[str, int], Loaded]] = {
    "onnxjit": load_onnxjit,
    "onnxruntime": load_onnxruntime,
    "openvino": load_openvino,
}


def engine_version(name: str) -> str | None:
    """The version of an engine's package, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of single runs: the least, the median, and how many there were."""

    minimum: float
    median: float
    runs: int


def take_turns(
    calls: Mapping[str, Call], seconds: float = 3.0, burst: float = 0.02, rounds: int = 5
) -> dict[str, Timing]:
    """Times calls against each other for about `seconds` in all, at least `rounds` rounds.

    In each round every call gets one turn: a pause until the threads of the engine before have
    stopped spinning, then runs for about `burst` seconds (two at least: the first one wakes the
    engine's threads and caches). The order rotates from round to round, so that no call always
    follows the same other. All runs count.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    clock = time.perf_counter
    for call in calls.values():
        call()
    end = clock() + seconds
    done = 0
    while done < rounds or clock() < end:
        for position in range(len(names)):
            name = names[(position + done) % len(names)]
            call, rows = calls[name], times[name]
            settle()
            stop = clock() + burst
            turn = 0
            while turn < 2 or clock() < stop:
                begin = clock()
                call()
                rows.append(clock() - begin)
                turn += 1
        done += 1
    return {name: Timing(min(rows), median(rows), len(rows)) for name, rows in times.items()}


def settle() -> None:
    """Waits until no thread of this process is busy any more, a quarter of a second at most.

    The worker threads of onnxruntime spin for about 45 ms after a run, on cores that the next
    engine is about to use.
    """
    end = time.perf_counter() + _PATIENCE
    while time.perf_counter() < end:
        begin, busy = time.perf_counter(), time.process_time()
        time.sleep(_POLL)
        if time.process_time() - busy < _QUIET * (time.perf_counter() - begin):
            return


def random_inputs(
    inputs: Sequence[Any], dims: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Arrays for inputs with `name`, `dtype` and `shape`: floats from the normal distribution,
    integers and booleans 0 or 1 (valid as an index, an id and a mask alike), strings of a letter.

    `dims` gives sizes to the model's free dimensions; one that it does not name is 1.
    """
    rng = np.random.default_rng(seed)
    sizes = dict(dims or {})
    return {v.name: _random(rng, v.dtype, [_size(d, sizes) for d in v.shape]) for v in inputs}


def _size(dim: int | str | None, sizes: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else sizes.get(dim or "", 1)


def _random(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> np.ndarray:
    if dtype == "string":
        return np.full(shape, "a", dtype=object)
    if dtype in ("bool",) or dtype.startswith(("int", "uint")):
        return rng.integers(0, 2, shape).astype(dtype)
    from onnxjit.runtime.plan import dtype_of

    return rng.standard_normal(shape).astype(dtype_of(dtype))
