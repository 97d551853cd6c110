"""What a kernel's source was made for, as JSON: its definition, its arguments and their layouts.

With it a kernel can be run by itself long after the model was compiled, and another source for the
same arguments can be compared with the definition. Expressions are stored as a table of nodes in
which every distinct one occurs once, children before parents.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from onnxjit.codegen.canonical import canonical
from onnxjit.codegen.expr import Apply, Axis, Const, Dim, Expr, Load, Poly, Reduce
from onnxjit.codegen.fingerprint import content_key
from onnxjit.codegen.kernel import Kernel, Stage, TensorType
from onnxjit.codegen.layout import Layout, Strided
from onnxjit.codegen.loops import LoopNest, Param
from onnxjit.codegen.packing import Packing


@dataclass(frozen=True, slots=True)
class Signature:
    """The interface of a compiled kernel: `kernel(ptrs, ints, scratch, begin, end)`.

    `definition` says what it computes. `params` are the buffers behind `ptrs`, `sizes` the integers
    behind `ints`; `layouts` says where the elements of buffers lie that are not row-major, and a
    buffer in `packings` is passed in packed form. `tiles` and `scratch` (bytes) are over the sizes
    of the definition; the tiles are `rounds` equal shares, one after the other.
    """

    definition: Kernel
    params: tuple[Param, ...]
    sizes: tuple[Expr, ...]
    layouts: Mapping[str, Layout]
    packings: Mapping[str, Packing]
    tiles: Expr
    scratch: Expr
    rounds: Expr


def signature(kernel: Kernel, nest: LoopNest, layouts: Mapping[str, Layout]) -> Signature:
    """The signature of `nest`, which was made for `kernel` under its standard names; `layouts` are
    by the kernel's own names."""
    same = canonical(kernel)
    orders = {b: layouts[v] for b, v in same.buffers.items() if v in layouts}
    packings = {p.buffer: p for p in nest.packings}
    return Signature(
        same.kernel,
        nest.params,
        nest.sizes,
        orders,
        packings,
        nest.tiles,
        nest.scratch,
        nest.rounds,
    )


def structure(kernel: Kernel, layouts: Mapping[str, Layout], constants: Iterable[str]) -> str:
    """32 hexadecimal digits that are equal for kernels which are equal but for names, in layouts
    and in which inputs are constants. `kernel` is under its standard names."""
    table = _Writer(anonymous=True)
    definition = _kernel_data(kernel, table)
    where = _layouts_data(dict(sorted(layouts.items())), table)
    data = [definition, where, sorted(constants), table.nodes]
    return content_key(json.dumps(data).encode())


def _kernel_data(k: Kernel, table: _Writer) -> dict[str, Any]:
    types = {b: [t.dtype, table.all(t.shape)] for b, t in k.types.items()}
    stages = [[x.buffer, table.all(x.axes), table.add(x.value), table.all(x.index)]
              for x in k.stages]  # fmt: skip
    return {
        "inputs": k.inputs,
        "outputs": k.outputs,
        "types": types,
        "stages": stages,
        "clock": table.all([] if k.clock is None else [k.clock]),
    }


def _layouts_data(layouts: Mapping[str, Layout], table: _Writer) -> dict[str, Any]:
    return {
        b: {"steps": table.all(x.steps)} if isinstance(x, Strided) else x
        for b, x in layouts.items()
    }


def to_data(s: Signature) -> dict[str, Any]:
    """A signature in JSON's types."""
    table = _Writer()
    return {
        "name": s.definition.name,
        **_kernel_data(s.definition, table),
        "params": [[p.buffer, p.dtype, p.written] for p in s.params],
        "sizes": table.all(s.sizes),
        "layouts": _layouts_data(s.layouts, table),
        "packings": [[getattr(p, f.name) for f in fields(p)] for p in s.packings.values()],
        "tiles": table.add(s.tiles),
        "scratch": table.add(s.scratch),
        "rounds": table.add(s.rounds),
        "nodes": table.nodes,
    }


