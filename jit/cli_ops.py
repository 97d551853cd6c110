"""`onnxjit ops`: which operators of ONNX can be compiled, and which cannot."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from onnxjit.cli_output import Json, print_json, print_table, print_text


def support() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The operators with definitions, and those of ONNX's schemas without, sorted by name.

    A row of the first has the versions that each definition covers ("13-" is 13 and later) and how
    it runs; a row of the second says whether its function body takes its place.
    """
    import onnx.defs

    from onnxjit import operators as _operators  # noqa: F401  (fills the operator table)
    from onnxjit.control import CONTROL_OPERATORS
    from onnxjit.operators.registry import table

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for op in table():
        domain = "" if op.domain == "ai.onnx" else op.domain
        row = rows.setdefault(
            (domain, op.name),
            {"domain": domain or "ai.onnx", "operator": op.name, "versions": [], "runs": [],
             "cases": 0},
        )  # fmt: skip
        last = "" if op.until is None else str(op.until)
        row["versions"].append(f"{op.since}" if last == str(op.since) else f"{op.since}-{last}")
        row["cases"] += len(op.cases)
        how = "host" if op.host else "kernel"
        if how not in row["runs"]:
            row["runs"].append(how)
    schemas = onnx.defs.get_all_schemas_with_history()
    for name in CONTROL_OPERATORS:
        first = min(s.since_version for s in schemas if (s.domain, s.name) == ("", name))
        rows["", name] = {
            "domain": "ai.onnx", "operator": name, "versions": [f"{first}-"],
            "runs": ["control flow"], "cases": 0,
        }  # fmt: skip
    newest: dict[tuple[str, str], Any] = {}
    for schema in schemas:
        key = (schema.domain, schema.name)
        if key not in newest or schema.since_version > newest[key].since_version:
            newest[key] = schema
    missing = [
        {
            "domain": schema.domain or "ai.onnx",
            "operator": schema.name,
            "since": schema.since_version,
            "inlined": bool(schema.has_function or schema.has_context_dependent_function),
        }
        for key, schema in sorted(newest.items())
        if key not in rows and not schema.deprecated
    ]
    return [rows[key] for key in sorted(rows)], missing


def ops(
    name: Annotated[str, typer.Argument(help="Only operators whose name contains this.")] = "",
    as_json: Json = False,
) -> None:
    """Show which operators of ONNX are supported."""
    supported, missing = support()
    wanted = name.lower()
    supported = [row for row in supported if wanted in row["operator"].lower()]
    missing = [row for row in missing if wanted in row["operator"].lower()]
    if as_json:
        print_json({"supported": supported, "missing": missing})
        return
    rows = [
        [row["domain"], row["operator"], ", ".join(row["versions"]), ", ".join(row["runs"]),
         row["cases"]]
        for row in supported
    ]  # fmt: skip
    print_table("supported", ["domain", "operator", "versions", "runs as", "cases"], rows)
    inlined = [row["operator"] for row in missing if row["inlined"]]
    lacking = [f"{row['domain']}::{row['operator']}" for row in missing if not row["inlined"]]
    if inlined:
        print_text(f"\nwithout a definition, inlined from their ONNX function: {_list(inlined)}")
    if lacking:
        print_text(f"\nnot supported: {_list(lacking)}")


def _list(names: list[str]) -> str:
    return ", ".join(names) if names else "none"
