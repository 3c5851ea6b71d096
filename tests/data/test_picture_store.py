"""Pictures in folders, zip and tar files: the same bytes as unpacked, in any process; tables that are whole."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tinyllava_edge.data import picture_sources
from tinyllava_edge.data.picture_store import PictureStore, open_store
from tinyllava_edge.errors import DataError, ImageError, StorageError

from .archives import make_tar, make_zip

FILES = {"a.png": b"one", "b/c.jpg": bytes(range(256)) * 40, "b/ü.png": b"", "d.webp": b"z" * 100_000}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    for name, data in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def opened(path: Path, **options: Any) -> PictureStore:
    return open_store([path], path.parent / "index", **options)


@pytest.mark.parametrize("kind", ["stored", "deflated", "tar", "tar of a folder"])
def test_archives_give_what_the_folder_gives(kind: str, folder: Path, tmp_path: Path) -> None:
    if kind == "tar":
        path = make_tar(tmp_path / "x.tar", FILES)
    elif kind == "tar of a folder":  # names begin with ./, long ones have a record of their own
        path = tmp_path / "x.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            archive.add(folder, ".")
    else:
        path = make_zip(tmp_path / "x.zip", FILES, zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED)
    store, unpacked = opened(path), opened(folder)
    for name in ["a.png", "b/c.jpg", "./b//c.jpg", "d.webp"]:
        assert name in store and name in unpacked and f"{path.name}/{name}" in store
        assert store.read(name) == store.read(f"{path.name}/{name}") == unpacked.read(name)
        assert store.size(name) == unpacked.size(name) == len(unpacked.read(name))
        assert store.fault(name) == unpacked.fault(name) == "" and store.origin(name) == path
    assert "b/ü.png" in store and store.size("b/ü.png") == 0
    for name in ["none.png", "b", "", "../folder/a.png", "/etc/passwd", "a\0.png", "b\\c.jpg", "x" * 5000, "\ud800"]:
        for each in (store, unpacked):
            assert name not in each and each.fault(name) and each.origin(name) is None
            with pytest.raises(ImageError):
                each.read(name)


def test_the_first_source_counts_and_links_in_folders_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "linked").symlink_to(folder / "b")
    archive = make_zip(tmp_path / "x.zip", {"a.png": b"two", "more.png": b"three"})
    store = open_store([folder, archive], tmp_path / "index")
    assert store.read("a.png") == b"one" and store.read("more.png") == b"three"
    assert store.read("x.zip/a.png") == b"two" and store.read("linked/c.jpg") == FILES["b/c.jpg"]
    assert open_store([archive, folder], tmp_path / "index").read("a.png") == b"two"
    assert open_store([], tmp_path / "index").fault("a.png").endswith("any --images: none is given")


def test_fingerprints_are_stable_and_follow_the_contents(folder: Path, tmp_path: Path) -> None:
    first = opened(make_zip(tmp_path / "x.zip", FILES)), opened(make_tar(tmp_path / "x.tar", FILES)), opened(folder)
    again = [opened(tmp_path / "x.zip"), opened(tmp_path / "x.tar"), opened(folder)]
    for one, other in zip(first, again, strict=True):
        assert [one.fingerprint(name) for name in FILES] == [other.fingerprint(name) for name in FILES]
    before = first[0].fingerprint("a.png")
    assert opened(make_zip(tmp_path / "x.zip", {**FILES, "a.png": b"eno"})).fingerprint("a.png") != before


def read_all(store: PictureStore) -> list[bytes]:
    return [store.read(name) for name in FILES if FILES[name]]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_open_the_archives_for_themselves(method: str, tmp_path: Path) -> None:
    store = open_store(
        [make_zip(tmp_path / "x.zip", {"a.png": FILES["a.png"]}), make_tar(tmp_path / "x.tar", FILES)],
        tmp_path / "index",
    )
    wanted = read_all(store)
    assert read_all(pickle.loads(pickle.dumps(store))) == wanted
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_all, [store] * 4) == [wanted] * 4
    assert read_all(store) == wanted


def reuses_the_parents_handles(store: PictureStore) -> bool:
    inherited = list(picture_sources._handles.opened.values())
    read_all(store)
    return any(handle in inherited for handle in picture_sources._handles.opened.values())


def test_a_forked_child_leaves_the_parents_handles_alone(tmp_path: Path) -> None:
    """SQLite forbids using a connection on both sides of a fork."""
    store = opened(make_zip(tmp_path / "x.zip", FILES))
    read_all(store)
    assert reuses_the_parents_handles(store)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert not pool.apply(reuses_the_parents_handles, (store,))


def test_more_archives_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_sources, "_OPEN", 3)
    paths = [make_tar(tmp_path / f"{k}.tar", {f"{k}.png": str(k).encode()}) for k in range(8)]
    store = open_store(paths, tmp_path / "index")
    assert store.read("0.png") == b"0"
    before = len(os.listdir("/proc/self/fd"))
    for k in [*range(8), *range(8)]:
        assert store.read(f"{k}.png") == str(k).encode()
    assert len(os.listdir("/proc/self/fd")) == before


# tables


def test_a_table_is_built_once_and_anew_when_the_archive_changed(tmp_path: Path) -> None:
    calls: list[tuple[Path, int]] = []
    path = make_zip(tmp_path / "x.zip", FILES)
    old = opened(path, on_progress=lambda *call: calls.append(call))
    assert calls == [(path, len(FILES))]
    opened(path, on_progress=lambda *call: calls.append(call))
    assert len(calls) == 1
    make_zip(path, {"new.png": b"new"})
    os.utime(path, ns=(1, 1))
    new = opened(path, on_progress=lambda *call: calls.append(call))
    assert len(calls) == 2 and new.read("new.png") == b"new" and "a.png" not in new
    assert len(list((tmp_path / "index").iterdir())) == 1
    with pytest.raises(ImageError, match="changed since this run began"):
        old.read("a.png")


def test_an_archive_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", FILES)
    with pytest.raises(DataError, match="changed while it was read"):
        opened(path, on_progress=lambda *_: os.utime(path, ns=(1, 1)))
    assert list((tmp_path / "index").iterdir()) == [] and opened(path).read("a.png") == b"one"


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "no row"])
def test_a_damaged_table_is_built_anew(damage: str, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", FILES)
    opened(path)
    (table,) = (tmp_path / "index").iterdir()
    if damage == "no row":
        with sqlite3.connect(table) as db:
            db.execute("DELETE FROM archive")
    else:
        whole = table.read_bytes()
        table.write_bytes({"empty": b"", "cut": whole[:100], "noise": b"x" * len(whole)}[damage])
    assert opened(path).read("a.png") == b"one"


def test_a_killed_build_leaves_no_table_and_the_next_one_sweeps(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", {f"{k}.png": b"x" for k in range(2000)})
    code = """
        import sys, time
        from pathlib import Path
        from tinyllava_edge.data import archive_index
        from tinyllava_edge.data.picture_store import open_store
        archive_index.EVERY = 1000
        def wait(*_):
            print("half", flush=True)
            time.sleep(60)
        path = Path(sys.argv[1])
        open_store([path], path.parent / "index", on_progress=wait)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"half\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    left = list((tmp_path / "index").iterdir())
    assert len(left) == 1 and ".tmp-" in left[0].name
    assert opened(path).read("1999.png") == b"x"
    assert [file.suffix for file in (tmp_path / "index").iterdir()] == [".sqlite"]


def test_a_table_that_can_not_be_written_is_a_storage_error(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", FILES)
    (tmp_path / "index").write_text("a file in the directory's place")
    with pytest.raises(StorageError, match="index: no directory"):
        opened(path)


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    """A limit on file sizes stands in for it; sqlite tells it in words of its own."""
    path = make_tar(tmp_path / "x.tar", {f"{k:0100d}.png": b"x" for k in range(500)})
    code = """
        import resource, signal, sys
        from pathlib import Path
        from tinyllava_edge.data.picture_store import open_store
        from tinyllava_edge.errors import DataError, StorageError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        path = Path(sys.argv[1])
        try:
            open_store([path], path.parent / "index")
        except (DataError, StorageError) as error:
            print(error.message)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], capture_output=True, text=True, check=True
    )
    assert "sqlite" in out.stdout and "written" in out.stdout
    assert list((tmp_path / "index").iterdir()) == []
