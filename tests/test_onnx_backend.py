"""The official ONNX backend suite: node, simple, converted PyTorch and light real models.

`onnx_backend_failures.txt` lists the tests that are expected to fail, each with the reason. It may
only shrink: a listed test that passes fails here, like an unlisted one that does not pass.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import unittest
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnx.backend.test
import pytest

from onnxjit.backend import Backend, CompiledRep

LIST = Path(__file__).with_name("onnx_backend_failures.txt")


def listed() -> dict[str, str]:
    """Names of the tests that are expected to fail, with the reasons."""
    rows = (line.partition(" ") for line in LIST.read_text().splitlines() if line[:1] not in "#")
    return {name: reason.strip() for name, _, reason in rows}


class InProcess(Backend):
    """Compiles in the calling process: the suite's models are too small for worker processes."""

    @classmethod
    def is_compatible(cls, *args: Any, **kwargs: Any) -> bool:
        """What cannot be compiled fails instead of being skipped."""
        return True

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> CompiledRep:
        return super().prepare(model, device, threads=1, jobs=0, cache=cache_folder(), **kwargs)


@functools.cache
def cache_folder() -> str | bool:
    """The user's cache where ONNXJIT_CACHE names one; otherwise a folder for this run."""
    if "ONNXJIT_CACHE" in os.environ:
        return True
    folder = tempfile.mkdtemp(prefix="onnxjit-suite-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def expected_to_fail(test: Any, reason: str) -> Any:
    @functools.wraps(test)
    def run(self: unittest.TestCase) -> None:
        try:
            test(self)
        except unittest.SkipTest:
            raise
        except Exception:
            pytest.xfail(reason)
        pytest.fail(f"it passes: take it out of {LIST.name}")

    return run


def suite() -> dict[str, type[unittest.TestCase]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from NumPy, as the reference results are computed
        runner = onnx.backend.test.BackendTest(InProcess, __name__)
    cases = runner.test_cases
    failing = listed()
    found: set[str] = set()
    for case in cases.values():
        for name in [n for n in vars(case) if n.startswith("test_")]:
            if name.endswith("_cuda"):
                delattr(case, name)
            elif name in failing:
                found.add(name)
                setattr(case, name, expected_to_fail(getattr(case, name), failing[name]))
    assert found == set(failing), f"no such tests: {sorted(set(failing) - found)}"
    return cases


globals().update(suite())


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite keeps data of the real models under ONNX_HOME."""
    monkeypatch.setenv("ONNX_HOME", str(tmp_path_factory.getbasetemp() / "onnx"))
