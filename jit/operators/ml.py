"""Preprocessing and linear models of ai.onnx.ml, computed on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxjit.codegen.expr import Expr, apply, index
from onnxjit.codegen.kernel import TensorType, product
from onnxjit.codegen.scalar_functions import numpy_dtype
from onnxjit.codegen.tensor import DefinitionError, Tensor, elementwise
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import draw
from onnxjit.tensors import array_dtype_name

DOMAIN = "ai.onnx.ml"
Array = np.ndarray


def typed(dtype: str, shape: Callable[..., Sequence[Expr | None]]) -> Callable[..., list[Any]]:
    """An inference function for one output of a fixed dtype ("" = that of the first input)."""

    def infer(*tensors: Tensor, **attrs: Any) -> list[TensorType]:
        sizes = tuple(shape(*tensors, **attrs))
        return [TensorType(dtype or tensors[0].dtype, sizes)]  # type: ignore[arg-type]

    return infer


def _same(x: Tensor, **_: Any) -> Sequence[Expr]:
    return x.shape


def post_transformed(scores: Array, name: str) -> Array:
    """The score transformations that classifiers and regressors share."""
    if name in ("", "NONE"):
        return scores
    if name == "LOGISTIC":
        e = np.exp(-np.abs(scores))
        return np.where(scores >= 0, 1 / (1 + e), e / (1 + e)).astype(scores.dtype)
    if name == "SOFTMAX":
        e = np.exp(scores - scores.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)
    if name == "SOFTMAX_ZERO":
        # Scores of zero keep their value times exp(-max); they do not become exp(0 - max).
        top = scores.max(axis=1, keepdims=True)
        e = np.where(np.abs(scores) > 1e-7, np.exp(scores - top), scores * np.exp(-top))
        total = e.sum(axis=1, keepdims=True)
        return np.where(total == 0, 0.5, e / np.where(total == 0, 1, total)).astype(scores.dtype)
    if name == "PROBIT":
        return (1.41421356 * inverse_erf(scores * 2 - 1)).astype(scores.dtype)
    raise DefinitionError(f"unknown post_transform {name!r}")


def inverse_erf(x: Array) -> Array:
    """Winitzki's approximation (a = 0.147), which ONNX's implementations use."""
    with np.errstate(all="ignore"):
        log = np.log((1 - x) * (1 + x))
        v = 2 / (np.pi * 0.147) + 0.5 * log
        root = np.sqrt(np.sqrt(v * v - log / 0.147) - v)
    return np.where((1 - x) * (1 + x) == 0, 0, np.copysign(root, x))


def labels_of(chosen: Array, ints: Sequence[int] | None, strings: Sequence[str] | None) -> Array:
    """Class numbers turned into the classes' labels."""
    if strings:
        return np.array(list(strings), object)[chosen]
    return np.array(list(ints or range(int(chosen.max(initial=0)) + 1)), np.int64)[chosen]


@operator(
    "Binarizer",
    since=1,
    domain=DOMAIN,
    cases=[Case(draw("float32[3,4]"), {"threshold": 0.5}), Case(draw("int64[3,4]"))],
)
def binarizer(x: Tensor, *, threshold: float = 0.0) -> Tensor:
    """1 where x > threshold, else 0."""

    def at(v: Expr) -> Expr:
        real = v if v.dtype.startswith("float") else apply("cast", v, dtype="float64")
        return apply("cast", apply("lt", threshold, real), dtype=x.dtype)

    return elementwise(at, x)


@operator(
    "Scaler",
    since=1,
    domain=DOMAIN,
    host=True,
    infer=typed("float32", _same),
    cases=[Case(draw("float32[3,2]"), {"offset": [0.5, 1.0], "scale": [2.0, 3.0]})],
)
def scaler(
    x: Array, *, offset: Sequence[float] | None = None, scale: Sequence[float] | None = None
) -> Array:
    """(x - offset) · scale for each feature."""
    moved = x.astype(np.float32) - np.asarray(offset if offset else [0.0], np.float32)
    return moved * np.asarray(scale if scale else [1.0], np.float32)


