"""Plots of results with matplotlib: of one model, and of many models against their peers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnxjit.bench.measure import Row

# Told apart with the common kinds of colour blindness; the same as in the page.
COLOURS = {
    "compute": "#2f6bd8", "L1": "#1d8a99", "L2": "#3b9b4f", "L3": "#c98a00", "memory": "#d2542c",
    "overhead": "#8a8f9c", "host": "#8e4ec6",
}  # fmt: skip
_OWN, _PEER = "#2f6bd8", "#8a8f9c"
_THEMES = {
    "light": {"ink": "#1b1f27", "soft": "#5b6472", "line": "#d9dce2", "back": "#ffffff"},
    "dark": {"ink": "#e8eaee", "soft": "#9aa3b2", "line": "#363b46", "back": "#14161b"},
}
Theme = dict[str, str]


def model_figure(data: dict[str, Any], path: Path) -> None:
    """Engines, roofline and timeline of one model (a result of `onnxjit bench`) as a PNG."""
    row = data["rows"][0]
    theme = _THEMES["light"]
    figure = _figure(10, 10.5, theme)
    grid = figure.add_gridspec(3, 1, height_ratios=[1.0, 2.7, 0.9])
    engines, roof, line = (figure.add_subplot(grid[i]) for i in range(3))
    figure.suptitle(_title(row), fontsize=13, color=theme["ink"])
    _engines(engines, row, theme)
    slanted = _roofline(roof, data["kernels"]["rows"], data["roofline"], theme)
    _timeline(line, data["kernels"], theme)
    figure.canvas.draw()  # only now the shape of the axes, and so the slope of a line, is known
    for text in slanted:
        x, y = text.get_position()
        (x0, y0), (x1, y1) = roof.transData.transform([(x, y), (2 * x, 2 * y)])
        text.set_rotation(math.degrees(math.atan2(y1 - y0, x1 - x0)))
    _save(figure, path)


def headline_figure(rows: Sequence[Row], threads: int, path: Path, theme: str = "light") -> None:
    """How many times as fast as its fastest peer onnxjit is on each model, best first, and every
    other peer as a dot; rows of one number of threads. PNG or SVG by the suffix of `path`."""
    colours = _THEMES[theme]
    shown = sorted(
        (r for r in rows if r["threads"] == threads and r["fastest"]),
        key=lambda r: r["ratios"]["fastest"],
    )
    if not shown:
        raise ValueError(f"no rows with a peer for {threads} thread(s)")
    figure = _figure(9, 1.3 + 0.27 * len(shown), colours)
    axes = figure.add_subplot()
    ratios = [row["ratios"]["fastest"] for row in shown]
    limit = max(2.0, 1.1 * max(ratios))
    places = range(len(shown))
    tints = [_OWN if ratio >= 1 else COLOURS["memory"] for ratio in ratios]
    axes.barh(places, ratios, color=tints, height=0.62, zorder=2)
    peers = list(dict.fromkeys(p for r in shown for p in r["ratios"] if p != "fastest"))
    for peer, marker in zip(peers, "osD^vP*X", strict=False):
        at = [(r["ratios"][peer], i) for i, r in enumerate(shown) if peer in r["ratios"]]
        inside = [(x, i) for x, i in at if x <= limit]
        if inside:
            x, y = zip(*inside, strict=True)
            axes.scatter(x, y, s=20, marker=marker, zorder=3, label=peer, color=colours["ink"],
                         facecolor=colours["back"], linewidth=1.1)  # fmt: skip
    for place, ratio in zip(places, ratios, strict=True):
        axes.text(0.02 * limit, place, f"{ratio:.2f}", va="center", color="#ffffff", fontsize=8.5,
                  zorder=4)  # fmt: skip
    axes.axvline(1.0, color=colours["ink"], linewidth=1.2, zorder=2.5)
    axes.set_yticks(places, [row["model"] for row in shown], fontsize=9)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set_xlim(0, limit)
    axes.set_xlabel(
        f"times as fast as the fastest peer of each model (bars) and as each peer (marks), "
        f"{threads} thread(s), least times",
        fontsize=9,
    )
    axes.legend(loc="lower right", fontsize=9, labelcolor=colours["ink"],
                facecolor=colours["back"], edgecolor=colours["line"])  # fmt: skip
    _plain(axes, colours, grid="x")
    _save(figure, path)


def _title(row: Row) -> str:
    text = f"{row['model']}, {row['threads']} thread(s)"
    if row["fastest"]:
        text += f": {row['ratios']['fastest']:.2f} times the fastest peer, {row['fastest']}"
    return text


def _engines(axes: Any, row: Row, theme: Theme) -> None:
    shown = sorted(row["engines"].items(), key=lambda item: -item[1]["minimum"])
    times = [1e3 * t["minimum"] for _, t in shown]
    # An engine many times slower than the others would leave nothing of them to see.
    own = 1e3 * row["engines"]["onnxjit"]["minimum"]
    limit = min(1.25 * max(times), 4 * max(own, sorted(times)[min(1, len(times) - 1)]))
    colours = [_OWN if name == "onnxjit" else _PEER for name, _ in shown]
    axes.barh(range(len(shown)), times, color=colours, height=0.6)
    for place, (_, t) in enumerate(shown):
        least, low, high = (1e3 * t[k] for k in ("minimum", "lower", "upper"))
        if least <= limit:
            axes.plot([low, min(high, limit)], [place, place], color=theme["ink"], linewidth=1)
        beside = max(least, high) * 1.01 < 0.86 * limit
        where = max(least, high) + 0.01 * limit if beside else 0.01 * limit
        axes.text(where, place, f"{least:.3g} ms", va="center", fontsize=9,
                  color=theme["ink"] if beside else "#ffffff")  # fmt: skip
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_xlim(0, limit)
    axes.set_xlabel("least time of a run (bar) and quartiles (line), ms")
    _plain(axes, theme, grid="x")


def _roofline(axes: Any, kernels: list[Row], roof: Row, theme: Theme) -> list[Any]:
    """Draws it; the labels that are to be turned along their lines."""
    shown = [k for k in kernels if k["intensity"] and k["gflops"]]
    dtypes = {k["dtype"] for k in shown} | {"float32"}
    peaks = {n: p / 1e9 for n, p in roof["peaks"].items() if n.split("/")[0] in dtypes}
    top = max(peaks.values())
    # What lies far outside has its work miscounted (windows or tables that are read in part only);
    # it stands at the edge.
    high = 2.5 * top
    low = max(high / 1e4, min([high / 100, *(k["gflops"] / 2 for k in shown)]))
    left, right = 0.02, 1000.0
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    for number, (name, peak) in enumerate(sorted(peaks.items(), key=lambda item: -item[1])):
        axes.axhline(peak, color=theme["soft"], linewidth=1, linestyle="--" if number else "-")
        axes.annotate(f"{name} {peak:.0f}", (1.01, peak), xycoords=("axes fraction", "data"),
                      va="center", fontsize=8, color=theme["soft"])  # fmt: skip
    slanted = []
    for number, b in enumerate(roof["bandwidths"]):
        rate = max(b["read"], b["copy"]) / 1e9
        start, end = max(left, low / rate), top / rate
        axes.plot([start, end], [rate * start, top], color=COLOURS[b["level"]], linewidth=1.3)
        at = start * (end / start) ** (0.5 if number % 2 else 0.06)
        text = f"{b['level']} {rate:.0f} GB/s"
        slanted.append(axes.text(at, 1.12 * rate * at, text, fontsize=8, rotation_mode="anchor",
                                 color=COLOURS[b["level"]]))  # fmt: skip
    axes.scatter(
        [min(max(k["intensity"], left), right) for k in shown],
        [min(max(k["gflops"], low), high) for k in shown],
        s=[14 + 2600 * k["share"] for k in shown],
        c=[_colour(k["limit"]) for k in shown],
        alpha=0.55, linewidth=0.6, edgecolor=theme["ink"], zorder=3, clip_on=False,
    )  # fmt: skip
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("GFLOP/s (area: share of the run)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    _plain(axes, theme, grid="both")
    return slanted


def _timeline(axes: Any, table: Row, theme: Theme) -> None:
    kernels = table["rows"]
    lanes = max((len(k["busy"]) for k in kernels), default=1)
    for lane in range(lanes):
        bars = [(1e3 * k["start"], 1e3 * k["busy"][lane]) for k in kernels if lane < len(k["busy"])]
        colours = [_colour(k["limit"]) for k in kernels if lane < len(k["busy"])]
        axes.broken_barh(bars, (lane - 0.36, 0.72), facecolors=colours,
                         edgecolor=theme["back"], linewidth=0.3)  # fmt: skip
    axes.set_yticks(range(lanes), ["caller", *(f"worker {n}" for n in range(1, lanes))])
    axes.set_ylim(lanes - 0.5, -0.5)
    axes.set_xlim(0, 1e3 * table["run"])
    axes.set_xlabel("ms; the fastest profiled run")
    _plain(axes, theme, grid="x")
    from matplotlib.patches import Patch

    limits = table["limits"].items()
    axes.legend(
        handles=[Patch(color=_colour(name), label=f"{name} {s * 100:.0f} %") for name, s in limits],
        loc="upper center", bbox_to_anchor=(0.5, -0.42), ncols=5, fontsize=8, frameon=False,
        labelcolor=theme["ink"],
    )  # fmt: skip


def _colour(limit: str) -> str:
    return COLOURS[limit.split()[0]]


def _figure(width: float, height: float, theme: Theme) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=theme["back"])
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Any, theme: Theme, grid: str) -> None:
    axes.set_facecolor(theme["back"])
    axes.grid(axis=grid, color=theme["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme["soft"], labelcolor=theme["ink"], which="both")
    axes.xaxis.label.set_color(theme["ink"])
    axes.yaxis.label.set_color(theme["ink"])
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme["line"])


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    # Equal data give an equal file: no date, no random ids.
    with matplotlib.rc_context({"svg.hashsalt": "onnxjit", "svg.fonttype": "path"}):
        dated = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=dated)
