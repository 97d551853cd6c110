"""Tree ensembles of ai.onnx.ml: all samples walk down all trees together, on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxjit.codegen.expr import index
from onnxjit.codegen.kernel import TensorType
from onnxjit.codegen.tensor import DefinitionError, Tensor
from onnxjit.operators.ml import DOMAIN, Array, labels_of, post_transformed
from onnxjit.operators.registry import Case, operator

_COMPARE: tuple[Callable[[Array, Array], Array], ...] = (
    np.less_equal,
    np.less,
    np.greater_equal,
    np.greater,
    np.equal,
    np.not_equal,
)
_MODES = {
    f"BRANCH_{name}": k for k, name in enumerate(("LEQ", "LT", "GTE", "GT", "EQ", "NEQ", "MEMBER"))
}
_LEAF = 7
_AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")
_TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """Nodes as parallel arrays. A leaf (mode 7) owns the entries `first[node] : last[node]` of
    `targets` and `weights`."""

    feature: Array
    mode: Array
    split: Array
    on_true: Array
    on_false: Array
    missing: Array
    roots: Array
    first: Array
    last: Array
    targets: Array
    weights: Array
    members: Mapping[int, Array]

    def leaves(self, x: Array) -> Array:
        """The leaf that every sample reaches in every tree, [samples, trees]."""
        node = np.broadcast_to(self.roots, (len(x), len(self.roots))).copy()
        rows = np.broadcast_to(np.arange(len(x))[:, None], node.shape)
        for _ in range(len(self.mode) + 1):
            open_ = self.mode[node] != _LEAF
            if not open_.any():
                return node
            at = node[open_]
            value = x[rows[open_], self.feature[at]]
            node[open_] = np.where(self._tests(at, value), self.on_true[at], self.on_false[at])
        raise DefinitionError("a tree of the ensemble has a cycle")

    def _tests(self, at: Array, value: Array) -> Array:
        hit = np.zeros(len(at), bool)
        modes = self.mode[at]
        for k, compare in enumerate(_COMPARE):
            mine = modes == k
            if mine.any():
                hit[mine] = compare(value[mine], self.split[at[mine]])
        for place in np.nonzero(modes == _MODES["BRANCH_MEMBER"])[0]:
            hit[place] = bool(np.isin(value[place], self.members[int(at[place])]))
        return hit | (np.isnan(value) & (self.missing[at] != 0))

    def aggregated(self, x: Array, targets: int, how: str, dtype: Any) -> tuple[Array, Array]:
        """The leaves' weights gathered per target, and which targets got any."""
        if how not in _AGGREGATES:
            raise DefinitionError(f"unknown aggregate_function {how!r}")
        leaf = self.leaves(x)
        start = {"MIN": np.inf, "MAX": -np.inf}.get(how, 0.0)
        total = np.full((len(x), targets), start, np.float64)
        combine = {"MIN": np.minimum, "MAX": np.maximum}.get(how, np.add)
        seen = np.zeros(total.shape, bool)
        counts = self.last[leaf] - self.first[leaf]
        for k in range(int(counts.max(initial=0))):
            has = counts > k
            sample, tree = np.nonzero(has)
            entry = self.first[leaf[sample, tree]] + k
            combine.at(total, (sample, self.targets[entry]), self.weights[entry])
            seen[sample, self.targets[entry]] = True
        if how == "AVERAGE":
            total = total / len(self.roots)
        return np.where(seen, total, 0.0).astype(dtype), seen


