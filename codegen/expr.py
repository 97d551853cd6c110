"""Scalar expressions over loop axes: the closed vocabulary in which every operator is defined.

Expressions are immutable and interned, so structural equality is identity and a subexpression that
occurs twice is one object. int64 sums and products are kept in polynomial normal form (`Poly`),
which makes index arithmetic with symbolic sizes comparable and divisible; see `simplify.py` for the
rules that need value ranges.
"""

from __future__ import annotations

import itertools
import weakref
from _weakref import _remove_dead_weakref  # type: ignore[attr-defined]  # not two steps
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

INDEX = "int64"


class _Entry(weakref.ref["Expr"]):
    """A weak reference that knows its place in the table (a WeakValueDictionary's takes thrice as
    long to make, and expressions are most of what a compilation makes)."""

    __slots__ = ("key",)
    key: tuple[Any, ...]


_interned: dict[tuple[Any, ...], _Entry] = {}


def _forget(entry: _Entry) -> None:
    _remove_dead_weakref(_interned, entry.key)


class Expr:
    """Base of all expressions; `dtype` is a NumPy dtype name, `kids` are the expressions that it
    is made of. Supports Python arithmetic.

    Hashing and comparison are those of `object`, by identity."""

    __slots__ = ("__weakref__", "_free", "_key", "_loads", "_order", "_text", "dtype", "kids")
    dtype: str
    kids: tuple[Expr, ...]
    _order: tuple[str, str] | None
    _key: tuple[Any, ...]
    _free: frozenset[Expr] | None
    _loads: tuple[Load, ...] | None
    _text: str | None

    def __reduce__(self) -> Any:
        return (_rebuild, (type(self).__name__, self._key[1:]))

    def __add__(self, other: Any) -> Expr:
        return apply("add", self, other)

    def __radd__(self, other: Any) -> Expr:
        return apply("add", other, self)

    def __sub__(self, other: Any) -> Expr:
        return apply("sub", self, other)

    def __rsub__(self, other: Any) -> Expr:
        return apply("sub", other, self)

    def __mul__(self, other: Any) -> Expr:
        return apply("mul", self, other)

    def __rmul__(self, other: Any) -> Expr:
        return apply("mul", other, self)

    def __floordiv__(self, other: Any) -> Expr:
        return apply("floordiv", self, other)

    def __rfloordiv__(self, other: Any) -> Expr:
        return apply("floordiv", other, self)

    def __mod__(self, other: Any) -> Expr:
        return apply("mod", self, other)

    def __neg__(self) -> Expr:
        return apply("neg", self)

    def __repr__(self) -> str:
        return to_text(self)


_Kind = TypeVar("_Kind", bound=Expr)


def _known(kind: type[_Kind], key: tuple[Any, ...]) -> _Kind | None:
    """The living expression with this key, else None."""
    entry = _interned.get(key)
    return None if entry is None else entry()  # type: ignore[return-value]


def _made(
    kind: type[_Kind], key: tuple[Any, ...], dtype: str, kids: tuple[Expr, ...] = (), **fields: Any
) -> _Kind:
    """A new expression, or its equal that another thread made in the meantime. Nobody finds it
    before it is complete."""
    e: Any = object.__new__(kind)
    e._key, e.dtype, e.kids = key, dtype, kids
    e._free = e._loads = e._text = e._order = None
    for name, value in fields.items():
        setattr(e, name, value)
    entry = _Entry(e, _forget)
    entry.key = key
    while (there := _interned.setdefault(key, entry)) is not entry:
        living: Any = there()
        if living is not None:
            return living  # type: ignore[no-any-return]
        _remove_dead_weakref(_interned, key)
    return e  # type: ignore[no-any-return]


class Const(Expr):
    """A literal. Floats are compared by their bits, so that -0.0 and NaN are themselves."""

    __slots__ = ("value",)
    value: Any

    def __new__(cls, value: Any, dtype: str) -> Const:
        if dtype == "bool":
            value = bool(value)
        elif dtype.startswith(("int", "uint")):
            value = int(value)
        else:
            value = float(value)
        bits = value.hex() if isinstance(value, float) else value
        key = ("Const", bits, dtype)
        return _known(cls, key) or _made(cls, key, dtype, value=value)

    def __reduce__(self) -> Any:
        return (Const, (self.value, self.dtype))


