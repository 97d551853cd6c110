"""A compiled model: called with arrays, asked about its kernels, pickled, closed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from onnxjit.artifact import Artifact, TensorInfo
from onnxjit.deferred import host_functions
from onnxjit.errors import DeviceError, InputError, ModelError, OnnxJitError
from onnxjit.outputs import field_names, output_type
from onnxjit.runtime.executor import AssumptionError, Executable
from onnxjit.runtime.executor import InputError as RuntimeInputError
from onnxjit.runtime.link import link
from onnxjit.runtime.plan import Plan, dtype_of

if TYPE_CHECKING:
    from onnxjit.api import Request
    from onnxjit.kernels import Kernels
    from onnxjit.report import Profile
    from onnxjit.runtime.profile import StepTime

Shapes = tuple[tuple[int, ...], ...]


class CompiledModel:
    """A model ready to run. Safe to call from several threads; the GIL is free while it computes.

    Call it with arrays in the order of `inputs`, or by name: `model(x=a)`, `model({"a/b": a})`.
    The result is one array, or a named tuple when the model has several outputs.
    """

    def __init__(
        self,
        artifact: Artifact,
        threads: int | None = None,
        request: Request | None = None,
        seconds: float = 0.0,
        found: bool = False,
    ) -> None:
        self.inputs: tuple[TensorInfo, ...] = artifact.inputs
        self.outputs: tuple[TensorInfo, ...] = artifact.outputs
        self.seconds = seconds
        """What compiling or loading took."""
        self.from_cache = found
        self._artifact = artifact
        self._request = request
        self._host = _host_functions(artifact, threads, request)
        self._executable = _load(artifact, threads, self._host)
        self._names = {info.name: i for i, info in enumerate(self.inputs)}
        self._single = len(self.outputs) == 1
        self._type = output_type(field_names([info.name for info in self.outputs]))
        self._special: dict[Shapes, Executable] = {}
        self._artifacts: dict[Shapes, Artifact] = {}
        self._lock = threading.Lock()
        self._observer: Callable[[Sequence[Any]], None] | None = None

    def __call__(self, *arrays: Any, **named: Any) -> Any:
        """Run the model. Raises `InputError` for inputs that do not fit it."""
        if named or (arrays and type(arrays[0]) is dict):
            results = self._by_name(arrays, named)
        else:
            attempt = self._executable.attempt(arrays)
            results = self.run(self.ordered(arrays, named)) if attempt is None else attempt
        return results[0] if self._single else self._type(results)

    def feed(self, values: Mapping[str, Any]) -> list[np.ndarray]:
        """Run the model on inputs by name; the outputs in order, as a list."""
        return self._by_name((), values)

    def _by_name(self, arrays: tuple[Any, ...], named: Mapping[str, Any]) -> list[np.ndarray]:
        if not arrays and len(named) == len(self._names):
            try:
                picked = tuple([named[name] for name in self._names])
            except KeyError:
                picked = None
            if picked is not None:
                results = self._executable.attempt(picked)
                return self.run(picked) if results is None else results
        return self.run(self.ordered(arrays, named))

    def run(self, arrays: Sequence[Any]) -> list[np.ndarray]:
        """Run the model on inputs in order; the outputs in order, as a list."""
        executable, prepared = self._prepare(arrays)
        try:
            results = executable(*prepared)
        except AssumptionError as error:
            results = self._specialise(prepared, error)(*prepared)
        except RuntimeInputError as error:
            raise InputError(str(error)) from None
        if self._observer is not None:
            observer, self._observer = self._observer, None
            observer(prepared)
        return results

    def observe_first_run(self, observer: Callable[[Sequence[Any]], None]) -> None:
        """Have `observer` called once, after the next run, with the inputs in order."""
        # A first run cannot be one that `attempt` takes.
        self._observer = observer

    def attempt(self, arrays: tuple[Any, ...]) -> list[np.ndarray] | None:
        """`run` if the inputs are just like the last ones; else None, and nothing has run."""
        return self._executable.attempt(arrays)

    def timed(self, arrays: Sequence[Any]) -> tuple[list[np.ndarray], list[StepTime]]:
        """`run` with a clock around every step: the outputs, and a row for each step."""
        executable, prepared = self._prepare(arrays)
        try:
            return executable.profile(prepared)
        except AssumptionError as error:
            return self._specialise(prepared, error).profile(prepared)
        except RuntimeInputError as error:
            raise InputError(str(error)) from None

    def ordered(self, arrays: Sequence[Any], named: Mapping[str, Any]) -> Sequence[Any]:
        """Arguments by position and by name (or in one mapping) in the order of `inputs`."""
        first = arrays[0] if len(arrays) == 1 else None
        if isinstance(first, Mapping):
            arrays, named = (), {**first, **named}
        if not named:
            if len(arrays) != len(self.inputs):
                raise InputError(
                    f"the model takes {len(self.inputs)} input(s) ({self._listed()}), "
                    f"got {len(arrays)}"
                )
            return arrays
        values: list[Any] = [*arrays, *[None] * (len(self.inputs) - len(arrays))]
        given = set(range(len(arrays)))
        for name, value in named.items():
            at = self._names.get(name)
            if at is None:
                raise InputError(f"the model has no input {name!r}; it takes {self._listed()}")
            if at in given:
                raise InputError(f"input {name!r} is given twice")
            values[at] = value
            given.add(at)
        missing = [info.name for i, info in enumerate(self.inputs) if i not in given]
        if missing:
            raise InputError(f"missing input(s) {', '.join(map(repr, missing))}")
        return values

    def _listed(self) -> str:
        return ", ".join(repr(info.name) for info in self.inputs) or "none"

    def _prepare(self, arrays: Sequence[Any]) -> tuple[Executable, list[Any]]:
        """Inputs as arrays, and the executable for them."""
        if len(arrays) != len(self.inputs):
            self.ordered(arrays, {})
        made = [
            value if isinstance(value, np.ndarray) else as_array(value, info)
            for value, info in zip(arrays, self.inputs, strict=True)
        ]
        if self._special:
            special = self._special.get(tuple(np.shape(a) for a in made))
            if special is not None:
                return special, made
        return self._executable, made

    def _specialise(self, arrays: Sequence[np.ndarray], error: AssumptionError) -> Executable:
        """Compile for these very shapes: an assumption about free sizes does not hold for them."""
        shapes = tuple(a.shape for a in arrays)
        with self._lock:
            executable = self._special.get(shapes)
            if executable is None:
                if self._request is None:
                    raise InputError(str(error)) from None
                try:
                    artifact = self._request.artifact(shapes)
                except ModelError as refusal:
                    raise InputError(
                        f"the model cannot take inputs of shapes {_spelled(shapes)}: {refusal}"
                    ) from error
                host = _host_functions(artifact, self.threads, self._request)
                executable = _load(artifact, self.threads, host)
                self._artifacts[shapes] = artifact
                self._special[shapes] = executable
        return executable

    @property
    def threads(self) -> int:
        """How many threads a call may use."""
        return self._executable.threads

    @property
    def plan(self) -> Plan:
        """The steps, buffers and sizes that the runtime works through."""
        return self._artifact.plan

    def plan_for(self, shapes: Shapes) -> Plan:
        """The plan that runs inputs of these shapes: one of its own where they needed one."""
        return self._artifacts.get(shapes, self._artifact).plan

    @property
    def kernels(self) -> Kernels:
        """The kernels by name, in running order: source, LLVM IR, assembly, rule, cost; and
        `replace`, which puts an edited source in the place of one."""
        from onnxjit.kernels import Kernels

        cache = None if self._request is None else self._request.cache
        return Kernels(self._artifact, cache, self._change)

    def _change(self, change: Callable[[Artifact], Artifact]) -> Artifact:
        """Run what `change` makes of the artifact, from the next call on."""
        with self._lock:
            if isinstance(self._executable, _Closed):
                self._executable.attempt(())
            artifact = change(self._artifact)
            # What is under way keeps the executable that it began with, code and memory included.
            executable = _load(artifact, self.threads, self._host)
            self._artifact, self._executable = artifact, executable
        return artifact

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the model file says of itself: producer, domain, version, opset imports, ..."""
        return self._artifact.metadata

    @property
    def specialisations(self) -> tuple[Shapes, ...]:
        """Input shapes for which the model had to be compiled again."""
        return tuple(self._special)

    def profile(self, *arrays: Any, runs: int = 10, **named: Any) -> Profile:
        """Time every step over `runs` runs: a table of the fastest time of each."""
        from onnxjit.report import profile

        executable, prepared = self._prepare(self.ordered(arrays, named))
        try:
            return profile(executable, prepared, runs)
        except AssumptionError as error:
            return profile(self._specialise(prepared, error), prepared, runs)
        except RuntimeInputError as error:
            raise InputError(str(error)) from None

    def report(self) -> str:
        """What was compiled, as text: devices, steps, kernels, memory, assumptions."""
        from onnxjit.report import report

        return report(self)

    def arena_bytes(self) -> int:
        """Bytes of working memory held now, over all runs so far."""
        held = [self._executable, *self._special.values()]
        return sum(executable.arena_bytes() for executable in held)

    def close(self) -> None:
        """Let go of code and memory. Calls that are under way end normally, later ones fail."""
        with self._lock:
            threads = self._executable.threads
            self._executable = _Closed(threads)  # type: ignore[assignment]
            self._special.clear()

    def __enter__(self) -> CompiledModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        def spell(infos: Sequence[TensorInfo]) -> str:
            return ", ".join(f"{i.name}: {i.dtype}[{', '.join(map(str, i.shape))}]" for i in infos)

        return f"<CompiledModel ({spell(self.inputs)}) -> ({spell(self.outputs)})>"

    def __reduce__(self) -> tuple[Any, ...]:
        from onnxjit.store import dump

        return _unpickled, (dump(self._artifact), self.threads, self._request)


