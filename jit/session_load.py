"""Models for sessions: compiled with a session's options, errors as onnxruntime words them."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from onnxjit import session_errors
from onnxjit.errors import ModelError, NotAModelError, UnsupportedOperators
from onnxjit.session_errors import InvalidArgument, InvalidGraph, InvalidProtobuf, NoSuchFile
from onnxjit.session_options import SessionOptions

TUNE = "onnxjit.tune"

if TYPE_CHECKING:
    from onnxjit.compiled import CompiledModel


def load(source: str | bytes | os.PathLike[str], options: SessionOptions) -> CompiledModel:
    """Compiles a model with the options of a session, its errors as sessions have them."""
    from onnxjit.api import compile

    path = None if isinstance(source, bytes) else os.fspath(source)
    if path is not None and not os.path.exists(path):
        raise NoSuchFile(f"Load model from {path} failed:Load model {path} failed. "
                         "File doesn't exist")  # fmt: skip
    if source == b"":
        raise InvalidArgument("No graph was found in the protobuf.")
    if not -1 <= options.log_severity_level <= 4:
        raise RuntimeError(
            "Invalid session log severity level. Not a valid onnxruntime::logging::Severity "
            f"value: {options.log_severity_level}"
        )
    threads = options.intra_op_num_threads if options.intra_op_num_threads > 0 else None
    try:
        overrides = free_dimensions(source, options)
        seconds = tuning_seconds(options)
        return compile(source, device="cpu", threads=threads, overrides=overrides, tune=seconds)
    except NotAModelError as error:
        text = "Failed to load model because protobuf parsing failed."
        if path is not None:
            text = f"Load model from {path} failed:Protobuf parsing failed."
        raise InvalidProtobuf(text) from error
    except UnsupportedOperators as error:
        lines = (
            f"Could not find an implementation for {n.op}({n.version}) node with name '{n.name}': "
            f"{n.reason}"
            for n in error.nodes
        )
        raise session_errors.NotImplemented("\n".join(lines)) from error
    except ModelError as error:
        if path is not None:
            raise InvalidGraph(f"Load model from {path} failed:{error}") from error
        raise InvalidGraph(f"This is an invalid model. {error}") from error


def tuning_seconds(options: SessionOptions) -> float:
    """Seconds to spend on tuning, from the configuration entry `onnxjit.tune`."""
    text = options._entries.get(TUNE, "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise InvalidArgument(f"{TUNE} takes a number of seconds, not {text!r}")
    return seconds


def free_dimensions(
    source: str | bytes | os.PathLike[str], options: SessionOptions
) -> dict[str, int]:
    """The overrides that concern dimensions of the model's inputs, by name."""
    if not options._overrides and not options._denotations:
        return {}
    chosen: dict[str, int] = {}
    for value in read_proto(source, external=False).graph.input:
        for dim in value.type.tensor_type.shape.dim:
            name = dim.dim_param
            if name in options._overrides:
                chosen[name] = options._overrides[name]
            elif dim.denotation in options._denotations and name:
                chosen[name] = options._denotations[dim.denotation]
    return chosen


def read_proto(source: str | bytes | os.PathLike[str], external: bool) -> Any:
    """The ModelProto of a model. Raises `NotAModelError`."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        if isinstance(source, bytes):
            return onnx.load_from_string(source)
        return onnx.load(os.fspath(source), load_external_data=external)
    except DecodeError as error:
        raise NotAModelError(str(error)) from error


def without_initializers(source: str | bytes | os.PathLike[str], names: frozenset[str]) -> bytes:
    """The model in which the initializers called `names` are inputs only."""
    model = read_proto(source, external=True)
    kept = [t for t in model.graph.initializer if t.name not in names]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return bytes(model.SerializeToString())
