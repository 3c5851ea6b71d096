"""Cached image embeddings: the same bits back, bounds kept, and no disk that can spoil an answer."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tinyllava_edge.bundle import BundleFile, BundlePart
from tinyllava_edge.errors import EngineError, ImageError, UsageError
from tinyllava_edge.runtimes import embedding_cache
from tinyllava_edge.runtimes.embedding_cache import (
    EmbeddingCache,
    cache_key,
    file_digest,
    picture_digest,
    vision_facts,
)

from .conftest import picture

Floats = npt.NDArray[np.float32]
HEADER = 84  # bytes


def key(n: int) -> str:
    return hashlib.sha256(str(n).encode()).hexdigest()


def embeds(n: int, rows: int = 4, columns: int = 64) -> Floats:
    """1 KiB."""
    return np.random.default_rng(n).standard_normal((rows, columns)).astype(np.float32)


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_memory() -> None:
    cache = EmbeddingCache(max_bytes=3 * 1024)
    assert cache.get(key(0)) is None
    mine = embeds(0)
    cache.put(key(0), mine)
    mine[:] = 0  # the cache has a copy
    found = cache.get(key(0))
    assert found is not None and found.dtype == np.float32
    np.testing.assert_array_equal(found, embeds(0))
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1
    for n in (1, 2):
        cache.put(key(n), embeds(n))
    cache.get(key(0))  # used last, so that 1 is the oldest
    cache.put(key(3), embeds(3))
    assert [cache.get(key(n)) is not None for n in range(4)] == [True, False, True, True]
    cache.put(key(4), embeds(4, rows=13))  # larger than the whole cache: the others stay
    stats = cache.stats()
    assert (stats["bytes"], stats["entries"], stats["evictions"]) == (3 * 1024, 3, 1)
    assert (stats["hits"], stats["misses"], stats["disk_hits"], stats["disk_bytes"]) == (5, 2, 0, 0)


def test_disk(tmp_path: Path) -> None:
    """A second process's cache finds what the first wrote, bit for bit, special values included."""
    directory = tmp_path / "a" / "b"
    values = embeds(0)
    values[0, :4] = [np.nan, -0.0, np.inf, 1e-42]
    EmbeddingCache(max_bytes=0, directory=directory).put(key(0), values)
    assert files(directory) == {key(0)} and (directory / key(0)).stat().st_size == HEADER + 1024
    if os.name == "posix":
        assert directory.stat().st_mode & 0o77 == 0 and (directory / key(0)).stat().st_mode & 0o77 == 0
    cache = EmbeddingCache(max_bytes=1 << 20, directory=directory)
    found = cache.get(key(0))
    assert found is not None and found.tobytes() == values.tobytes() and not found.flags.writeable
    assert cache.get(key(0)) is found and cache.get(key(1)) is None
    stats = cache.stats()
    assert (stats["hits"], stats["disk_hits"], stats["misses"], stats["disk_bytes"]) == (1, 1, 1, HEADER + 1024)


