"""The README's section of results: a table and plots made from `results/`, never by hand.

`python -m benchmarks readme` writes it between the two marks, and headline.svg and
headline-dark.svg beside the results; with `--check` it only says whether the text is what the
results give. A file that is not there adds nothing; models.json is needed. Folders in `results/`
hold earlier results of other machines, of which the headline is shown.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.readme_limits import folded, read, tables
from onnxjit.bench import against
from onnxjit.bench.machine import describe
from onnxjit.bench.measure import Row, summaries

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
README = Path(__file__).parent.parent / "README.md"
PLOTS = {"light": "headline.svg", "dark": "headline-dark.svg"}
_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "openvino-bf16": "OpenVINO bf16",
          "onnxjit": "onnxjit", "tract": "tract", "iree": "IREE", "tvm": "TVM", "torch": "PyTorch",
          "torch-compiled": "PyTorch compiled"}  # fmt: skip


def main(arguments: Namespace, readme: Path = README) -> None:
    try:
        text = section(arguments.results, readme.parent)
        before, inside, after = parts(readme.read_text(encoding="utf-8"))
    except ValueError as error:  # no results of this format, or no marks
        raise SystemExit(str(error)) from None
    if arguments.check:
        if inside.strip() != text.strip():
            raise SystemExit(f"{readme.name} is not what the results give: run without --check")
        print(f"{readme.name} is up to date")
        return
    from onnxjit.bench.plots import headline_figure

    rows = against.load(arguments.results / "models.json")["rows"]
    for theme, name in PLOTS.items():
        headline_figure(rows, rows[0]["threads"], arguments.results / name, theme)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    print(f"written to {readme}")


def parts(text: str) -> tuple[str, str, str]:
    """What stands before, between and after the marks. Raises ValueError without them."""
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no {BEGIN} and {END}")
    return before, inside, after


def section(results: Path, root: Path) -> str:
    """The text between the marks. Raises ValueError (`ResultError`) without models.json of the
    present format."""
    data = against.load(results / "models.json")
    rows: list[Row] = data["rows"]
    folder = Path(results).resolve().relative_to(Path(root).resolve()).as_posix()
    blocks = [
        _headline(rows),
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" '
        f'srcset="{folder}/{PLOTS["dark"]}">\n'
        f'  <img alt="How many times as fast as its fastest peer onnxjit is, model by model" '
        f'src="{folder}/{PLOTS["light"]}">\n</picture>',
        _every_model(rows),
        _others(results),
        tables(Path(results)),
        _measured(data),
        *(_elsewhere(path) for path in sorted(Path(results).glob("*/models.json"))),
    ]
    return "\n\n".join(block for block in blocks if block)


def _measured(data: Mapping[str, Any]) -> str:
    return "\n".join(["Measured on:", "", *(f"- {line}" for line in describe(data["machine"]))])


def _elsewhere(models: Path) -> str:
    """The headline of an earlier result of another machine, folded."""
    data = against.load(models)
    what = f"Earlier, on another machine: {models.parent.name}"
    blocks = [
        f"<details><summary>{what}</summary>",
        _headline(data["rows"]),
        _measured(data),
        "</details>",
    ]
    return "\n\n".join(blocks)


def _headline(rows: Sequence[Row]) -> str:
    found = summaries(rows)
    lines = ["| threads | compared with | models | geometric mean | as fast or faster | least |",
             "| ---: | --- | ---: | ---: | ---: | --- |"]  # fmt: skip
    order = sorted(found, key=lambda s: (s["threads"], s["peer"] != "fastest"))
    for s in order:
        if s["peer"] == "fastest":
            name, mean = "**the fastest peer of each model**", f"**{s['mean']:.2f}x**"
        else:
            name, mean = _NAMES.get(s["peer"], s["peer"]), f"{s['mean']:.2f}x"
        lines.append(
            f"| {s['threads']} | {name} | {s['models']} | {mean} | {s['faster']} of {s['models']} "
            f"| {s['worst_ratio']:.2f}x `{s['worst']}` |"
        )
    return "\n".join(lines)


def _every_model(rows: Sequence[Row]) -> str:
    """A folded table for each number of threads: least times in ms."""
    blocks = []
    for threads in dict.fromkeys(row["threads"] for row in rows):
        same = [row for row in rows if row["threads"] == threads]
        engines = list(dict.fromkeys(e for r in same for e in [*r["engines"], *r["failures"]]))
        head = ["model", *(_NAMES.get(e, e) for e in engines), "to the fastest peer"]
        table = []
        for row in sorted(same, key=lambda r: -r["ratios"].get("fastest", 0.0)):
            cells = [_cell(row, engine) for engine in engines]
            ratio = f"{row['ratios']['fastest']:.2f}x" if row["fastest"] else "-"
            table.append([f"`{row['model']}`", *cells, ratio])
        count = f"{threads} thread{'s' if threads > 1 else ''}"
        blocks.append(folded(f"Every model, {count}: least time of a run in ms", head, table))
    return "\n\n".join(blocks)


def _cell(row: Row, engine: str) -> str:
    if engine in row["engines"]:
        times = {e: facts["minimum"] for e, facts in row["engines"].items()}
        text = f"{times[engine] * 1e3:.3g}"
        return f"**{text}**" if times[engine] == min(times.values()) else text
    return "differs" if engine in row["disagree"] else "fails"


def _others(results: Path) -> str:
    """Lines for the measurements beside the models' speed that are there."""
    lines = []
    if data := read(results / "overhead.json"):
        for row in data["rows"]:
            times = ", ".join(f"{_NAMES.get(n, f'`{n}`')} {t:.1f} µs"
                              for n, t in row["microseconds"].items())  # fmt: skip
            lines.append(f"- A call of a model of {row['nodes']} tiny nodes: {times}.")
    if data := read(results / "startup.json"):
        rows = [r for r in data["rows"] if r["threads"] == data["rows"][0]["threads"]]
        lines.append(_starts(rows))
    if data := read(results / "memory.json"):
        pairs = [
            [row["engines"][engine] for engine in ("onnxjit", "onnxruntime")]
            for row in data["rows"]
            if "onnxruntime" in row["engines"]
            and all(row["engines"][e]["run"] for e in ("onnxjit", "onnxruntime"))
        ]
        if pairs:
            peak, both, running = (
                sum(taken(own) <= taken(peer) for own, peer in pairs)
                for taken in (
                    lambda facts: facts["peak"],
                    lambda facts: facts["load"] + facts["run"],
                    lambda facts: facts["run"],
                )
            )
            lines.append(
                f"- Memory: a process takes no more than with ONNX Runtime at its peak on "
                f"{peak} of {len(pairs)} models, for loading and running together on {both}, for "
                f"running alone (ONNX Runtime runs in what loading has left) on {running}."
            )
    if data := read(results / "shapes.json"):
        lines.append(
            f"- A shape not seen before costs {data['summary']['median'] * 1e3:.2f} ms beyond the "
            f"run itself (`{data['rows'][0]['model']}`, median)."
        )
    return "\n".join(lines)


def _starts(rows: list[dict[str, Any]]) -> str:
    """From process start to the first output: of one model, or the range over several."""
    kinds = [kind for kind in rows[0]["kinds"] if all(kind in r["kinds"] for r in rows)]
    parts = []
    for kind in kinds:
        seconds = {r["model"]: r["kinds"][kind]["seconds"] for r in rows}
        slowest = max(seconds, key=lambda m: seconds[m])
        times = f"{seconds[slowest]:.2f} s"
        if len(rows) > 1:
            times = f"{min(seconds.values()):.2f} to {times} (`{slowest}`)"
        parts.append(f"{_STARTS.get(kind, _NAMES.get(kind, kind))} {times}")
    which = f"`{rows[0]['model']}`" if len(rows) == 1 else f"{len(rows)} models"
    return f"- Process start to first output, {which}: {', '.join(parts)}."


_STARTS = {"cold": "onnxjit with an empty cache", "warm": "onnxjit with a full one",
           "numpy": "NumPy alone"}  # fmt: skip
