"""Einstein summation."""

from __future__ import annotations

import re
from functools import reduce

from onnxjit.codegen import tensor as T
from onnxjit.codegen.expr import ONE, Expr, cast, index
from onnxjit.codegen.tensor import NARROW, DefinitionError, Tensor, broadcast_dim, cast_to
from onnxjit.operators.registry import Case, operator
from onnxjit.operators.samples import FLOATS, draw

Term = list[str | int]  # letters, and the axes of the ellipsis as numbers counted from its end


def _term(text: str, rank: int) -> Term:
    left, dots, right = text.partition("...")
    letters = [*left, *right]
    if not all(c.isascii() and c.isalpha() for c in letters):
        raise DefinitionError("Einsum: a term may hold letters and one ellipsis")
    spread = rank - len(letters)
    if spread < 0 or (spread and not dots):
        raise DefinitionError(f"Einsum: a term of {len(letters)} letters for rank {rank}")
    return [*left, *range(-spread, 0), *right]


def parse(equation: str, ranks: list[int]) -> tuple[list[Term], Term]:
    """The axes of every operand and of the result. Without "->" the result has the ellipsis and
    then, sorted, the letters that occur once."""
    inputs, arrow, output = re.sub(r"\s+", "", equation).partition("->")
    texts = inputs.split(",")
    if len(texts) != len(ranks):
        raise DefinitionError(f"Einsum: {len(texts)} terms for {len(ranks)} operands")
    terms = [_term(t, r) for t, r in zip(texts, ranks, strict=True)]
    spread = max((sum(isinstance(a, int) for a in t) for t in terms), default=0)
    if not arrow:
        every = [a for t in terms for a in t if isinstance(a, str)]
        return terms, [*range(-spread, 0), *sorted(a for a in every if every.count(a) == 1)]
    letters = len(output.replace("...", ""))
    return terms, _term(output, letters + (spread if "..." in output else 0))


@operator("Einsum", since=12, cases=[
    *(Case(draw(f"{d}[3,5]", f"{d}[5,7]"), {"equation": "ij,jk->ik"}) for d in FLOATS),
    Case(draw("float32[3,5]"), {"equation": "ij->ji"}),
    Case(draw("float32[3,5]"), {"equation": "ij->i"}),
    Case(draw("float32[5,5]"), {"equation": "ii->i"}),
    Case(draw("float32[2,3,5,5]"), {"equation": "...ii->...i"}),
    Case(draw("float32[2,3,5]", "float32[2,5,7]"), {"equation": "bij, bjk"}),
    Case(draw("float32[2,3,5]", "float32[2,5,7]"), {"equation": "...ij,...jk->...ik"}),
    Case(draw("int32[3]", "int32[5]"), {"equation": "i,j->ij"}),
    Case(draw("float32[3,5]"), {"equation": "ij->"}),
    Case(draw("float32[3,0]", "float32[0,7]"), {"equation": "ij,jk->ik"}),
])  # fmt: skip
def einsum(*xs: Tensor, equation: str) -> Tensor:
    """The sum, over all axes that the result lacks, of the product of the operands."""
    terms, result = parse(equation, [x.rank for x in xs])
    sizes: dict[str | int, Expr] = {}
    for x, term in zip(xs, terms, strict=True):
        for a, d in zip(term, x.shape, strict=True):
            sizes[a] = broadcast_dim(sizes.get(a, ONE), d)
    missing = [a for a in result if a not in sizes]
    if missing or len(set(result)) != len(result):
        raise DefinitionError("Einsum: the result's term repeats a letter or has a new one")
    summed = [a for a in sizes if a not in result]
    dtype = xs[0].dtype
    wide = "float32" if dtype in NARROW else dtype

    def body(idx: tuple[Expr, ...], red: tuple[Expr, ...]) -> Expr:
        place = {**dict(zip(result, idx, strict=True)), **dict(zip(summed, red, strict=True))}

        def read(x: Tensor, term: Term) -> Expr:
            where = [index(0) if d is ONE else place[a] for a, d in zip(term, x.shape, strict=True)]
            return cast(x.at(*where), wide)

        return reduce(lambda a, b: a * b, map(read, xs, terms))

    shape = [sizes[a] for a in result]
    if not summed:
        return Tensor(shape, dtype, lambda idx: cast(body(idx, ()), dtype))
    return cast_to(T.reduce_over("sum", shape, [sizes[a] for a in summed], body), dtype)
