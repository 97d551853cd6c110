"""Variants of schedules: every option that a rule offers computes the same, at odd sizes too.

Buffers lie between guard bands, scratch memory starts as NaN and tiles run in random order
(`kernels_support`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import pytest
from kernels_support import Layouts, check_kernel, define, lab, lower_model, model
from onnx import helper
from test_winograd import LAST, F, kernel

from onnxjit.codegen.emit_cpu import emit
from onnxjit.codegen.expr import apply, index
from onnxjit.codegen.kernel import Kernel
from onnxjit.codegen.schedule import Request, Variant, schedule
from onnxjit.codegen.tensor import Tensor, elementwise, materialize, pad_with, reduce_over

RANDOM = 4
"""Variants of several choices at once, for each kernel."""


@dataclass(frozen=True)
class Case:
    kernel: Kernel
    rule: str
    sizes: Sequence[dict[str, int]] = ({},)
    layouts: Layouts = field(default_factory=dict)
    constants: tuple[str, ...] = ("w",)

    def request(self, variant: Variant) -> Request:
        constants = frozenset(self.constants)
        return Request(self.kernel, self.layouts, lab().target, constants, variant)

    def distinct(self) -> list[Variant]:
        """Variants with sources of their own: all of one choice, their neighbours, and some that
        take several options at random."""
        rng = random.Random(0)
        texts: dict[str, Variant] = {}
        options: dict[str, tuple[int, ...]] = {}

        def tried(variant: Variant) -> Request:
            r = self.request(variant)
            texts.setdefault(emit(schedule(r)), variant)
            options.update(r.offered)
            return r

        for variant in tried({}).neighbours():
            if variant.keys() <= {"filtering"}:
                for further in tried(variant).neighbours():
                    tried(further)
            else:
                tried(variant)
        for _ in range(RANDOM):
            tried({name: rng.choice(offered) for name, offered in options.items()})
        return list(texts.values())


def product(m: int | str, n: int, depth: int) -> Kernel:
    def body(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = reduce_over(
            "sum", (x.shape[0], index(n)), (index(depth),),
            lambda i, k: apply("mul", x.at(i[0], k[0]), w.at(k[0], i[1])),
        )  # fmt: skip
        return elementwise("add", y, b)

    return define(body, {"x": (F, (m, depth)), "w": (F, (depth, n)), "b": (F, (n,))})


def window(c: int, n: int, side: int | str, taps: int, step: int) -> Kernel:
    """A padded convolution that minimal filtering does not take."""

    def body(x: Tensor, w: Tensor) -> Tensor:
        half = taps // 2
        source = materialize(pad_with(x, (0, 0, half, half), (0, 0, half, half), 0.0), "pad")
        high, wide = ((d + (step - 1)) // step for d in x.shape[2:])
        y = reduce_over(
            "sum", (x.shape[0], index(n), high, wide), (index(c), index(taps), index(taps)),
            lambda i, k: apply(
                "mul",
                source.at(i[0], k[0], i[2] * step + k[1], i[3] * step + k[2]),
                w.at(i[1], k[0], k[1], k[2]),
            ),
        )  # fmt: skip
        return elementwise(lambda v: apply("max", v, 0.0), y)

    return define(body, {"x": (F, (1, c, side, side)), "w": (F, (n, c, taps, taps))})


def lowered(rule: str, shapes: dict[str, Sequence[int]], *nodes: onnx.NodeProto) -> Case:
    """The kernel that a rule takes of a model whose inputs are x, y, z and whose weights are w…"""
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items() if n[0] == "w"}
    inputs = {n: (F, s) for n, s in shapes.items() if n[0] != "w"}
    low = lower_model(model(nodes, inputs, [nodes[-1].output[0]], weights))
    (kernel,) = [k for k, r in zip(low.kernels, low.rules, strict=True) if r == rule]
    layouts = {b: x for b, x in low.program.layouts.items() if b in kernel.types}
    constants = tuple(b for b in kernel.inputs if b in low.program.constants)
    return Case(kernel, rule, layouts=layouts, constants=constants)


def attention() -> Case:
    node = helper.make_node
    shapes = {"x": (2, 300, 24), "y": (2, 24, 430), "z": (2, 430, 24)}
    return lowered(
        "attention", shapes, node("MatMul", ["x", "y"], ["s"]), node("Softmax", ["s"], ["p"]),
        node("MatMul", ["p", "z"], ["o"]),
    )  # fmt: skip


def depthwise() -> Case:
    """Between convolutions that have their channels last."""
    node = helper.make_node
    shapes = {
        "x": (1, 24, 13, 19),
        "w": (200, 24, 1, 1),
        "w1": (200, 1, 5, 5),
        "w2": (24, 200, 1, 1),
    }
    return lowered(
        "depthwise", shapes, node("Conv", ["x", "w"], ["t"]),
        node("Conv", ["t", "w1"], ["u"], group=200, pads=[2, 2, 2, 2]),
        node("Conv", ["u", "w2"], ["o"]),
    )  # fmt: skip


IMAGE = {"x": LAST, "y0": LAST}
CASES = {
    "product": Case(product(61, 83, 517), "contraction"),
    "deep product": Case(product(100, 70, 1100), "contraction"),
    "conflicting rows": Case(product(57, 130, 1024), "contraction"),
    "free rows": Case(
        product("m", 83, 129), "contraction", [{"m": n} for n in (0, 1, 13, 14, 15, 61, 331)]
    ),
    "window": Case(window(19, 37, 23, 5, 2), "contraction: window", layouts=IMAGE),
    "free window": Case(
        window(7, 18, "s", 3, 2), "contraction: window", [{"s": n} for n in (0, 1, 2, 7, 40)], IMAGE
    ),
    "attention": attention(),
    "depthwise": depthwise(),
    "correlation": Case(kernel((1, 32, 29, 31), 70), "winograd", layouts=IMAGE),
    "free correlation": Case(
        kernel(("b", 32, "h", "w"), 35), "winograd",
        [{"b": b, "h": h, "w": w} for b, h, w in ((0, 3, 3), (1, 1, 7), (2, 13, 60))], IMAGE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_option_computes_the_same(name: str) -> None:
    case = CASES[name]
    variants = case.distinct()
    assert len(variants) > 2
    rules = set()
    for variant in variants:
        compiled = check_kernel(
            case.kernel, *case.sizes, layouts=case.layouts, constants=case.constants,
            rule=lambda r, v=variant: schedule(replace(r, variant=v)),
        )  # fmt: skip
        rules.add(compiled.nest.rule)
    assert case.rule in rules
    assert case.rule != "winograd" or "contraction: window" in rules


def test_a_variant_takes_effect_and_unknown_values_do_not() -> None:
    case = CASES["product"]
    usual = emit(schedule(case.request({})))
    for variant in ({"tile_rows": 1000}, {"tile_columns": -1}, {"no_such": 3}, {"strip_kb": 0}):
        assert emit(schedule(case.request(variant))) == usual
    r = case.request({})
    schedule(r)
    narrow = min(r.offered["tile_columns"])
    text = emit(schedule(case.request({"tile_columns": narrow})))
    assert text != usual
    assert f"x{narrow}_" in text


def test_neighbours_differ_in_one_choice() -> None:
    r = CASES["correlation"].request({"filtering": 0, "strip_tiles": 6, "gone": 7})
    schedule(r)
    taken = {"filtering": 0, "strip_tiles": 6}
    found = r.neighbours()
    assert {"strip_tiles": 6} in found  # filtering as the cost model says
    assert {"filtering": 0} in found
    for variant in found:
        assert sum(variant.get(n) != taken.get(n) for n in {*variant, *taken}) == 1
    assert len({tuple(sorted(v.items())) for v in found}) == len(found)


def test_the_direct_convolution_is_an_option_of_each_correlation() -> None:
    for side in (29, 7):
        r = replace(CASES["correlation"].request({}), kernel=kernel((1, 32, side, side), 64))
        nest = schedule(r)
        other = 0 if nest.rule == "winograd" else 4
        again = schedule(replace(r, variant={"filtering": other}, offered={}))
        assert (nest.rule == "winograd") != (again.rule == "winograd")


def test_options_are_few() -> None:
    """The tuner builds each of them."""
    for case in CASES.values():
        r = case.request({})
        schedule(r)
        assert 0 < len(r.neighbours()) <= 32, r.offered
        assert all(isinstance(v, int | np.integer) for o in r.offered.values() for v in o)
