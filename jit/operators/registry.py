"""The operator table: one decorated definition per operator and version, with its test cases.

A definition takes tensors (None for an omitted optional input) positionally and attributes by
keyword, as the ONNX schema names them, and returns one tensor or a tuple. The keyword arguments
`outputs` (how many outputs the node has) and `version` (the since_version that the model's opset
selects) are passed to definitions that declare them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxjit.codegen.kernel import TensorType
from onnxjit.graph import Node

Definition = Callable[..., Any]
Inference = Callable[..., Any]
Known = TensorType | np.ndarray | None
"""An input: its data where it is a constant, its type elsewhere, None where it is left out."""
Expansion = tuple[list[Node], dict[str, np.ndarray]]
"""Nodes in order, and constants that they read."""
Expand = Callable[[Node, Sequence[Known], str], Expansion | None]
"""Of a node, its inputs, and how names of values between the new nodes begin."""


@dataclass(frozen=True, slots=True)
class Case:
    """One test of an operator: input arrays (None = omitted) made by `inputs()`, and attributes.

    Sizes of at least 2 are also tried as symbolic ones (equal sizes share a symbol) unless
    `symbolic` is False; `fixed` lists sizes that stay constants. `bench` marks the case that the
    benchmark tables use. `version` asks for one schema version; otherwise the row's newest is used.
    `tolerance` replaces the usual one of the dtype. `expect` computes the outputs from the inputs
    where the ONNX reference lacks or breaks the case.
    """

    inputs: Callable[[], Sequence[Any]]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    bench: bool = False
    label: str = ""
    symbolic: bool = True
    fixed: tuple[int, ...] = ()
    version: int | None = None
    tolerance: float | None = None
    expect: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True)
class Operator:
    """`since`..`until` are the schema versions this definition covers (until = None: newest).

    A `host` operator's `define` computes NumPy arrays; its `infer` gives the types of its outputs
    from tensors and attributes, with None for a size that depends on data. `expand` gives nodes
    that compute the same faster than one kernel could, where there are such.
    """

    name: str
    domain: str
    since: int
    until: int | None
    define: Definition
    cases: tuple[Case, ...]
    keywords: frozenset[str]
    variadic: bool
    host: bool = False
    infer: Inference | None = None
    expand: Expand | None = None


_TABLE: dict[tuple[str, str], list[Operator]] = {}


def operator(
    name: str,
    *,
    since: int,
    until: int | None = None,
    domain: str = "",
    cases: Sequence[Case] = (),
    host: bool = False,
    infer: Inference | None = None,
    expand: Expand | None = None,
) -> Callable[[Definition], Definition]:
    """Registers a definition. `host=True`: the function computes NumPy arrays at run time instead
    (for operators whose output shapes depend on data, or that are no function of an index); reports
    name such steps. `infer(*tensors, **attrs)` then returns one `TensorType` per output, in whose
    shape None stands for a size that is known only after the call."""
    if host and infer is None:
        raise TypeError(f"host operator {name} needs an `infer` function")

    def add(define: Definition) -> Definition:
        params = inspect.signature(define).parameters.values()
        keywords = frozenset(p.name for p in params if p.kind is p.KEYWORD_ONLY)
        variadic = any(p.kind is p.VAR_KEYWORD for p in params)
        row = Operator(
            name,
            domain,
            since,
            until,
            define,
            tuple(cases),
            keywords,
            variadic,
            host,
            infer,
            expand,
        )
        rows = _TABLE.setdefault((domain, name), [])
        for other in rows:
            if (until is None or other.since <= until) and (
                other.until is None or since <= other.until
            ):
                raise ValueError(f"{name} version {max(since, other.since)} is defined twice")
        rows.append(row)
        rows.sort(key=lambda o: o.since)
        return define

    return add


def find(domain: str, name: str, version: int) -> Operator | None:
    """The definition for a schema version: the highest `since` that is not above it."""
    best = None
    for row in _TABLE.get((domain, name), ()):
        if row.since <= version and (row.until is None or version <= row.until):
            best = row
    return best


def table() -> list[Operator]:
    """Every registered definition, sorted by domain, name and version."""
    return [o for key in sorted(_TABLE) for o in _TABLE[key]]


def keyword_arguments(
    op: Operator, attrs: Mapping[str, Any], outputs: int, version: int
) -> dict[str, Any]:
    """The keyword arguments for a call of `op.define` or `op.infer` (which declare the same ones);
    unknown attributes raise TypeError."""
    args = dict(attrs)
    args.pop("consumed_inputs", None)  # a memory hint of opset 1 without meaning
    if "outputs" in op.keywords:
        args["outputs"] = outputs
    if "version" in op.keywords:
        args["version"] = version
    unknown = sorted(set(args) - op.keywords)
    if unknown and not op.variadic:
        raise TypeError(f"attribute {unknown[0]!r} is not defined for {op.name} version {version}")
    return args