class Axis(Expr):
    """A loop index running over [0, extent). Two axes are the same when their names are."""

    __slots__ = ("extent", "name")
    name: str
    extent: Expr
    _count: ClassVar[Iterator[int]] = itertools.count(1)

    def __new__(cls, name: str, extent: Expr | int) -> Axis:
        extent = index(extent)
        key = ("Axis", name, extent)
        return _known(cls, key) or _made(cls, key, INDEX, name=name, extent=extent)


def fresh_axis(extent: Expr | int, prefix: str = "a") -> Axis:
    """A new axis whose name no other axis has."""
    return Axis(f"{prefix}{next(Axis._count)}", extent)


class Dim(Expr):
    """A symbolic size: a non-negative run-time integer of the kernel."""

    __slots__ = ("name",)
    name: str

    def __new__(cls, name: str) -> Dim:
        key = ("Dim", name)
        return _known(cls, key) or _made(cls, key, INDEX, name=name)


class Var(Expr):
    """A local scalar of a loop nest (an accumulator, a tile base); never part of a definition."""

    __slots__ = ("name",)
    name: str

    def __new__(cls, name: str, dtype: str = INDEX) -> Var:
        key = ("Var", name, dtype)
        return _known(cls, key) or _made(cls, key, dtype, name=name)


class Load(Expr):
    """Element `index` of `buffer` (a logical index in a definition, a flat offset in a nest)."""

    __slots__ = ("buffer", "index")
    buffer: str
    index: tuple[Expr, ...]

    def __new__(cls, buffer: str, index: Iterable[Expr | int], dtype: str) -> Load:
        idx = _indices(index)
        key = ("Load", buffer, idx, dtype)
        return _known(cls, key) or _made(cls, key, dtype, idx, buffer=buffer, index=idx)


class Apply(Expr):
    """A scalar function `fn` of `args`; the functions are those of `scalar_functions.FUNCTIONS`."""

    __slots__ = ("args", "fn")
    fn: str
    args: tuple[Expr, ...]

    def __new__(cls, fn: str, args: tuple[Expr, ...], dtype: str) -> Apply:
        key = ("Apply", fn, args, dtype)
        return _known(cls, key) or _made(cls, key, dtype, args, fn=fn, args=args)


class Poly(Expr):
    """An int64 sum of products: `terms` maps sorted atom tuples to non-zero coefficients."""

    __slots__ = ("terms",)
    terms: tuple[tuple[tuple[Expr, ...], int], ...]

    def __new__(cls, terms: tuple[tuple[tuple[Expr, ...], int], ...]) -> Poly:
        key = ("Poly", terms)
        found = _known(cls, key)
        if found is None:
            kids = tuple([a for atoms, _ in terms for a in atoms])
            found = _made(cls, key, INDEX, kids, terms=terms)
        return found


class Reduce(Expr):
    """`fn` (sum, prod, max, min, any, all) of `body` over all values of `axes`."""

    __slots__ = ("axes", "body", "fn")
    fn: str
    axes: tuple[Axis, ...]
    body: Expr

    def __new__(cls, fn: str, axes: tuple[Axis, ...], body: Expr) -> Reduce:
        key = ("Reduce", fn, axes, body)
        return _known(cls, key) or _made(cls, key, body.dtype, (body,), fn=fn, axes=axes, body=body)


def _rebuild(kind: str, key: tuple[Any, ...]) -> Expr:
    return globals()[kind](*key)


ZERO = Const(0, INDEX)
ONE = Const(1, INDEX)
TRUE = Const(True, "bool")
FALSE = Const(False, "bool")


def index(x: Expr | int) -> Expr:
    """An int64 expression from a Python integer or an expression."""
    return x if isinstance(x, Expr) else Const(int(x), INDEX)


def _indices(items: Iterable[Expr | int]) -> tuple[Expr, ...]:
    return tuple([index(i) for i in items])


def const(value: Any, dtype: str) -> Const:
    return Const(value, dtype)


def as_int(e: Expr | int) -> int | None:
    """The value of a constant integer expression, else None."""
    if isinstance(e, int):
        return e
    return e.value if isinstance(e, Const) else None


# --- polynomials -------------------------------------------------------------------------------


