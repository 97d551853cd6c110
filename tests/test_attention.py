"""Attention as one kernel: how graphs spell it, odd sizes, masks, and its micro-kernels.

Models are compared with float64 NumPy. `run_program` puts every buffer between guard bands, fills
scratch memory with NaN and runs the tiles in random order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import kernels_support
import numpy as np
import onnx
import pytest
from kernels_support import Lab, Lowered, close, lower_model, model, run_model, run_program
from onnx import helper

from onnxjit.codegen import instruction_sets, microkernels
from onnxjit.codegen.dialect_python import Buffer, python_namespace
from onnxjit.codegen.instruction_sets import isa_of
from onnxjit.codegen.target import Target, cpu_target, host, limited
from onnxjit.runtime.link import link

F = "float32"
INF = np.float32(np.inf)


def exact(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float = 1.0, mask: Any = 0.0,
    nan_to_zero: bool = False,
) -> np.ndarray:  # fmt: skip
    """Attention over [..., rows, head] in float64, as ONNX defines its operators."""
    s = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) * scale
    s = s + np.asarray(mask, np.float64)
    with np.errstate(invalid="ignore"):
        if s.shape[-1]:
            s = np.exp(s - s.max(-1, keepdims=True))
            s = s / s.sum(-1, keepdims=True)
    if nan_to_zero:
        s = np.nan_to_num(s, nan=0.0)
    return (s @ v.astype(np.float64)).astype(np.float32)


class Spelling:
    """Builds the nodes of one attention; `ready` is the name that was made last."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def node(self, op: str, *inputs: str, **attrs: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attrs))
        return name

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(value, dtype)
        return name

    def heads(self, x: str, heads: int, perm: Sequence[int] = (0, 2, 1, 3)) -> str:
        """[b, rows, heads * d] as [b, heads, rows, d], or in another order."""
        shape = self.constant([0, 0, heads, -1], np.int64)
        return self.node("Transpose", self.node("Reshape", x, shape), perm=perm)

    def merged(self, x: str) -> str:
        x = self.node("Transpose", x, perm=[0, 2, 1, 3])
        return self.node("Reshape", x, self.constant([0, 0, -1], np.int64))


def built(s: Spelling, out: str, inputs: dict[str, tuple[str, Sequence[int | str]]]) -> Lowered:
    """The model after all passes; it has to be one attention kernel (and pointwise ones)."""
    low = lower_model(model(s.nodes, inputs, [out], s.constants))
    assert low.rules.count("attention") == 1, low.rules
    assert not {"rows", "contraction"} & set(low.rules), low.rules
    return low


def split(x: np.ndarray, heads: int) -> np.ndarray:
    b, m, width = x.shape
    return x.reshape(b, m, heads, width // heads).transpose(0, 2, 1, 3)


def joined(x: np.ndarray) -> np.ndarray:
    b, h, m, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b, m, h * d)


def numbers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


# --- spellings -----------------------------------------------------------------------------------

HEADS, SIZE = 3, 16


def softmax(s: Spelling, x: str) -> str:
    return s.node("Softmax", x, axis=-1)


def written_out(s: Spelling, x: str) -> str:
    top = s.node("ReduceMax", x, s.constant([-1], np.int64), keepdims=1)
    e = s.node("Exp", s.node("Sub", x, top))
    return s.node("Div", e, s.node("ReduceSum", e, s.constant([-1], np.int64), keepdims=1))


def no_nan(s: Spelling, x: str) -> str:
    p = softmax(s, x)
    return s.node("Where", s.node("IsNaN", p), s.constant(0.0), p)


SCALES: dict[str, tuple[str, str, str]] = {
    # Operator after the product of scores, and before it on queries and on keys.
    "times": ("Mul", "", ""),
    "divided": ("Div", "", ""),
    "queries scaled": ("", "Mul", ""),
    "both scaled": ("", "Mul", "Mul"),
    "none": ("", "", ""),
}

MASKS: dict[str, tuple[int | str, ...] | None] = {
    "none": None,
    "keys": ("b", 1, 1, "n"),
    "rows": ("b", 1, "m", "n"),
    "heads": (HEADS, "m", "n"),
    "all": ("b", HEADS, "m", "n"),
    "scalar": (),
}


