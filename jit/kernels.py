"""The kernels of a compiled model: what is known of each, and edited ones in their place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxjit.artifact import Artifact
from onnxjit.runtime.plan import Expression, Plan

if TYPE_CHECKING:
    import numpy as np

    from onnxjit.codegen.build import Source
    from onnxjit.codegen.cache import Cache
    from onnxjit.kernel_check import Checked
    from onnxjit.kernel_run import Problem
    from onnxjit.kernel_sizes import Space
    from onnxjit.kernel_source import Built
    from onnxjit.kernel_time import KernelTime

Row = dict[str, Any]
SourceText = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Home:
    """What a kernel takes from its model: the plan, its sizes' names in signatures, the cache."""

    plan: Plan
    dims: tuple[str, ...]
    cache: Cache | None
    target: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel step of a compiled model, as it was when it was asked for.

    `source` is its Python text, `rule` the schedule rule that made it, `declined` the others with
    their reasons. `definition` says what is computed, `nest` in which order, `origin` by which
    ONNX nodes. `flops`, `bytes` (each input and output counted once) and `tiles` (of its parallel
    index space) are numbers, or expressions where sizes are free. `key` names the machine code,
    which equal kernels share; `original` is the key of the code that an edited source replaces.
    `variant` are the choices that tuning made instead of the cost models, and `gain` how many times
    as fast the kernel alone was with them (1.0 without).

    Where a method takes `source`, that is the text of an edited source for the same arguments, or
    the path of its file. Where it takes `dims`, sizes by the model's names of them; what is not
    named is 1. `seed` decides the random data.
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
    symbols: tuple[str, ...]
    wide: bool
    signature: str = field(repr=False)
    home: Home = field(repr=False, compare=False)
    original: str | None = None
    variant: Mapping[str, int] = field(default_factory=dict)
    gain: float = 1.0

    @property
    def llvm(self) -> str:
        """The optimised LLVM IR; compiled when it is asked for."""
        return self._inspect("llvm")

    @property
    def assembly(self) -> str:
        """The assembly; compiled when it is asked for."""
        return self._inspect("asm")

    @property
    def decisions(self) -> str:
        """Which rule made it and why the others declined, as comment lines."""
        lines = [f"# {self.name}: {', '.join(self.origin)}", f"# rule: {self.rule}"]
        lines += [f"# {rule} declined: {reason}" for rule, reason in self.declined]
        lines += [f"# {note}" for note in self.notes]
        if self.variant:
            lines.append(
                f"# tuned: {spelled(self.variant)}; {self.gain:.2f} times as fast as usual"
            )
        if self.original is not None:
            lines.append("# edited: this source is not the one that the rule made")
        return "\n".join(lines)

    @property
    def path(self) -> Path | None:
        """The file that holds the source, in the cache; None for a model without a cache."""
        if self.home.cache is None:
            return None
        path = self.home.cache.source_path("kernels", self.key)
        if not path.exists():
            self.home.cache.put_source("kernels", self.key, self.source)
        return path

    def check(self, source: SourceText, dims: Mapping[str, int] | None = None) -> Checked:
        """Build an edited source and compare it with the definition on random data: at `dims`, or
        where sizes are free, at a few small ones.

        Raises `KernelSourceError` for a source that cannot be built and `KernelMismatch` for one
        that computes something else. The source runs as machine code: like any native code, one
        that goes far outside of its buffers ends the process.
        """
        return self._check(self._build_edited(source)[1], dims)

    def time(
        self,
        source: SourceText | None = None,
        *,
        dims: Mapping[str, int] | None = None,
        threads: int = 1,
        seconds: float = 1.0,
        seed: int = 0,
    ) -> dict[str, KernelTime]:
        """Time the kernel by itself on random data, in turns with an edited source if there is
        one: a `KernelTime` under "kernel", and under "edited".

        The same data is used again and again, so that small operands come from the caches.
        Nothing is compared: see `check`.
        """
        from onnxjit.kernel_time import time_kernels

        built = {"kernel": self._build()}
        if source is not None:
            built["edited"] = self._build_edited(source)[1]
        problem = self._problem(dims, seed)
        return time_kernels(problem, built, threads, seconds, self.home.cache)

    def interpret(
        self,
        source: SourceText | None = None,
        *,
        begin: int = 0,
        end: int | None = 1,
        dims: Mapping[str, int] | None = None,
        seed: int = 0,
    ) -> list[np.ndarray]:
        """Run tiles [begin, end) in plain Python on random data, and return the outputs.

        The kernel is the function of the source's file (`path`, or the file given), so breakpoints
        there stop, and pdb steps through it; micro-kernels run on NumPy. `end=None` runs all
        tiles. Elements that no tile has written are NaN, integers -1 or their largest value.
        Raises IndexError where the source reads or writes outside of a buffer.
        """
        from onnxjit.kernel_run import shown
        from onnxjit.kernel_source import Text, called_micro_kernels, read_text

        problem = self._problem(dims, seed)
        last = problem.tiles if end is None else end
        if not 0 <= begin <= last <= problem.tiles:
            raise ValueError(
                f"the kernel has {problem.tiles} tiles: [{begin}, {last}) is not a range of them"
            )
        given = Text(self.source, self.path) if source is None else read_text(source)
        symbols = called_micro_kernels(given)
        filename = str(given.path or f"<kernel {self.name}>")
        if given.path is None:
            shown(filename, given.text)
        return problem.interpret(given.text, symbols, begin, last, filename)

    def _inspect(self, what: str) -> str:
        from onnxjit.codegen.build import Builder
        from onnxjit.codegen.target import host

        self._must_be_at_home()
        with Builder(host(), jobs=0) as builder:
            return builder.inspect(self._source(), what)

    def _source(self) -> Source:
        from onnxjit.codegen.build import Source

        return Source(self.source, self.symbols, self.name, self.wide)

    def _build(self) -> Built:
        from onnxjit.kernel_source import build

        self._must_be_at_home()
        return build(self._source(), self.home.cache)

    def _build_edited(self, source: SourceText) -> tuple[Source, Built]:
        from onnxjit.kernel_source import build, edited_source, read_text

        self._must_be_at_home()
        given = read_text(source)
        made = edited_source(given, self.name, self.wide)
        return made, build(made, self.home.cache, given.where)

    def _check(self, edited: Built, dims: Mapping[str, int] | None = None) -> Checked:
        from onnxjit.kernel_check import check
        from onnxjit.kernel_run import Loaded
        from onnxjit.kernel_sizes import given_sizes

        space = self._space()
        sizes = [] if dims is None else [given_sizes(space, dims)]
        return check(self.name, space, Loaded(self._build()), Loaded(edited), sizes)

    def _space(self) -> Space:
        from onnxjit.codegen.signature import from_data
        from onnxjit.kernel_sizes import space

        return space(from_data(json.loads(self.signature)), self.home.plan, self.home.dims)

    def _problem(self, dims: Mapping[str, int] | None, seed: int) -> Problem:
        from onnxjit.kernel_run import random_problem
        from onnxjit.kernel_sizes import given_sizes

        space = self._space()
        return random_problem(space.signature, given_sizes(space, dims or {}), seed)

    def _must_be_at_home(self) -> None:
        from onnxjit.codegen.target import host

        if host().code_key != self.home.target:
            raise RuntimeError(f"kernel {self.name} was compiled for another processor")

    def __str__(self) -> str:
        return f"{self.decisions}\n{self.source}"


