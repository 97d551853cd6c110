"""The on-disk store: integrity, atomicity, privacy, size cap and the stat index."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onnxjit.codegen import model_store
from onnxjit.codegen.cache import BLOBS, Cache, CacheError
from onnxjit.codegen.fingerprint import content_key, modules_digest, stamp

KEY = "0123456789abcdef0123456789abcdef"
OTHER = "f" * 32


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[len(data) // 2 :]
    elif how == "emptied":
        data.clear()
    elif how == "extended":
        data += b"x"
    else:
        data[len(data) // 3] ^= 1
    path.write_bytes(data)


def age(path: Path, seconds: float) -> None:
    past = time.time() - seconds
    for one in (path, *(path.iterdir() if path.is_dir() else ())):
        os.utime(one, (past, past))


@pytest.mark.parametrize("kind", BLOBS)
def test_blob_roundtrip(cache: Cache, kind: str) -> None:
    assert cache.get(kind, KEY) is None
    cache.put(kind, KEY, b"object code", source="def kernel(): ...\n")
    assert cache.get(kind, KEY) == b"object code"
    assert cache.source_path(kind, KEY).read_text() == "def kernel(): ...\n"
    assert cache.get(kind, OTHER) is None


@pytest.mark.parametrize("how", ["flipped", "truncated", "emptied", "extended"])
def test_damaged_blob_is_absent_and_removed(cache: Cache, how: str) -> None:
    cache.put("kernels", KEY, b"object code" * 50)
    path = cache.root / "kernels" / f"{KEY}.o"
    damage(path, how)
    assert cache.get("kernels", KEY) is None
    assert not path.exists()
    cache.put("kernels", KEY, b"again")
    assert cache.get("kernels", KEY) == b"again"


def test_blob_under_another_name_is_refused(cache: Cache) -> None:
    cache.put("kernels", KEY, b"object code")
    (cache.root / "kernels" / f"{KEY}.o").rename(cache.root / "kernels" / f"{OTHER}.o")
    assert cache.get("kernels", OTHER) is None


@pytest.mark.parametrize("key", ["../escape", "", "a/b", ".hidden", "x" * 200])
def test_names_cannot_leave_the_folder(cache: Cache, key: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        cache.put("kernels", key, b"")
    with pytest.raises(ValueError, match="not a name"):
        cache.open_model(key)


def test_model_roundtrip_with_streamed_constants(cache: Cache) -> None:
    piece = os.urandom(1 << 20)
    with cache.model_writer(KEY) as writer:
        writer.write("plan.json", b"{}")
        with writer.open("constants.bin") as file:
            file.seek(len(piece))
            file.write(piece[::-1])
            file.seek(0)
            file.write(piece)
        assert cache.open_model(KEY) is None
    model = cache.open_model(KEY)
    assert model is not None and set(model) == {"plan.json", "constants.bin"}
    assert model["plan.json"] == b"{}"
    constants = model["constants.bin"]
    assert isinstance(constants, memoryview) and constants.readonly
    assert constants == piece + piece[::-1]


def test_write_model_takes_pieces(cache: Cache) -> None:
    model = cache.write_model(KEY, {"a": b"one", "b": (bytes([n]) for n in range(3))})
    assert (model["a"], model["b"]) == (b"one", b"\0\1\2")


def test_failed_model_leaves_nothing(cache: Cache) -> None:
    with pytest.raises(ZeroDivisionError), cache.model_writer(KEY) as writer:
        writer.write("plan.json", b"{}")
        raise ZeroDivisionError
    assert list((cache.root / "models").iterdir()) == []


def test_model_written_twice_keeps_the_first(cache: Cache) -> None:
    cache.write_model(KEY, {"plan": b"first"})
    assert cache.write_model(KEY, {"plan": b"second"})["plan"] == b"first"
    assert len(list((cache.root / "models").iterdir())) == 1


@pytest.mark.parametrize("name", ["plan.json", "constants.bin", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "removed"])
def test_damaged_model_is_absent_and_removed(cache: Cache, name: str, how: str) -> None:
    cache.write_model(KEY, {"plan.json": b"{}" * 9, "constants.bin": bytes(2 << 20)})
    path = cache.root / "models" / KEY / name
    path.unlink() if how == "removed" else damage(path, how)
    assert cache.open_model(KEY) is None
    assert not path.parent.exists()
    assert cache.write_model(KEY, {"plan.json": b"new"})["plan.json"] == b"new"


def test_large_files_are_digested_once_in_a_boot(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again when they change, and when the machine was started anew."""
    cache.write_model(KEY, {"constants.bin": bytes(2 << 20)})
    path = cache.root / "models" / KEY / "constants.bin"
    sizes: list[int] = []
    digest = model_store._digest

    def counted(data: bytes) -> str:
        sizes.append(len(data))
        return digest(data)

    monkeypatch.setattr(model_store, "_digest", counted)
    boots = ["one"]
    monkeypatch.setattr("onnxjit.codegen.cache.boot_id", lambda: boots[0])
    for boot, times in (("one", 1), ("one", 1), ("two", 2), ("two", 2), ("", 3), ("", 4)):
        boots[0] = boot
        with in_a_minute():
            assert cache.open_model(KEY) is not None
        assert len(sizes) == times
    boots[0] = "two"
    assert cache.open_model(KEY) is not None
    assert cache.verify() == [] and len(sizes) == 5
    damage(path, "flipped")
    assert cache.open_model(KEY) is None
    assert not path.exists()