def poly_terms(e: Expr) -> dict[tuple[Expr, ...], int]:
    """The terms of an int64 expression as {atoms: coefficient}; the constant has key ()."""
    if isinstance(e, Poly):
        return dict(e.terms)
    if isinstance(e, Const):
        return {(): e.value} if e.value else {}
    return {(e,): 1}


def _atom_key(e: Expr) -> tuple[str, str]:
    order = e._order
    if order is None:
        order = e._order = (type(e).__name__, getattr(e, "name", "") or repr(e))
    return order


def _term_key(item: tuple[tuple[Expr, ...], int]) -> tuple[Any, ...]:
    return (-len(item[0]), [_atom_key(a) for a in item[0]])


def from_terms(terms: Mapping[tuple[Expr, ...], int]) -> Expr:
    """The normal form of a sum of products; `k * (x // k) + x % k` becomes `x`."""
    for atoms, c in terms.items():
        if len(atoms) == 1 and isinstance(mod := atoms[0], Apply) and mod.fn == "mod" and c:
            x, k = mod.args
            quotient = _known(Apply, ("Apply", "floordiv", (x, k), INDEX))
            size = as_int(k)
            if size and quotient is not None and terms.get((quotient,)) == c * size:
                rest = {a: v for a, v in terms.items() if a not in (atoms, (quotient,))}
                return poly_add(from_terms(rest), poly_mul(x, Const(c, INDEX)))
    items = [(a, c) for a, c in terms.items() if c]
    if not items:
        return ZERO
    if len(items) == 1:
        atoms, c = items[0]
        if not atoms:
            return Const(c, INDEX)
        if c == 1 and len(atoms) == 1:
            return atoms[0]
    else:
        items.sort(key=_term_key)
    return Poly(tuple(items))


def poly_add(a: Expr, b: Expr, sign: int = 1) -> Expr:
    terms = poly_terms(a)
    for atoms, c in poly_terms(b).items():
        terms[atoms] = terms.get(atoms, 0) + sign * c
    return from_terms(terms)


def poly_mul(a: Expr, b: Expr) -> Expr:
    if a is ONE:
        return b
    if b is ONE:
        return a
    return from_terms(_product(poly_terms(a), poly_terms(b)))


def _product(
    a: Mapping[tuple[Expr, ...], int], b: Mapping[tuple[Expr, ...], int]
) -> dict[tuple[Expr, ...], int]:
    out: dict[tuple[Expr, ...], int] = {}
    for x, c in a.items():
        for y, d in b.items():
            atoms = tuple(sorted(x + y, key=_atom_key)) if x and y else x + y
            out[atoms] = out.get(atoms, 0) + c * d
    return out


# --- construction ------------------------------------------------------------------------------


def apply(fn: str, *args: Any, dtype: str | None = None) -> Expr:
    """`fn(*args)` simplified; Python numbers take the dtype of the first expression argument."""
    like = INDEX
    for a in args:
        if isinstance(a, Expr):
            like = a.dtype
            break
    if fn == "select" and len(args) == 3:
        like = next((a.dtype for a in args[1:] if isinstance(a, Expr)), like)
    exprs = tuple([a if isinstance(a, Expr) else Const(a, like) for a in args])
    return simplify.build(fn, exprs, dtype)


def cast(e: Expr, dtype: str) -> Expr:
    return e if e.dtype == dtype else apply("cast", e, dtype=dtype)


# --- traversal ---------------------------------------------------------------------------------


def walk(e: Expr) -> Iterator[Expr]:
    """Every distinct subexpression, parents before children."""
    seen = {e}
    stack = [e]
    while stack:
        x = stack.pop()
        yield x
        for c in x.kids:
            if c not in seen:
                seen.add(c)
                stack.append(c)


def leaves(e: Expr) -> frozenset[Expr]:
    """The axes, dims and local variables that occur in `e`, reduced axes included."""
    if e._free is None:
        if isinstance(e, Axis | Dim | Var):
            e._free = frozenset((e,))
        else:
            e._free = frozenset().union(*[leaves(c) for c in e.kids])
    return e._free


def axes_of(e: Expr) -> set[Axis]:
    return {a for a in leaves(e) if isinstance(a, Axis)}


def loads(e: Expr) -> tuple[Load, ...]:
    """Every distinct load of `e`, in a deterministic order."""
    if e._loads is None:
        e._loads = tuple(x for x in walk(e) if isinstance(x, Load))
    return e._loads


