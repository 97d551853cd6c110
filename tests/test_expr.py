"""Expressions: simplification against direct evaluation, range proofs, traversal, pickling."""

from __future__ import annotations

import itertools
import pickle
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxjit.codegen.evaluate import _Evaluator
from onnxjit.codegen.expr import (
    FALSE,
    INDEX,
    ONE,
    TRUE,
    ZERO,
    Apply,
    Axis,
    Const,
    Dim,
    Expr,
    Load,
    Poly,
    Reduce,
    Var,
    apply,
    as_int,
    axes_of,
    cast,
    fresh_axis,
    index,
    leaves,
    loads,
    rewrite,
    substitute,
    to_text,
)
from onnxjit.codegen.kernel import Stage, inline, rename_axes
from onnxjit.codegen.scalar_functions import FUNCTIONS, numpy_dtype
from onnxjit.codegen.simplify import is_less, is_nonneg
from onnxjit.codegen.tensor import NARROW

FAST = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)

N, M = Dim("n"), Dim("m")
I, J = Axis("i", 6), Axis("j", N)
K, L = Axis("k", M * 2), Axis("l", (N + 1) // 2)
DIMS = [{"n": n, "m": m} for n in (0, 1, 2, 3, 5) for m in (0, 1, 2, 4)]
Env = Mapping[str, int]


class Undefined(Exception):
    """A division by zero: the value of the expression is not specified."""


@dataclass(frozen=True)
class Pair:
    """An expression and what it means, computed without any simplification."""

    e: Expr
    value: Callable[[Env], int]

    def __repr__(self) -> str:
        return to_text(self.e)


def leaf(name: str, e: Expr) -> Pair:
    return Pair(e, lambda env: env[name])


def number(c: int) -> Pair:
    return Pair(index(c), lambda env: c)


def divided(fn: str, a: Pair, b: Pair) -> Pair:
    def value(env: Env) -> int:
        x, y = a.value(env), b.value(env)
        if y == 0:
            raise Undefined
        return x // y if fn == "floordiv" else x % y

    return Pair(apply(fn, a.e, b.e), value)


COMPARE: dict[str, Callable[[int, int], bool]] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


def chosen(fn: str, a: Pair, b: Pair, c: Pair, d: Pair) -> Pair:
    test = COMPARE[fn]
    return Pair(
        apply("select", apply(fn, a.e, b.e), c.e, d.e),
        lambda env: c.value(env) if test(a.value(env), b.value(env)) else d.value(env),
    )


def extreme(fn: str, pick: Callable[[int, int], int], a: Pair, b: Pair) -> Pair:
    return Pair(apply(fn, a.e, b.e), lambda env: pick(a.value(env), b.value(env)))


LEAVES = st.sampled_from([leaf(x.name, x) for x in (I, J, K, L, N, M)]) | st.integers(-7, 9).map(
    number
)
DIVISORS = st.sampled_from([number(c) for c in (1, 2, 3, 4, 6, 12)]) | st.sampled_from(
    [
        leaf("n", N),
        leaf("m", M),
        Pair(N * 2, lambda env: 2 * env["n"]),
        Pair(N * M, lambda env: env["n"] * env["m"]),
        Pair(N + 1, lambda env: env["n"] + 1),
    ]
)


def larger(s: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    two = st.tuples(s, s)
    return st.one_of(
        two.map(lambda p: Pair(p[0].e + p[1].e, lambda v: p[0].value(v) + p[1].value(v))),
        two.map(lambda p: Pair(p[0].e - p[1].e, lambda v: p[0].value(v) - p[1].value(v))),
        two.map(lambda p: Pair(p[0].e * p[1].e, lambda v: p[0].value(v) * p[1].value(v))),
        two.map(lambda p: extreme("min", min, *p)),
        two.map(lambda p: extreme("max", max, *p)),
        s.map(lambda p: Pair(-p.e, lambda v: -p.value(v))),
        st.tuples(st.sampled_from(["floordiv", "mod"]), s, DIVISORS).map(lambda t: divided(*t)),
        st.tuples(st.sampled_from(["floordiv", "mod"]), s, DIVISORS).map(lambda t: divided(*t)),
        st.tuples(st.sampled_from(sorted(COMPARE)), s, s, s, s).map(lambda t: chosen(*t)),
    )


PAIRS = st.recursive(LEAVES, larger, max_leaves=10)


def points(e: Expr, *, most: int = 150) -> list[dict[str, int]]:
    """Every value of the leaves for some dims (a sample of them when there are many)."""
    out = []
    axes = sorted((a for a in leaves(e) if isinstance(a, Axis)), key=lambda a: a.name)
    for dims in DIMS:
        extents = [evaluated(a.extent, dims) for a in axes]
        for at in itertools.product(*(range(x) for x in extents)):
            out.append({**dims, **{a.name: i for a, i in zip(axes, at, strict=True)}})
    step = max(1, len(out) // most)
    return out[::step]


def evaluated(e: Expr, env: Env) -> int:
    """Direct evaluation of an expression of integers at one point."""
    if isinstance(e, Const):
        return int(e.value)
    if isinstance(e, Axis | Dim | Var):
        return env[e.name]
    if isinstance(e, Poly):
        total = 0
        for atoms, c in e.terms:
            for a in atoms:
                c *= evaluated(a, env)
            total += c
        return total
    assert isinstance(e, Apply)
    if e.fn == "select":
        return evaluated(e.args[1] if evaluated(e.args[0], env) else e.args[2], env)
    args = [evaluated(a, env) for a in e.args]
    if e.fn in ("floordiv", "mod"):
        if args[1] == 0:
            raise Undefined
        return args[0] // args[1] if e.fn == "floordiv" else args[0] % args[1]
    if e.fn in COMPARE:
        return int(COMPARE[e.fn](*args))
    simple: dict[str, Callable[..., int]] = {
        "min": min,
        "max": max,
        "abs": abs,
        "logical_and": lambda a, b: a and b,
        "logical_or": lambda a, b: a or b,
        "logical_not": lambda a: not a,
    }
    return int(simple[e.fn](*args))


# --- integers ----------------------------------------------------------------------------------


@FAST
@given(PAIRS)
def test_simplified_integers_keep_their_value(p: Pair) -> None:
    # The leaves of the simplified form may be fewer, so points come from a superset.
    everything = I + J + K + L + N + M
    for env in points(everything, most=120):
        try:
            wanted = p.value(env)
        except Undefined:
            continue
        assert evaluated(p.e, env) == wanted, (p, env)


@FAST
@given(PAIRS)
def test_range_proofs_are_sound(p: Pair) -> None:
    for e in (p.e, -p.e, p.e - 1, N * M - p.e):
        if not is_nonneg(e):
            continue
        for env in points(e):
            try:
                assert evaluated(e, env) >= 0, (e, env)
            except Undefined:
                continue


@FAST
@given(PAIRS, PAIRS)
def test_proofs_of_order_are_sound(p: Pair, q: Pair) -> None:
    for a, b in ((p.e, q.e), (q.e, p.e), (p.e, q.e + N), (q.e, p.e + I)):
        if not is_less(a, b):
            continue
        for env in points(I + J + K + L, most=50):
            try:
                assert evaluated(a, env) < evaluated(b, env), (a, b, env)
            except Undefined:
                continue


@FAST
@given(st.sampled_from(sorted(COMPARE)), PAIRS, PAIRS)
def test_comparisons_keep_their_value(fn: str, p: Pair, q: Pair) -> None:
    e = apply(fn, p.e, q.e)
    negated = apply("logical_not", e)
    for env in points(I + J + K + L, most=50):
        try:
            wanted = COMPARE[fn](p.value(env), q.value(env))
        except Undefined:
            continue
        assert bool(evaluated(e, env)) == wanted, (fn, p, q, env)
        assert bool(evaluated(negated, env)) != wanted, (fn, p, q, env)


@FAST
@given(PAIRS, st.permutations([I, J, K, L]))
def test_substitution_commutes_with_evaluation(p: Pair, order: list[Axis]) -> None:
    table: dict[Expr, Expr] = {order[0]: order[1] * 2 + 1, order[2]: index(3), N: N + 2}
    e = substitute(p.e, table)
    for env in points(I + J + K + L, most=40):
        inner = {**env, "n": env["n"] + 2}
        inner[order[2].name] = 3
        inner[order[0].name] = 2 * env[order[1].name] + 1
        if any(inner[a.name] >= evaluated(a.extent, inner) for a in (I, J, K, L)):
            continue  # the substituted value lies outside what the axis may be
        try:
            wanted = p.value(inner)
            got = evaluated(e, env)
        except Undefined:
            continue
        assert got == wanted, (p, env)


@pytest.mark.parametrize(
    ("e", "text"),
    [
        ((I * 8 + J) - J - I * 8, "0"),
        ((I * 12 + Axis("r", 12)) // 12, "i"),
        ((I * 12 + Axis("r", 12)) % 12, "r"),
        ((I * 12 + Axis("r", 12)) % 4, "mod(r, 4)"),
        ((J * M + Axis("c", M)) // M, "j"),
        ((J * M + Axis("c", M)) % M, "c"),
        ((N * M * 6) // (M * 2), "(3*n)"),
        ((I // 2) // 3, "0"),
        ((K // 2) // 3, "floordiv(k, 6)"),
        ((K % 12) % 4, "mod(k, 4)"),
        (apply("min", J, N), "j"),
        (apply("max", J - N, 0), "0"),
        (apply("lt", J, N), "True"),
        (apply("le", N, J), "False"),
        (apply("eq", I, I + 1), "False"),
        (apply("lt", J + 1, N), "lt((j + 1), n)"),
        (apply("select", apply("lt", I, 6), N, M), "n"),
        (N // N, "1"),
        (0 - (0 - I), "i"),
    ],
)
def test_normal_forms(e: Expr, text: str) -> None:
    assert to_text(e) == text


def test_equal_expressions_are_one_object() -> None:
    assert (I + J) * 2 is J * 2 + I + I
    assert Const(0.0, "float32") is not Const(-0.0, "float32")
    assert Const(float("nan"), "float32") is Const(float("nan"), "float32")
    assert Const(1, "int32") is not Const(1, "int64")
    assert apply("logical_and", TRUE, FALSE) is FALSE
    assert as_int(N) is None and as_int(ONE + ONE) == 2 and as_int(ZERO) == 0


@FAST
@given(PAIRS)
def test_pickled_expressions_come_back_as_themselves(p: Pair) -> None:
    assert pickle.loads(pickle.dumps(p.e)) is p.e


def test_expressions_survive_a_pickle_of_everything() -> None:
    r = Axis("r", N)
    body = apply("mul", Load("x", (I, r), "float32"), Const(float("inf"), "float32"))
    e = cast(Reduce("max", (r,), body), "float64") + Const(-0.0, "float64")
    assert pickle.loads(pickle.dumps(e)) is e


# --- other dtypes ------------------------------------------------------------------------------

DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64",
)  # fmt: skip


def interesting(dtype: str) -> np.ndarray:
    t = numpy_dtype(dtype)
    if dtype == "bool":
        return np.array([False, True])
    if t.kind in "iu":
        info = np.iinfo(t)
        return np.array([info.min, info.max, 0, 1, 2, 100, info.max // 2 + 1], t)
    values = [0.0, -0.0, 1.0, -1.5, 2.5, 100.0, 300.0, -40000.0, 7e4, np.inf, -np.inf, np.nan]
    with np.errstate(all="ignore"):
        return np.array(values, np.float32).astype(t)


def value_of(e: Expr, x: np.ndarray) -> np.ndarray:
    a = Axis("v", x.size)
    out = _Evaluator({}, {"x": x}).value(substitute(e, {I: a}), (a,))
    return np.broadcast_to(np.asarray(out), x.shape)


def same(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype
    bits = f"u{want.dtype.itemsize}"
    nan = np.isnan(want.astype(np.float64))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float64)), nan)
    np.testing.assert_array_equal(got.view(bits)[~nan], np.ascontiguousarray(want).view(bits)[~nan])


@pytest.mark.parametrize("first", DTYPES)
def test_chains_of_casts_keep_their_value(first: str) -> None:
    x = interesting(first)
    convert = FUNCTIONS["cast"].evaluate
    load = Load("x", (I,), first)
    with np.errstate(all="ignore"):
        for second, third in itertools.product(DTYPES, DTYPES):
            e = cast(cast(load, second), third)
            want = np.asarray(convert(convert(x, second), third)).astype(numpy_dtype(third))
            same(np.ascontiguousarray(value_of(e, x)), want)


@pytest.mark.parametrize(
    ("fn", "dtype"),
    [
        (fn, dtype)
        for fn in ("add", "sub", "mul", "div", "min", "max", "floordiv", "mod")
        for dtype in DTYPES
        if dtype not in ("bool", *NARROW) and not (fn == "floordiv" and dtype.startswith("float"))
    ],
)
def test_rules_hold_for_special_values(fn: str, dtype: str) -> None:
    x = interesting(dtype)
    load = Load("x", (I,), dtype)
    constants: list[float] = [0, 1, 2, 4] if dtype.startswith("uint") else [0, 1, 2, 4, -1, -2]
    if dtype.startswith("float"):
        constants += [-0.0, 0.5, 3.0, 2.0**-60, float("inf"), float("nan")]
    with np.errstate(all="ignore"):
        for c in constants:
            for left in (False, True):
                k = numpy_dtype(dtype).type(c)
                e = apply(fn, c, load) if left else apply(fn, load, c)
                want = FUNCTIONS[fn].evaluate(k, x) if left else FUNCTIONS[fn].evaluate(x, k)
                same(np.ascontiguousarray(value_of(e, x)), np.asarray(want).astype(x.dtype))


@pytest.mark.parametrize(
    ("exponent", "dtype"),
    [
        *itertools.product((0, 1, 2, 3, 0.5, -1), ("float32", "float64")),
        *itertools.product((0, 1, 2, 3), ("int32", "int64")),
    ],
)
def test_powers_hold_for_special_values(exponent: float, dtype: str) -> None:
    x = interesting(dtype)
    e = apply("pow", Load("x", (I,), dtype), Const(exponent, dtype))
    with np.errstate(all="ignore"):
        want = np.asarray(FUNCTIONS["pow"].evaluate(x, numpy_dtype(dtype).type(exponent)))
    got = value_of(e, x)
    np.testing.assert_allclose(got, want, rtol=3e-7 if dtype.startswith("float") else 0)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


def test_negative_zero_survives() -> None:
    x = np.array([-0.0, 0.0], np.float32)
    load = Load("x", (I,), "float32")
    same(value_of(load - 0.0, x), x)
    same(value_of(load + 0.0, x), np.zeros(2, np.float32))
    same(value_of(load * 1.0, x), x)


# --- reductions and substitution ---------------------------------------------------------------


def reduced(e: Expr, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    a = Axis("v", x.shape[0])
    return _Evaluator({}, {"x": x, "y": y}).value(substitute(e, {I: a}), (a,))


def test_inlined_reductions_do_not_capture_each_other() -> None:
    r = fresh_axis(5, "r")
    row = Stage("s", (I,), Reduce("sum", (r,), Load("x", (I, r), "float32")))
    # The reader reduces over an axis of the same extent and reads two elements of the stage.
    read = apply("mul", Load("s", (r,), "float32"), Load("s", (I,), "float32"))
    value = inline(Reduce("sum", (r,), read), row)
    x = np.arange(25, dtype=np.float32).reshape(5, 5)
    sums = x.sum(axis=1)
    np.testing.assert_array_equal(reduced(value, x, x), sums.sum() * sums)


def test_renaming_reaches_binders() -> None:
    r, s = Axis("r", 3), Axis("s", 3)
    e = Reduce("max", (r,), Load("x", (I, r), "float32"))
    renamed = rename_axes(e, {r: s})
    assert isinstance(renamed, Reduce) and renamed.axes == (s,)
    assert axes_of(renamed.body) == {I, s}


def test_rewriting_sees_rebuilt_children() -> None:
    e = apply("add", Load("x", (I + J,), "float32"), Load("y", (I,), "float32"))
    out = rewrite(e, lambda x: Load("z", x.index, x.dtype) if isinstance(x, Load) else None)
    assert {x.buffer for x in loads(out)} == {"z"}
    assert loads(rewrite(out, lambda x: ZERO if x is J else None))[0].index[0] is I


def test_index_constants_take_the_index_dtype() -> None:
    assert index(3).dtype == INDEX
    assert apply("add", Load("x", (I,), "int8"), 1).dtype == "int8"


def test_threads_share_whole_expressions() -> None:
    """What one thread finds of another's is complete, and equal expressions stay one object while
    they come and go in all threads."""
    failures: list[str] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        for n in range(4000):
            size = Dim(f"shared{n % 5}")
            e = apply("floordiv", size * (n % 7 + 2) + 1, 3) + Axis(f"a{n % 3}", size) * size
            again = apply("floordiv", size * (n % 7 + 2) + 1, 3) + Axis(f"a{n % 3}", size) * size
            if e is not again:
                failures.append(f"{e} is two objects")
            try:
                to_text(e), leaves(e), [x.kids for x in e.kids]
            except AttributeError as error:
                failures.append(str(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures, failures[:3]
