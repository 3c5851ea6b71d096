"""Files are whole or absent, also after a kill and on a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinyllava_edge import files
from tinyllava_edge.errors import BundleError, StorageError
from tinyllava_edge.files import new_directory, new_file, safe_join, sha256_tree, storage_errors, write_text


def test_new_directory_appears_at_the_end_or_never(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_directory(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with pytest.raises(StorageError, match="exists already"), new_directory(target):
        pass
    with pytest.raises(ValueError, match="boom"), new_directory(target, force=True) as temporary:
        (temporary / "a").write_text("2")
        raise ValueError("boom")
    assert (target / "a").read_text() == "1"
    with new_directory(target, force=True) as temporary:
        (temporary / "a").write_text("3")
    assert (target / "a").read_text() == "3"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_killed_writer_leaves_no_final_name_and_the_next_one_sweeps(tmp_path: Path) -> None:
    code = (
        "import sys,time,pathlib\nfrom tinyllava_edge.files import new_directory\n"
        "with new_directory(pathlib.Path(sys.argv[1])) as t:\n"
        " (t/'half').write_text('x')\n print('ready', flush=True)\n time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    left = [p.name for p in tmp_path.iterdir()]
    assert left == [f".out.tmp-{process.pid}"]
    time.sleep(0.1)
    with new_directory(tmp_path / "out") as temporary:
        (temporary / "whole").touch()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("finished", [False, True])
def test_a_kill_between_the_two_renames_loses_nothing(finished: bool, tmp_path: Path) -> None:
    """The old directory was moved aside; the next run brings it back, or drops it once the new one is in place."""
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "a").write_text("old")
    if finished:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("new")
    with pytest.raises(StorageError, match="exists already"), new_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == ("new" if finished else "old")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_runs_into_one_place(tmp_path: Path) -> None:
    """The second to end replaces nothing."""
    with pytest.raises(StorageError, match="another run"), new_directory(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("first")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "a").read_text() == "first"


def test_new_file_keeps_the_old_one_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.write_text("old")
    with pytest.raises(RuntimeError), new_file(target) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_disk_errors_are_explained(tmp_path: Path) -> None:
    import errno

    with pytest.raises(StorageError, match="no space left") as error, storage_errors(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "free some space" in error.value.hint


@pytest.mark.parametrize("entry", ["/etc/passwd", "../x", "a/../../x", "", "a\\..\\b", "link/x"])
def test_manifest_paths_stay_inside(entry: str, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(BundleError):
        safe_join(root, entry)
    assert safe_join(root, "a/b.onnx") == root / "a" / "b.onnx"


def test_tree_hash_sees_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = sha256_tree(tmp_path)
    (tmp_path / "a").write_text("2")
    second = sha256_tree(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, sha256_tree(tmp_path)}) == 3


def test_a_pipe_or_a_directory_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(StorageError, match="no regular file"):
            write_text(tmp_path / name, "x")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "folder").is_dir()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """What it leads to is replaced, or made where it led to nothing yet."""
    (tmp_path / "there").mkdir()
    (tmp_path / "folder").symlink_to("there")
    (tmp_path / "link").symlink_to("second")
    (tmp_path / "second").symlink_to(Path("folder") / "file")
    for text in ("first", "again"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "there" / "file").read_text() == text
        assert [p.name for p in (tmp_path / "there").iterdir()] == ["file"]
    assert (tmp_path / "link").is_symlink() and (tmp_path / "second").is_symlink()
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(StorageError, match="circle"):
        write_text(tmp_path / "circle", "x")
    assert (tmp_path / "circle").is_symlink()


def test_nothing_below_dev_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root it could be. /dev/stdout is a link, perhaps to the very file that the shell writes to."""
    monkeypatch.setattr(files, "_DEVICES", (tmp_path / "dev",))
    monkeypatch.setattr(files, "_MEMORY", tmp_path / "dev" / "shm")
    (tmp_path / "dev" / "shm").mkdir(parents=True)
    (tmp_path / "shell").write_text("the shell's")
    (tmp_path / "dev" / "stdout").symlink_to(tmp_path / "shell")
    (tmp_path / "dev" / "disk").write_text("a device's")
    (tmp_path / "link").symlink_to("dev/stdout")
    (tmp_path / "folder").symlink_to("dev")
    for name in ("dev/stdout", "dev/disk", "dev/new", "link", "folder/disk", "folder/../dev/disk"):
        with pytest.raises(StorageError, match="no regular file") as caught:
            write_text(tmp_path / name, "x")
        assert str(tmp_path / name) in caught.value.message
    assert (tmp_path / "shell").read_text() == "the shell's" and (tmp_path / "dev" / "disk").read_text() == "a device's"
    assert (tmp_path / "dev" / "stdout").is_symlink() and not (tmp_path / "dev" / "new").exists()
    write_text(tmp_path / "dev" / "shm" / "file", "x")


def test_devices_are_those_of_the_system() -> None:
    for name in ("/dev/stdout", "/proc/self/fd/1", "/dev/fd/1"):
        with pytest.raises(StorageError, match="no regular file"):
            files.end_of_links(Path(name))


def test_force_replaces_only_its_own_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that holds something else stays, and so does the one you stand in."""
    thesis, own, empty = tmp_path / "thesis", tmp_path / "own", tmp_path / "empty"
    for folder in (thesis, own, empty):
        folder.mkdir()
    (thesis / "thesis.tex").write_text("years")
    (own / "bundle.json").write_text("{}")
    with pytest.raises(StorageError, match="something else"), new_directory(thesis, force=True, ours="bundle.json"):
        raise AssertionError("not reached")
    assert (thesis / "thesis.tex").read_text() == "years"
    for folder in (own, empty):
        with new_directory(folder, force=True, ours="bundle.json") as temporary:
            (temporary / "bundle.json").write_text("new")
        assert (folder / "bundle.json").read_text() == "new"
    monkeypatch.chdir(own)
    with pytest.raises(StorageError, match="you are in"), new_directory(Path("."), force=True):
        raise AssertionError("not reached")
