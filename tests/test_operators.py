"""Every operator definition against the ONNX reference evaluator, with fixed and symbolic sizes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnxjit.codegen.evaluate import evaluate, evaluate_int
from onnxjit.codegen.expr import Dim, as_int, index
from onnxjit.codegen.kernel import TensorType
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.codegen.tensor import (
    NARROW,
    DefinitionError,
    NeedsValue,
    Tensor,
    Trace,
    array,
    finish,
    full,
    placeholder,
)
from onnxjit.operators import registry
from onnxjit.operators.registry import Case, Operator
from onnxjit.operators.selection import top_k
from onnxjit.tensors import array_dtype_name, dtype_code, dtype_name

ROWS = registry.table()
# Cases of benchmarks are too large for evaluation with NumPy.
TRIED = [(row, k) for row in ROWS for k, case in enumerate(row.cases) if not case.bench]
CASES = [(row, row.cases[k]) for row, k in TRIED]
IDS = [f"{row.name}-{row.since}-{k}" for row, k in TRIED]
NEWEST = onnx.defs.onnx_opset_version()
ORT_OPSET = 21  # the newest that the oldest ONNX Runtime in use knows
IMPLICIT = frozenset(("outputs", "version"))


@functools.cache
def history() -> dict[tuple[str, str], list[Any]]:
    """Every schema that is not deprecated, oldest first."""
    out: dict[tuple[str, str], list[Any]] = {}
    for s in sorted(onnx.defs.get_all_schemas_with_history(), key=lambda s: s.since_version):
        if not s.deprecated:
            out.setdefault((s.domain, s.name), []).append(s)
    return out


def versions(row: Operator) -> list[Any]:
    """The schemas that a row covers, oldest first."""
    last = row.until if row.until is not None else 10**9
    found = history().get((row.domain, row.name), [])
    return [s for s in found if row.since <= s.since_version <= last]


def version_of(row: Operator, case: Case) -> int:
    if case.version is not None:
        return case.version
    covered = versions(row)
    return covered[-1].since_version if covered else row.since


def supported(row: Operator, case: Case) -> None:
    """Skips a case of a schema that the installed onnx does not have."""
    if version_of(row, case) > NEWEST or not versions(row):
        pytest.skip(f"onnx {onnx.__version__} has no {row.name} version {version_of(row, case)}")


# --- the reference -----------------------------------------------------------------------------


def wider(a: Any) -> Any:
    return a.astype(np.float32) if a is not None and array_dtype_name(a) in NARROW else a


def model_of(
    row: Operator, case: Case, arrays: Sequence[Any], version: int | None = None
) -> onnx.ModelProto:
    names = ["" if a is None else f"x{k}" for k, a in enumerate(arrays)]
    outs = [f"y{k}" for k in range(case.outputs)]
    attrs = {
        k: onnx.numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v
        for k, v in case.attrs.items()
    }
    node = helper.make_node(row.name, names, outs, domain=row.domain, **attrs)
    inputs = [
        helper.make_tensor_value_info(n, dtype_code(array_dtype_name(a)), a.shape)
        for n, a in zip(names, arrays, strict=True)
        if n
    ]
    outputs = [onnx.ValueInfoProto(name=o) for o in outs]
    graph = helper.make_graph([node], "case", inputs, outputs)
    opset = helper.make_opsetid(row.domain, version or version_of(row, case))
    return helper.make_model(graph, opset_imports=[opset])


def expected(row: Operator, case: Case, arrays: Sequence[Any]) -> list[np.ndarray]:
    """What the case says, or the ONNX reference. Old versions, of which the reference has few, are
    converted to the newest one."""
    with np.errstate(all="ignore"):
        if case.expect is not None:
            out = case.expect(*arrays)
            return [np.asarray(o) for o in (out if isinstance(out, tuple) else (out,))]
        model = model_of(row, case, arrays)
        if row.until is not None and not row.domain:
            model = onnx.version_converter.convert_version(model, NEWEST)
        return [np.asarray(o) for o in ReferenceEvaluator(model).run(None, feeds_of(arrays))]


def second_opinion(row: Operator, case: Case, arrays: Sequence[Any]) -> list[np.ndarray]:
    """ONNX Runtime, which judges where the reference (it has bugs, too) fails or disagrees."""
    ort = pytest.importorskip("onnxruntime")
    covered = [s.since_version for s in versions(row) if s.since_version <= ORT_OPSET]
    model = model_of(row, case, arrays, case.version or max(covered, default=None))
    model.ir_version = min(model.ir_version, 10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds_of(arrays))


def feeds_of(arrays: Sequence[Any]) -> dict[str, np.ndarray]:
    return {f"x{k}": a for k, a in enumerate(arrays) if a is not None}


def output_dtypes(row: Operator, case: Case, arrays: Sequence[Any]) -> list[str]:
    inferred = onnx.shape_inference.infer_shapes(model_of(row, case, arrays))
    return [dtype_name(o.type.tensor_type.elem_type) for o in inferred.graph.output]


# --- the definition ----------------------------------------------------------------------------


def keywords(row: Operator, case: Case) -> dict[str, Any]:
    return registry.keyword_arguments(row, case.attrs, case.outputs, version_of(row, case))


def symbolic_shape(a: np.ndarray, case: Case) -> tuple[Any, ...]:
    return tuple(Dim(f"n{d}") if d > 1 and d not in case.fixed else index(d) for d in a.shape)


def run(row: Operator, case: Case, arrays: Sequence[Any], symbolic: bool) -> list[np.ndarray]:
    """The definition traced and evaluated. An input becomes known when the definition asks."""
    known: set[str] = set()
    names = [f"x{k}" for k in range(len(arrays))]
    while True:
        trace = Trace()
        try:
            with trace.active():
                tensors: list[Any] = []
                for name, a in zip(names, arrays, strict=True):
                    if a is None:
                        tensors.append(None)
                        continue
                    free = symbolic and name not in known
                    shape = symbolic_shape(a, case) if free else tuple(map(index, a.shape))
                    t = TensorType(array_dtype_name(a), shape)
                    tensors.append(placeholder(name, t, known=a if name in known else None))
                out = row.define(*tensors, **keywords(row, case))
                results = out if isinstance(out, tuple) else (out,)
                named = [(f"y{k}", r) for k, r in enumerate(results)]
                kernel = finish("case", trace, named, names)
            break
        except NeedsValue as e:
            if e.buffer not in names or e.buffer in known:
                raise
            known.add(e.buffer)
    dims = {f"n{d}": d for a in arrays if a is not None for d in a.shape}
    for a, b in trace.guards:
        assert evaluate_int(a, dims) == evaluate_int(b, dims), f"the guard {a} == {b} fails"
    feeds = {n: a for n, a in zip(names, arrays, strict=True) if a is not None}
    # Behind the results are the states of a recurrence.
    got = evaluate(kernel, feeds, dims)[: len(results)]
    for r, y in zip(results, got, strict=True):
        assert y.shape == tuple(evaluate_int(d, dims) for d in r.shape)
    return got


def run_host(row: Operator, case: Case, arrays: Sequence[Any]) -> list[np.ndarray]:
    """The host function; what it returns must have the types that its `infer` promises."""
    known = [None if a is None else (array_dtype_name(a), a) for a in arrays]
    with Trace().active():
        tensors = [
            placeholder(f"x{k}", TensorType(t[0], tuple(map(index, t[1].shape))), known=t[1])
            if t is not None
            else None
            for k, t in enumerate(known)
        ]
        assert row.infer is not None
        types = row.infer(*tensors, **keywords(row, case))
    out = row.define(*arrays, **keywords(row, case))
    results = list(out) if isinstance(out, tuple) else [out]
    for t, y in zip(types, results, strict=True):
        assert y.dtype == numpy_dtype(t.dtype)
        assert len(t.shape) == y.ndim
        assert all(d is None or as_int(d) == n for d, n in zip(t.shape, y.shape, strict=True))
    return results


TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 2e-5, "float64": 5e-8}


def compare(
    got: np.ndarray, want: np.ndarray, dtype: str, inputs: Sequence[Any], tolerance: float | None
) -> None:
    assert array_dtype_name(got) == dtype
    assert got.shape == want.shape
    if got.dtype.kind in "biu":
        np.testing.assert_array_equal(got, want)
        return
    names = {dtype, *(array_dtype_name(a) for a in inputs if a is not None)} & {dtype, *NARROW}
    bound = tolerance or max(TOLERANCE.get(d, 2e-5) for d in names)
    wide = np.asarray(want).astype(numpy_dtype(dtype)).astype(np.float64)
    np.testing.assert_allclose(got.astype(np.float64), wide, rtol=bound, atol=bound)


# --- tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "case"), CASES, ids=IDS)
def test_case(row: Operator, case: Case) -> None:
    supported(row, case)
    arrays = case.inputs()
    got = run_host(row, case, arrays) if row.host else run(row, case, arrays, symbolic=False)
    assert len(got) == case.outputs
    dtypes = output_dtypes(row, case, arrays)

    def check(want: list[np.ndarray]) -> None:
        for y, w, d in zip(got, want, dtypes, strict=True):
            compare(y, w, d or array_dtype_name(w), arrays, case.tolerance)

    # References round 16-bit floats after every step; definitions do once.
    wide = [wider(a) for a in arrays]
    try:
        check(expected(row, case, wide))
    except Exception:
        if case.expect is not None:
            raise
        check(second_opinion(row, case, wide))


SYMBOLIC = [k for k, (row, case) in enumerate(CASES) if case.symbolic and not row.host]


@pytest.mark.parametrize(
    ("row", "case"), [CASES[k] for k in SYMBOLIC], ids=[IDS[k] for k in SYMBOLIC]
)
def test_symbolic_sizes(row: Operator, case: Case) -> None:
    supported(row, case)
    arrays = case.inputs()
    fixed = run(row, case, arrays, symbolic=False)
    for y, w in zip(run(row, case, arrays, symbolic=True), fixed, strict=True):
        assert y.dtype == w.dtype
        assert y.shape == w.shape
        np.testing.assert_allclose(y.astype(np.float64), w.astype(np.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("row", ROWS, ids=[f"{r.name}-{r.since}" for r in ROWS])
def test_signature(row: Operator) -> None:
    """The keywords of a definition are the attributes of the schemas that it covers."""
    covered = versions(row)
    if not covered:
        pytest.skip(f"onnx {onnx.__version__} has no such schema of {row.name}")
    attributes: dict[str, Any] = {}
    for schema in covered:
        attributes.update(schema.attributes)
    attributes.pop("consumed_inputs", None)
    assert row.keywords - IMPLICIT - {"consumed_inputs"} == set(attributes)
    parameters = inspect.signature(row.define).parameters
    for name, attribute in attributes.items():
        default = parameters[name].default
        if attribute.required:
            assert default is inspect.Parameter.empty or row.since < covered[-1].since_version
            continue
        if not attribute.default_value.type:
            assert default is not inspect.Parameter.empty
            continue
        value = helper.get_attribute_value(attribute.default_value)
        if isinstance(value, float):
            assert default == pytest.approx(value)
        elif isinstance(value, bytes):
            assert default == value.decode()
        elif isinstance(value, list):
            assert list(default) == [v.decode() if isinstance(v, bytes) else v for v in value]
        else:
            assert default == value
    if row.host:
        assert row.infer is not None
        inferred = inspect.signature(row.infer).parameters
        assert set(attributes) <= set(inferred) or any(
            p.kind is p.VAR_KEYWORD for p in inferred.values()
        )


def test_rows_do_not_overlap() -> None:
    for row in ROWS:
        for version in (s.since_version for s in versions(row)):
            assert registry.find(row.domain, row.name, version) is row


# --- symbolic shape arithmetic -----------------------------------------------------------------

B, S, P = Dim("b"), Dim("s"), Dim("p")


def define(name: str, *tensors: Tensor, version: int = 21, **attrs: Any) -> Tensor:
    row = registry.find("", name, version)
    assert row is not None
    return row.define(*tensors, **registry.keyword_arguments(row, attrs, 1, version))


def source(*shape: Any, dtype: str = "float32") -> Tensor:
    return placeholder("x", TensorType(dtype, tuple(map(index, shape))))


def ints(*values: Any) -> Tensor:
    return array(list(values), "int64")


def test_shape_chain_folds() -> None:
    """Shape -> Gather -> Unsqueeze -> Concat -> Reshape, as exporters write a split of heads."""
    with Trace().active() as t:
        x = source(B, S, 768)
        sizes = [
            define("Unsqueeze", define("Gather", define("Shape", x), placeholder(
                "k", TensorType("int64", ()), known=np.array(k))), ints(0))
            for k in (0, 1)
        ]  # fmt: skip
        target = define("Concat", *sizes, ints(12, -1), axis=0)
        assert target.values() == [B, S, index(12), index(-1)]
        assert define("Reshape", x, target).shape == (B, S, index(12), index(64))
        assert not t.guards


@pytest.mark.parametrize(
    ("shape", "target", "want"),
    [
        ((B, S, 768), (-1, 768), (B * S, 768)),
        ((B * S, 768), (B, -1, 12, 64), (B, S, 12, 64)),
        ((B * (S + P), 64), (B, -1, 64), (B, S + P, 64)),
        ((B * (S + P), 64), (-1, S + P, 64), (B, S + P, 64)),
        ((B, 12, S, 64), (B, -1), (B, S * 768)),
        ((B, S, 6), (0, 0, 2, -1), (B, S, 2, 3)),
    ],
)
def test_reshape_infers_symbolic_sizes(shape: Any, target: Any, want: Any) -> None:
    with Trace().active():
        assert define("Reshape", source(*shape), ints(*target)).shape == tuple(map(index, want))


@pytest.mark.parametrize(
    ("size", "start", "end", "want"),
    [
        (512, 0, S, S),
        (512, P, P + S, S),
        (S, -1, 2**63 - 1, 1),
        (S, 0, -1, S - 1),
        (S, 1, 2**31 - 1, S - 1),
        (S, 0, 2**31 - 1, S),
        (P + S, P, 2**63 - 1, S),
        (P + S, -S, 2**63 - 1, S),
        (4, 1, -1, 2),
    ],
)
def test_slice_sizes(size: Any, start: Any, end: Any, want: Any) -> None:
    with Trace().active():
        x = source(B, size)
        assert define("Slice", x, ints(start), ints(end), ints(1)).shape == (B, index(want))


def test_sizes_survive_narrowing_and_rounding() -> None:
    with Trace().active():
        sizes = define("Shape", source(B, S))
        narrow = define("Cast", sizes, to=6)
        assert define("ConstantOfShape", narrow).shape == (B, S)
        real = define("Cast", sizes, to=1)
        for factor, want in ((2.0, (B * 2, S * 2)), (0.5, (B // 2, S // 2))):
            scaled = define("Floor", define("Mul", real, full((), factor, "float32")))
            assert define("ConstantOfShape", define("Cast", scaled, to=7)).shape == want


def test_range_and_expand_with_symbolic_limits() -> None:
    with Trace().active() as t:
        count = define("Range", ints(0), full((), S, "int64"), ints(1), version=11)
        assert count.shape == (S,)
        assert count.at(B) is B
        assert define("Range", full((), P, "int64"), full((), P + S, "int64"), ints(1)).shape == (
            S,
        )
        grown = define("Expand", source(B, 1, S, 1), ints(B, 1, S, S))
        assert grown.shape == (B, index(1), S, S)
        assert not t.guards


def test_guards_state_what_a_slice_relies_on() -> None:
    with Trace().active() as t:
        define("Slice", source(B, S), ints(-1), ints(2**63 - 1), ints(1))
    ((a, b),) = t.guards
    assert evaluate_int(a, {"s": 3}) == evaluate_int(b, {"s": 3})
    assert evaluate_int(a, {"s": 0}) != evaluate_int(b, {"s": 0})


def test_contents_that_are_not_known_are_asked_for() -> None:
    with Trace().active(), pytest.raises(NeedsValue) as e:
        define("Reshape", source(B, S), placeholder("shape", TensorType("int64", (index(2),))))
    assert e.value.buffer == "shape"


def test_malformed_nodes_are_refused() -> None:
    with Trace().active():
        for name, tensors, attrs in (
            ("Reshape", (source(4, 3), ints(5, 2)), {}),
            ("Reshape", (source(4, 3), ints(-1, -1)), {}),
            ("Concat", (source(4, 3), source(4, 3)), {"axis": 2}),
            ("Gather", (source(4, 3), ints(4)), {}),
            ("Slice", (source(4), ints(0), ints(1), ints(0), ints(0)), {}),
            ("Transpose", (source(4, 3),), {"perm": [0, 0]}),
            ("Einsum", (source(4, 3),), {"equation": "ij->ik"}),
            ("Einsum", (source(4, 3),), {"equation": "ijk->i"}),
            ("Squeeze", (source(4, 3), ints(0)), {}),
            ("Add", (source(4, 3), source(2, 3)), {}),
        ):
            with pytest.raises(DefinitionError):
                define(name, *tensors, **attrs).at(*[0] * 2)


# --- random numbers ----------------------------------------------------------------------------


def draw_random(name: str, *arrays: np.ndarray, **attrs: Any) -> np.ndarray:
    row = registry.find("", name, 15)
    assert row is not None
    (got,) = run_host(row, Case(lambda: arrays, attrs), arrays)
    return got


@pytest.mark.parametrize(
    ("name", "arrays", "attrs", "mean", "deviation"),
    [
        ("RandomNormal", (), {"shape": [100, 100], "mean": 2.0, "scale": 3.0}, 2.0, 3.0),
        ("RandomUniform", (), {"shape": [100, 100], "low": 1.0, "high": 3.0}, 2.0, 3**-0.5),
        ("RandomNormalLike", (np.zeros((100, 100), np.float64),), {"dtype": 1}, 0.0, 1.0),
        ("RandomUniformLike", (np.zeros((100, 100), np.float32),), {"dtype": 11}, 0.5, 12**-0.5),
        ("Bernoulli", (np.full((100, 100), 0.25, np.float32),), {"dtype": 9}, 0.25, 0.1875**0.5),
        ("Multinomial", (np.log([[1.0, 3.0]]),), {"sample_size": 10000}, 0.75, 0.1875**0.5),
    ],
)
def test_random(name: str, arrays: Any, attrs: Any, mean: float, deviation: float) -> None:
    """Moments within five standard errors, and a seed repeats the numbers."""
    got = draw_random(name, *arrays, **attrs, seed=7.5)
    assert abs(got.mean(dtype=np.float64) - mean) < 5 * deviation / 100
    assert got.astype(np.float64).std() == pytest.approx(deviation, rel=0.05)
    np.testing.assert_array_equal(got, draw_random(name, *arrays, **attrs, seed=7.5))
    assert not np.array_equal(got, draw_random(name, *arrays, **attrs, seed=8.5))


def test_top_k_of_long_rows_keeps_nan_and_the_order_of_equal_elements() -> None:
    """Rows of which most is dropped before the rest is sorted."""
    rng = np.random.default_rng(0)
    for n, k, rare in ((512, 1, 0.0), (520, 32, 0.01), (1031, 64, 0.5), (700, 7, 0.02)):
        x = rng.integers(-9, 9, (2, n)).astype(np.float32)
        x[rng.random(x.shape) < rare] = np.nan
        x[rng.random(x.shape) < rare] = np.inf
        for largest in (0, 1):
            got, where = top_k(x, np.array([k]), largest=largest)
            key = np.where(np.isnan(x), np.inf, x) * (-1 if largest else 1)
            # NaN counts as more than infinity.
            nan = np.isnan(x) * (-1 if largest else 1)
            for row in range(2):
                want = np.lexsort((np.arange(n), key[row], nan[row]))[:k]
                np.testing.assert_array_equal(where[row], want)
                np.testing.assert_array_equal(got[row], x[row, want])