def from_data(data: Mapping[str, Any]) -> Signature:
    """The inverse of `to_data`."""
    e = _read(data["nodes"])

    def exprs(numbers: Sequence[int]) -> tuple[Any, ...]:
        return tuple(e[n] for n in numbers)

    kernel = Kernel(
        data["name"],
        tuple(data["inputs"]),
        tuple(data["outputs"]),
        tuple(Stage(b, exprs(axes), e[v], exprs(where)) for b, axes, v, where in data["stages"]),
        {b: TensorType(dtype, exprs(shape)) for b, (dtype, shape) in data["types"].items()},
        next(iter(exprs(data["clock"])), None),
    )
    packings = [Packing(*map(_tuples, row)) for row in data["packings"]]
    return Signature(
        kernel,
        tuple(Param(*row) for row in data["params"]),
        exprs(data["sizes"]),
        {
            b: Strided(exprs(x["steps"])) if isinstance(x, Mapping) else tuple(x)
            for b, x in data["layouts"].items()
        },
        {p.buffer: p for p in packings},
        e[data["tiles"]],
        e[data["scratch"]],
        e[data["rounds"]],
    )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


class _Writer:
    """The table of nodes, as it grows; a node is a tag, plain values and numbers of nodes.

    `anonymous`: sizes are numbered by their first occurrence instead of named.
    """

    def __init__(self, anonymous: bool = False) -> None:
        self.nodes: list[list[Any]] = []
        self._sizes: dict[str, str] | None = {} if anonymous else None
        self._numbers: dict[Expr, int] = {}

    def all(self, exprs: Sequence[Expr]) -> list[int]:
        return [self.add(e) for e in exprs]

    def add(self, e: Expr) -> int:
        if e not in self._numbers:
            node = self._node(e)
            self._numbers[e] = len(self.nodes)
            self.nodes.append(node)
        return self._numbers[e]

    def _node(self, e: Expr) -> list[Any]:
        if isinstance(e, Const):
            # JSON has no infinities and no NaN.
            return ["const", e.value.hex() if isinstance(e.value, float) else e.value, e.dtype]
        if isinstance(e, Axis):
            return ["axis", e.name, self.add(e.extent)]
        if isinstance(e, Dim):
            known = self._sizes
            return ["dim", e.name if known is None else known.setdefault(e.name, f"{len(known)}")]
        if isinstance(e, Load):
            return ["load", e.buffer, self.all(e.index), e.dtype]
        if isinstance(e, Apply):
            return ["apply", e.fn, self.all(e.args), e.dtype]
        if isinstance(e, Poly):
            return ["poly", [[self.all(atoms), c] for atoms, c in e.terms]]
        assert isinstance(e, Reduce), f"a {type(e).__name__} is not part of a definition"
        return ["reduce", e.fn, self.all(e.axes), self.add(e.body)]


def _read(nodes: Sequence[Sequence[Any]]) -> list[Any]:
    e: list[Any] = []
    for tag, *row in nodes:
        if tag == "const":
            value, dtype = row
            e.append(Const(float.fromhex(value) if isinstance(value, str) else value, dtype))
        elif tag == "axis":
            e.append(Axis(row[0], e[row[1]]))
        elif tag == "dim":
            e.append(Dim(row[0]))
        elif tag == "load":
            e.append(Load(row[0], [e[n] for n in row[1]], row[2]))
        elif tag == "apply":
            e.append(Apply(row[0], tuple(e[n] for n in row[1]), row[2]))
        elif tag == "poly":
            e.append(Poly(tuple((tuple(e[n] for n in atoms), c) for atoms, c in row[0])))
        elif tag == "reduce":
            e.append(Reduce(row[0], tuple(e[n] for n in row[1]), e[row[2]]))
        else:
            raise ValueError(f"no kind of expression: {tag!r}")
    return e
