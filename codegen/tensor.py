"""A NumPy-like surface whose operations build definitions: a tensor is a function of its index.

Operators are written with it. Nothing is computed; `Trace` collects the stages that reductions
need, and reading a tensor at symbolic indices yields the expression of one element.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from onnxjit.codegen.expr import (
    INDEX,
    ONE,
    Axis,
    Const,
    Expr,
    Load,
    Reduce,
    apply,
    as_int,
    cast,
    fresh_axis,
    index,
    leaves,
    loads,
    poly_mul,
    to_text,
)
from onnxjit.codegen.kernel import (
    Kernel,
    Stage,
    TensorType,
    inline,
    product,
    prune,
    split_reader,
    used_inputs,
)
from onnxjit.codegen.scalar_functions import COMBINE, reduction_identity

Index = tuple[Expr, ...]


class DefinitionError(ValueError):
    """An operator was given shapes, dtypes or attributes that its specification forbids."""


class NeedsValue(Exception):
    """A definition needs the contents of an input that is not known at compile time."""

    def __init__(self, buffer: str) -> None:
        super().__init__(f"the contents of {buffer} are not known at compile time")
        self.buffer = buffer


_ids = itertools.count()
_trace: contextvars.ContextVar[Trace | None] = contextvars.ContextVar("trace", default=None)


class Trace:
    """Stages, buffer types and guards gathered while a definition runs.

    `clock` is the axis over which a recurrence runs, and `running` whether stages are being added
    to it; `states` are buffers that live from one of its steps to the next, `recorded` those that
    keep something of every step. `faults` are questions to the data: a function that makes an int64
    scalar, the least int64 when nothing is wrong, and the text of what it complains of.
    """

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.types: dict[str, TensorType] = {}
        self.guards: list[tuple[Expr, Expr]] = []
        self.faults: list[tuple[Callable[[], Tensor], str]] = []
        self.clock: Axis | None = None
        self.running = False
        self.states: list[str] = []
        self.recorded: set[str] = set()

    @contextmanager
    def active(self) -> Any:
        token = _trace.set(self)
        try:
            yield self
        finally:
            _trace.reset(token)


def new_name(prefix: str) -> str:
    """A buffer name that no other trace of this process uses."""
    return f"{prefix}{next(_ids)}"


def current() -> Trace:
    t = _trace.get()
    if t is None:
        raise RuntimeError("a definition that reduces must run inside a Trace")
    return t


class Tensor:
    """`at(index)` gives one element as an expression; `known` its contents when they are known."""

    __slots__ = ("_at", "_known", "_pieces", "buffer", "dtype", "shape")

    def __init__(
        self,
        shape: Sequence[Expr | int],
        dtype: str,
        at: Callable[[Index], Expr],
        known: np.ndarray | None = None,
        pieces: Sequence[tuple[Sequence[Expr], Tensor]] | None = None,
        buffer: str | None = None,
    ) -> None:
        self.shape = tuple(index(d) for d in shape)
        self.dtype = dtype
        self._at = at
        self._known = known
        self._pieces = pieces
        self.buffer = buffer

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> Expr:
        return product(self.shape)

    def at(self, *idx: Expr | int) -> Expr:
        assert len(idx) == len(self.shape), f"rank {len(self.shape)} read with {len(idx)} indices"
        return self._at(tuple(index(i) for i in idx))

    def dim(self, axis: int) -> Expr:
        return self.shape[axis]

    def values(self) -> list[Expr]:
        """The elements of a small tensor in row-major order, as expressions over dims.

        Raises `NeedsValue` when they depend on run-time data.
        """
        sizes = [as_int(d) for d in self.shape]
        if any(s is None for s in sizes):
            raise NeedsValue(self.buffer or "an intermediate value")
        if self._known is not None:
            return [_as_expr(v, self.dtype) for v in self._known.reshape(-1)]
        out = []
        for idx in np.ndindex(*[s for s in sizes if s is not None]):
            e = self.at(*idx)
            for x in leaves(e):
                if isinstance(x, Axis):
                    raise NeedsValue(self.buffer or "an intermediate value")
            if loads(e):
                raise NeedsValue(self.buffer or "an intermediate value")
            out.append(e)
        return out

    def ints(self) -> list[int]:
        """Like `values`, but all must be plain integers."""
        out = [as_int(v) for v in self.values()]
        if any(v is None for v in out):
            raise NeedsValue(self.buffer or "an intermediate value")
        return [v for v in out if v is not None]

    def scalar(self) -> Expr:
        vals = self.values()
        if len(vals) != 1:
            raise DefinitionError(f"expected one value, got {len(vals)}")
        return vals[0]

    def __add__(self, o: Any) -> Tensor:
        return elementwise("add", self, o)

    def __radd__(self, o: Any) -> Tensor:
        return elementwise("add", o, self)

    def __sub__(self, o: Any) -> Tensor:
        return elementwise("sub", self, o)

    def __rsub__(self, o: Any) -> Tensor:
        return elementwise("sub", o, self)

    def __mul__(self, o: Any) -> Tensor:
        return elementwise("mul", self, o)

    def __rmul__(self, o: Any) -> Tensor:
        return elementwise("mul", o, self)

    def __truediv__(self, o: Any) -> Tensor:
        return elementwise("div", self, o)

    def __rtruediv__(self, o: Any) -> Tensor:
        return elementwise("div", o, self)

    def __neg__(self) -> Tensor:
        return elementwise("neg", self)


def _as_expr(v: Any, dtype: str) -> Expr:
    return v if isinstance(v, Expr) else Const(v, dtype)


# --- sources -----------------------------------------------------------------------------------


def placeholder(buffer: str, t: TensorType, known: np.ndarray | None = None) -> Tensor:
    """A kernel input; `known` (object or numeric array) makes reads at constant indices fold."""

    active = _trace.get()
    if active is not None:
        active.types[buffer] = t

    def at(idx: Index) -> Expr:
        if known is not None:
            fixed = [as_int(i) for i in idx]
            at_index = tuple(i for i in fixed if i is not None)
            if len(at_index) == len(fixed):
                # Outside reads occur in branches that a selection is about to discard.
                inside = all(0 <= i < n for i, n in zip(at_index, known.shape, strict=True))
                return _as_expr(known[at_index], t.dtype) if inside else Const(0, t.dtype)
            if known.size == 1:
                return _as_expr(known.reshape(-1)[0], t.dtype)
        return Load(buffer, idx, t.dtype)

    return Tensor(t.shape, t.dtype, at, known=known, buffer=buffer)


def full(shape: Sequence[Expr | int], value: Any, dtype: str) -> Tensor:
    e = _as_expr(value, dtype)
    return Tensor(shape, dtype, lambda idx: e)


def array(values: Any, dtype: str) -> Tensor:
    """A small constant tensor that is written into the expressions that read it."""
    data = np.asarray(values)
    if any(isinstance(v, Expr) for v in np.asarray(values, dtype=object).reshape(-1)):
        data = np.asarray(values, dtype=object)

    def at(idx: Index) -> Expr:
        fixed = [as_int(i) for i in idx]
        if all(i is not None for i in fixed):
            return _as_expr(data[tuple(i for i in fixed if i is not None)], dtype)
        flat = data.reshape(-1)
        linear = flatten_index(idx, [index(d) for d in data.shape])
        e = _as_expr(flat[-1], dtype) if flat.size else Const(0, dtype)
        for k in range(flat.size - 2, -1, -1):
            e = apply("select", apply("eq", linear, k), _as_expr(flat[k], dtype), e)
        return e

    return Tensor(data.shape, dtype, at, known=data)


def compute(shape: Sequence[Expr | int], dtype: str, fn: Callable[..., Expr]) -> Tensor:
    """The tensor whose element at `(i, j, …)` is `fn(i, j, …)`."""
    return Tensor(shape, dtype, lambda idx: fn(*idx))


# --- elementwise -------------------------------------------------------------------------------


def same_dim(a: Expr, b: Expr) -> Expr:
    """Two sizes that must agree: proved, or guarded at run time; returns the simpler one."""
    if a is b:
        return a
    ia, ib = as_int(a), as_int(b)
    if ia is not None and ib is not None:
        raise DefinitionError(f"sizes {ia} and {ib} differ")
    t = _trace.get()
    if t is not None:
        t.guards.append((a, b))
    if ia is not None:
        return a
    if ib is not None:
        return b
    return a if len(to_text(a)) <= len(to_text(b)) else b


def broadcast_dim(a: Expr, b: Expr) -> Expr:
    if a is ONE:
        return b
    if b is ONE:
        return a
    try:
        return same_dim(a, b)
    except DefinitionError:
        raise DefinitionError(f"cannot broadcast {to_text(a)} with {to_text(b)}") from None


def broadcast_shape(*shapes: Sequence[Expr]) -> tuple[Expr, ...]:
    """NumPy's multidirectional broadcasting (ONNX `Broadcasting.md`)."""
    rank = max((len(s) for s in shapes), default=0)
    out: list[Expr] = [ONE] * rank
    for s in shapes:
        for k, d in enumerate(s, rank - len(s)):
            out[k] = broadcast_dim(out[k], d)
    return tuple(out)