@operator(
    "Normalizer",
    since=1,
    domain=DOMAIN,
    host=True,
    infer=typed("float32", _same),
    cases=[Case(draw("float32[3,4]"), {"norm": n}, label=n) for n in ("MAX", "L1", "L2")],
)
def normalizer(x: Array, *, norm: str = "MAX") -> Array:
    """Every row divided by its norm."""
    v = x.astype(np.float32)
    if norm == "MAX":
        size = np.abs(v).max(axis=-1, keepdims=True)
    elif norm == "L1":
        size = np.abs(v).sum(axis=-1, keepdims=True)
    elif norm == "L2":
        size = np.sqrt((v * v).sum(axis=-1, keepdims=True))
    else:
        raise DefinitionError(f"unknown norm {norm!r}")
    return v / np.maximum(size, np.float32(1e-30))


def _impute_type(x: Tensor, **_: Any) -> list[TensorType]:
    return [TensorType(x.dtype, x.shape)]


@operator(
    "Imputer",
    since=1,
    domain=DOMAIN,
    host=True,
    infer=_impute_type,
    cases=[
        Case(
            lambda: [np.array([[1, np.nan], [np.nan, 4]], "float32")],
            {"imputed_value_floats": [7.0, 8.0], "replaced_value_float": float("nan")},
        ),
        Case(
            lambda: [np.array([[1, 0], [0, 4]], "int64")],
            {"imputed_value_int64s": [9], "replaced_value_int64": 0},
        ),
    ],
)
def imputer(
    x: Array,
    *,
    imputed_value_floats: Sequence[float] | None = None,
    imputed_value_int64s: Sequence[int] | None = None,
    replaced_value_float: float = 0.0,
    replaced_value_int64: int = 0,
) -> Array:
    """Replaces one value (or NaN) by a value for each feature."""
    if imputed_value_floats:
        values, replaced = np.asarray(imputed_value_floats), replaced_value_float
    else:
        values, replaced = np.asarray(imputed_value_int64s), replaced_value_int64
    missing = np.isnan(x) if replaced != replaced else x == replaced
    return np.where(missing, values.astype(x.dtype), x)


def _linear_shape(x: Tensor, targets: int = 1, **_: Any) -> Sequence[Expr]:
    return (x.shape[0] if x.rank > 1 else index(1), index(targets))


@operator(
    "LinearRegressor",
    since=1,
    domain=DOMAIN,
    host=True,
    infer=typed("float32", _linear_shape),
    cases=[
        Case(
            draw("float32[3,2]"),
            {"coefficients": [1.0, 2.0, 3.0, 4.0], "intercepts": [0.5, 1.0], "targets": 2},
        )
    ],
)
def linear_regressor(
    x: Array,
    *,
    coefficients: Sequence[float] | None = None,
    intercepts: Sequence[float] | None = None,
    post_transform: str = "NONE",
    targets: int = 1,
) -> Array:
    """x · coefficients + intercepts."""
    data = np.atleast_2d(x).astype(np.float32)
    scores = data @ np.asarray(coefficients, np.float32).reshape(targets, -1).T
    if intercepts:
        scores = scores + np.asarray(intercepts, np.float32)
    return post_transformed(scores, post_transform)


def _classifier_types(
    x: Tensor,
    *,
    outputs: int = 1,
    classlabels_ints: Sequence[int] | None = None,
    classlabels_strings: Sequence[str] | None = None,
    coefficients: Sequence[float] | None = None,
    intercepts: Sequence[float] | None = None,
    **_: Any,
) -> list[TensorType]:
    count = len(classlabels_strings or classlabels_ints or intercepts or [0])
    rows = x.shape[0] if x.rank > 1 else index(1)
    label = TensorType("string" if classlabels_strings else "int64", (rows,))
    return [label, TensorType("float32", (rows, index(count)))][:outputs]