def _forest(attrs: Mapping[str, Any], kind: str) -> Forest:
    """The ensemble of versions 1 and 3; `kind` is "class" or "target"."""
    trees, ids = attrs["nodes_treeids"], attrs["nodes_nodeids"]
    place = {key: k for k, key in enumerate(zip(trees, ids, strict=True))}
    mode = np.array([_MODES.get(m, _LEAF) for m in attrs["nodes_modes"]])

    def child(name: str) -> Array:
        found = [place.get(key, 0) for key in zip(trees, attrs[name], strict=True)]
        return np.where(mode == _LEAF, 0, found)

    roots: dict[int, int] = {}
    for k, t in enumerate(trees):
        roots.setdefault(t, k)
    owners = np.array(
        [
            place[key]
            for key in zip(attrs[f"{kind}_treeids"], attrs[f"{kind}_nodeids"], strict=True)
        ],
        np.int64,
    )
    order = np.argsort(owners, kind="stable")
    weights = attrs.get(f"{kind}_weights_as_tensor")
    weights = np.asarray(attrs[f"{kind}_weights"], np.float32) if weights is None else weights
    split = attrs.get("nodes_values_as_tensor")
    split = np.asarray(attrs["nodes_values"], np.float32) if split is None else split
    nodes = np.arange(len(trees))
    return Forest(
        np.asarray(attrs["nodes_featureids"]),
        mode,
        split,
        child("nodes_truenodeids"),
        child("nodes_falsenodeids"),
        np.asarray(attrs["nodes_missing_value_tracks_true"] or [0] * len(trees)),
        np.array([roots[t] for t in sorted(roots)]),
        np.searchsorted(owners[order], nodes, "left"),
        np.searchsorted(owners[order], nodes, "right"),
        np.asarray(attrs[f"{kind}_ids"])[order],
        weights[order],
        {},
    )


def _numeric(x: Array) -> Array:
    return x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)


def _base(attrs: Mapping[str, Any]) -> Array | None:
    tensor = attrs.get("base_values_as_tensor")
    values = attrs.get("base_values") if tensor is None else tensor
    return None if values is None or len(values) == 0 else np.asarray(values, np.float32)


def _regressor_type(x: Tensor, *, n_targets: int = 1, **_: Any) -> list[TensorType]:
    return [TensorType("float32", (x.shape[0], index(n_targets)))]


_STUMPS = {
    "nodes_treeids": [0, 0, 0, 1, 1, 1],
    "nodes_nodeids": [0, 1, 2, 0, 1, 2],
    "nodes_featureids": [0, 0, 0, 1, 0, 0],
    "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF", "BRANCH_GT", "LEAF", "LEAF"],
    "nodes_values": [0.5, 0.0, 0.0, -0.25, 0.0, 0.0],
    "nodes_truenodeids": [1, 0, 0, 1, 0, 0],
    "nodes_falsenodeids": [2, 0, 0, 2, 0, 0],
}
_SAMPLES = np.array([[0.25, -1.0], [0.5, 0.0], [2.0, -0.25], [3.0, 1.0]], "float32")
_LEAVES = ([0, 0, 1, 1], [1, 2, 1, 2])


@operator(
    "TreeEnsembleRegressor",
    since=1,
    domain=DOMAIN,
    host=True,
    infer=_regressor_type,
    cases=[
        Case(
            lambda: [_SAMPLES],
            {
                **_STUMPS,
                **dict(zip(("target_treeids", "target_nodeids"), _LEAVES, strict=True)),
                "target_ids": [0, 0, 0, 0],
                "target_weights": [1.0, 2.0, 10.0, 20.0],
                "n_targets": 1,
                "aggregate_function": how,
            },
            expect=expect,
            label=how,
        )
        for how, expect in (
            ("SUM", lambda _: np.array([[21.0], [11], [22], [12]], "float32")),
            ("AVERAGE", lambda _: np.array([[10.5], [5.5], [11], [6]], "float32")),
            ("MIN", lambda _: np.array([[1.0], [1], [2], [2]], "float32")),
        )
    ],
)
def tree_ensemble_regressor(
    x: Array,
    *,
    aggregate_function: str = "SUM",
    base_values: Sequence[float] | None = None,
    base_values_as_tensor: Array | None = None,
    n_targets: int = 1,
    nodes_falsenodeids: Sequence[int] = (),
    nodes_featureids: Sequence[int] = (),
    nodes_hitrates: Sequence[float] | None = None,
    nodes_hitrates_as_tensor: Array | None = None,
    nodes_missing_value_tracks_true: Sequence[int] = (),
    nodes_modes: Sequence[str] = (),
    nodes_nodeids: Sequence[int] = (),
    nodes_treeids: Sequence[int] = (),
    nodes_truenodeids: Sequence[int] = (),
    nodes_values: Sequence[float] = (),
    nodes_values_as_tensor: Array | None = None,
    post_transform: str = "NONE",
    target_ids: Sequence[int] = (),
    target_nodeids: Sequence[int] = (),
    target_treeids: Sequence[int] = (),
    target_weights: Sequence[float] = (),
    target_weights_as_tensor: Array | None = None,
) -> Array:
    """The sum, mean, minimum or maximum of the reached leaves' weights for every target."""
    attrs = locals()
    forest = _forest(attrs, "target")
    total, _ = forest.aggregated(_numeric(x), n_targets, aggregate_function, np.float32)
    base = _base(attrs)
    return post_transformed(total if base is None else total + base, post_transform)