def spelt(
    scale: str = "times", mask: str = "none", middle: Callable[[Spelling, str], str] = softmax,
    d: int = SIZE, heads: int = HEADS, sizes: tuple[Any, Any, Any] = ("b", "m", "n"),
) -> Callable[..., None]:  # fmt: skip
    """Compiles one spelling and returns a check at sizes b, m, n."""
    s = Spelling()
    b, m, n = sizes
    inputs: dict[str, tuple[str, Sequence[int | str]]] = {
        "q": (F, (b, m, heads * d)), "k": (F, (b, n, heads * d)), "v": (F, (b, n, heads * d))
    }  # fmt: skip
    q, k, v = s.heads("q", heads), s.heads("k", heads, (0, 2, 3, 1)), s.heads("v", heads)
    after, on_q, on_k = SCALES[scale]
    factor = 0.25
    if on_q:
        q = s.node(on_q, q, s.constant(0.5 if on_k else 0.25))
    if on_k:
        k = s.node(on_k, k, s.constant(0.5))
    x = s.node("MatMul", q, k)
    if after:
        x = s.node(after, x, s.constant(4.0 if after == "Div" else 0.25))
    if scale == "none":
        factor = 1.0
    shape = MASKS[mask]
    if shape is not None:
        names = {"b": b, "m": m, "n": n}
        inputs["mask"] = F, [names.get(i, i) for i in shape]  # type: ignore[call-overload]
        x = s.node("Add", x, "mask")
    out = s.merged(s.node("MatMul", middle(s, x), v))
    low = built(s, out, inputs)
    # A constant scale of queries or keys costs no pass of its own; the last reshape is a copy.
    assert low.rules in (["attention"], ["attention", "pointwise"])

    def check(b: int, m: int, n: int, seed: int = 0, feed: np.ndarray | None = None) -> None:
        rng = np.random.default_rng(seed)
        feeds = {"q": numbers(rng, b, m, heads * d)}
        feeds |= {x: numbers(rng, b, n, heads * d) for x in "kv"}
        term: Any = 0.0
        if shape is not None:
            sizes = {"b": b, "m": m, "n": n}
            term = feeds["mask"] = (
                numbers(rng, *(sizes.get(i, i) for i in shape))  # type: ignore[call-overload]
                if feed is None
                else feed
            )
        q, k, v = (split(feeds[x], heads) for x in "qkv")
        want = joined(exact(q, k, v, factor, term, middle is no_nan))
        close(run_program(low, feeds, seed)[0], want, 1e-5, f"{b} x {m} x {n}")

    return check


@pytest.mark.parametrize("scale", SCALES)
def test_scales(scale: str) -> None:
    check = spelt(scale, "rows")
    check(2, 17, 33)
    check(1, 1, 5)


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str) -> None:
    check = spelt(mask=mask)
    check(2, 15, 50)
    check(1, 30, 7)


@pytest.mark.parametrize("middle", [softmax, written_out, no_nan])
def test_spellings_of_softmax(middle: Callable[[Spelling, str], str]) -> None:
    check = spelt(mask="rows", middle=middle)
    check(1, 13, 41)
    check(2, 29, 700)


SIZES = [(1, 1, 1), (0, 3, 4), (2, 0, 5), (3, 1, 64), (1, 13, 31), (1, 14, 32), (1, 15, 33),
         (1, 53, 383), (1, 28, 384), (2, 29, 385), (1, 300, 257), (1, 5, 1009)]  # fmt: skip


@pytest.mark.parametrize("d", [7, 16, 33, 64, 128])
def test_one_compilation_serves_every_size(d: int) -> None:
    check = spelt(mask="keys", d=d, heads=2)
    for k, (b, m, n) in enumerate(SIZES):
        check(b, m, n, k)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (1, 1, 77), (2, 49, 49), (1, 14, 32), (1, 31, 129), (1, 40, 1000)]
)
def test_fixed_sizes(sizes: tuple[int, int, int]) -> None:
    if sizes[2] > 1:
        spelt(mask="heads", sizes=sizes)(*sizes)
        spelt(d=64, sizes=sizes)(*sizes)


def test_without_keys_the_sum_is_zero() -> None:
    check = spelt(mask="rows")
    check(1, 5, 0)
    check(2, 20, 3)


# --- contents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [9, 700])
@pytest.mark.parametrize("middle", [softmax, no_nan])
def test_rows_that_no_key_may_see(n: int, middle: Callable[[Spelling, str], str]) -> None:
    """All of a row masked: NaN as in ONNX, or 0 where the graph says so. In rows with some keys,
    the masked ones count for nothing, wherever the block of keys begins."""
    rng = np.random.default_rng(0)
    mask = np.where(rng.random((2, 1, 16, n)) < 0.5, np.float32(0), -INF)
    mask[0, 0, 3] = -INF
    mask[1, 0, 15] = -INF
    mask[1, 0, 2, :-1] = -INF  # only the last key
    mask[1, 0, 4, 1:] = -INF  # only the first
    mask[1, 0, 4, 0] = mask[1, 0, 2, -1] = 0
    spelt(mask="rows", middle=middle)(2, 16, n, feed=mask)