def aligned(x: Tensor, idx: Index) -> Expr:
    """`x` read under broadcasting at an index of the broadcast shape."""
    tail = idx[len(idx) - x.rank :] if x.rank else ()
    return x.at(*(index(0) if d is ONE else i for d, i in zip(x.shape, tail, strict=True)))


def as_tensor(x: Any, dtype: str) -> Tensor:
    return x if isinstance(x, Tensor) else full((), x, dtype)


def elementwise(fn: str | Callable[..., Expr], *args: Any, dtype: str | None = None) -> Tensor:
    """Applies a scalar function under broadcasting. Python numbers take the tensors' dtype.

    float16 and bfloat16 are computed in float32 and rounded once at the end.
    """
    like = next(a.dtype for a in args if isinstance(a, Tensor))
    tensors = [as_tensor(a, like) for a in args]
    shape = broadcast_shape(*(t.shape for t in tensors))

    def scalar(*values: Expr) -> Expr:
        return apply(fn, *values, dtype=dtype) if isinstance(fn, str) else fn(*values)

    def at(idx: Index) -> Expr:
        return in_wide(scalar, *(aligned(t, idx) for t in tensors))

    if dtype is None:
        dtype = in_wide(scalar, *(Load("?", (), t.dtype) for t in tensors)).dtype
    return Tensor(shape, dtype, at)


