"""`IOBinding`: inputs and outputs of a session bound to memory of the caller's."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxjit.session_errors import InvalidArgument
from onnxjit.session_types import OrtValue

if TYPE_CHECKING:
    from onnxjit.session import InferenceSession

__all__ = ["IOBinding"]


class IOBinding:
    """Values by name for `InferenceSession.run_with_iobinding`; the CPU is the one device."""

    def __init__(self, session: InferenceSession) -> None:
        self._session = session
        self._inputs: dict[str, OrtValue] = {}
        self._outputs: dict[str, OrtValue | None] = {}
        self._results: list[OrtValue] = []

    def bind_cpu_input(self, name: str, arr_on_cpu: np.ndarray) -> None:
        """Binds an input to an array."""
        self._inputs[self._input(name)] = OrtValue.ortvalue_from_numpy(arr_on_cpu)

    def bind_input(
        self,
        name: str,
        device_type: str,
        device_id: int,
        element_type: Any,
        shape: Sequence[int],
        buffer_ptr: int,
    ) -> None:
        """Binds an input to memory at an address, which has to stay until the run has ended."""
        array = array_at(buffer_ptr, element_type, shape)
        self._inputs[self._input(name)] = OrtValue.ortvalue_from_numpy(array, device_type)

    def bind_ortvalue_input(self, name: str, ortvalue: OrtValue) -> None:
        """Binds an input to a value."""
        self._inputs[self._input(name)] = ortvalue

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: Any = None,
        shape: Sequence[int] | None = None,
        buffer_ptr: int | None = None,
    ) -> None:
        """Asks for an output: in new memory, or copied to an address when one is given."""
        if buffer_ptr is None:
            OrtValue.ortvalue_from_numpy(np.empty(0), device_type)  # checks the device
            self._outputs[self._output(name)] = None
            return
        if element_type is None or shape is None:
            raise ValueError("an output at an address needs its element type and shape")
        array = array_at(buffer_ptr, element_type, shape)
        self._outputs[self._output(name)] = OrtValue.ortvalue_from_numpy(array, device_type)

    def bind_ortvalue_output(self, name: str, ortvalue: OrtValue) -> None:
        """Asks for an output, written into a value."""
        self._outputs[self._output(name)] = ortvalue

    def clear_binding_inputs(self) -> None:
        """Forgets the inputs."""
        self._inputs.clear()

    def clear_binding_outputs(self) -> None:
        """Forgets the outputs and what was computed for them."""
        self._outputs.clear()
        self._results.clear()

    def get_outputs(self) -> list[OrtValue]:
        """The outputs of the last run, in the order in which they were bound."""
        return list(self._results)

    def copy_outputs_to_cpu(self) -> list[np.ndarray]:
        """The outputs of the last run as arrays."""
        return [value.numpy() for value in self._results]

    def synchronize_inputs(self) -> None:
        """Nothing to wait for: all memory is the CPU's."""

    def synchronize_outputs(self) -> None:
        """Nothing to wait for: all memory is the CPU's."""

    def run(self, run_options: Any = None) -> None:
        """Runs the session on what is bound. ValueError for an output that does not fit its
        memory."""
        names = list(self._outputs)
        made = self._session.run(names or None, self._inputs, run_options)
        results = []
        for name, value in zip(names, made, strict=bool(names)):
            bound = self._outputs[name]
            if bound is None:
                results.append(OrtValue(value))
            else:
                bound.update_inplace(value)
                results.append(bound)
        self._results = results

    def _input(self, name: str) -> str:
        known = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        if name not in {v.name for v in known}:
            raise InvalidArgument(f"Failed to find input name in the mapping: {name}")
        return name

    def _output(self, name: str) -> str:
        if name not in {v.name for v in self._session.get_outputs()}:
            raise InvalidArgument(f"Failed to find output name in the mapping: {name}")
        return name


def array_at(address: int, element_type: Any, shape: Sequence[int]) -> np.ndarray:
    """An array over memory that something else owns; `element_type` is a NumPy type or ONNX's
    number of it."""
    if isinstance(element_type, int):
        from onnxjit.tensors import array_dtype, dtype_name

        element_type = array_dtype(dtype_name(element_type))
    dtype = np.dtype(element_type)
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return np.empty(tuple(shape), dtype)
    memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype).reshape(tuple(shape))