def _unpickled(files: Mapping[str, Any], threads: int, request: Request | None) -> CompiledModel:
    from onnxjit.codegen.target import host
    from onnxjit.store import undump

    artifact = undump(files)
    if artifact.target != host().code_key:
        raise DeviceError("this model was compiled, and pickled, on another kind of processor")
    return CompiledModel(artifact, threads, request)


class _Closed:
    """Stands where the executable was."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def attempt(self, arrays: Any) -> NoReturn:
        raise OnnxJitError("this model is closed")

    profile = __call__ = attempt

    def arena_bytes(self) -> int:
        return 0


def _host_functions(
    artifact: Artifact, threads: int | None, request: Request | None
) -> dict[str, Callable[..., Any]]:
    cache = None if request is None else request.cache
    return host_functions(artifact.plan, cache=cache, threads=threads)


def _load(
    artifact: Artifact, threads: int | None, host: Mapping[str, Callable[..., Any]]
) -> Executable:
    library = link(artifact.objects)
    return Executable(artifact.plan, library, artifact.constants, threads, host=host)


def as_array(value: Any, info: TensorInfo) -> np.ndarray:
    """A list, number or array-like object as an array of the declared dtype. Arrays and objects
    that know their dtype keep it; numbers may be narrowed but never change their kind."""
    if info.dtype == "object" or not info.dtype.isidentifier():
        return value  # a sequence, an optional, or a value of unknown type
    if hasattr(value, "__array__") or isinstance(value, np.generic):
        return np.asarray(value)
    dtype = dtype_of(info.dtype)
    try:
        plain = np.asarray(value)
        if plain.dtype.kind in "iu" and dtype.kind in "iu":
            return np.array(value, dtype)  # checks the range
        if plain.size and not np.can_cast(plain.dtype, dtype, "same_kind"):
            raise InputError(f"input {info.name!r}: expected {dtype}, got {plain.dtype}")
        return plain.astype(dtype)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"input {info.name!r}: a {type(value).__name__} that is no array of {dtype}: {error}"
        ) from None


def _spelled(shapes: Shapes) -> str:
    return ", ".join(map(str, shapes))
