"""Named tuples for the outputs of a model, made without generating source."""

from __future__ import annotations

import functools
import keyword
import re
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

_RESERVED = frozenset(dir(tuple)) | {"_fields", "_asdict"}


class Outputs(tuple[Any, ...]):
    """A tuple whose items are attributes too; `_fields` are their names, as in a namedtuple."""

    __slots__ = ()
    _fields: tuple[str, ...] = ()

    def _asdict(self) -> dict[str, Any]:
        """The items by name."""
        return dict(zip(self._fields, self, strict=True))

    def __repr__(self) -> str:
        return f"Outputs({', '.join(f'{k}={v!r}' for k, v in self._asdict().items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._fields, tuple(self))


@functools.lru_cache(maxsize=256)
def output_type(fields: tuple[str, ...]) -> type[Outputs]:
    """The class for outputs of these names; made once, so that equal models share it."""
    body: dict[str, Any] = {"__slots__": (), "_fields": fields}
    body.update((name, property(itemgetter(i))) for i, name in enumerate(fields))
    return type("Outputs", (Outputs,), body)


def field_names(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct identifiers that look like `names`: "a/b:0" becomes a_b_0."""
    made: dict[str, None] = {}
    for n, name in enumerate(names):
        text = re.sub(r"[^0-9A-Za-z]+", "_", name).strip("_") or f"output_{n}"
        if text[0].isdigit():
            text = f"output_{text}"
        if keyword.iskeyword(text) or text in _RESERVED:
            text += "_"
        base, number = text, 1
        while text in made:
            number += 1
            text = f"{base}_{number}"
        made[text] = None
    return tuple(made)


def _again(fields: tuple[str, ...], values: Sequence[Any]) -> Outputs:
    return output_type(fields)(values)
