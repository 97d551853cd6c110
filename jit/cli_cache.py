"""`onnxjit cache`: show, path, trim, clear, verify."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from onnxjit.cli_output import FOUND, Json, fail, print_json, print_table, print_text, spell_bytes

app = typer.Typer(help="The cache of compiled kernels and models.", no_args_is_help=True)

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def _cache() -> Any:
    from onnxjit.codegen.cache import Cache

    return Cache()


@app.command()
def path(as_json: Json = False) -> None:
    """Print the folder (ONNXJIT_CACHE chooses another one)."""
    root = str(_cache().root)
    if as_json:
        print_json({"path": root})
    else:
        print(root)


@app.command()
def show(
    entries: Annotated[bool, typer.Option("--entries", help="List every entry.")] = False,
    as_json: Json = False,
) -> None:
    """Show how much of what is stored."""
    from onnxjit.codegen.tuned import tables

    cache = _cache()
    found = cache.entries()
    tuned = {
        name: {"kernels": len(rows), "variants": sum(bool(t.choices) for t in rows.values())}
        for name, rows in tables(cache).items()
    }
    totals = {
        kind: {
            "entries": sum(e.kind == kind for e in found),
            "bytes": sum(e.bytes for e in found if e.kind == kind),
        }
        for kind in ("models", "kernels", "tiles")
    }
    if as_json:
        data: dict[str, Any] = {
            "path": str(cache.root),
            "limit": cache.max_bytes,
            "bytes": sum(e.bytes for e in found),
            "kinds": totals,
            "tuned": tuned,
        }
        if entries:
            data["entries"] = [
                {"kind": e.kind, "key": e.key, "bytes": e.bytes, "used": e.used} for e in found
            ]
        print_json(data)
        return
    rows = [[kind, t["entries"], spell_bytes(t["bytes"])] for kind, t in totals.items()]
    print_table(str(cache.root), ["kind", "entries", "size"], rows)
    total = sum(e.bytes for e in found)
    print_text(f"{spell_bytes(total)} of at most {spell_bytes(cache.max_bytes)}")
    for name, counts in tuned.items():
        isa, _, threads = name.rpartition("-")
        print_text(
            f"tuned for {isa}, {threads} thread(s): {counts['kernels']} kernels, "
            f"{counts['variants']} of them with a variant that is faster than usual"
        )
    if entries:
        now = time.time()
        listed = [
            [e.kind, e.key, spell_bytes(e.bytes), f"{max(0.0, now - e.used) / 3600:.1f} h"]
            for e in reversed(found)
        ]
        print_table("entries", ["kind", "key", "size", "unused for"], listed)


@app.command()
def trim(
    size: Annotated[str, typer.Argument(help="Bytes to keep, such as 500M or 2G.")],
    as_json: Json = False,
) -> None:
    """Remove the entries that were not used for longest, down to a size."""
    limit = _bytes(size)
    freed = _cache().trim(limit)
    if as_json:
        print_json({"freed": freed})
    else:
        print_text(f"{spell_bytes(freed)} freed")


@app.command()
def clear(as_json: Json = False) -> None:
    """Remove everything."""
    cache = _cache()
    found = cache.entries()
    cache.clear()
    freed = sum(e.bytes for e in found)
    if as_json:
        print_json({"removed": len(found), "freed": freed})
    else:
        print_text(f"{len(found)} entries removed, {spell_bytes(freed)} freed")


@app.command()
def verify(as_json: Json = False) -> None:
    """Check every entry's digest; damaged ones are removed (status 1)."""
    cache = _cache()
    checked = len(cache.entries())
    damaged = cache.verify()
    if as_json:
        rows = [{"kind": e.kind, "key": e.key, "bytes": e.bytes} for e in damaged]
        print_json({"checked": checked, "damaged": rows})
    else:
        for e in damaged:
            print_text(f"damaged, removed: {e.kind} {e.key}")
        print_text(f"{checked} entries checked, {len(damaged)} damaged")
    if damaged:
        raise typer.Exit(FOUND)


def _bytes(text: str) -> int:
    unit = text[-1:].lower() if text[-1:].isalpha() else ""
    number = text[: len(text) - len(unit)]
    if unit not in _UNITS or not number.isascii() or not number.isdigit():
        fail(f"a size is a number with K, M or G behind it, not {text!r}")
    return int(number) * _UNITS[unit]
