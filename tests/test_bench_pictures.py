"""The page, the plots and the trace of a result."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from bench_data import result, row, table

from onnxjit.bench.page import page
from onnxjit.bench.trace import trace


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


def test_page_holds_its_data_and_nothing_from_outside() -> None:
    text = page(result())
    elements = Elements(text)
    for tag, attributes in elements.tags:
        assert tag not in ("link", "img", "iframe")
        assert not {"src", "href"} & attributes.keys()
    urls = set(re.findall(r"\w+://[^\s\"'`]+", text))
    assert urls == {"http://www.w3.org/2000/svg"}  # a name space, which nothing loads
    assert "@import" not in text and "url(" not in text
    assert json.loads(elements.scripts[0]) == json.loads(json.dumps(result()))
    ids = {attributes["id"] for _, attributes in elements.tags if "id" in attributes}
    for wanted in re.findall(r'\$\("([\w-]+)"\)', elements.scripts[1]):
        assert wanted in ids
    assert {"engines", "roofline", "timeline", "kernels", "limits", "machine"} <= ids


def test_names_of_the_model_are_no_markup() -> None:
    data = result()
    name = "</script><script>alert(1)</script><!--"
    data["rows"][0]["model"] = name
    data["kernels"]["rows"][0]["origin"] = [name]
    data["rows"][0]["engines"]["openvino"]["difference"] = math.inf
    elements = Elements(page(data))
    assert len(elements.scripts) == 2
    shown = json.loads(elements.scripts[0])
    assert shown["rows"][0]["model"] == name
    assert shown["rows"][0]["engines"]["openvino"]["difference"] is None
    assert "innerHTML" not in elements.scripts[1] and "document.write" not in elements.scripts[1]


def test_trace_has_a_bar_for_each_thread_of_a_step() -> None:
    data = json.loads(json.dumps(trace(table(), "small")))
    bars = [e for e in data["traceEvents"] if e["ph"] == "X"]
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in bars] == [
        ("first", 0, 0.0, pytest.approx(2000)),
        ("first", 1, 0.0, pytest.approx(1000)),
        ("second", 1, pytest.approx(2000), pytest.approx(2000)),
    ]
    assert bars[0]["args"]["nodes"] == "MatMul 'a'" and bars[0]["args"]["limit"] == "compute"
    names = {e["tid"]: e["args"]["name"] for e in data["traceEvents"] if e["name"] == "thread_name"}
    assert names == {0: "calling thread", 1: "worker 1"}


def test_plots_of_a_model(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from onnxjit.bench.plots import model_figure

    path = tmp_path / "plots.png"
    model_figure(result(), path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def headline(folder: Path, name: str, rows: list[dict[str, Any]], theme: str) -> str:
    from onnxjit.bench.plots import headline_figure

    headline_figure(rows, 1, folder / name, theme)
    return (folder / name).read_text()


def test_headline_plot_depends_on_the_data_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("a", 1, 1.0, onnxruntime=2.0, openvino=1.5), row("b", 1, 1.0, onnxruntime=0.8)]
    first = headline(tmp_path, "1.svg", [*rows, row("c", 2, 1.0, onnxruntime=9.0)], "light")
    assert headline(tmp_path, "2.svg", rows, "light") == first
    assert headline(tmp_path, "3.svg", rows, "dark") != first
    with pytest.raises(ValueError, match="no rows with a peer"):
        headline(tmp_path, "4.svg", [row("a", 1, 1.0)], "light")