def test_large_scores_do_not_overflow() -> None:
    rng = np.random.default_rng(0)
    for size in (1e2, 1e4, 1e30):
        mask = (rng.standard_normal((1, 1, 9, 600)) * size).astype(np.float32)
        spelt(mask="rows")(1, 9, 600, feed=mask)


def test_lowest_float_as_mask() -> None:
    mask = np.full((1, 1, 9, 600), np.finfo(np.float32).min)
    mask[..., 5] = 0
    spelt(mask="rows")(1, 9, 600, feed=mask)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 599])
def test_a_bad_score_spoils_its_row_only(bad: float, where: int) -> None:
    mask = np.zeros((1, 1, 9, 600), np.float32)
    mask[0, 0, 4, where] = bad
    spelt(mask="rows")(1, 9, 600, feed=mask)


# --- shapes of operands --------------------------------------------------------------------------


def test_masked_by_where_and_causal() -> None:
    s = Spelling()
    x = s.node("MatMul", "q", s.node("Transpose", "k", perm=[0, 1, 3, 2]))
    causal = np.tril(np.ones((40, 40), bool))
    x = s.node("Where", s.constant(causal, np.bool_), x, s.constant(-np.inf))
    out = s.node("MatMul", softmax(s, x), "v")
    shape = ("b", 2, 40, 24)
    low = built(s, out, {n: (F, shape) for n in "qkv"})
    rng = np.random.default_rng(0)
    feeds = {n: numbers(rng, 2, 2, 40, 24) for n in "qkv"}
    want = exact(feeds["q"], feeds["k"], feeds["v"], 1.0, np.where(causal, 0, -np.inf))
    close(run_program(low, feeds)[0], want, 1e-5)


@pytest.mark.parametrize("group", [1, 4])
def test_heads_that_share_keys(group: int) -> None:
    """Keys and values of two heads, each for `group` heads of queries, behind a cache."""
    s = Spelling()
    d, kv = 16, 2
    shape: dict[str, tuple[str, Sequence[int | str]]] = {
        "q": (F, ("b", kv * group, "m", d)),
        **{n: (F, ("b", kv, "m", d)) for n in ("k", "v")},
        **{n: (F, ("b", kv, "past", d)) for n in ("old_k", "old_v")},
    }
    repeated = []
    for n in ("k", "v"):
        x = s.node("Concat", f"old_{n}", n, axis=2)
        x = s.node("Unsqueeze", x, s.constant([2], np.int64))
        x = s.node("Expand", x, s.constant([1, 1, group, 1, 1], np.int64))
        size = s.constant([0, kv * group, -1, d], np.int64)
        repeated.append(s.node("Reshape", x, size))
    x = s.node("MatMul", "q", s.node("Transpose", repeated[0], perm=[0, 1, 3, 2]))
    x = s.node("Mul", x, s.constant(0.25))
    low = built(s, s.merged(s.node("MatMul", softmax(s, x), repeated[1])), shape)
    for b, m, past in ((1, 1, 0), (2, 1, 70), (1, 19, 40), (1, 3, 500)):
        rng = np.random.default_rng(m)
        feeds = {"q": numbers(rng, b, kv * group, m, d)}
        feeds |= {n: numbers(rng, b, kv, m, d) for n in ("k", "v")}
        feeds |= {f"old_{n}": numbers(rng, b, kv, past, d) for n in ("k", "v")}
        k, v = (
            np.concatenate([feeds[f"old_{n}"], feeds[n]], 2).repeat(group, 1) for n in ("k", "v")
        )
        want = joined(exact(feeds["q"], k, v, 0.25))
        close(run_program(low, feeds)[0], want, 1e-5, f"{b} {m} {past}")


