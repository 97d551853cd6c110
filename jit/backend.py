"""The standard ONNX backend interface: `prepare`, `run_model`, `run_node`, `supports_device`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx.backend.base import Backend as OnnxBackend
from onnx.backend.base import BackendRep, Device, DeviceType, namedtupledict

from onnxjit.compiler import build_model
from onnxjit.deferred import host_functions
from onnxjit.runtime.executor import Executable
from onnxjit.runtime.link import link
from onnxjit.tensors import dtype_code

if TYPE_CHECKING:
    from onnxjit.codegen.build import Builder
    from onnxjit.codegen.cache import Cache

__all__ = ["Backend", "CompiledRep", "is_compatible", "prepare", "run_model", "run_node",
           "supports_device"]  # fmt: skip


class CompiledRep(BackendRep):
    """A compiled model; `run` takes its inputs in order (or by name) and gives a named tuple."""

    def __init__(self, graph: Any, executable: Executable) -> None:
        self.graph = graph
        self.executable = executable
        self._names = [v.name for v in graph.inputs]
        self._result = namedtupledict("Outputs", [v.name for v in graph.outputs])

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Runs the model on arrays, lists (sequences) or None (an empty optional)."""
        if kwargs:
            raise TypeError(f"unknown arguments {sorted(kwargs)}")
        if isinstance(inputs, Mapping):
            missing = [n for n in self._names if n not in inputs]
            if missing:
                raise ValueError(f"missing inputs {missing}")
            inputs = [inputs[n] for n in self._names]
        elif isinstance(inputs, np.ndarray):
            inputs = [inputs]
        return self._result(*self.executable(*inputs))


class Backend(OnnxBackend):
    """Compiles models for this machine's CPU."""

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether every operator of the model can be compiled for `device`."""
        from onnxjit.errors import OnnxJitError

        if not cls.supports_device(device):
            return False
        try:
            cls.prepare(model, device, **kwargs)
        except OnnxJitError:
            return False
        return True

    @classmethod
    def prepare(
        cls,
        model: onnx.ModelProto,
        device: str = "CPU",
        *,
        threads: int | None = None,
        cache: Cache | None = None,
        builder: Builder | None = None,
        **kwargs: Any,
    ) -> CompiledRep:
        """Compiles `model`. `builder` and `cache` let several calls share workers and results.

        Raises `ValueError` for a device other than a CPU, `onnxjit.errors.ModelError` for a model
        that cannot be compiled, TypeError for unknown arguments.
        """
        if kwargs:
            raise TypeError(f"unknown arguments {sorted(kwargs)}")
        if not cls.supports_device(device):
            raise ValueError(f"this backend compiles for CPUs, not for {device!r}")
        graph, parts = build_model(model, cache=cache, builder=builder)
        library = link(list(parts.objects.values()))
        plan = parts.generated.plan
        executable = Executable(
            plan, library, parts.constants, threads, host=host_functions(plan)
        )
        return CompiledRep(graph, executable)

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
        given = [
            onnx.helper.make_tensor_value_info(n, array_code(a), a.shape)
            for n, a in arrays.items()
        ]
        made = [onnx.ValueInfoProto(name=n) for n in node.output if n]
        graph = onnx.helper.make_graph([node], "node", given, made)
        imports = [onnx.helper.make_opsetid("", version)]
        if node.domain not in ("", "ai.onnx"):
            known = [s.since_version for s in onnx.defs.get_all_schemas() if s.domain == node.domain]
            imports.append(onnx.helper.make_opsetid(node.domain, max(known, default=1)))
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