NARROW = ("float16", "bfloat16")


def in_wide(fn: Callable[..., Expr], *values: Expr) -> Expr:
    """Evaluates `fn` with 16-bit floats widened to float32 and narrows a float32 result back."""
    narrow = next((v.dtype for v in values if v.dtype in NARROW), None)
    if narrow is None:
        return fn(*values)
    e = fn(*(cast(v, "float32") if v.dtype in NARROW else v for v in values))
    return cast(e, narrow) if e.dtype == "float32" else e


def select(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    shape = broadcast_shape(c.shape, a.shape, b.shape)
    return Tensor(
        shape,
        a.dtype,
        lambda i: apply("select", aligned(c, i), aligned(a, i), aligned(b, i)),
    )


def cast_to(x: Tensor, dtype: str) -> Tensor:
    if x.dtype == dtype:
        return x
    return Tensor(x.shape, dtype, lambda idx: cast(x.at(*idx), dtype))


# --- movement ----------------------------------------------------------------------------------


def flatten_index(idx: Sequence[Expr], shape: Sequence[Expr]) -> Expr:
    """Row-major position of an index."""
    total: Expr = index(0)
    for i, d in zip(idx, shape, strict=True):
        total = poly_mul(total, d) + i
    return total


def unflatten_index(linear: Expr, shape: Sequence[Expr]) -> list[Expr]:
    out: list[Expr] = []
    rest = linear
    for k in range(len(shape) - 1, 0, -1):
        out.append(rest % shape[k])
        rest = rest // shape[k]
    if shape:
        out.append(rest)
    return out[::-1]


def _groups(src: Sequence[Expr], dst: Sequence[Expr]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of source and target axes whose products agree."""
    groups = []
    i = j = 0
    while i < len(src) or j < len(dst):
        gi, gj = [], []
        a: Expr = ONE
        b: Expr = ONE
        if i < len(src) and j < len(dst) and src[i] is dst[j]:
            groups.append(([i], [j]))
            i, j = i + 1, j + 1
            continue
        if i < len(src):
            gi.append(i)
            a, i = src[i], i + 1
        if j < len(dst):
            gj.append(j)
            b, j = dst[j], j + 1
        while a is not b and (i < len(src) or j < len(dst)):
            na, nb = as_int(a), as_int(b)
            grow_src = i < len(src) and (
                j >= len(dst) or (na < nb if na is not None and nb is not None else _fewer(a, b))
            )
            if grow_src:
                gi.append(i)
                a, i = poly_mul(a, src[i]), i + 1
            else:
                gj.append(j)
                b, j = poly_mul(b, dst[j]), j + 1
        groups.append((gi, gj))
    return groups


def _fewer(a: Expr, b: Expr) -> bool:
    """Whether the product `a` has fewer symbolic factors than `b` (or as many and is smaller)."""
    from onnxjit.codegen.expr import poly_terms

    def weight(e: Expr) -> tuple[int, int]:
        terms = poly_terms(e)
        return (max((len(t) for t in terms), default=0), max(terms.values(), default=0))

    return weight(a) < weight(b)


def reshape(x: Tensor, shape: Sequence[Expr | int]) -> Tensor:
    """Row-major reshape to fully resolved sizes."""
    target = tuple(index(d) for d in shape)
    if target == x.shape:
        return x
    src, dst = product(x.shape), product(target)
    if src is not dst:
        same_dim(src, dst)
    groups = _groups(x.shape, target)

    def at(idx: Index) -> Expr:
        out: list[Expr] = [index(0)] * x.rank
        for gi, gj in groups:
            if len(gi) == 1 and len(gj) == 1:
                out[gi[0]] = idx[gj[0]]
                continue
            linear = flatten_index([idx[j] for j in gj], [target[j] for j in gj])
            parts = unflatten_index(linear, [x.shape[i] for i in gi])
            for i, e in zip(gi, parts, strict=True):
                out[i] = e
        return x.at(*out)

    return Tensor(target, x.dtype, at, known=_reshaped(x, target))


def _reshaped(x: Tensor, shape: tuple[Expr, ...]) -> np.ndarray | None:
    sizes = [as_int(d) for d in shape]
    if x._known is None or any(s is None for s in sizes):
        return None
    return x._known.reshape([s for s in sizes if s is not None])


def transpose(x: Tensor, perm: Sequence[int]) -> Tensor:
    inverse = [0] * len(perm)
    for k, p in enumerate(perm):
        inverse[p] = k
    return Tensor(
        [x.shape[p] for p in perm],
        x.dtype,
        lambda idx: x.at(*(idx[inverse[k]] for k in range(x.rank))),
    )


def expand(x: Tensor, shape: Sequence[Expr]) -> Tensor:
    return Tensor(shape, x.dtype, lambda idx: aligned(x, idx))


def slice_axis(
    x: Tensor, axis: int, start: Expr | int, length: Expr | int, step: int = 1
) -> Tensor:
    """Elements start, start + step, … of one axis; the caller has clamped the range."""
    shape = list(x.shape)
    shape[axis] = index(length)
    begin = index(start)

    def at(idx: Index) -> Expr:
        full_index = list(idx)
        full_index[axis] = begin + idx[axis] * step
        return x.at(*full_index)

    return Tensor(shape, x.dtype, at)


def concat(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Joins along `axis`; lowered as one store per part, read as a chain of selections."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    for p in parts[1:]:
        if p.rank != len(shape):
            raise DefinitionError("tensors of different rank cannot be concatenated")
        for k in range(len(shape)):
            if k != axis:
                shape[k] = same_dim(shape[k], p.shape[k])
    starts: list[Expr] = []
    total: Expr = index(0)
    for p in parts:
        starts.append(total)
        total = total + p.shape[axis]
    shape[axis] = total

    def at(idx: Index) -> Expr:
        def read(k: int) -> Expr:
            sub = list(idx)
            sub[axis] = idx[axis] - starts[k]
            return parts[k].at(*sub)

        def chain(k: int) -> Expr:
            if k == len(parts) - 1:
                return read(k)
            c = apply("lt", idx[axis], starts[k + 1])
            if isinstance(c, Const):
                return read(k) if c.value else chain(k + 1)
            return apply("select", c, read(k), chain(k + 1))

        return chain(0)

    origin = [index(0)] * len(shape)
    pieces = [
        ([*origin[:axis], s, *origin[axis + 1 :]], p) for s, p in zip(starts, parts, strict=True)
    ]
    return Tensor(shape, parts[0].dtype, at, pieces=pieces)


def pad_with(
    x: Tensor, before: Sequence[Expr | int], after: Sequence[Expr | int], value: Any
) -> Tensor:
    """Constant padding (or cropping where negative) on every axis."""
    lo = [index(b) for b in before]
    shape = [d + b + a for d, b, a in zip(x.shape, lo, after, strict=True)]
    fill = _as_expr(value, x.dtype)

    def at(idx: Index) -> Expr:
        src = [i - b for i, b in zip(idx, lo, strict=True)]
        inside: Expr = Const(True, "bool")
        for i, d in zip(src, x.shape, strict=True):
            inside = apply("logical_and", inside, apply("le", index(0), i))
            inside = apply("logical_and", inside, apply("lt", i, d))
        return apply("select", inside, x.at(*src), fill)

    return Tensor(shape, x.dtype, at)


# --- stages ------------------------------------------------------------------------------------


def materialize(x: Tensor, prefix: str = "t") -> Tensor:
    """Makes the tensor a stage of the current trace, so that it is computed once and stored."""
    t = current()
    name = new_name(prefix)
    axes = tuple(fresh_axis(d) for d in x.shape)
    t.types[name] = TensorType(x.dtype, x.shape)
    if t.running:
        assert t.clock is not None
        t.stages.append(Stage(name, (t.clock, *axes), x.at(*axes), axes))
    else:
        t.stages.append(Stage(name, axes, x.at(*axes)))
    return Tensor(x.shape, x.dtype, lambda idx: Load(name, idx, x.dtype), buffer=name)


FOLLOWED_TERMS = 64
"""Most terms of an integer reduction that is followed symbolically."""


def reduce_over(
    fn: str,
    shape: Sequence[Expr | int],
    extents: Sequence[Expr | int],
    body: Callable[[Index, Index], Expr],
) -> Tensor:
    """A stage: element `i` is `fn` over all `r < extents` of `body(i, r)`.

    Where every extent is 1 the result is the body itself, and no stage is made.
    """
    probe = tuple(index(0) if index(d) is ONE else fresh_axis(d, "r") for d in extents)
    bound = tuple(r for r in probe if isinstance(r, Axis))
    dims = tuple(index(d) for d in shape)
    dtype = body(tuple(fresh_axis(d) for d in dims), probe).dtype
    if not bound:
        return Tensor(dims, dtype, lambda idx: body(idx, probe))

    def at(idx: Index) -> Expr:
        return Reduce(fn, bound, body(idx, probe))

    made = materialize(Tensor(dims, dtype, at))
    sizes = [as_int(d) or 0 for d in extents]
    if not dtype.startswith(("int", "bool")) or not 0 < math.prod(sizes) <= FOLLOWED_TERMS:
        return made

    def read(idx: Index) -> Expr:
        # Sizes of tensors are reduced in shape arithmetic: such a result is an expression of dims.
        if all(as_int(i) is not None for i in idx):
            points = itertools.product(*map(range, sizes))
            terms = [body(idx, tuple(map(index, r))) for r in points]
            if not any(loads(t) for t in terms):
                return functools.reduce(lambda a, b: apply(COMBINE[fn], a, b), terms)
        return made.at(*idx)

    return Tensor(dims, dtype, read, buffer=made.buffer)


def reduce(fn: str, x: Tensor, axes: Sequence[int], keepdims: bool = False) -> Tensor:
    """Reduces `axes` (non-negative). 16-bit floats are accumulated in float32 and stay float32."""
    gone = sorted(set(axes))
    kept = [k for k in range(x.rank) if k not in gone]
    wide = "float32" if x.dtype in NARROW else x.dtype

    def body(idx: Index, red: Index) -> Expr:
        full_index: list[Expr] = [index(0)] * x.rank
        for k, i in zip(kept, idx, strict=True):
            full_index[k] = i
        for k, r in zip(gone, red, strict=True):
            full_index[k] = r
        return cast(x.at(*full_index), wide)

    out = reduce_over(fn, [x.shape[k] for k in kept], [x.shape[k] for k in gone], body)
    if not keepdims:
        return out
    shape = [ONE if k in gone else d for k, d in enumerate(x.shape)]
    return Tensor(shape, out.dtype, lambda idx: out.at(*(idx[k] for k in kept)))


def reduce_identity(fn: str, dtype: str) -> Const:
    return Const(reduction_identity(fn, dtype), dtype)


def finish(
    name: str, t: Trace, results: Sequence[tuple[str, Tensor]], inputs: Sequence[str]
) -> Kernel:
    """The kernel that stores each result tensor under its buffer name. The states of a recurrence
    are outputs of it as well."""
    stages = list(t.stages)
    types = dict(t.types)
    names: dict[str, str] = {}
    for buffer, x in results:
        types[buffer] = TensorType(x.dtype, x.shape)
        if x.buffer in t.recorded and x.buffer not in names:
            names[x.buffer] = buffer
            continue
        if x._pieces is not None:
            for origin, part in x._pieces:
                axes = tuple(fresh_axis(d) for d in part.shape)
                where = tuple(o + a for o, a in zip(origin, axes, strict=True))
                stages.append(Stage(buffer, axes, part.at(*axes), where))
            continue
        axes = tuple(fresh_axis(d) for d in x.shape)
        stages.append(Stage(buffer, axes, x.at(*axes)))
    outputs = tuple(b for b, _ in results)
    if t.clock is None:
        kept = merge_stages(prune(tuple(stages), outputs), outputs)
        return Kernel(name, used_inputs(kept, inputs), outputs, kept, types)
    stages = [replace(s, buffer=names.get(s.buffer, s.buffer)) for s in stages]
    kept = prune(tuple(stages), outputs)
    stored = {s.buffer for s in kept}
    outputs = (*outputs, *(b for b in t.states if b in stored))
    return Kernel(name, used_inputs(kept, inputs), outputs, kept, types, t.clock)


def merge_stages(stages: tuple[Stage, ...], outputs: Sequence[str]) -> tuple[Stage, ...]:
    """Folds a reduced temporary into its only reader when that reads each element exactly once.

    The reader then holds the reduction inside its value, which is the form of an epilogue.
    Temporaries without a reduction were made by `materialize` on purpose and stay.
    """
    work = list(stages)
    k = 0
    while k < len(work):
        s = work[k]
        readers = [
            (j, x) for j, r in enumerate(work) for x in loads(r.value) if x.buffer == s.buffer
        ]
        if s.buffer in outputs or not s.reduces or len(readers) != 1:
            k += 1
            continue
        j, x = readers[0]
        reader, x = split_reader(work[j], x)
        varying = [i for i in x.index if as_int(i) != 0]
        wanted = [a for a in reader.axes if a.extent is not ONE]
        bijective = len(set(varying)) == len(varying) and set(wanted) <= set(varying) <= {
            *reader.axes
        }
        nested = any(x in loads(r.body) for r in reader.reduces)
        if bijective and not nested:
            work[j] = Stage(reader.buffer, reader.axes, inline(reader.value, s), reader.index)
            del work[k]
            k = 0
        else:
            k += 1
    return tuple(work)


__all__ = [
    "INDEX", "DefinitionError", "NeedsValue", "Tensor", "Trace", "aligned", "array", "as_tensor",
    "broadcast_shape", "cast_to", "compute", "concat", "current", "elementwise", "expand",
    "finish", "flatten_index", "full", "in_wide", "materialize", "merge_stages", "new_name",
    "pad_with", "placeholder", "reduce", "reduce_identity", "reduce_over", "reshape", "same_dim",
    "select", "slice_axis", "transpose", "unflatten_index",
]  # fmt: skip
