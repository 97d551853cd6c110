"""The engines that are compared: one row of `ENGINES` each, and an adapter that loads a model.

An adapter raises whatever its engine raises; `measure` makes that a row which says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

Feeds = Mapping[str, np.ndarray]
Call = Callable[[], Sequence[Any]]


_BFLOAT16 = frozenset({"avx512bf16", "amx-bf16", "bf16"})


class Unsupported(RuntimeError):
    """The engine cannot be compared under these conditions; the message says why."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model inside an engine. `bind(feeds)` gives a call without arguments that runs it once;
    `outputs` are the names of what the call returns; `model` is the engine's own object; `note` is
    a remark for the table."""

    bind: Callable[[Feeds], Call]
    outputs: tuple[str, ...]
    model: Any
    note: str = ""


@dataclass(frozen=True, slots=True)
class Engine:
    """A row of the table: `packages` are the distributions it needs, the first of which gives its
    version. One that is `always` compared has a row even where it is not installed. `precision` is
    that of its arithmetic: the fastest peer is sought among those that compute in float32."""

    load: Callable[[str, int], Loaded]
    packages: tuple[str, ...]
    always: bool = False
    precision: str = "float32"

    @property
    def missing(self) -> list[str]:
        """The packages it needs that are not installed."""
        return [name for name in self.packages if _version(name) is None]


def load_onnxjit(path: str, threads: int) -> Loaded:
    """onnxjit on the CPU with `threads` threads."""
    import onnxjit

    model = onnxjit.compile(path, threads=threads)
    return onnxjit_loaded(model)


def onnxjit_loaded(model: Any) -> Loaded:
    """A `CompiledModel` as a row of the comparison."""
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


def load_openvino(path: str, threads: int, precision: str = "f32") -> Loaded:
    """OpenVINO's CPU plugin with `threads` threads and a precision hint (its own default may be
    bfloat16)."""
    import openvino

    from onnxjit.codegen.target import host

    if precision == "bf16" and not host().features & _BFLOAT16:
        raise Unsupported("this processor has no bfloat16 instructions: it would only emulate them")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if used != precision:
        raise Unsupported(f"it computes in {used} on this processor, whatever the hint")
    request = compiled.create_infer_request()
    names = tuple(o.get_any_name() for o in compiled.outputs)

    def bind(feeds: Feeds) -> Call:
        given = dict(feeds)

        def call() -> Sequence[Any]:
            request.infer(given, share_inputs=True)
            return [request.get_output_tensor(i).data for i in range(len(names))]

        return call

    return Loaded(bind, names, compiled)


def _later(name: str) -> Callable[[str, int], Loaded]:
    """An adapter of `peers`, which is imported when it is used."""

    def load(path: str, threads: int) -> Loaded:
        from onnxjit.bench import peers

        return getattr(peers, name)(path, threads)

    return load


_IREE = ("iree-base-compiler", "iree-base-runtime")
_TORCH = ("torch", "onnx2torch")
ENGINES: dict[str, Engine] = {
    "onnxjit": Engine(load_onnxjit, ("onnxjit",), always=True),
    "onnxruntime": Engine(load_onnxruntime, ("onnxruntime",), always=True),
    "openvino": Engine(load_openvino, ("openvino",), always=True),
    "openvino-bf16": Engine(
        partial(load_openvino, precision="bf16"), ("openvino",), precision="bfloat16"
    ),
    "tract": Engine(_later("load_tract"), ("tract",)),
    "iree": Engine(_later("load_iree"), _IREE),
    "tvm": Engine(_later("load_tvm"), ("apache-tvm",)),
    # PyTorch reads no ONNX files: its rows are those of what onnx2torch makes of the model.
    "torch": Engine(_later("load_torch"), _TORCH),
    "torch-compiled": Engine(_later("load_torch_compiled"), _TORCH),
}


def engine_version(name: str) -> str | None:
    """The version of an engine (a key of `ENGINES`) or of a package, None where not installed."""
    engine = ENGINES.get(name)
    return _version(name if engine is None else engine.packages[0])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def wanted(asked: Sequence[str] | None = None) -> list[str]:
    """The engines to compare, onnxjit first: those asked for, else the usual ones and whatever
    others are installed. Raises KeyError, with the names there are, for one that is not known."""
    unknown = [name for name in asked or () if name not in ENGINES]
    if unknown:
        raise KeyError(f"no engine {unknown[0]!r}; there are {', '.join(ENGINES)}")
    if asked:
        return ["onnxjit", *(name for name in dict.fromkeys(asked) if name != "onnxjit")]
    return [name for name, engine in ENGINES.items() if engine.always or not engine.missing]
