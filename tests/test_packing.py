"""Packing of constant operands, against element-by-element copies."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxjit.codegen.packing import Packed, Packing, arranged, flattened, pack


def packed_slowly(flat: np.ndarray, p: Packing) -> np.ndarray:
    """[outer..., panels, k, nr] by its definition; columns past the last are zero."""
    out = np.zeros(p.elements, flat.dtype)
    at = 0
    inner = [range(e) for e, _ in p.inner]
    for o in itertools.product(*(range(e) for e, _ in p.outer)):
        base = p.offset + sum(i * s for i, (_, s) in zip(o, p.outer, strict=True))
        for panel in range(p.panels):
            for k in itertools.product(*inner):
                row = base + sum(i * s for i, (_, s) in zip(k, p.inner, strict=True))
                for j in range(p.nr):
                    column = panel * p.nr + j
                    if column < p.column[0]:
                        out[at] = flat[row + column * p.column[1]]
                    at += 1
    assert at == p.elements
    return out


@st.composite
def packings(draw: st.DrawFn) -> tuple[np.ndarray, Packing]:
    """A packing of an array whose axes take the roles of outer, column and k in any order."""
    outer, inner = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    roles = draw(st.permutations(["o"] * outer + ["n"] + ["k"] * inner))
    shape = [draw(st.integers(1, 40 if r == "n" else 5)) for r in roles]
    source = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    steps = [s // 4 for s in source.strides]
    pairs = {r: [(e, s) for q, e, s in zip(roles, shape, steps, strict=True) if q == r]
             for r in "onk"}  # fmt: skip
    # A slice of the column axis, as for one of several products of a joint weight.
    (columns, step) = pairs["n"][0]
    first = draw(st.integers(0, columns - 1))
    nr = draw(st.sampled_from([1, 4, 16, 32, 48]))
    column = columns - first, step
    return source, Packing("w", first * step, tuple(pairs["o"]), column, tuple(pairs["k"]), nr)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(packings())
def test_panels_hold_neighbouring_columns(case: tuple[np.ndarray, Packing]) -> None:
    source, p = case
    want = packed_slowly(source.reshape(-1), p)
    got = pack(source, p)
    assert got.shape == (p.elements,) and got.flags.c_contiguous
    np.testing.assert_array_equal(got, want)
    out = np.full(p.elements, np.nan, np.float32)
    assert Packed(source, p).array(out) is out
    np.testing.assert_array_equal(out, want)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(packings(), st.integers(1, 4000))
def test_pieces_make_the_whole(case: tuple[np.ndarray, Packing], nbytes: int) -> None:
    """Also those that end inside a group; the next one is made elsewhere."""
    packed = Packed(*case)
    found = []
    for piece in packed.pieces(nbytes):
        found.append(piece.copy())
        time.sleep(1e-4)
        np.testing.assert_array_equal(piece, found[-1])
    np.testing.assert_array_equal(
        np.concatenate(found), packed_slowly(case[0].reshape(-1), case[1])
    )
    assert all(x.nbytes <= max(nbytes, packed.nbytes // packed.panels) for x in found)
    assert (packed.nbytes, packed.dtype) == (sum(x.nbytes for x in found), case[0].dtype)


def test_pieces_of_filters_make_the_whole() -> None:
    w = np.random.default_rng(1).standard_normal((37, 5, 3, 3)).astype(np.float32)
    g = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
    p = Packing("w", 0, (), (37, 45), ((5, 9), (3, 3), (3, 1)), 8, g)
    for nbytes in (1, 6000, 1 << 20):
        made = np.concatenate([x.copy() for x in Packed(w, p).pieces(nbytes)])
        np.testing.assert_array_equal(made, pack(w, p))


def test_what_fails_while_packing_is_raised_to_the_reader() -> None:
    packed = Packed(np.zeros((64, 64), np.float32), Packing("w", 0, (), (64, 1), ((64, 64),), 8))
    packed._view = packed._view[:, :3]
    with pytest.raises(ValueError, match=r"broadcast|reshape"):
        list(packed.pieces(16))


def test_a_reader_may_stop_early() -> None:
    packed = Packed(np.ones((64, 64), np.float32), Packing("w", 0, (), (64, 1), ((64, 64),), 8))
    pieces = packed.pieces(16)
    assert next(pieces)[0] == 1
    pieces.close()


def test_every_element_of_a_product_is_found_again() -> None:
    w = np.random.default_rng(0).standard_normal((21, 37)).astype(np.float32)
    p = Packing("w", 0, (), (37, 1), ((21, 37),), 16)
    panels = pack(w, p).reshape(p.panels, p.depth, p.nr)
    assert (p.panels, p.depth) == (3, 21)
    np.testing.assert_array_equal(np.hstack(list(panels))[:, :37], w)
    assert not panels[2, :, 5:].any()


@pytest.mark.parametrize("shape", [(7, 5), (1, 9)])
def test_a_repeated_element_needs_no_copy_of_the_source(shape: tuple[int, int]) -> None:
    """Initializers of one repeated value are views with stride 0."""
    w = np.broadcast_to(np.float32(2.5), shape)
    assert flattened(w).strides == (0,)
    p = Packing("w", 0, (), (shape[1], 1), ((shape[0], shape[1]),), 4)
    np.testing.assert_array_equal(pack(w, p), pack(np.ascontiguousarray(w), p))


def test_arranged_gives_the_physical_order() -> None:
    x = np.arange(24).reshape(2, 3, 4)
    assert arranged(x, None) is x
    turned = arranged(x, (2, 0, 1))
    assert turned.shape == (4, 2, 3) and turned.flags.c_contiguous
    np.testing.assert_array_equal(turned, x.transpose(2, 0, 1))
    # Element [i, j, k] lies at the offset that `strides` of this order gives.
    assert turned.reshape(-1)[3 * 6 + 1 * 3 + 2] == x[1, 2, 3]
