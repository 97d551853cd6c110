"""A compiled model with edited kernels in the place of its own, as data.

A row of the kernels' table whose source is edited has the key of its own code under "original";
edited sources are marked, and `added` names the symbols of the object files that came with them,
which are the last ones of the artifact. So an edited model can be stored, pickled and restored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from onnxjit.codegen.build import symbol_of
from onnxjit.runtime.plan import Step

if TYPE_CHECKING:
    from onnxjit.artifact import Artifact
    from onnxjit.codegen.build import Source
    from onnxjit.kernel_source import Built


def own_key(row: Mapping[str, Any]) -> str:
    """The key of the code that a row's kernel had when the model was compiled."""
    return str(row.get("original", row["key"]))


def with_edit(artifact: Artifact, key: str, source: Source, built: Built) -> Artifact:
    """`artifact` in which every step whose own code has `key` runs `built`."""
    data = json.loads(bytes(artifact.kernels))
    for row in data["rows"]:
        if "name" in row and own_key(row) == key:
            row.update(original=key, key=built.key)
            if built.key == key:
                del row["original"]
    text = {"text": source.text, "symbols": source.symbols, "wide": source.wide, "edited": True}
    data["sources"].setdefault(built.key, text)
    return _remade(artifact, data, {built.symbol: built.image, **built.tiles})


def without_edits(artifact: Artifact, key: str | None) -> Artifact:
    """`artifact` with the own code of the steps whose own code has `key`, of all steps if None."""
    data = json.loads(bytes(artifact.kernels))
    for row in data["rows"]:
        if "original" in row and key in (None, own_key(row)):
            row["key"] = row.pop("original")
    return _remade(artifact, data, {})


def _remade(artifact: Artifact, data: dict[str, Any], images: Mapping[str, bytes]) -> Artifact:
    """The artifact for changed rows; `images` are object files that it may lack."""
    rows = {row["name"]: row for row in data["rows"] if "name" in row}
    used = {row["key"] for row in rows.values()}
    sources = {k: s for k, s in data["sources"].items() if k in used or "edited" not in s}
    own: set[str] = set()
    wanted: set[str] = set()
    for key, source in sources.items():
        (wanted if "edited" in source else own).update([symbol_of(key), *source["symbols"]])
    added = data.get("added", [])
    first = len(artifact.objects) - len(added)
    known = {**dict(zip(added, artifact.objects[first:], strict=True)), **images}
    data.update(sources=sources, added=sorted(wanted - own))
    steps = tuple(
        s._replace(kernel=symbol_of(rows[s.name]["key"])) if isinstance(s, Step) else s
        for s in artifact.plan.steps
    )
    return artifact._replace(
        plan=artifact.plan._replace(steps=steps),
        objects=(*artifact.objects[:first], *(known[symbol] for symbol in data["added"])),
        kernels=json.dumps(data, separators=(",", ":")).encode(),
    )
