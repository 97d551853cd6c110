"""What the compiled and the interpreted form of the kernel dialect share; imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass

DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64",
    "uint8", "uint16", "uint32", "uint64", "bool",
)  # fmt: skip

GEMM_SIZE = re.compile(r"_(?:1to)?(?P<mr>\d+)x(?P<nr>\d+)_")
"""Rows and columns in the symbol of a GEMM tile."""

PACK_SYMBOL = re.compile(r"pack_f32_(?P<nr>[1-9]\d*)_[a-z0-9]+")
WINOGRAD_SYMBOL = re.compile(r"winograd_(?P<direction>in|out)_f32_(?P<m>[24])_(?P<isa>[a-z0-9]+)")
WINDOW_SYMBOL = re.compile(
    r"(?P<kind>depthwise|sumpool|maxpool)_f32_(?:(?P<t>[1-9]\d*)x(?P<kw>[1-9]\d*)"
    r"s(?P<stride>[1-9]\d*)d(?P<dilation>[1-9]\d*)|border)_(?P<isa>[a-z0-9]+)"
)


@dataclass(frozen=True, slots=True)
class Family:
    """Micro-kernels whose symbols match `pattern` take `parameters`; the first row that matches.

    A parameter is "int64" or "DTYPE@" (a buffer and an element index, passed as one pointer). The C
    function gets pointers and int64 in this order, returns void.
    """

    name: str
    pattern: re.Pattern[str]
    parameters: tuple[str, ...]


_GEMM = (
    "float32@", "int64", "int64@", "int64", "int64", "float32@", "float32@", "int64", "int64",
    "float32@",
)  # fmt: skip

FAMILIES: tuple[Family, ...] = (
    Family("gemm_rows", re.compile(r"gemm_[a-z0-9]+_1to[1-9]\d*x[1-9]\d*_[a-z0-9]+"),
           (*_GEMM, "int64")),
    Family("gemm", re.compile(r"gemm_[a-z0-9]+_[1-9]\d*x[1-9]\d*_[a-z0-9]+"), _GEMM),
    Family(
        "softmax",
        re.compile(r"softmax_f32_[a-z0-9]+"),
        (
            "float32@", "int64", "float32@", "int64", "int64", "int64", "float32@", "float32@",
        ),
    ),
    Family(
        "winograd_in",
        re.compile(r"winograd_in_f32_[24]_[a-z0-9]+"),
        ("float32@", "float32@", "int64", "int64", "float32@", *["int64"] * 4),
    ),
    Family(
        "winograd_out",
        re.compile(r"winograd_out_f32_[24]_[a-z0-9]+"),
        ("float32@", "float32@", "int64", "int64"),
    ),
    Family("pack", PACK_SYMBOL, ("float32@", "int64", "int64", "int64", "float32@", "int64")),
    Family(
        "window",
        WINDOW_SYMBOL,
        (
            "float32@", "int64", "int64", "int64", "float32@", "int64", "int64", "int64",
            "float32@", "int64", "int64", "int64", "int64",
        ),
    ),
)  # fmt: skip


CALLABLE = re.compile(rf"\b(?:{'|'.join(f.pattern.pattern for f in FAMILIES)})\b")
"""The symbol of a micro-kernel in the text of a source."""


def places_of_calls(text: str) -> dict[str, str]:
    """The micro-kernels that a source names, in order, and what stands for each in sources that
    call others in their places: its family and its number."""
    called = dict.fromkeys(found[0] for found in CALLABLE.finditer(text))
    return {symbol: f"{family_of(symbol).name}.{n}" for n, symbol in enumerate(called)}


_LINKED = 48


def linked(symbol: str) -> str:
    """The name of a micro-kernel in object files. All are equally long, so that an object file can
    be made to call another one without a linker (`Builder`)."""
    assert len(symbol) <= _LINKED
    return symbol.ljust(_LINKED, "_")


def family_of(symbol: str) -> Family:
    """The table row of a micro-kernel symbol. Raises ValueError if no row matches."""
    for family in FAMILIES:
        if family.pattern.fullmatch(symbol):
            return family
    raise ValueError(f"no micro-kernel family for symbol {symbol!r}")
