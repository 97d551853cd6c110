"""Execution providers: the CPU is the one there is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

PROVIDER = "CPUExecutionProvider"


def get_available_providers() -> list[str]:
    """The execution providers that sessions can use."""
    return [PROVIDER]


def get_all_providers() -> list[str]:
    """The execution providers that any build has."""
    return [PROVIDER]


def normalized_providers(providers: Any, provider_options: Any) -> dict[str, dict[str, str]]:
    """Providers with their options, in order. ValueError for arguments of another form; names that
    are not available are warned about and kept, repeated ones are warned about and dropped."""
    available = get_available_providers()
    chosen: dict[str, dict[str, str]] = {}
    if providers is None:
        return chosen
    if not isinstance(providers, Sequence):
        raise ValueError("'providers' should be a sequence.")
    pairs: list[tuple[str, Mapping[Any, Any]]] = []
    if provider_options is not None:
        if not isinstance(provider_options, Sequence):
            raise ValueError("'provider_options' should be a sequence.")
        if len(providers) != len(provider_options):
            raise ValueError(
                "'providers' and 'provider_options' should be the same length if both are given."
            )
        if not all(isinstance(p, str) for p in providers):
            raise ValueError(
                "Only string values for 'providers' are supported if 'provider_options' is given."
            )
        if not all(isinstance(o, dict) for o in provider_options):
            raise ValueError("'provider_options' values must be dicts.")
        pairs = list(zip(providers, provider_options, strict=True))
    else:
        for p in providers:
            if isinstance(p, str):
                pairs.append((p, {}))
            elif (
                isinstance(p, tuple)
                and len(p) == 2
                and isinstance(p[0], str)
                and isinstance(p[1], dict)
            ):
                pairs.append(p)
            else:
                raise ValueError(
                    "'providers' values must be either strings or (string, dict) tuples."
                )
    for name, options in pairs:
        if name not in available:
            warnings.warn(
                f"Specified provider '{name}' is not in available provider names."
                f"Available providers: '{', '.join(available)}'",
                stacklevel=4,
            )
        if name in chosen:
            warnings.warn(f"Duplicate provider '{name}' encountered, ignoring.", stacklevel=4)
            continue
        chosen[name] = {str(k): str(v) for k, v in options.items()}
    return chosen
