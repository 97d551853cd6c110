"""If, Loop and Scan as host steps around bodies that are compiled when they first run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxjit.deferred import Deferred, HostFunction, Settings
from onnxjit.graph import Graph, Node, Value
from onnxjit.runtime.plan import dtype_of

CONTROL_OPERATORS = ("If", "Loop", "Scan")


def control_function(node: Node, graph: Graph, settings: Settings) -> HostFunction:
    """The function of a control-flow node.

    `graph` has the node alone; its inputs are the node's inputs (omitted ones left out) and then
    what the bodies capture, and these are the arguments of the function.
    """
    names = [v.name for v in graph.inputs]
    make = {"If": _If, "Loop": _Loop, "Scan": _Scan}[node.op]
    return make(node, names, settings)


class _Control:
    def __init__(self, node: Node, names: list[str], settings: Settings) -> None:
        self.node, self.names = node, names
        self.bodies = {
            key: Deferred(with_captures(g), settings)
            for key, g in node.attrs.items()
            if isinstance(g, Graph)
        }

    def __call__(
        self, arrays: Sequence[Any], attributes: Mapping[str, Any] | None = None
    ) -> Sequence[Any]:
        scope = dict(zip(self.names, arrays, strict=True))
        inputs = [scope[n] if n else None for n in self.node.inputs]
        results = self.run(inputs, scope)
        return [r for n, r in zip(self.node.outputs, results, strict=False) if n]

    def run(self, inputs: list[Any], scope: Mapping[str, Any]) -> list[Any]:
        raise NotImplementedError

    def body(self, key: str, arguments: Sequence[Any], scope: Mapping[str, Any]) -> list[Any]:
        graph: Graph = self.node.attrs[key]
        return list(self.bodies[key]([*arguments, *(scope[n] for n in graph.free)]))


def with_captures(graph: Graph) -> Graph:
    """A body with the names that it captures as further inputs."""
    captured = tuple(Value(n, "", None) for n in graph.free)
    return graph.replace(inputs=(*graph.inputs, *captured))


class _If(_Control):
    def run(self, inputs: list[Any], scope: Mapping[str, Any]) -> list[Any]:
        key = "then_branch" if bool(np.asarray(inputs[0]).reshape(-1)[0]) else "else_branch"
        return self.body(key, (), scope)


class _Loop(_Control):
    def run(self, inputs: list[Any], scope: Mapping[str, Any]) -> list[Any]:
        graph: Graph = self.node.attrs["body"]
        count, going, *state = [*inputs, None, None][: max(2, len(inputs))]
        trips = None if count is None else int(np.asarray(count).reshape(-1)[0])
        condition = True if going is None else bool(np.asarray(going).reshape(-1)[0])
        carried = len(state)
        rows: list[list[np.ndarray]] = [[] for _ in graph.outputs[1 + carried :]]
        number = 0
        while condition and (trips is None or number < trips):
            flag = np.asarray(condition)
            made = self.body("body", [np.asarray(number, np.int64), flag, *state], scope)
            condition = bool(np.asarray(made[0]).reshape(-1)[0])
            state = made[1 : 1 + carried]
            for row, value in zip(rows, made[1 + carried :], strict=True):
                row.append(value)
            number += 1
        stacked = [
            np.stack(row) if row else empty_rows(v)
            for row, v in zip(rows, graph.outputs[1 + carried :], strict=True)
        ]
        return [*state, *stacked]


def empty_rows(value: Value) -> np.ndarray:
    """What a loop that never ran gives for a scan output; sizes that are unknown become 0."""
    shape = [d if isinstance(d, int) else 0 for d in value.shape or ()]
    return np.empty((0, *shape), dtype_of(value.dtype or "float32"))


class _Scan(_Control):
    def run(self, inputs: list[Any], scope: Mapping[str, Any]) -> list[Any]:
        attrs = self.node.attrs
        scans = int(attrs["num_scan_inputs"])
        if self.node.version >= 9:
            return self.scan(inputs, scans, scope)
        # Version 8 has a batch axis in front of everything, and sequence lengths as first input.
        lengths, *values = inputs
        directions = attrs.get("directions")
        results = []
        for k in range(values[-1].shape[0]):
            part = [v[k] for v in values]
            if lengths is not None:
                n = int(lengths[k])
                part = [*part[:-scans], *(p[:n] for p in part[-scans:])]
            results.append(self.scan(part, scans, scope, directions))
        batches = list(zip(*results, strict=True))
        longest = [max(b.shape[0] if b.ndim else 0 for b in batch) for batch in batches]
        carried = len(values) - scans
        return [
            np.stack(batch if i < carried else [_extended(b, longest[i]) for b in batch])
            for i, batch in enumerate(batches)
        ]

    def scan(
        self,
        inputs: list[Any],
        scans: int,
        scope: Mapping[str, Any],
        directions: Sequence[int] | None = None,
    ) -> list[Any]:
        attrs = self.node.attrs
        graph: Graph = attrs["body"]
        state, sequences = inputs[: len(inputs) - scans], inputs[len(inputs) - scans :]
        made = len(graph.outputs) - len(state)
        axes = attrs.get("scan_input_axes") or [0] * scans
        backwards = directions or attrs.get("scan_input_directions") or [0] * scans
        out_axes = attrs.get("scan_output_axes") or [0] * made
        out_backwards = attrs.get("scan_output_directions") or [0] * made
        moved = [
            np.moveaxis(s, a, 0)[:: -1 if b else 1]
            for s, a, b in zip(sequences, axes, backwards, strict=True)
        ]
        rows: list[list[np.ndarray]] = [[] for _ in range(made)]
        for n in range(moved[0].shape[0]):
            results = self.body(
                "body",
                [*state, *(np.ascontiguousarray(m[n]).reshape(m.shape[1:]) for m in moved)],
                scope,
            )
            state = results[: len(state)]
            for row, value in zip(rows, results[len(state) :], strict=True):
                row.append(value)
        stacked = []
        for k, row in enumerate(rows):
            value = np.stack(row) if row else empty_rows(graph.outputs[len(state) + k])
            stacked.append(np.moveaxis(value[:: -1 if out_backwards[k] else 1], 0, out_axes[k]))
        return [*state, *stacked]


def _extended(array: np.ndarray, length: int) -> np.ndarray:
    return np.pad(array, [(0, length - array.shape[0])] + [(0, 0)] * (array.ndim - 1))
