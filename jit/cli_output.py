"""What the command line prints: tables or JSON, the progress of a compilation, errors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from onnxjit import plain_json

# As `diff` has it: 1 says that a check found something, 2 that it could not be made.
FOUND, TROUBLE = 1, 2

MANY_KERNELS = 12  # from here on a compilation shows a progress bar

errors = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Model = Annotated[str, typer.Argument(help="An ONNX file.", show_default=False)]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads per run; by default one for each core.")
]
Dims = Annotated[
    list[str] | None,
    typer.Option("--dim", metavar="NAME=SIZE", help="Size of a free dimension; 1 if not given."),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input", metavar="NAME=FILE.npy", help="Array for an input; random if not given."
    ),
]
Tune = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        min=0.0,
        help="Measure variants of the kernels for so long; the fastest serve later runs, too.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the random inputs.")]


def console() -> Console:
    """Standard output as it is now; as wide as its contents when it is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def clean(value: Any) -> str:
    """A string of a model for the terminal: what is not printable is escaped."""
    text = str(value)
    if text.replace("\t", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)


def print_json(data: Any) -> None:
    """`data` as JSON on standard output; infinity and NaN become null."""
    print(plain_json.dumps(data, indent=2, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table; a column whose cells are all numbers (or units of them) is set to the right."""
    table = Table(title=Text(title), title_justify="left", header_style="bold", box=None)
    for position, name in enumerate(columns):
        numbers = all(_is_number(row[position]) for row in rows) and bool(rows)
        table.add_column(Text(name), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    console().print(table)


def _is_number(cell: Any) -> bool:
    return isinstance(cell, (int, float)) or str(cell)[:1].isdigit() or cell in ("", "-")


def print_text(text: str) -> None:
    """Text of ours that may hold names of the model, as it is."""
    print("\n".join(clean(line) for line in text.split("\n")))


def spell_bytes(count: float) -> str:
    """A number of bytes in the unit that leaves one to four digits before the point."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def spell_seconds(seconds: float) -> str:
    """A time in s, ms or us."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}" if seconds < 100 else f"{seconds:.0f} s"
    return f"{seconds * 1e6:.3g} us"


def fail(message: str) -> NoReturn:
    """End the program with one clear message."""
    errors.print(Text.assemble(("error: ", "bold red"), clean_lines(message)), soft_wrap=True)
    raise typer.Exit(TROUBLE)


def clean_lines(message: str) -> str:
    """A message of several lines for the terminal."""
    return "\n".join(clean(line) for line in message.split("\n"))


@contextlib.contextmanager
def compiling(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress function for `onnxjit.compile`: a bar, on a terminal, for a long compilation."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("kernels"),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
    )
    task = bar.add_task(what, total=None)
    started = False

    def progress(done: int, total: int) -> None:
        nonlocal started
        if not started and total >= MANY_KERNELS and errors.is_terminal:
            bar.start()
            started = True
        bar.update(task, completed=done, total=total)

    try:
        yield progress
    finally:
        if started:
            bar.stop()


def pairs(options: Sequence[str] | None, flag: str) -> dict[str, str]:
    """The NAME=VALUE texts of an option; names may hold "=" (the last one divides)."""
    found = {}
    for text in options or ():
        name, mark, value = text.rpartition("=")
        if not mark or not name or not value:
            fail(f"{flag} takes NAME=VALUE, not {text!r}")
        found[name] = value
    return found


def sizes(options: Sequence[str] | None) -> dict[str, int]:
    """The sizes of `--dim` options."""
    found = {}
    for name, text in pairs(options, "--dim").items():
        if not text.isascii() or not text.isdigit():
            fail(f"--dim {name} takes a size, not {text!r}")
        found[name] = int(text)
    return found