def _classifier_types(
    x: Tensor,
    *,
    outputs: int = 1,
    classlabels_int64s: Sequence[int] | None = None,
    classlabels_strings: Sequence[str] | None = None,
    **_: Any,
) -> list[TensorType]:
    classes = max(len(classlabels_strings or classlabels_int64s or ()), 2)
    label = TensorType("string" if classlabels_strings else "int64", x.shape[:1])
    return [label, TensorType("float32", (x.shape[0], index(classes)))][:outputs]


@operator(
    "TreeEnsembleClassifier",
    since=1,
    domain=DOMAIN,
    host=True,
    infer=_classifier_types,
    cases=[
        Case(
            lambda: [_SAMPLES],
            {
                **_STUMPS,
                **dict(zip(("class_treeids", "class_nodeids"), _LEAVES, strict=True)),
                "class_ids": [0, 1, 2, 0],
                "class_weights": [0.5, 0.75, 0.25, 1.0],
                "classlabels_int64s": [7, 8, 9],
            },
            outputs=2,
            expect=lambda _: (
                np.array([7, 7, 7, 8]),
                np.array([[1.5, 0, 0], [0.5, 0, 0.25], [1, 0.75, 0], [0, 0.75, 0.25]], "float32"),
            ),
        )
    ],
)
def tree_ensemble_classifier(
    x: Array,
    *,
    outputs: int = 1,
    base_values: Sequence[float] | None = None,
    base_values_as_tensor: Array | None = None,
    class_ids: Sequence[int] = (),
    class_nodeids: Sequence[int] = (),
    class_treeids: Sequence[int] = (),
    class_weights: Sequence[float] = (),
    class_weights_as_tensor: Array | None = None,
    classlabels_int64s: Sequence[int] | None = None,
    classlabels_strings: Sequence[str] | None = None,
    nodes_falsenodeids: Sequence[int] = (),
    nodes_featureids: Sequence[int] = (),
    nodes_hitrates: Sequence[float] | None = None,
    nodes_hitrates_as_tensor: Array | None = None,
    nodes_missing_value_tracks_true: Sequence[int] = (),
    nodes_modes: Sequence[str] = (),
    nodes_nodeids: Sequence[int] = (),
    nodes_treeids: Sequence[int] = (),
    nodes_truenodeids: Sequence[int] = (),
    nodes_values: Sequence[float] = (),
    nodes_values_as_tensor: Array | None = None,
    post_transform: str = "NONE",
) -> tuple[Array, ...]:
    """The class with the largest sum of the reached leaves' weights, and the sums.

    With weights for one class of two only (a binary model) the other class's score follows from it,
    as 1 - score where all weights are probabilities and as -score otherwise (ONNX Runtime's rule).
    """
    attrs = locals()
    labels = classlabels_strings or classlabels_int64s or ()
    ids = set(class_ids)
    forest = _forest(attrs, "class")
    count = max(len(labels), 1)
    scores, _ = forest.aggregated(_numeric(x), count, "SUM", np.float32)
    base = _base(attrs)
    binary = len(ids) == 1 and count <= 2
    if binary:
        column = scores[:, next(iter(ids))] + (0 if base is None else base[-1])
        plain = post_transform in ("NONE", "PROBIT") and bool((forest.weights >= 0).all())
        scores = np.stack([1 - column if plain else -column, column], axis=1)
    elif base is not None:
        scores = scores + base
    scores = post_transformed(scores, post_transform).astype(np.float32)
    chosen = np.argmax(scores, axis=1)
    if len(labels) < 2:
        return (chosen.astype(np.int64), scores)[:outputs]
    return (labels_of(chosen, classlabels_int64s, classlabels_strings), scores)[:outputs]