def test_disk_is_bounded(tmp_path: Path) -> None:
    """The longest unused go first; a hit, from memory too, is a use."""
    size = HEADER + 1024
    cache = EmbeddingCache(max_bytes=1 << 20, directory=tmp_path, max_disk_bytes=10 * size)
    for n in range(10):
        cache.put(key(n), embeds(n))
        os.utime(tmp_path / key(n), (1000 + n, 1000 + n))
    cache.get(key(0))
    cache.put(key(10), embeds(10))
    assert files(tmp_path) == {key(n) for n in (0, *range(3, 11))}  # nine tenths are left
    assert cache.stats()["disk_bytes"] == 9 * size and cache.stats()["evictions"] == 2
    cache.put(key(11), embeds(11, rows=50))  # larger than the limit
    assert key(11) not in files(tmp_path)
    EmbeddingCache(max_bytes=0, directory=tmp_path, max_disk_bytes=2 * size)
    assert len(files(tmp_path)) == 1


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    """Only names that are keys are ours; what killed writers left goes after an hour."""
    (tmp_path / "notes.txt").write_bytes(b"x" * 5000)
    (tmp_path / key(1)).mkdir()
    old, new = tmp_path / f".{key(2)}.abc", tmp_path / f".{key(2)}.def"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    cache = EmbeddingCache(max_bytes=0, directory=tmp_path, max_disk_bytes=2000)
    cache.put(key(1), embeds(1))  # a directory is in the way
    cache.put(key(3), embeds(3))
    assert files(tmp_path) == {"notes.txt", key(1), new.name, key(3)}
    assert cache.get(key(1)) is None and cache.stats()["disk_errors"] == 1


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    """Cut at every length, each part of the header changed, another key's file: a miss, and then replaced."""
    cache = EmbeddingCache(max_bytes=0, directory=tmp_path)
    cache.put(key(0), embeds(0, 2, 4))
    path = tmp_path / key(0)
    whole = path.read_bytes()
    broken = [whole[:n] for n in range(len(whole))]
    broken += [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(len(whole))]
    broken += [whole + b"x", b"\0" * len(whole), b"\xff" * 200, b"\x80\x04N.", whole[:12] + b"\xff" * 8 + whole[20:]]
    for data in broken:
        path.write_bytes(data)
        assert cache.get(key(0)) is None
    (tmp_path / key(1)).write_bytes(whole)
    assert cache.get(key(1)) is None
    cache.put(key(0), embeds(0, 2, 4))
    assert path.read_bytes() == whole
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / key(2))
        assert cache.get(key(2)) is None