@operator(
    "LinearClassifier",
    since=1,
    domain=DOMAIN,
    host=True,
    infer=_classifier_types,
    cases=[
        Case(
            draw("float32[4,2]"),
            {
                "coefficients": [1.0, -2.0, 0.5, 1.5, -1.0, 1.0],
                "intercepts": [0.1, 0.2, 0.3],
                "classlabels_ints": [5, 6, 7],
                "post_transform": "SOFTMAX",
            },
            outputs=2,
        )
    ],
)
def linear_classifier(
    x: Array,
    *,
    outputs: int = 1,
    classlabels_ints: Sequence[int] | None = None,
    classlabels_strings: Sequence[str] | None = None,
    coefficients: Sequence[float],
    intercepts: Sequence[float] | None = None,
    multi_class: int = 0,
    post_transform: str = "NONE",
) -> tuple[Array, ...]:
    """The class of the highest linear score, and the scores."""
    data = np.atleast_2d(x).astype(np.float32)
    # Models with surplus coefficients exist; onnxruntime does not look at those either.
    used = len(intercepts) * data.shape[1] if intercepts else len(coefficients)
    scores = data @ np.asarray(coefficients[:used], np.float32).reshape(-1, data.shape[1]).T
    if intercepts:
        scores = scores + np.asarray(intercepts, np.float32)
    classes = len(classlabels_strings or classlabels_ints or [])
    if scores.shape[1] == 1 and classes == 2:
        scores = np.concatenate([-scores, scores], axis=1)
    scores = post_transformed(scores, post_transform)
    if scores.shape[1] > 1:
        labels = labels_of(np.argmax(scores, axis=1), classlabels_ints, classlabels_strings)
    else:
        positive = scores[:, 0] >= (0 if post_transform == "NONE" else 0.5)
        if classlabels_strings:
            labels = np.array(["", classlabels_strings[0]], object)[positive.astype(int)]
        else:
            one = classlabels_ints[0] if classlabels_ints else 1
            labels = np.where(positive, one, 0).astype(np.int64)
    return (labels, scores.astype(np.float32))[:outputs]


def _extracted_shape(x: Tensor, y: Tensor, **_: Any) -> Sequence[Expr]:
    lead = x.shape[:-1] if x.rank > 1 else (index(1),)
    return (*lead, product(y.shape))


@operator(
    "ArrayFeatureExtractor",
    since=1,
    domain=DOMAIN,
    host=True,
    infer=typed("", _extracted_shape),
    cases=[Case(draw("float32[3,5]", np.array([[0, 3]])))],
)
def array_feature_extractor(x: Array, y: Array) -> Array:
    """The chosen elements of the last axis."""
    out = x[..., y.reshape(-1)]
    return out.reshape(1, -1) if x.ndim == 1 else out


def _joined_shape(*xs: Tensor, inputdimensions: Sequence[int] | None = None) -> Sequence[Expr]:
    return (xs[0].shape[0], index(sum(inputdimensions or ())))


@operator(
    "FeatureVectorizer",
    since=1,
    domain=DOMAIN,
    host=True,
    infer=typed("float32", _joined_shape),
    cases=[Case(draw("float32[3,2]", "float32[3,4]"), {"inputdimensions": [2, 4]})],
)
def feature_vectorizer(*xs: Array, inputdimensions: Sequence[int] | None = None) -> Array:
    """The inputs' features side by side, each cut or filled with zeros to its given length."""
    parts = []
    for x, n in zip(xs, inputdimensions or (), strict=True):
        rows = x.reshape(len(x), -1)[:, :n].astype(np.float32)
        parts.append(np.pad(rows, [(0, 0), (0, n - rows.shape[1])]))
    return np.concatenate(parts, axis=1)


def _encoded_shape(
    x: Tensor,
    cats_int64s: Sequence[int] | None = None,
    cats_strings: Sequence[str] | None = None,
    **_: Any,
) -> Sequence[Expr]:
    return (*x.shape, index(len(cats_int64s or cats_strings or ())))


