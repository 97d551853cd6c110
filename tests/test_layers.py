"""The shape of the source tree: import direction, packages, what a warm start imports."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"onnxjit": "jit", "onnxjit.codegen": "codegen", "onnxjit.runtime": "runtime"}
MAY_IMPORT = {
    "onnxjit.codegen": ("onnxjit.codegen",),
    "onnxjit.runtime": ("onnxjit.runtime",),
    "onnxjit": ("onnxjit",),
}


def modules(package: str) -> list[tuple[str, Path]]:
    """(dotted name, file) of every module below a top folder."""
    top = ROOT / FOLDERS[package]
    found = []
    for path in sorted(top.rglob("*.py")):
        parts = path.relative_to(top).with_suffix("").parts
        found.append((".".join((package, *parts)).removesuffix(".__init__"), path))
    return found


def imports(name: str, path: Path) -> set[str]:
    """Every `onnxjit…` module that a file imports, also inside functions."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                outer = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*outer, *filter(None, [node.module])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {one for one in found if one.split(".")[0] == "onnxjit"}


@pytest.mark.parametrize("package", ["onnxjit.codegen", "onnxjit.runtime"])
def test_lower_layers_import_only_themselves(package: str) -> None:
    checked = 0
    for name, path in modules(package):
        for target in imports(name, path):
            checked += 1
            inside = target == package or target.startswith(f"{package}.")
            # `from onnxjit import runtime` also reads as an import of `onnxjit` itself.
            assert inside or package.startswith(f"{target}."), f"{path} imports {target}"
    assert checked


def test_relative_imports_do_not_leave_their_folder() -> None:
    for package in FOLDERS:
        for name, path in modules(package):
            depth = len(name.split(".")) - len(package.split("."))
            depth += path.name == "__init__.py"
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert node.level <= max(depth, 0), f"{path}:{node.lineno}"


def test_every_package_is_listed_in_pyproject() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == FOLDERS
    found = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *parts)))
    assert found == set(settings["packages"])


def test_every_python_folder_is_a_package() -> None:
    for folder in FOLDERS.values():
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path


def test_import_loads_neither_numba_nor_onnx() -> None:
    code = (
        "import sys, onnxjit, onnxjit.runtime.executor, onnxjit.runtime.link, "
        "onnxjit.codegen.cache; "
        "print([m for m in ('numba', 'onnx', 'typer', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
