"""Arrays for the inputs of a model, from the options `--input`, `--dim` and `--seed`."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxjit.cli_output import fail, pairs, sizes


def feeds_for(
    inputs: Any, files: list[str] | None, dims: list[str] | None, seed: int
) -> dict[str, np.ndarray]:
    """Arrays for a model's inputs: the given files, and random ones for the others, whose free
    dimensions are those of the files where they share a name."""
    from onnxjit.bench import random_inputs

    paths = pairs(files, "--input")
    names = [v.name for v in inputs]
    for name in paths:
        if name not in names:
            fail(f"the model has no input {name!r}; it has {', '.join(map(repr, names))}")
    given = {name: _load(path) for name, path in paths.items()}
    known = sizes(dims)
    free = {d for v in inputs for d in v.shape if isinstance(d, str)}
    for name in known:
        if name not in free:
            has = ", ".join(sorted(map(repr, free))) or "none"
            fail(f"the model's inputs have no free dimension {name!r}; they have {has}")
    for v in inputs:
        if v.name in given and len(v.shape) == given[v.name].ndim:
            for dim, extent in zip(v.shape, given[v.name].shape, strict=True):
                if isinstance(dim, str):
                    known.setdefault(dim, extent)
    rest = random_inputs([v for v in inputs if v.name not in given], known, seed)
    return {name: given[name] if name in given else rest[name] for name in names}


def _load(path: str) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        fail(f"cannot read {path!r}: {error.strerror}")
    except (ValueError, EOFError):
        fail(f"{path!r} is not a .npy file of numbers")
    if not isinstance(array, np.ndarray):
        fail(f"{path!r} holds several arrays; one .npy file holds one input")
    return array