def test_default_root_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXJIT_CACHE", str(tmp_path / "deep" / "cache"))
    cache = Cache()
    assert cache.root == tmp_path / "deep" / "cache"
    assert cache.root.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
def test_folder_writable_by_others_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(CacheError, match=f"{tmp_path}.*{mode:04o}.*written by other"):
        Cache(tmp_path)


def test_folder_inside_writable_by_others_is_refused(cache: Cache) -> None:
    (cache.root / "models").chmod(0o777)
    with pytest.raises(CacheError, match="models"):
        Cache(cache.root)


def test_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(CacheError, match="belongs to user"):
        Cache(tmp_path)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="set ONNXJIT_CACHE"):
        Cache(tmp_path / "file" / "cache")


def test_trim_removes_what_was_not_used_for_longest(cache: Cache) -> None:
    for number in range(4):
        cache.put("kernels", f"k{number}", bytes(1000), source="#" * 100)
        age(cache.root / "kernels" / f"k{number}.o", 1000 - number)
        age(cache.source_path("kernels", f"k{number}"), 1000 - number)
    cache.write_model(KEY, {"plan": bytes(1000)})
    age(cache.root / "models" / KEY, 2000)
    assert cache.get("kernels", "k0") is not None
    cache.trim(2400)
    assert {entry.key for entry in cache.entries()} == {"k0", "k3"}
    assert not cache.source_path("kernels", "k1").exists()


def test_writing_keeps_the_cap(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=100_000)
    for number in range(300):
        cache.put("kernels", f"k{number:03}", bytes(1000))
        age(cache.root / "kernels" / f"k{number:03}.o", 1000 - number)
    assert sum(entry.bytes for entry in cache.entries()) < 110_000
    assert cache.get("kernels", "k299") is not None


def test_trim_sweeps_what_killed_processes_left(cache: Cache) -> None:
    old, new = (cache.root / "kernels" / f".tmp-{name}" for name in ("old", "new"))
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    age(old, 7200)
    note = cache.root / "index" / "note.json"
    note.write_text("{}")
    age(note, 100 * 86400)
    cache.trim()
    assert not old.exists() and not note.exists() and new.exists()


def test_verify_reports_and_removes_damage(cache: Cache) -> None:
    cache.put("kernels", KEY, b"x" * 100)
    cache.put("tiles", KEY, b"x" * 100)
    cache.write_model(KEY, {"constants": bytes(2 << 20)})
    assert cache.verify() == []
    damage(cache.root / "tiles" / f"{KEY}.o", "flipped")
    damage(cache.root / "models" / KEY / "constants", "flipped")
    assert {entry.kind for entry in cache.verify()} == {"tiles", "models"}
    assert [entry.kind for entry in cache.entries()] == ["kernels"]


def test_clear(cache: Cache, tmp_path: Path) -> None:
    cache.put("kernels", KEY, b"x", source="x")
    model = cache.write_model(KEY, {"constants": b"7" * (2 << 20)})
    (tmp_path / "m.onnx").write_bytes(b"m")
    cache.remember_key(tmp_path / "m.onnx", stamp([tmp_path / "m.onnx"]), KEY)
    cache.clear()
    assert [path for path in cache.root.rglob("*") if path.is_file()] == []
    assert model["constants"][-1] == ord("7")


