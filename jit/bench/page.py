"""One self-contained page of a result: `page.html`, its style, its script and the data."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from onnxjit import plain_json


def page(data: dict[str, Any]) -> str:
    """HTML text of a result (what `onnxjit bench --json` prints). It refers to nothing outside, and
    names that come from the model are text in it, never markup."""
    folder = files("onnxjit.bench")
    text = (folder / "page.html").read_text(encoding="utf-8")
    # "<" would let a name end the script element that the data stands in.
    plain = plain_json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    for mark, content in (
        ("/*STYLE*/", (folder / "page.css").read_text(encoding="utf-8")),
        ("/*SCRIPT*/", (folder / "page.js").read_text(encoding="utf-8")),
        ("/*DATA*/", plain),
    ):
        before, found, after = text.partition(mark)
        if not found:
            raise ValueError(f"page.html has no {mark}")
        text = before + content + after
    return text
