"""BLAKE2b as `hashlib` has it. That module loads OpenSSL first, which costs a warm start 4 ms."""

from __future__ import annotations

try:
    from _blake2 import blake2b
except ImportError:  # a Python without that module of CPython's
    from hashlib import blake2b

__all__ = ["blake2b"]