def _ensemble_type(x: Tensor, *, n_targets: int = 1, **_: Any) -> list[TensorType]:
    return [TensorType(x.dtype, (x.shape[0], index(n_targets)))]


@operator(
    "TreeEnsemble",
    since=5,
    domain=DOMAIN,
    host=True,
    infer=_ensemble_type,
    cases=[
        Case(
            lambda: [_SAMPLES],
            {
                "n_targets": 2,
                "nodes_featureids": [0, 1],
                "nodes_modes": np.array([0, 6], "uint8"),
                "nodes_splits": np.array([1.0, 0.0], "float32"),
                "nodes_truenodeids": [0, 0],
                "nodes_trueleafs": [1, 1],
                "nodes_falsenodeids": [1, 2],
                "nodes_falseleafs": [0, 1],
                "leaf_targetids": [0, 1, 0],
                "leaf_weights": np.array([1.0, 2.0, 4.0], "float32"),
                "membership_values": np.array([-0.25, 5.0, np.nan], "float32"),
                "tree_roots": [0],
            },
            expect=lambda _: np.array([[1, 0], [1, 0], [1, 0], [4, 0]], "float32"),
        )
    ],
)
def tree_ensemble(
    x: Array,
    *,
    aggregate_function: int = 1,
    leaf_targetids: Sequence[int],
    leaf_weights: Array,
    membership_values: Array | None = None,
    n_targets: int = 1,
    nodes_falseleafs: Sequence[int],
    nodes_falsenodeids: Sequence[int],
    nodes_featureids: Sequence[int],
    nodes_hitrates: Array | None = None,
    nodes_missing_value_tracks_true: Sequence[int] | None = None,
    nodes_modes: Array,
    nodes_splits: Array,
    nodes_trueleafs: Sequence[int],
    nodes_truenodeids: Sequence[int],
    post_transform: int = 0,
    tree_roots: Sequence[int],
) -> Array:
    """Version 5: leaves are numbered apart from nodes, one target and weight each."""
    nodes, leaves = len(nodes_modes), len(leaf_targetids)

    def child(ids: Sequence[int], is_leaf: Sequence[int]) -> Array:
        numbers = np.asarray(ids) + np.where(np.asarray(is_leaf) != 0, nodes, 0)
        return np.concatenate([numbers, np.zeros(leaves, np.int64)])

    mode = np.concatenate([np.asarray(nodes_modes, np.int64), np.full(leaves, _LEAF)])
    missing = np.asarray(nodes_missing_value_tracks_true or [0] * nodes)
    # A root whose branches are one leaf stands for a tree that is only that leaf; walking into it
    # gives the same.
    forest = Forest(
        np.concatenate([np.asarray(nodes_featureids), np.zeros(leaves, np.int64)]),
        mode,
        np.concatenate([np.asarray(nodes_splits, np.float64), np.zeros(leaves)]),
        child(nodes_truenodeids, nodes_trueleafs),
        child(nodes_falsenodeids, nodes_falseleafs),
        np.concatenate([missing, np.zeros(leaves)]),
        np.asarray(tree_roots),
        np.concatenate([np.zeros(nodes, np.int64), np.arange(leaves)]),
        np.concatenate([np.zeros(nodes, np.int64), np.arange(leaves) + 1]),
        np.asarray(leaf_targetids),
        np.asarray(leaf_weights, np.float64),
        _members(np.asarray(nodes_modes), membership_values),
    )
    how = _AGGREGATES[aggregate_function]
    total, _ = forest.aggregated(x, n_targets, how, x.dtype)
    return post_transformed(total, _TRANSFORMS[post_transform])


def _members(modes: Array, values: Array | None) -> dict[int, Array]:
    """The sets of the membership nodes; sets end with NaN and follow the nodes' own order."""
    nodes = np.nonzero(modes == _MODES["BRANCH_MEMBER"])[0]
    if len(nodes) == 0:
        return {}
    if values is None:
        raise DefinitionError("membership nodes need membership_values")
    ends = np.nonzero(np.isnan(values))[0]
    starts = np.concatenate([[0], ends[:-1] + 1])
    return {int(n): values[a:b] for n, a, b in zip(nodes, starts, ends, strict=True)}
