"""What a compiled model tells about each of its kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from onnxjit.artifact import Blob
from onnxjit.runtime.plan import Expression

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel step of a compiled model.

    `source` is its Python text, `rule` the schedule rule that made it, `declined` the others with
    their reasons. `definition` says what is computed, `nest` in which order, `origin` by which
    ONNX nodes. `flops`, `bytes` (each input and output counted once) and `tiles` (of its parallel
    index space) are numbers, or expressions where sizes are free. `key` names the machine code,
    which equal kernels share.
    """

    name: str
    key: str
    rule: str
    declined: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    definition: str
    nest: str
    origin: tuple[str, ...]
    flops: Expression
    bytes: Expression
    tiles: Expression
    scratch: Expression
    source: str
    symbols: tuple[str, ...] = ()
    wide: bool = False
    target: str = field(default="", repr=False)

    @property
    def llvm(self) -> str:
        """The optimised LLVM IR; compiled when it is asked for."""
        return self._inspect("llvm")

    @property
    def assembly(self) -> str:
        """The assembly; compiled when it is asked for."""
        return self._inspect("asm")

    def _inspect(self, what: str) -> str:
        from onnxjit.codegen.build import Builder, Source
        from onnxjit.codegen.target import host

        if host().code_key != self.target:
            raise RuntimeError(f"kernel {self.name} was compiled for another processor")
        with Builder(host(), jobs=0) as builder:
            return builder.inspect(Source(self.source, self.symbols, self.name, self.wide), what)

    def __str__(self) -> str:
        lines = [f"# {self.name}: {', '.join(self.origin)}", f"# rule: {self.rule}"]
        lines += [f"# {rule} declined: {reason}" for rule, reason in self.declined]
        lines += [f"# {note}" for note in self.notes]
        return "\n".join([*lines, self.source])


class Kernels(Mapping[str, Kernel]):
    """Kernels by name, in the order in which they run."""

    def __init__(self, text: Blob, target: str) -> None:
        data = json.loads(bytes(text))
        self._target = target
        self._sources: Mapping[str, Row] = data["sources"]
        self._rows: dict[str, Row] = {r["name"]: r for r in data["rows"] if "name" in r}

    def __getitem__(self, name: str) -> Kernel:
        row = self._rows[name]
        source = self._sources[row["key"]]
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        fields["declined"] = tuple((rule, reason) for rule, reason in row["declined"])
        return Kernel(
            **fields,
            source=source["text"],
            symbols=tuple(source["symbols"]),
            wide=source["wide"],
            target=self._target,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"<{len(self)} kernels: {', '.join(self)}>"