def spelled(variant: Mapping[str, int]) -> str:
    """The choices of a variant: "filtering 4, block_tiles 28"."""
    return ", ".join(f"{name} {value}" for name, value in variant.items())


class Kernels(Mapping[str, Kernel]):
    """Kernels by name, in the order in which they run.

    `replace` puts an edited source in the place of a kernel of the running model, `restore` takes
    it out again.
    """

    def __init__(
        self,
        artifact: Artifact,
        cache: Cache | None,
        change: Callable[[Callable[[Artifact], Artifact]], Artifact],
    ) -> None:
        """`change` has the model run what a function makes of its artifact, and returns that."""
        self._change, self._cache = change, cache
        self._read(artifact)

    def _read(self, artifact: Artifact) -> None:
        data = json.loads(bytes(artifact.kernels))
        self._home = Home(artifact.plan, tuple(data["dims"]), self._cache, artifact.target)
        self._signatures: list[str] = data["signatures"]
        self._sources: Mapping[str, Row] = data["sources"]
        self._rows: dict[str, Row] = {r["name"]: r for r in data["rows"] if "name" in r}

    def replace(self, name: str, source: SourceText) -> Kernel:
        """Have the model run an edited source instead of a kernel, and return the new kernel.

        `source` is a text, or the path of a file. It is built for the same arguments and compared
        with the kernel's definition on random data (see `Kernel.check`). If all is well, every
        step that has the same machine code runs the edited one from the next call of the model
        on; calls that are under way end with the old one. Code that the model has compiled for
        special sizes, or compiles when it runs, stays what it is.

        Raises `KernelSourceError` or `KernelMismatch`, and changes nothing then.
        """
        from onnxjit.kernel_swap import own_key, with_edit

        key = own_key(self._rows[name])
        made, built = self[name]._build_edited(source)
        same = [self[other] for other, row in self._rows.items() if own_key(row) == key]
        for kernel in {k.signature: k for k in same}.values():
            kernel._check(built)
        self._read(self._change(lambda artifact: with_edit(artifact, key, made, built)))
        return self[name]

    def restore(self, name: str | None = None) -> None:
        """Have the model run the own code of an edited kernel again; of all of them if None."""
        from onnxjit.kernel_swap import own_key, without_edits

        key = None if name is None else own_key(self._rows[name])
        self._read(self._change(lambda artifact: without_edits(artifact, key)))

    def __getitem__(self, name: str) -> Kernel:
        row = self._rows[name]
        source = self._sources[row["key"]]
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        fields["declined"] = tuple((rule, reason) for rule, reason in row["declined"])
        fields["signature"] = self._signatures[row["signature"]]
        return Kernel(
            **fields,
            source=source["text"],
            symbols=tuple(source["symbols"]),
            wide=source["wide"],
            home=self._home,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"<{len(self)} kernels: {', '.join(self)}>"
