"""Runs a plan: shape binding, contexts, host steps, and the fast way in for the common case."""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from onnxjit.runtime import layout
from onnxjit.runtime.binding import Binding, Context, Slot
from onnxjit.runtime.executor_source import SYMBOLS
from onnxjit.runtime.inputs import RELATIONS, AssumptionError, InputError, InputReader
from onnxjit.runtime.plan import NO_FAULT, HostStep, Plan, PlanError, dtype_of
from onnxjit.runtime.results import LEAST, MOST
from onnxjit.runtime.stages import stages_of
from onnxjit.runtime.threads import MAX_THREADS, available_threads, pool

if TYPE_CHECKING:
    from onnxjit.runtime.profile import Record, StepTime

HostFunction = Callable[[list[Any], Mapping[str, Any]], Sequence[Any]]
MAX_BINDINGS = 64

__all__ = ["AssumptionError", "Executable", "InputError"]


class Code(Protocol):
    """Loaded machine code (`link.Library`)."""

    def address(self, symbol: str) -> int: ...


class Executable:
    """A plan with its machine code and constants, ready to run; safe to call from several threads.

    library: the kernels' code. executor: code with the symbols of `executor_source.SYMBOLS`, if it
    is another library. constants: arrays of `plan.constants()`, kept and never copied when
    C-contiguous. threads: at most this many per run (default `available_threads()`). host:
    functions of host steps.
    """

    def __init__(
        self,
        plan: Plan,
        library: Code,
        constants: Sequence[np.ndarray] = (),
        threads: int | None = None,
        *,
        executor: Code | None = None,
        host: Mapping[str, HostFunction] | None = None,
    ) -> None:
        self.plan = plan
        self.threads = min(threads or available_threads(), MAX_THREADS)
        if self.threads < 1:
            raise ValueError(f"threads must be positive, not {threads}")
        self._library, self._executor = library, executor or library
        self._storage, self._stages = stages_of(plan)
        self._reader = InputReader(plan)
        self._host = dict(host or {})
        wanted = {s.function for s in plan.steps if isinstance(s, HostStep)}
        if wanted - self._host.keys():
            raise PlanError(f"no host function {sorted(wanted - self._host.keys())}")
        self._constants, self._addresses = self._adopt(constants)
        self._kernels = [
            np.array([library.address(s.kernel) for s in stage.steps], np.int64)
            for stage in self._stages
        ]
        word = ctypes.c_int64
        self._worker = self._executor.address(SYMBOLS["worker"])
        self._enter = self._executor.address(SYMBOLS["run"])
        self._execute = ctypes.CFUNCTYPE(word, word)(self._executor.address(SYMBOLS["execute"]))
        self._lock = threading.Lock()
        self._bindings: OrderedDict[tuple[int, tuple[int, ...]], Binding] = OrderedDict()
        self._slots: list[list[Slot]] = [[] for _ in self._stages]
        self._pool = pool()
        self._pool.users.add(self)
        self._direct = self._is_direct()
        self._attempt: Callable[[tuple[Any, ...]], list[Any] | None] = _decline

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run the model: arrays in the plan's order in, new arrays out.

        Inputs are read in place when they are C-contiguous and of the exact dtype, else copied.
        Raises `InputError` when they do not fit. Nothing else in the process may write to them
        meanwhile.
        """
        outputs = self._attempt(inputs)
        return self._run(inputs, None) if outputs is None else outputs

    def attempt(self, inputs: tuple[Any, ...]) -> list[Any] | None:
        """`__call__` if the inputs are just like the last ones and right; else None, and nothing
        has changed."""
        return self._attempt(inputs)

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """`__call__` with the inputs as one sequence."""
        return self(*inputs)

    def profile(self, inputs: Sequence[Any]) -> tuple[list[Any], list[StepTime]]:
        """Run once with a clock around every step; the outputs and a row per step."""
        from onnxjit.runtime.profile import step_times

        records: list[Record] = []
        outputs = self._run(tuple(inputs), records)
        return outputs, step_times(records)

    def rebind(self, forked: bool = False) -> None:
        """Look at the thread pool again before the next run: its workers have gone."""
        if forked:
            self._lock = threading.Lock()  # a thread that the child lacks may have held it
        self._attempt = _decline

    def arena_bytes(self) -> int:
        """Bytes of arena and scratch memory held now, over all concurrent runs so far."""
        return sum(s.arena.nbytes + s.scratch.nbytes for slots in self._slots for s in slots)

    def _adopt(self, constants: Sequence[np.ndarray]) -> tuple[dict[int, np.ndarray], np.ndarray]:
        ids = self.plan.constants()
        if len(ids) != len(constants):
            raise PlanError(f"the plan has {len(ids)} constants, {len(constants)} were given")
        arrays: dict[int, np.ndarray] = {}
        addresses = np.zeros(len(self.plan.buffers), np.int64)
        for b, given in zip(ids, constants, strict=True):
            array = np.asarray(given, order="C")
            nbytes = self.plan.buffers[b].nbytes
            if array.nbytes != nbytes:
                raise PlanError(f"constant buffer {b} has {array.nbytes} bytes, not {nbytes}")
            arrays[b] = array
            addresses[b] = array.ctypes.data
        return arrays, addresses

    def _is_direct(self) -> bool:
        plan = self.plan
        return (
            layout.TABLE is not None
            and len(self._stages) == 1
            and len(self._stages[0].parts) == 1
            and self._stages[0].parts[0].host is None
            and sorted(plan.outputs) == self._storage.outputs
            and all(plan.buffers[b].dtype not in ("object", "string") for b in plan.inputs)
        )

    def _direct_attempt(self, binding: Binding) -> Callable[[tuple[Any, ...]], list[Any] | None]:
        """A function that runs this binding, or answers None if the inputs are not just like it."""
        plan = self.plan
        inputs = [(b, dtype_of(plan.buffers[b].dtype)) for b in plan.inputs]
        outputs = [(binding.shapes[b], dtype_of(plan.buffers[b].dtype)) for b in plan.outputs]
        slots = self._slots[0]
        pop, push, empty = slots.pop, slots.append, np.empty
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in outputs]
        large = any(LEAST <= n <= MOST for n in sizes)

        if len(outputs) == 1 and not large:
            ((shape, dtype),) = outputs

            def make(slot: Slot) -> list[Any]:
                return [empty(shape, dtype)]
        elif not large:

            def make(slot: Slot) -> list[Any]:
                return [empty(shape, dtype) for shape, dtype in outputs]
        else:

            def make(slot: Slot) -> list[Any]:
                again = slot.results.array
                return [
                    again(k, shape, dtype, n) if LEAST <= n <= MOST else empty(shape, dtype)
                    for k, ((shape, dtype), n) in enumerate(zip(outputs, sizes, strict=True))
                ]

        def attempt(arguments: tuple[Any, ...]) -> list[Any] | None:
            try:
                slot = pop()
            except IndexError:
                slot = Slot()
            context = slot.contexts.get(binding)
            if context is None or (call := context.call) is None:
                context = slot.context(binding, self._addresses, self._pool.address)
                call = context.enter_by(self._enter, inputs, plan.outputs)
            results = make(slot)
            done = call(arguments, results)
            push(slot)
            return results if done else None

        if not plan.faults:
            return attempt

        count = len(plan.results)

        def checked(arguments: tuple[Any, ...]) -> list[Any] | None:
            results = attempt(arguments)
            if results is None or any(found != NO_FAULT for found in results[count:]):
                return None  # the general path says what is wrong
            return results[:count]

        return checked

    def _bind(self, number: int, dims: tuple[int, ...], arrays: Sequence[Any] | None) -> Binding:
        """The binding of a stage, from the cache or new.

        Checks `arrays` (inputs) on the first stage.
        """
        stage = self._stages[number]
        with self._lock:
            binding = self._bindings.get((number, dims))
            if binding is not None:
                self._bindings.move_to_end((number, dims))
        if binding is not None:
            if arrays is not None:
                self._reader.match(arrays, binding.shapes)
            return binding
        try:
            values = stage.table.evaluate(dims)
        except ZeroDivisionError as error:
            raise InputError(
                f"no shapes follow from sizes {self._sizes(stage.dims, dims)}"
            ) from error
        if arrays is not None:
            shapes = {b: tuple(values[stage.shapes[b]].tolist()) for b in self.plan.inputs}
            self._reader.match(arrays, shapes)
        for check, left, right in zip(
            stage.checks, values[stage.check_left], values[stage.check_right], strict=True
        ):
            if not RELATIONS[check.relation](left, right):
                # Sizes that a host step computed are not known before a run: nothing can be
                # compiled for them.
                kind = AssumptionError if check.assumed and number == 0 else InputError
                raise kind(
                    f"{check.message} (sizes {self._sizes(stage.dims, dims)}: "
                    f"{left} {check.relation} {right} does not hold)"
                )
        binding = Binding(stage, values, self._kernels[number], self.threads)
        with self._lock:
            self._bindings[number, dims] = binding
            if len(self._bindings) > MAX_BINDINGS:
                self._bindings.popitem(last=False)
        return binding

    def _sizes(self, names: Sequence[str], dims: Sequence[int]) -> str:
        labels = {d.name: d.label or d.name for d in self.plan.dims}
        return ", ".join(f"{labels[n]}={v}" for n, v in zip(names, dims, strict=True))

    def _run(self, inputs: tuple[Any, ...], records: list[Record] | None) -> list[Any]:
        arrays, dims = self._reader.read(inputs)
        if self._direct and records is None:
            binding = self._bind(0, dims, arrays)
            if binding.threads > 1:
                self._pool.ensure(binding.threads, self._worker, self._executor)
            if binding.attempt is None:
                binding.attempt = self._direct_attempt(binding)
            self._attempt = binding.attempt
            results = binding.attempt(tuple(arrays))
            if results is not None:
                return results
        held: dict[int, Any] = dict(zip(self.plan.inputs, arrays, strict=True))
        run = _Run(self, held, records)
        try:
            for number, stage in enumerate(self._stages):
                binding = self._bind(number, dims, arrays if number == 0 else None)
                if binding.threads > 1:
                    self._pool.ensure(binding.threads, self._worker, self._executor)
                run.enter(number, binding)
                for part in stage.parts:
                    if part.host is None:
                        run.native(part.begin, part.end)
                    else:
                        dims += run.host(part.host)
            outputs = run.outputs()
        finally:
            run.close()
        return self._sound(outputs)

    def _sound(self, outputs: list[Any]) -> list[Any]:
        """The results of a run. Raises `InputError` if what the data was asked for went wrong."""
        faults = self.plan.faults
        if not faults:
            return outputs
        count = len(self.plan.results)
        for message, found in zip(faults, outputs[count:], strict=True):
            if found != NO_FAULT:
                raise InputError(f"{message}: {found}")
        return outputs[:count]


def _decline(inputs: tuple[Any, ...]) -> None:
    return None


class _Run:
    """State of one run on the general path.

    Arrays by buffer, and the context of each stage so far.
    """

    def __init__(
        self, owner: Executable, arrays: dict[int, Any], records: list[Record] | None
    ) -> None:
        self._owner = owner
        self._arrays = arrays
        self._records = records
        self._slots: list[tuple[int, Slot]] = []
        self._contexts: list[Context] = []
        self._arena: dict[int, tuple[Context, int]] = {}  # root -> its context and offset

    def enter(self, number: int, binding: Binding) -> None:
        owner, stage = self._owner, binding.stage
        try:
            slot = owner._slots[number].pop()
        except IndexError:
            slot = Slot()
        self._slots.append((number, slot))
        context = slot.context(binding, owner._addresses, owner._pool.address)
        context.forget()
        self._contexts.append(context)
        for b in stage.new_outputs:
            dtype = dtype_of(owner.plan.buffers[b].dtype)
            self._arrays[b] = np.empty(binding.shapes[b], dtype)
        for root in stage.outside:
            self._connect(root)
        for root, offset in zip(stage.arena, binding.offsets.tolist(), strict=True):
            self._arena[root] = (context, offset)

    def _connect(self, root: int) -> None:
        array = self._arrays.get(root)
        if isinstance(array, np.ndarray):
            self._contexts[-1].patch(root, array.ctypes.data)
        elif root in self._arena:
            context, offset = self._arena[root]
            self._contexts[-1].patch(root, context.arena.ctypes.data + offset)

    def native(self, begin: int, end: int) -> None:
        context = self._contexts[-1]
        times = None
        if self._records is not None:
            times = context.profile(True)
        context.limit(begin, end)
        try:
            self._owner._execute(context.address)
        finally:
            context.limit(0, len(context.stage.steps))
            context.profile(False)
        if times is not None and self._records is not None:
            from onnxjit.runtime.profile import native_record

            self._records.append(native_record(context.binding, begin, end, times))

    def host(self, step: HostStep) -> tuple[int, ...]:
        """Run a host step; the values of the sizes that its results define."""
        owner = self._owner
        values = [None if b < 0 else self._view(b) for b in step.inputs]
        start = time.monotonic_ns()
        results = owner._host[step.function](values, step.attributes)
        if self._records is not None:
            end = time.monotonic_ns()
            from onnxjit.runtime.profile import host_record

            self._records.append(host_record(step.name, step.function, start, end))
        if len(results) != len(step.outputs):
            raise PlanError(
                f"host function {step.function!r} returned {len(results)} results, "
                f"not {len(step.outputs)}"
            )
        for b, result in zip(step.outputs, results, strict=True):
            buffer = owner.plan.buffers[b]
            if buffer.dtype != "object":
                array = np.asarray(result, dtype=dtype_of(buffer.dtype), order="C")
                # A view would change when the arena behind it serves another value.
                result = array if array.base is None and array is not result else array.copy()
            self._arrays[b] = result
            self._connect(b)
        return tuple(self._size(d) for d in owner.plan.dims if d.source.buffer in step.outputs)

    def _size(self, dim) -> int:
        array, source = self._arrays[dim.source.buffer], dim.source
        label = self._owner.plan.buffers[source.buffer].label
        if source.axis is None:
            extent = int(array.reshape(-1)[source.element])
            where = f"value {label!r} element {source.element}"
        else:
            extent, where = array.shape[source.axis], f"value {label!r} axis {source.axis}"
        return self._owner._reader.size(dim, extent, where)

    def _view(self, b: int) -> Any:
        """The array of a buffer, over its own memory."""
        owner, binding = self._owner, self._contexts[-1].binding
        buffer = owner.plan.buffers[b]
        root = owner._storage.roots[b][0]
        if buffer.dtype == "object" or (b == root and b in self._arrays):
            return self._arrays[b]
        dtype = dtype_of(buffer.dtype)
        shape, offset = binding.shapes[b], binding.byte_offsets[b]
        if root in self._arena:
            context, start = self._arena[root]
            memory, offset = context.arena, start + offset
        else:
            array = owner._constants[root] if root in owner._constants else self._arrays[root]
            memory = array.reshape(-1).view(np.uint8)
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.ndarray(shape, dtype, memory, offset)

    def outputs(self) -> list[Any]:
        owner = self._owner
        given: set[int] = set()
        results = []
        for b in owner.plan.outputs:
            buffer = owner.plan.buffers[b]
            fresh = buffer.kind in ("output", "host") and buffer.alias is None and b not in given
            given.add(b)
            value = self._view(b)
            if not fresh and isinstance(value, np.ndarray):
                value = value.copy()
            results.append(value)
        return results

    def close(self) -> None:
        for number, slot in self._slots:
            self._owner._slots[number].append(slot)