def rewrite(
    e: Expr, fn: Callable[[Expr], Expr | None], memo: dict[Expr, Expr] | None = None
) -> Expr:
    """Rebuilds `e` bottom-up; `fn` gets each rebuilt node and may return a replacement."""
    memo = {} if memo is None else memo

    def go(x: Expr) -> Expr:
        done = memo.get(x)
        if done is not None:
            return done
        y = rebuild(x, go)
        z = fn(y)
        y = y if z is None else z
        memo[x] = y
        return y

    return go(e)


def rebuild(x: Expr, go: Callable[[Expr], Expr]) -> Expr:
    """`x` with `go` applied to its children, simplified again."""
    if isinstance(x, Apply):
        args = tuple([go(a) for a in x.args])
        return x if args == x.args else simplify.build(x.fn, args, x.dtype)
    if isinstance(x, Load):
        idx = tuple([go(a) for a in x.index])
        return x if idx == x.index else Load(x.buffer, idx, x.dtype)
    if isinstance(x, Poly):
        made = {a: go(a) for a in x.kids}
        if all([a is b for a, b in made.items()]):
            return x
        total: dict[tuple[Expr, ...], int] = {}
        for atoms, c in x.terms:
            term: dict[tuple[Expr, ...], int] = {(): c}
            for a in atoms:
                term = _product(term, poly_terms(made[a]))
            for key, v in term.items():
                total[key] = total.get(key, 0) + v
        return from_terms(total)
    if isinstance(x, Reduce):
        axes = tuple(go(a) for a in x.axes)
        body = go(x.body)
        if axes == x.axes and body is x.body:
            return x
        assert all(isinstance(a, Axis) for a in axes), "a reduced axis can only be renamed"
        return Reduce(x.fn, axes, body)  # type: ignore[arg-type]
    if isinstance(x, Axis):
        extent = go(x.extent)
        return x if extent is x.extent else Axis(x.name, extent)
    return x


def substitute(e: Expr, table: Mapping[Expr, Expr]) -> Expr:
    """Replaces leaves (axes, dims, variables) by expressions."""
    if not table or leaves(e).isdisjoint(table):
        return e
    memo: dict[Expr, Expr] = dict(table)

    def go(x: Expr) -> Expr:
        done = memo.get(x)
        if done is None:
            done = x if leaves(x).isdisjoint(table) else rebuild(x, go)
            memo[x] = done
        return done

    return go(e)


def map_loads(e: Expr, fn: Callable[[Load], Expr | None]) -> Expr:
    """Replaces loads; `fn` sees loads whose own indices are already rewritten."""
    memo: dict[Expr, Expr] = {}

    def go(x: Expr) -> Expr:
        if not loads(x):
            return x
        done = memo.get(x)
        if done is None:
            done = rebuild(x, go)
            if isinstance(x, Load):
                done = fn(done) or done  # type: ignore[arg-type]
            memo[x] = done
        return done

    return go(e)


# --- text --------------------------------------------------------------------------------------


def to_text(e: Expr) -> str:
    """Readable, deterministic text of an expression (for messages and printed kernels)."""
    if e._text is None:
        e._text = _text(e)
    return e._text


def _text(e: Expr) -> str:
    if isinstance(e, Const):
        return repr(e.value) if e.dtype in (INDEX, "bool") else f"{e.dtype}({e.value!r})"
    if isinstance(e, Axis | Dim | Var):
        return e.name
    if isinstance(e, Load):
        return f"{e.buffer}[{', '.join(to_text(i) for i in e.index)}]"
    if isinstance(e, Apply):
        inner = ", ".join(to_text(a) for a in e.args)
        return f"{e.fn}<{e.dtype}>({inner})" if e.fn == "cast" else f"{e.fn}({inner})"
    if isinstance(e, Poly):
        parts = []
        for atoms, c in e.terms:
            names = [to_text(a) for a in atoms]
            factors = names if c == 1 and names else [str(c), *names]
            parts.append("*".join(factors))
        return "(" + " + ".join(parts) + ")"
    assert isinstance(e, Reduce)
    axes = ", ".join(f"{a.name}<{to_text(a.extent)}" for a in e.axes)
    return f"{e.fn}[{axes}]({to_text(e.body)})"


from onnxjit.codegen import simplify  # noqa: E402  (each needs the other; it needs these names)