WRITER = """
import sys
from onnxjit.codegen.cache import Cache
cache = Cache(sys.argv[1])
hits = 0
for turn in range(60):
    data = bytes([int(sys.argv[2])]) * 200_000
    cache.put("kernels", "shared", data)
    found = cache.get("kernels", "shared")
    if found is not None:
        assert len(found) == len(data) and len(set(found)) == 1
        hits += 1
    model = cache.write_model("shared", {"a": data, "b": data * 6})
    assert model["a"] * 6 == model["b"]
    if turn % 10 == 0 and sys.argv[2] == "0":
        cache.clear()
assert hits > 30
assert "numba" not in sys.modules and "onnx" not in sys.modules
"""


def test_concurrent_writers(cache: Cache) -> None:
    command = [sys.executable, "-c", WRITER, str(cache.root)]
    writers = [
        subprocess.Popen([*command, str(number)], stderr=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    reports = [writer.communicate(timeout=60)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], reports


def test_known_key_needs_no_read(cache: Cache, tmp_path: Path) -> None:
    model, weights = tmp_path / "m.onnx", tmp_path / "m.bin"
    model.write_bytes(b"model")
    weights.write_bytes(b"weights")
    assert cache.known_key(model) is None
    settled(cache, model, weights)
    assert cache.known_key(model) == KEY
    assert cache.known_key(model, b"other options") is None
    assert cache.known_key(tmp_path / "m.bin") is None


def settled(cache: Cache, *paths: Path) -> None:
    """Remember a key as if the files had not been touched for a minute."""
    with in_a_minute():
        cache.remember_key(paths[0], stamp(paths), KEY)


@contextmanager
def in_a_minute() -> Iterator[None]:
    now = time.time_ns
    try:
        time.time_ns = lambda: now() + 60_000_000_000
        yield
    finally:
        time.time_ns = now


@pytest.mark.parametrize("changed", ["m.onnx", "m.bin"])
@pytest.mark.parametrize("how", ["rewritten", "replaced", "removed"])
def test_known_key_notices_changes(cache: Cache, tmp_path: Path, changed: str, how: str) -> None:
    paths = tmp_path / "m.onnx", tmp_path / "m.bin"
    for path in paths:
        path.write_bytes(b"data")
    settled(cache, *paths)
    victim = tmp_path / changed
    before = victim.stat()
    if how == "rewritten":  # same size, same modification time
        victim.write_bytes(b"atad")
        os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif how == "replaced":
        (tmp_path / "new").write_bytes(b"atad")
        os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
        os.replace(tmp_path / "new", victim)
    else:
        victim.unlink()
    assert cache.known_key(paths[0]) is None


def test_fresh_files_are_not_trusted(cache: Cache, tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(b"model")
    cache.remember_key(model, stamp([model]), KEY)
    assert cache.known_key(model) is None


def test_damaged_index_is_absent(cache: Cache, tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(b"model")
    settled(cache, model)
    for path in (cache.root / "index").iterdir():
        damage(path, "truncated")
    assert cache.known_key(model) is None


def test_content_key(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"model" * 2_000_000)
    assert content_key(path) == content_key(b"model" * 2_000_000)
    assert content_key([b"ab", b"c"]) != content_key([b"a", b"bc"])
    assert content_key(b"a", b"x") != content_key(b"a", b"y")
    assert content_key([b"a", b"b"]) != content_key([b"b", b"a"])


@pytest.mark.parametrize(
    "text",
    [
        "from pkg.b import x",
        "    from pkg.b import (\n    x,\n    y,\n)",
        "import sys, pkg.b as b  # noqa",
        "from pkg import c, b",
        "from pkg import (  # a, comment\n    c,  # of c\n    b,\n)",
        "from .b import x",
        "from . import b",
    ],
)
def test_digest_follows_imports(tmp_path: Path, text: str) -> None:
    modules = {"a": text, "b": "import pkg.d", "c": "", "d": "", "other": "import pkg.a"}
    for name, content in modules.items():
        (tmp_path / f"{name}.py").write_text(content)
    before = modules_digest(tmp_path, "pkg", "a")
    (tmp_path / "other.py").write_text("changed")
    assert modules_digest(tmp_path, "pkg", "a") == before
    (tmp_path / "d.py").write_text("changed")
    assert modules_digest(tmp_path, "pkg", "a") != before
