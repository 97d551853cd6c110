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
from onnxjit.codegen.tensor import NARROW, NeedsValue, Trace, finish, placeholder
from onnxjit.operators import registry
from onnxjit.operators.registry import Case, Operator
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
                tensors = []
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
    got = evaluate(kernel, feeds, dims)
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
    narrow = [
        array_dtype_name(a) for a in inputs if a is not None and array_dtype_name(a) in NARROW
    ]
    bound = tolerance or max(TOLERANCE.get(d, 2e-5) for d in (dtype, *narrow))
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
