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
        ModelError,
        OnnxJitError,
        UnsupportedOperators,
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
}

__all__ = [
    "CompiledModel",
    "DeviceError",
    "InputError",
    "ModelError",
    "OnnxJitError",
    "TensorInfo",
    "UnsupportedOperators",
    "__version__",
    "compile",
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