def test_a_disk_that_can_not_be_written(tmp_path: Path) -> None:
    """A file where the directory should be: answers come from memory, and the failures are counted."""
    (tmp_path / "file").write_text("x")
    cache = EmbeddingCache(max_bytes=1 << 20, directory=tmp_path / "file")
    cache.put(key(0), embeds(0))
    assert cache.get(key(0)) is not None and cache.get(key(1)) is None
    assert cache.stats()["disk_errors"] == 1 and cache.stats()["disk_bytes"] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary file leads to /dev/full, so that the write itself fails; nothing of it stays."""

    def full(prefix: str, dir: Path) -> tuple[int, str]:
        temporary = str(dir / f"{prefix}full")
        os.symlink("/dev/full", temporary)
        return os.open(temporary, os.O_WRONLY), temporary

    monkeypatch.setattr(embedding_cache.tempfile, "mkstemp", full)
    cache = EmbeddingCache(max_bytes=0, directory=tmp_path)
    cache.put(key(0), embeds(0))
    assert cache.stats()["disk_errors"] == 1 and cache.get(key(0)) is None and files(tmp_path) == set()


def test_turned_off(tmp_path: Path) -> None:
    cache = EmbeddingCache(max_bytes=0, directory=tmp_path, max_disk_bytes=0)
    cache.put(key(0), embeds(0))
    assert cache.get(key(0)) is None and files(tmp_path) == set()
    for limits in ({"max_bytes": -1}, {"max_bytes": 0, "max_disk_bytes": -1}):
        with pytest.raises(UsageError, match="negative"):
            EmbeddingCache(**limits)


@pytest.mark.parametrize("bad", ["", "../x", "A" * 64, "0" * 63, "0" * 64 + "\n", "x" * 64])
def test_only_keys(tmp_path: Path, bad: str) -> None:
    cache = EmbeddingCache(max_bytes=1, directory=tmp_path)
    with pytest.raises(EngineError, match="64 hex digits"):
        cache.get(bad)
    with pytest.raises(EngineError, match="64 hex digits"):
        cache.put(bad, embeds(0))
    for shape in ((4,), (0, 4), (1, 2, 3)):
        with pytest.raises(EngineError, match="can't be cached"):
            cache.put(key(0), np.zeros(shape, np.float32))


def test_threads(tmp_path: Path) -> None:
    """Eight threads, little room: what comes back is right, and the bounds hold."""
    cache = EmbeddingCache(max_bytes=3 * 1024, directory=tmp_path, max_disk_bytes=8 * (HEADER + 1024))
    wrong: list[int] = []

    def work(seed: int) -> None:
        chance = np.random.default_rng(seed)
        for n in chance.integers(0, 20, 60):
            found = cache.get(key(int(n)))
            if found is None:
                cache.put(key(int(n)), embeds(int(n)))
            elif found.tobytes() != embeds(int(n)).tobytes():
                wrong.append(int(n))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = cache.stats()
    assert not wrong and stats["hits"] + stats["disk_hits"] + stats["misses"] == 480
    assert stats["bytes"] <= 3 * 1024 and stats["entries"] <= 3 and stats["disk_errors"] == 0
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 8 * (HEADER + 1024)
    assert all(not name.startswith(".") for name in files(tmp_path))


WRITER = """
import sys, hashlib
from pathlib import Path
import numpy as np
from tinyllava_edge.runtimes.embedding_cache import EmbeddingCache
cache = EmbeddingCache(max_bytes=0, directory=Path(sys.argv[1]), max_disk_bytes=12 * 1108)
for i in range(200):
    n = (i // 2 * int(sys.argv[2])) % 17  # each twice, so that the second finds it unless the other threw it out
    key = hashlib.sha256(str(n).encode()).hexdigest()
    wanted = np.random.default_rng(n).standard_normal((4, 64)).astype(np.float32)
    found = cache.get(key)
    if found is None:
        cache.put(key, wanted)
    else:
        assert found.tobytes() == wanted.tobytes()
assert cache.stats()["disk_errors"] == 0 and cache.stats()["disk_hits"] > 0, cache.stats()
"""


def test_processes(tmp_path: Path) -> None:
    """Two processes in one directory: each finds right values only, and both keep the bound."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    running = [subprocess.Popen([*command, step]) for step in ("3", "5")]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    EmbeddingCache(max_bytes=0, directory=tmp_path, max_disk_bytes=12 * 1108)
    assert 0 < len(files(tmp_path)) <= 12


def test_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"some bytes")
    assert picture_digest(path) == picture_digest(str(path)) == picture_digest(b"some bytes")
    array = picture(0, 6, 4)
    other = [
        array.reshape(4, 6, 3),
        array.view(np.int8),
        array + np.uint8(1),
        array[::-1],
    ]
    digests = [picture_digest(b"some bytes"), *map(picture_digest, [array, *other]), picture_digest(array.tobytes())]
    assert len(set(digests)) == len(digests)
    assert picture_digest(np.asfortranarray(array)) == picture_digest(array)
    monkeypatch.setattr(embedding_cache, "MAX_FILE_BYTES", 9)
    for bad, message in ((path, "more than 9 bytes"), (tmp_path / "none", "no such file"), (tmp_path, "no such file")):
        with pytest.raises(ImageError, match=message):
            picture_digest(bad)


def test_keys_name_everything() -> None:
    file = BundleFile("v.onnx", "vision", "fp32", "a" * 64, 1)
    more = BundleFile("v.onnx", "vision", "fp32", "a" * 64, 1, parts=(BundlePart("v.data", "b" * 64, 1),))
    assert file_digest(file) != file_digest(more)
    facts = vision_facts(["CPUExecutionProvider"], 2)
    given = [
        ("p", "g", "v", facts),
        ("q", "g", "v", facts),
        ("p", "h", "v", facts),
        ("p", "g", "w", facts),
        ("g", "p", "v", facts),
        ("p", "g", "v", {**facts, "n_threads": 3}),
        ("p", "g", "v", {**facts, "onnxruntime": "0"}),
    ]
    keys = [cache_key(*entry) for entry in given]
    assert len(set(keys)) == len(keys) and all(len(found) == 64 for found in keys)
    assert cache_key("p", "g", "v", dict(reversed(facts.items()))) == keys[0]
