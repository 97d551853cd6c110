"""`InferenceSession`: compiled models behind the interface of onnxruntime."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxjit.errors import InputError, ModelError
from onnxjit.session_errors import Fail, InvalidArgument, RuntimeException
from onnxjit.session_load import load, without_initializers
from onnxjit.session_options import RunOptions, SessionOptions
from onnxjit.session_profile import SessionProfile
from onnxjit.session_providers import (
    PROVIDER,
    get_all_providers,
    get_available_providers,
    normalized_providers,
)
from onnxjit.session_types import (
    ModelMetadata,
    NodeArg,
    OrtValue,
    array_dtype_text,
    same_type,
    type_text,
)

if TYPE_CHECKING:
    from onnxjit.artifact import TensorInfo
    from onnxjit.compiled import CompiledModel
    from onnxjit.session_binding import IOBinding

__all__ = [
    "InferenceSession", "get_all_providers", "get_available_providers", "get_device",
    "get_version_string", "set_default_logger_severity", "set_default_logger_verbosity",
]  # fmt: skip


def get_device() -> str:
    """The kind of device that models run on."""
    return "CPU"


def get_version_string() -> str:
    """The version of onnxjit."""
    from onnxjit import __version__

    return __version__


def set_default_logger_severity(severity: int) -> None:
    """Checked (0 to 4) and otherwise without effect: sessions raise errors and log nothing."""
    if not 0 <= severity <= 4:
        raise RuntimeError(f"Invalid logging severity {severity}: it is 0 to 4")


def set_default_logger_verbosity(level: int) -> None:
    """Without effect: sessions log nothing."""


class InferenceSession:
    """A model compiled for this machine, with onnxruntime's methods. Threads may share it.

    `path_or_bytes` is a path or the bytes of a model. `providers` may list any names; the ones that
    are not there are warned about. Raises the classes of `onnxjit.session_errors`.
    """

    def __init__(
        self,
        path_or_bytes: str | bytes | os.PathLike[str],
        sess_options: SessionOptions | None = None,
        providers: Sequence[str | tuple[str, dict[Any, Any]]] | None = None,
        provider_options: Sequence[dict[Any, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(path_or_bytes, str | bytes | os.PathLike):
            raise TypeError(f"Unable to load from type '{type(path_or_bytes)}'")
        self._source = path_or_bytes
        self._options = sess_options if sess_options is not None else SessionOptions()
        self._fallback = int(kwargs.get("enable_fallback", 1)) == 1
        self._lock = threading.Lock()
        self._profile: SessionProfile | None = None
        if self._options.enable_profiling:
            self._profile = SessionProfile(self._options.profile_file_prefix)
        self.set_providers(providers, provider_options)
        start = time.monotonic_ns()
        self._open(load(path_or_bytes, self._options))
        if self._profile is not None:
            self._profile.session("session_initialization", start)

    def _open(self, model: CompiledModel) -> None:
        self._model = model
        self._names = [info.name for info in model.inputs]
        self._inputs = {info.name: info for info in model.inputs}
        self._outputs = [info.name for info in model.outputs]
        self._positions = {name: i for i, name in enumerate(self._outputs)}
        self._overridable = [overridable_info(row) for row in model.metadata["overridable"]]
        self._overridden: dict[frozenset[str], InferenceSession] = {}
        self._pick = picker(self._names)
        # Nothing may hold back a timed run, so a session with a profile takes the long way.
        self._count = len(self._names) if self._profile is None else -1
        self._attempt = model.attempt

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: RunOptions | None = None,
    ) -> list[Any]:
        """The outputs called `output_names` (all of them when it is empty) for inputs by name.

        Inputs are arrays, nested lists, `OrtValue`s, lists of arrays for sequences. Raises
        ValueError for a missing input and `InvalidArgument` for what does not fit.
        """
        if not output_names and run_options is None:
            try:
                if len(input_feed) == self._count:
                    results = self._attempt(self._pick(input_feed))
                    if results is not None:
                        return results
            except (KeyError, TypeError):
                pass  # what is wrong is found out and said below
        return self._run(output_names, input_feed, run_options)

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        input_dict_ort_values: Mapping[str, OrtValue],
        run_options: RunOptions | None = None,
    ) -> list[OrtValue]:
        """`run` with `OrtValue`s in and out."""
        for value in input_dict_ort_values.values():
            if not isinstance(value, OrtValue):
                raise TypeError(f"expected an OrtValue, got {type(value).__name__}")
        return [OrtValue(v) for v in self.run(output_names, input_dict_ort_values, run_options)]

    def run_async(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        callback: Callable[[list[Any], Any, str], None],
        user_data: Any,
        run_options: RunOptions | None = None,
    ) -> None:
        """Runs on another thread, which then calls `callback(results, user_data, error_text)`."""
        self._check_given(list(input_feed.keys()))

        def work() -> None:
            try:
                results, error = self.run(output_names, input_feed, run_options), ""
            except Exception as failure:
                results, error = [], str(failure)
            callback(results, user_data, error)

        threading.Thread(target=work, name="onnxjit-async", daemon=True).start()

    def io_binding(self) -> IOBinding:
        """A binding of inputs and outputs to memory, for `run_with_iobinding`."""
        from onnxjit.session_binding import IOBinding

        return IOBinding(self)

    def run_with_iobinding(
        self, iobinding: IOBinding, run_options: RunOptions | None = None
    ) -> None:
        """Runs on bound inputs, into bound outputs."""
        iobinding.run(run_options)

    # --- the long way -------------------------------------------------------------------------

    def _run(
        self, output_names: Any, input_feed: Mapping[str, Any], run_options: RunOptions | None
    ) -> list[Any]:
        if run_options is not None and not isinstance(run_options, RunOptions):
            raise TypeError(f"run_options must be RunOptions, not {type(run_options).__name__}")
        given = list(input_feed.keys())
        self._check_given(given)
        wanted = self._wanted(output_names)
        if run_options is not None and run_options.terminate:
            raise Fail("Exiting due to terminate flag being set to true.")
        unknown = [n for n in given if n not in self._inputs]
        if unknown:
            names = {info.name for info in self._overridable}
            for name in unknown:
                if name not in names:
                    raise InvalidArgument(f"Invalid input name: {name}")
            return self._override(frozenset(unknown)).run(output_names, input_feed, run_options)
        arrays = [self._value(info, input_feed.get(info.name)) for info in self._model.inputs]
        positions = self._selected(wanted)
        start = time.monotonic_ns()
        try:
            results, steps = self._execute(arrays)
        except InputError as error:
            raise InvalidArgument(str(error)) from error
        except (ArithmeticError, LookupError, ValueError, ModelError) as error:
            raise RuntimeException(f"The model failed: {error}") from error
        if self._profile is not None:
            self._profile.run(start, steps)
        return results if positions is None else [results[p] for p in positions]

    def _execute(self, arrays: list[Any]) -> tuple[list[Any], Sequence[Any]]:
        """The results, and the times of the steps when the session has a profile."""
        if self._profile is None:
            return self._model.run(arrays), ()
        return self._model.timed(arrays)

    def _check_given(self, names: list[str]) -> None:
        missing = [
            n
            for n, info in self._inputs.items()
            if n not in names and not info.dtype.startswith("optional")
        ]
        if missing:
            raise ValueError(f"Required inputs ({missing}) are missing from input feed ({names}).")

    def _wanted(self, names: Any) -> list[str] | None:
        if not names:
            return None
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(
                f"run(): output_names must be a sequence of str, not {type(names).__name__}"
            )
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"run(): an output name is a {type(name).__name__}, not a str")
        return list(names)

    def _selected(self, names: list[str] | None) -> list[int] | None:
        if names is None or names == self._outputs:
            return None
        for name in names:
            if name not in self._positions:
                raise InvalidArgument(f"Invalid output name:{name}")
        return [self._positions[name] for name in names]

    def _value(self, info: TensorInfo, value: Any) -> Any:
        """An input as the model takes it, checked the way onnxruntime does and in its words."""
        if isinstance(value, OrtValue):
            value = value._value
        if info.dtype == "object" or not info.dtype.isidentifier():
            return value
        if isinstance(value, list):
            value = from_list(value, info.dtype)
        elif not isinstance(value, np.ndarray | np.generic):
            if not hasattr(value, "__array__"):
                raise RuntimeError(f"Unable to handle object of type {type(value)}")
            value = np.asarray(value)
        value = np.asarray(value)
        if not same_type(value, info.dtype):
            actual = type_text(array_dtype_text(value))
            raise InvalidArgument(
                f"Unexpected input data type. Actual: ({actual}) , "
                f"expected: ({type_text(info.dtype)})"
            )
        shape = info.shape
        if value.ndim != len(shape):
            if not shape and self._rank_unknown(info):
                return value
            raise InvalidArgument(
                f"Invalid rank for input: {info.name} Got: {value.ndim} Expected: {len(shape)} "
                "Please fix either the inputs/outputs or the model."
            )
        wrong = [
            f" index: {axis} Got: {got} Expected: {want}\n"
            for axis, (got, want) in enumerate(zip(value.shape, shape, strict=True))
            if isinstance(want, int) and got != want
        ]
        if wrong:
            raise InvalidArgument(
                f"Got invalid dimensions for input: {info.name} for the following indices\n"
                f"{''.join(wrong)} Please fix either the inputs/outputs or the model."
            )
        return value

    def _rank_unknown(self, info: TensorInfo) -> bool:
        plan = self._model.plan
        return plan.buffers[plan.inputs[self._names.index(info.name)]].dtype == "object"

    def _override(self, names: frozenset[str]) -> InferenceSession:
        """A session in which initializers that the model lets callers replace are inputs."""
        with self._lock:
            session = self._overridden.get(names)
        if session is None:
            session = InferenceSession(without_initializers(self._source, names), self._options)
            with self._lock:
                session = self._overridden.setdefault(names, session)
        return session

    # --- what the model is --------------------------------------------------------------------

    def get_inputs(self) -> list[NodeArg]:
        """The required inputs."""
        return [node_arg(info) for info in self._model.inputs]

    def get_outputs(self) -> list[NodeArg]:
        """The outputs; a shape that the model does not declare is the inferred one."""
        return [node_arg(info) for info in self._model.outputs]

    def get_overridable_initializers(self) -> list[NodeArg]:
        """The initializers that are listed as inputs too: `run` may be given other values."""
        return list(self._overridable)

    def get_modelmeta(self) -> ModelMetadata:
        """What the model file says of itself."""
        m = self._model.metadata
        return ModelMetadata(
            m["producer_name"],
            m["graph_name"],
            m["domain"],
            m["doc_string"],
            m["graph_doc_string"],
            m["model_version"] or 2**63 - 1,
            dict(m["metadata_props"]),
        )

    def get_session_options(self) -> SessionOptions:
        """The options that the session was made with."""
        return self._options

    def get_providers(self) -> list[str]:
        """The execution providers in use."""
        return [PROVIDER]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        """The options of each provider in use."""
        return {PROVIDER: dict(self._provider_options)}

    def set_providers(
        self,
        providers: Sequence[str | tuple[str, dict[Any, Any]]] | None = None,
        provider_options: Sequence[dict[Any, Any]] | None = None,
    ) -> None:
        """Checks providers and their options; the CPU is the one there is."""
        chosen = normalized_providers(providers, provider_options)
        self._provider_options = chosen.get(PROVIDER, {})

    def enable_fallback(self) -> None:
        """Kept for programs that call it: there is nothing to fall back from."""
        self._fallback = True

    def disable_fallback(self) -> None:
        """See `enable_fallback`."""
        self._fallback = False

    def end_profiling(self) -> str:
        """Writes the profile of the runs so far (Chrome trace events) and gives the file's name;
        "" when profiling is not enabled or has ended."""
        if self._profile is None:
            return ""
        profile, self._profile = self._profile, None
        self._count = len(self._names)
        return profile.write()

    def get_profiling_start_time_ns(self) -> int:
        """When profiling began, on the clock of time.monotonic_ns; 0 when it did not."""
        return 0 if self._profile is None else self._profile.start

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle 'InferenceSession' object")


def picker(names: list[str]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """A function that takes the values of `names` from a mapping."""
    if len(names) > 1:
        return itemgetter(*names)
    if not names:
        return lambda feed: ()
    (name,) = names
    return lambda feed: (feed[name],)


def from_list(value: list[Any], dtype: str) -> np.ndarray:
    """A nested list as an array of the declared type."""
    from onnxjit.runtime.plan import dtype_of

    try:
        return np.array(value, dtype_of(dtype))
    except (TypeError, ValueError, OverflowError):
        raise RuntimeError("Could not create tensor from given input list") from None


def node_arg(info: TensorInfo) -> NodeArg:
    return NodeArg(info.name, type_text(info.dtype), list(info.shape))


def overridable_info(row: Sequence[Any]) -> NodeArg:
    name, dtype, shape = row
    return NodeArg(name, type_text(dtype), list(shape))