@pytest.mark.parametrize("stored", ["keys by columns", "queries by columns", "wide queries"])
def test_operands_that_are_not_contiguous(stored: str) -> None:
    """Keys stored as [head, keys], queries as [head, rows], and rows 4 KB apart."""
    s = Spelling()
    d = 20
    width = 1024 if stored == "wide queries" else d
    q = ("b", d, "m") if stored == "queries by columns" else ("b", "m", width)
    k = ("b", d, "n") if stored == "keys by columns" else ("b", "n", d)
    inputs = {"q": (F, q), "k": (F, k), "v": (F, ("b", "n", d))}
    left, right = "q", "k"
    if stored == "queries by columns":
        left = s.node("Transpose", "q", perm=[0, 2, 1])
    elif stored == "wide queries":
        ends = (s.constant([v], np.int64) for v in (7, 7 + d, 2))
        left = s.node("Slice", "q", *ends)
    if stored != "keys by columns":
        right = s.node("Transpose", "k", perm=[0, 2, 1])
    x = s.node("MatMul", left, right)
    low = built(s, s.node("MatMul", softmax(s, x), "v"), inputs)
    rng = np.random.default_rng(0)
    sizes = {"b": 2, "m": 37, "n": 45}
    feeds = {n: numbers(rng, *(sizes.get(i, i) for i in t[1])) for n, t in inputs.items()}
    qs, ks = feeds["q"], feeds["k"]
    if stored == "queries by columns":
        qs = qs.swapaxes(1, 2)
    elif stored == "wide queries":
        qs = qs[..., 7 : 7 + d]
    want = exact(qs, ks.swapaxes(1, 2) if stored == "keys by columns" else ks, feeds["v"])
    close(run_program(low, feeds)[0], want, 1e-5)


def test_operator_of_onnx_23() -> None:
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    m = model([node], {n: (F, (2, 3, 17, 16)) for n in "qkv"}, ["y"], opset=23)
    low = lower_model(m)
    assert low.rules.count("attention") == 1, low.rules
    rng = np.random.default_rng(0)
    feeds = {n: numbers(rng, 2, 3, 17, 16) for n in "qkv"}
    want = exact(feeds["q"], feeds["k"], feeds["v"], 0.25)
    close(run_program(low, feeds)[0], want, 1e-5)


def test_shares_that_are_an_output_stay() -> None:
    s = Spelling()
    x = s.node("MatMul", "q", s.node("Transpose", "k", perm=[0, 2, 1]))
    p = softmax(s, x)
    y = s.node("MatMul", p, "v")
    low = lower_model(model(s.nodes, {n: (F, (2, 17, 16)) for n in "qkv"}, [y, p], s.constants))
    assert "attention" not in low.rules
    rng = np.random.default_rng(0)
    feeds = {n: numbers(rng, 2, 17, 16) for n in "qkv"}
    want = exact(feeds["q"], feeds["k"], feeds["v"])
    close(run_program(low, feeds)[0], want, 1e-5)


def test_a_residual_after_the_sum() -> None:
    """The output's tail reads other values at its own position."""
    s = Spelling()
    x = s.node("MatMul", "q", s.node("Transpose", "k", perm=[0, 2, 1]))
    y = s.node("Add", s.node("MatMul", softmax(s, x), "v"), "r")
    low = built(s, s.node("Relu", y), {n: (F, ("b", "m", 20)) for n in "qkvr"})
    rng = np.random.default_rng(0)
    feeds = {n: numbers(rng, 2, 19, 20) for n in "qkvr"}
    want = np.maximum(exact(feeds["q"], feeds["k"], feeds["v"]) + feeds["r"], 0)
    close(run_program(low, feeds)[0], want, 1e-5)


