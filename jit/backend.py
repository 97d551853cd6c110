"""The standard ONNX backend interface: `prepare`, `run_model`, `run_node`, `supports_device`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.backend.base import Backend as OnnxBackend
from onnx.backend.base import BackendRep, Device, DeviceType, namedtupledict

from onnxjit.api import compile
from onnxjit.compiled import CompiledModel
from onnxjit.errors import OnnxJitError
from onnxjit.tensors import dtype_code

__all__ = [
    "Backend", "CompiledRep", "is_compatible", "prepare", "run_model", "run_node",
    "supports_device",
]  # fmt: skip


class CompiledRep(BackendRep):
    """A compiled model (`model`) whose `run` gives a named tuple of the outputs."""

    def __init__(self, model: CompiledModel) -> None:
        self.model = model
        self._result = namedtupledict("Outputs", [info.name for info in model.outputs])

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Runs the model on its inputs in order or by name; one array may stand for a list of it.

        An input is an array, a list of arrays for a sequence, or None for an empty optional.
        Raises `onnxjit.InputError` for inputs that do not fit.
        """
        if kwargs:
            raise TypeError(f"unknown arguments {sorted(kwargs)}")
        if isinstance(inputs, np.ndarray):
            inputs = [inputs]
        elif isinstance(inputs, Mapping):
            inputs = self.model.ordered((), inputs)
        return self._result(*self.model.run(inputs))


class Backend(OnnxBackend):
    """Compiles models for this machine's CPU."""

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether `prepare` can compile the model."""
        if not cls.supports_device(device):
            return False
        try:
            cls.prepare(model, device, **kwargs)
        except OnnxJitError:
            return False
        return True

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> CompiledRep:
        """Compiles `model`; keyword arguments are those of `onnxjit.compile`.

        Raises `onnxjit.DeviceError` for a device other than a CPU, `onnxjit.ModelError` for a
        model that cannot be compiled.
        """
        if not cls.supports_device(device):
            from onnxjit.errors import DeviceError

            raise DeviceError(f"this backend compiles for the CPU, not for {device!r}")
        return CompiledRep(compile(model, device="cpu", **kwargs))

    @classmethod
    def run_model(
        cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **kwargs: Any
    ) -> tuple[Any, ...]:
        """`prepare` and one run."""
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def run_node(
        cls,
        node: onnx.NodeProto,
        inputs: Any,
        device: str = "CPU",
        outputs_info: Sequence[tuple[np.dtype, tuple[int, ...]]] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Runs one operator of opset `opset_version` (the newest one known, unless given)."""
        version = kwargs.pop("opset_version", None) or onnx.defs.onnx_opset_version()
        names = [n for n in node.input if n]
        if isinstance(inputs, Mapping):
            inputs = [inputs[n] for n in names]
        arrays = dict(zip(names, map(np.asarray, inputs), strict=True))
        info = onnx.helper.make_tensor_value_info
        given = [info(n, array_code(a), a.shape) for n, a in arrays.items()]
        made = [onnx.ValueInfoProto(name=n) for n in node.output if n]
        graph = onnx.helper.make_graph([node], "node", given, made)
        imports = [onnx.helper.make_opsetid("", version)]
        if node.domain not in ("", "ai.onnx"):
            versions = [
                s.since_version for s in onnx.defs.get_all_schemas() if s.domain == node.domain
            ]
            imports.append(onnx.helper.make_opsetid(node.domain, max(versions, default=1)))
        model = onnx.helper.make_model(graph, opset_imports=imports)
        return cls.run_model(model, list(arrays.values()), device, **kwargs)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether models can be compiled for `device` ("CPU", "CUDA:1", ...) here."""
        try:
            return Device(device).type == DeviceType.CPU
        except (AttributeError, ValueError):
            return False


def array_code(array: np.ndarray) -> int:
    """The TensorProto.DataType of an array."""
    name = "string" if array.dtype.kind in "OSU" else array.dtype.name
    code = dtype_code(name)
    if not code:
        raise TypeError(f"ONNX has no element type {name}")
    return code


is_compatible = Backend.is_compatible
prepare = Backend.prepare
run_model = Backend.run_model
run_node = Backend.run_node
supports_device = Backend.supports_device
