"""`SessionOptions` and `RunOptions` with onnxruntime's names, types and defaults.

Options that mean nothing to a compiler are kept and given back, so that programs which set them
run unchanged; assigning the wrong type is an error as it is there.
"""

from __future__ import annotations

import operator
from typing import Any

from onnxjit.session_types import ExecutionMode, ExecutionOrder, GraphOptimizationLevel

_LONGEST_KEY = 1024
_LONGEST_VALUE = 8192


class _Option:
    """An attribute with a default that takes values of one type (an int also takes a bool)."""

    def __init__(self, type_: type, default: Any, doc: str = "") -> None:
        self.type, self.default, self.__doc__ = type_, default, doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else instance._values.get(self.name, self.default)

    def __set__(self, instance: Any, value: Any) -> None:
        if self.type is int:
            try:
                value = operator.index(value)
            except TypeError:
                raise TypeError(self._complaint(value)) from None
        elif not isinstance(value, self.type):
            raise TypeError(self._complaint(value))
        instance._values[self.name] = value

    def _complaint(self, value: Any) -> str:
        return f"{self.name} must be of type {self.type.__name__}, not {type(value).__name__}"


class _Entries:
    """Values of options, and free-form entries."""

    __slots__ = ("_entries", "_values")
    _kind = ""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._entries: dict[str, str] = {}

    def _add(self, key: str, value: str) -> None:
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError("configuration keys and values are strings")
        if not 0 < len(key) <= _LONGEST_KEY:
            raise RuntimeError(f"Config key is empty or longer than maximum length {_LONGEST_KEY}")
        if len(value) > _LONGEST_VALUE:
            raise RuntimeError(f"Config value is longer than maximum length {_LONGEST_VALUE}")
        self._entries[key] = value

    def _get(self, key: str) -> str:
        try:
            return self._entries[key]
        except KeyError:
            raise RuntimeError(
                f"{self._kind} does not have configuration with key: {key}"
            ) from None


class SessionOptions(_Entries):
    """How a session is made. `intra_op_num_threads` (0: as many as this process may use), the
    free-dimension overrides, and the profiling options take effect."""

    __slots__ = ("_denotations", "_overrides")
    _kind = "SessionOptions"

    enable_cpu_mem_arena = _Option(bool, True)
    enable_mem_pattern = _Option(bool, True)
    enable_mem_reuse = _Option(bool, True)
    enable_profiling = _Option(bool, False, "Whether runs are timed, see `end_profiling`.")
    execution_mode = _Option(ExecutionMode, ExecutionMode.ORT_SEQUENTIAL)
    execution_order = _Option(ExecutionOrder, ExecutionOrder.DEFAULT)
    graph_optimization_level = _Option(
        GraphOptimizationLevel, GraphOptimizationLevel.ORT_ENABLE_ALL
    )
    inter_op_num_threads = _Option(int, 0)
    intra_op_num_threads = _Option(int, 0, "Threads of a run; 0 is as many as may be used.")
    log_severity_level = _Option(int, -1)
    log_verbosity_level = _Option(int, 0)
    logid = _Option(str, "")
    optimized_model_filepath = _Option(str, "")
    profile_file_prefix = _Option(str, "onnxruntime_profile_")
    use_deterministic_compute = _Option(bool, False)
    use_per_session_threads = _Option(bool, True)

    def __init__(self) -> None:
        super().__init__()
        self._overrides: dict[str, int] = {}
        self._denotations: dict[str, int] = {}

    def add_session_config_entry(self, key: str, value: str) -> None:
        """Keeps a configuration entry. "onnxjit.tune" with a number of seconds tunes the model."""
        self._add(key, value)

    def get_session_config_entry(self, key: str) -> str:
        """The entry's value; RuntimeError when there is none."""
        return self._get(key)

    def add_free_dimension_override_by_name(self, name: str, value: int) -> None:
        """Fixes the free dimension that the model calls `name`; unknown names are ignored."""
        self._overrides[str(name)] = operator.index(value)

    def add_free_dimension_override_by_denotation(self, denotation: str, value: int) -> None:
        """Fixes the free dimensions with a denotation."""
        self._denotations[str(denotation)] = operator.index(value)

    def has_providers(self) -> bool:
        """Whether providers were added to the options: there are none to add."""
        return False


class RunOptions(_Entries):
    """How one run behaves. `terminate` makes it fail before it begins; the rest is kept."""

    __slots__ = ()
    _kind = "RunOptions"

    log_severity_level = _Option(int, -1)
    log_verbosity_level = _Option(int, 0)
    logid = _Option(str, "")
    only_execute_path_to_fetches = _Option(bool, False)
    terminate = _Option(bool, False)

    def add_run_config_entry(self, key: str, value: str) -> None:
        """Keeps a configuration entry."""
        self._add(key, value)

    def get_run_config_entry(self, key: str) -> str:
        """The entry's value; RuntimeError when there is none."""
        return self._get(key)
