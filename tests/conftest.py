"""Options and fixtures of the test suite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden anew instead of comparing"
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the tests of a module share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def build(folder: Path) -> Callable[..., Any]:
    """`onnxjit.compile` without processes of its own."""
    import onnxjit

    def build(model: Any, **options: Any) -> Any:
        return onnxjit.compile(model, **{"cache": folder, "jobs": 0, "threads": 1, **options})

    return build
