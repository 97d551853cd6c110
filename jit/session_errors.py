"""Errors of the session interface: onnxruntime's classes, status codes and form of the text."""

from __future__ import annotations

from onnxjit.errors import OnnxJitError

__all__ = [
    "EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf",
    "ModelLoadCanceled", "ModelLoaded", "ModelRequiresCompilation", "NoModel", "NoSuchFile",
    "NotFound", "NotImplemented", "RuntimeException", "SessionError",
]  # fmt: skip


class SessionError(OnnxJitError):
    """Base class. `code` and `label` are onnxruntime's status; `str` gives its whole text."""

    code = 1
    label = "FAIL"

    def __init__(self, message: str) -> None:
        super().__init__(f"[ONNXRuntimeError] : {self.code} : {self.label} : {message}")
        self.message = message

    def __reduce__(self) -> tuple[type[SessionError], tuple[str]]:
        return type(self), (self.message,)


class Fail(SessionError):
    """Something else failed."""


class InvalidArgument(SessionError):
    """Inputs, output names or options that do not fit the model."""

    code, label = 2, "INVALID_ARGUMENT"


class NoSuchFile(SessionError):
    """The model file does not exist."""

    code, label = 3, "NO_SUCHFILE"


class NoModel(SessionError):
    """No model is loaded."""

    code, label = 4, "NO_MODEL"


class EngineError(SessionError):
    """The engine failed."""

    code, label = 5, "ENGINE_ERROR"


class RuntimeException(SessionError):
    """A node failed while the model ran."""

    code, label = 6, "RUNTIME_EXCEPTION"


class InvalidProtobuf(SessionError):
    """The bytes are not an ONNX model."""

    code, label = 7, "INVALID_PROTOBUF"


class ModelLoaded(SessionError):
    """A model is loaded already."""

    code, label = 8, "MODEL_LOADED"


class NotImplemented(SessionError):
    """The model has operators without an implementation."""

    code, label = 9, "NOT_IMPLEMENTED"


class InvalidGraph(SessionError):
    """The model is inconsistent."""

    code, label = 10, "INVALID_GRAPH"


class EPFail(SessionError):
    """A device failed."""

    code, label = 11, "EP_FAIL"


class ModelLoadCanceled(SessionError):
    """Loading was cancelled."""

    code, label = 12, "MODEL_LOAD_CANCELED"


class ModelRequiresCompilation(SessionError):
    """The session may not compile the model, and nothing in the cache serves it."""

    code, label = 13, "MODEL_REQUIRES_COMPILATION"


class NotFound(SessionError):
    """Something that was asked for by name does not exist."""

    code, label = 14, "NOT_FOUND"