@pytest.mark.parametrize("isa", ["avx2", "scalar"])
def test_other_instruction_sets(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = limited(host(), isa)
    if target == host():
        pytest.skip(f"this machine has nothing above {isa}")
    made = Lab(target)
    monkeypatch.setattr(kernels_support, "lab", lambda: made)
    check = spelt(mask="rows", d=20)
    for k, (b, m, n) in enumerate(SIZES):
        check(b, m, n, k)


def test_threads_do_not_change_the_result() -> None:
    s = Spelling()
    q, k, v = s.heads("q", 4), s.heads("k", 4, (0, 2, 3, 1)), s.heads("v", 4)
    out = s.merged(s.node("MatMul", softmax(s, s.node("MatMul", q, k)), v))
    m = model(s.nodes, {n: (F, ("b", "m", 64)) for n in "qkv"}, [out], s.constants)
    rng = np.random.default_rng(0)
    feeds = {n: numbers(rng, 2, 523, 64) for n in "qkv"}
    first, second = (run_model(m, threads=t)(feeds)[0] for t in (1, 3))
    np.testing.assert_array_equal(first, second)


# --- micro-kernels -------------------------------------------------------------------------------

ISAS = [isa for isa in instruction_sets.ISAS.values() if isa.arch in (None, host().arch)
        and host().has(isa.features)]  # fmt: skip


def native(symbol: str) -> tuple[Any, Any]:
    """A micro-kernel compiled for this machine; the library that owns its code comes with it."""
    library = link([microkernels.object_code(symbol, host())])
    parameters = "piiipi" if symbol.startswith("pack") else "pipiiipp"
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int64}
    kind = ctypes.CFUNCTYPE(None, *[types[p] for p in parameters])
    return library, kind(library.address(symbol))


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_pack(isa: instruction_sets.Isa) -> None:
    for vectors in range(1, isa.vectors + 1):
        nr = vectors * isa.lanes
        symbol = microkernels.pack(nr, isa.name)
        library, pack = native(symbol)
        python = python_namespace([symbol])[symbol]
        for rows in {1, 2, nr // 2 + 1, nr - 1, nr}:
            for depth in (0, 1, isa.lanes - 1, isa.lanes, isa.lanes + 1, 3 * isa.lanes + 2):
                for step in {nr, nr + 5, nr if vectors > 1 else 3}:
                    stride = depth + 3
                    src = np.arange((rows - 1) * stride + depth, dtype=np.float32)
                    size = max(0, depth - 1) * step + nr * (depth > 0)
                    want = np.full(size + 8, -1, np.float32)
                    for k in range(depth):
                        line = np.minimum(np.arange(nr), rows - 1) * stride + k
                        want[k * step : k * step + nr] = line
                    out, again = np.full_like(want, -1), np.full_like(want, -1)
                    pack(src.ctypes.data, stride, rows, depth, out.ctypes.data, step)
                    a, b = (Buffer(F, x.ctypes.data, x) for x in (src, again))
                    python(a, 0, stride, rows, depth, b, 0, step)
                    np.testing.assert_array_equal(out, again)
                    np.testing.assert_array_equal(out, want)
        assert library is not None


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("place", ["strip", "other"])
def test_softmax_of_rows(isa: instruction_sets.Isa, place: str) -> None:
    library, run = native(microkernels.softmax(isa.name))
    python = python_namespace([microkernels.softmax(isa.name)])[microkernels.softmax(isa.name)]
    rng = np.random.default_rng(0)
    for n in (0, 1, isa.lanes - 1, isa.lanes, isa.lanes + 1, 5 * isa.lanes - 1, 5 * isa.lanes, 97):
        whole = -(-n // isa.lanes) * isa.lanes
        lds = whole + 16 if place == "strip" else n + 3
        ldt = whole + 16
        x = (rng.standard_normal((6, lds)) * 30).astype(np.float32)
        x[1, :n] = -INF
        x[2, :1] = -INF
        x[3, n // 2] = np.nan
        x[3, n // 2 : n // 2 + 1].view(np.int32)[:] |= 0x12345  # a NaN of other bits
        x[5] = rng.uniform(-140, -70, lds)
        top = np.full(6, -INF, np.float32)
        top[4:] = 90, 0
        data = []
        for _ in range(2):
            source = x.copy()
            out = source if place == "strip" else np.full((6, ldt), 5, np.float32)
            data.append((source, out, top.copy(), np.full(6, np.nan, np.float32)))
        s, o, t, total = (a.ctypes.data for a in data[0])
        run(s, lds, o, ldt, 6, n, t, total)
        b = [Buffer(F, a.ctypes.data, a) for a in data[1]]
        python(b[0], 0, lds, b[1], 0, ldt, 6, n, b[2], 0, b[3], 0)
        (_, got, highest, sums), (_, want, want_highest, want_sums) = data
        np.testing.assert_array_equal(highest, want_highest)
        np.testing.assert_array_equal(got[:, whole:], want[:, whole:])
        assert (got[:, n:whole] == 0).all()
        # Below the smallest normal number the result is 0.
        np.testing.assert_allclose(got[:, :n], want[:, :n], rtol=5e-7, atol=1.3e-38)
        np.testing.assert_allclose(sums, want_sums, rtol=1e-6, atol=1e-36)
    assert library is not None


@pytest.mark.parametrize("target", [
    cpu_target("aarch64-unknown-linux-gnu", frozenset()),
    cpu_target("x86_64-unknown-linux-gnu", frozenset({"sse2"})),
], ids=lambda t: t.triple)  # fmt: skip
def test_micro_kernels_for_other_machines(target: Target) -> None:
    isa = isa_of(target)
    lanes = instruction_sets.ISAS[isa].lanes
    for symbol in (microkernels.pack(2 * lanes, isa), microkernels.softmax(isa)):
        assert microkernels.object_code(symbol, target)
    with pytest.raises(ValueError, match="does not run"):
        microkernels.object_code(microkernels.softmax("avx512"), target)


@pytest.mark.parametrize("symbol", ["pack_f32_7_scalar", "pack_f32_8_none", "softmax_f32_none"])
def test_unknown_micro_kernels(symbol: str) -> None:
    with pytest.raises(KeyError):
        microkernels.object_code(symbol, host())
