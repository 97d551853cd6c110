"""onnxjit compiles ONNX models to machine code for this machine's processor.

    import onnxjit

    model = onnxjit.compile("model.onnx")
    y = model(x)

Names are loaded when they are first used: importing the package imports neither onnx nor Numba.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxjit.api import compile
    from onnxjit.compiled import CompiledModel
    from onnxjit.errors import (
        DeviceError,
        InputError,
        KernelMismatch,
        KernelSourceError,
        ModelError,
        OnnxJitError,
        UnsupportedOperators,
    )
    from onnxjit.session import (
        InferenceSession,
        get_all_providers,
        get_available_providers,
        get_device,
        get_version_string,
        set_default_logger_severity,
        set_default_logger_verbosity,
    )
    from onnxjit.session_binding import IOBinding
    from onnxjit.session_options import (
        RunOptions,
        SessionOptions,
    )
    from onnxjit.session_types import (
        ExecutionMode,
        ExecutionOrder,
        GraphOptimizationLevel,
        ModelMetadata,
        NodeArg,
        OrtAllocatorType,
        OrtMemType,
        OrtValue,
    )

__version__ = "0.1.0"

_HOMES = {
    "compile": "api",
    "CompiledModel": "compiled",
    "TensorInfo": "artifact",
    "OnnxJitError": "errors",
    "ModelError": "errors",
    "UnsupportedOperators": "errors",
    "InputError": "errors",
    "DeviceError": "errors",
    "KernelMismatch": "errors",
    "KernelSourceError": "errors",
    "InferenceSession": "session",
    "get_all_providers": "session",
    "get_available_providers": "session",
    "get_device": "session",
    "get_version_string": "session",
    "set_default_logger_severity": "session",
    "set_default_logger_verbosity": "session",
    "RunOptions": "session_options",
    "SessionOptions": "session_options",
    "ExecutionMode": "session_types",
    "ExecutionOrder": "session_types",
    "GraphOptimizationLevel": "session_types",
    "ModelMetadata": "session_types",
    "NodeArg": "session_types",
    "OrtAllocatorType": "session_types",
    "OrtMemType": "session_types",
    "OrtValue": "session_types",
    "IOBinding": "session_binding",
}

__all__ = [
    "CompiledModel",
    "DeviceError",
    "ExecutionMode",
    "ExecutionOrder",
    "GraphOptimizationLevel",
    "IOBinding",
    "InferenceSession",
    "InputError",
    "KernelMismatch",
    "KernelSourceError",
    "ModelError",
    "ModelMetadata",
    "NodeArg",
    "OnnxJitError",
    "OrtAllocatorType",
    "OrtMemType",
    "OrtValue",
    "RunOptions",
    "SessionOptions",
    "TensorInfo",
    "UnsupportedOperators",
    "__version__",
    "compile",
    "get_all_providers",
    "get_available_providers",
    "get_device",
    "get_version_string",
    "set_default_logger_severity",
    "set_default_logger_verbosity",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
