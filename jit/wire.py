"""Takes the bulk tensor data out of a serialised ModelProto, so that parsing it copies no weights.

The message is walked at the level of protobuf's wire format
(https://protobuf.dev/programming-guides/encoding/). Long `TensorProto.raw_data` fields are replaced
by short tickets; what was there is remembered as a view of the original bytes.
"""

from __future__ import annotations

import os
from typing import Any

# Fields that lead to tensors, by message: field number -> message inside ("raw" = tensor bytes).
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {9: "raw"},
}
_BULK = 1024  # bytes; shorter fields are left where they are
_DEEPEST = 50  # the parser itself refuses deeper nesting


class _Malformed(Exception):
    pass


class Tickets:
    """Maps the tickets of one model back to the bytes they stand for."""

    def __init__(self) -> None:
        # A random mark, so that no model can contain a ticket of its own making.
        self._mark = os.urandom(16)
        self._views: list[memoryview] = []

    def __len__(self) -> int:
        return len(self._views)

    def issue(self, view: memoryview) -> bytes:
        """A ticket for `view`."""
        self._views.append(view)
        return self._mark + (len(self._views) - 1).to_bytes(8, "little")

    def redeem(self, data: bytes) -> bytes | memoryview:
        """The bytes that `data` stands for: itself, unless it is a ticket."""
        if len(data) == 24 and data.startswith(self._mark):
            return self._views[int.from_bytes(data[16:], "little")]
        return data


def strip_tensors(data: Any) -> tuple[Any, Tickets]:
    """The serialised ModelProto `data` (a buffer) with tickets in place of bulk tensor data.

    `data` comes back as it is, with no tickets, when it holds no bulk data or is malformed: then
    the parser is the one to say what is wrong.
    """
    view = memoryview(data)
    tickets = Tickets()
    parts: list[Any] = []
    try:
        _strip(view, 0, len(view), "model", parts, tickets, 0)
    except _Malformed:
        return data, Tickets()
    return (b"".join(parts), tickets) if tickets else (data, tickets)


def _strip(
    view: memoryview, at: int, end: int, kind: str, parts: list[Any], tickets: Tickets, depth: int
) -> int:
    """Append view[at:end], a message of `kind`, to `parts` and return how many bytes that is."""
    children = _CHILDREN[kind] if depth < _DEEPEST else {}
    kept = at
    size = 0
    while at < end:
        key, at = _varint(view, at, end)
        wire = key & 7
        if wire == 2:
            body = at
            length, at = _varint(view, at, end)
            start, at = at, at + length
            if at > end:
                raise _Malformed
            child = children.get(key >> 3) if length >= _BULK else None
            if child is None:
                continue
            inner: list[Any] = []
            if child == "raw":
                inner.append(tickets.issue(view[start:at]))
                length = len(inner[0])
            else:
                before = len(tickets)
                length = _strip(view, start, at, child, inner, tickets, depth + 1)
                if len(tickets) == before:
                    continue
            prefix = _encode(length)
            parts += (view[kept:body], prefix, *inner)
            size += body - kept + len(prefix) + length
            kept = at
        elif wire == 0:
            _, at = _varint(view, at, end)
        elif wire == 1:
            at += 8
        elif wire == 5:
            at += 4
        else:
            raise _Malformed
    if at != end:
        raise _Malformed
    parts.append(view[kept:end])
    return size + end - kept


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    """The base-128 number at `at`, and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _Malformed


def _encode(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