@operator(
    "OneHotEncoder",
    since=1,
    domain=DOMAIN,
    host=True,
    infer=typed("float32", _encoded_shape),
    cases=[Case(lambda: [np.array([[2, 5], [7, 9]])], {"cats_int64s": [2, 5, 7]})],
)
def one_hot_encoder(
    x: Array,
    *,
    cats_int64s: Sequence[int] | None = None,
    cats_strings: Sequence[str] | None = None,
    zeros: int = 1,
) -> Array:
    """1 at the position of each element's category; all 0 for an unknown one."""
    if cats_int64s:
        hits = x.astype(np.int64)[..., None] == np.asarray(cats_int64s, np.int64)
    else:
        hits = x[..., None] == np.asarray(list(cats_strings or ()), object)
    if not zeros and not hits.any(axis=-1).all():
        raise ValueError("OneHotEncoder met a value outside its categories")
    return hits.astype(np.float32)


_DEFAULTS = {"default_string": "_Unused", "default_int64": -1, "default_float": -0.0}


def _encoder_type(x: Tensor, *, version: int = 4, **attrs: Any) -> list[TensorType]:
    if version == 1:
        return [TensorType("int64" if x.dtype == "string" else "string", x.shape)]
    return [TensorType(_table({**_DEFAULTS, **attrs})[3], x.shape)]


def _table(attrs: Any) -> tuple[Sequence[Any], Sequence[Any], Any, str]:
    """Keys, values, the default and the values' dtype."""
    keys: Sequence[Any] = next(
        (
            k
            for n in ("keys_tensor", "keys_strings", "keys_int64s", "keys_floats")
            if (k := attrs.get(n)) is not None and len(k)
        ),
        [],
    )
    values = attrs.get("values_tensor")
    if values is not None:
        dtype = array_dtype_name(values)
        default = attrs.get("default_tensor")
        if default is None:
            default = {"string": "_Unused", "int64": -1, "int32": -1, "int16": -1}.get(dtype, -0.0)
            return keys, values, default, dtype
        return keys, values, default.reshape(-1)[0], dtype
    for name, default, dtype in (
        ("values_strings", "default_string", "string"),
        ("values_int64s", "default_int64", "int64"),
        ("values_floats", "default_float", "float32"),
    ):
        if attrs.get(name):
            return keys, attrs[name], attrs[default], dtype
    raise DefinitionError("LabelEncoder without values")


@operator(
    "LabelEncoder",
    since=1,
    domain=DOMAIN,
    host=True,
    infer=_encoder_type,
    cases=[
        Case(
            lambda: [np.array([1, 5, 9, 1])],
            {"keys_int64s": [1, 9], "values_floats": [0.5, 2.5], "default_float": -1.0},
        )
    ],
)
def label_encoder(
    x: Array,
    *,
    version: int = 4,
    classes_strings: Sequence[str] | None = None,
    default_float: float = -0.0,
    default_int64: int = -1,
    default_string: str = "_Unused",
    default_tensor: Array | None = None,
    keys_floats: Sequence[float] | None = None,
    keys_int64s: Sequence[int] | None = None,
    keys_strings: Sequence[str] | None = None,
    keys_tensor: Array | None = None,
    values_floats: Sequence[float] | None = None,
    values_int64s: Sequence[int] | None = None,
    values_strings: Sequence[str] | None = None,
    values_tensor: Array | None = None,
) -> Array:
    """Maps keys to values and everything else to a default; NaN is a key like any other."""
    attrs = {k: v for k, v in locals().items() if k not in ("x", "version")}
    if version == 1:
        classes = list(classes_strings or ())
        if x.dtype.kind in "iu":
            names = dict(enumerate(classes))
            mapped = [names.get(int(v), default_string) for v in x.reshape(-1)]
            return np.array(mapped, object).reshape(x.shape)
        numbers = {c: k for k, c in enumerate(classes)}
        found = [numbers.get(v, default_int64) for v in x.reshape(-1)]
        return np.array(found, np.int64).reshape(x.shape)
    keys, values, default, dtype = _table(attrs)
    nan = object()

    def key(v: Any) -> Any:
        v = v.item() if isinstance(v, np.generic) else v
        return nan if v != v else v

    table = {key(k): v for k, v in zip(keys, values, strict=True)}
    out = [table.get(key(v), default) for v in x.reshape(-1)]
    target = np.dtype(object) if dtype == "string" else numpy_dtype(dtype)
    return np.array(out, target).reshape(x.shape)
