"""A training replaces nothing that is not its own, and two of them don't write the same places."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from tinyllava_edge.errors import StorageError, UsageError
from tinyllava_edge.train import places
from tinyllava_edge.train.places import cache_directory, check_places, claimed, start_directory, tidy, work_directory


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_no_name_for_a_directory(name: str) -> None:
    with pytest.raises(UsageError, match="no name"):
        check_places(Path(name), [])


def test_links_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a link"):
        check_places(tmp_path / "link", [])
    with pytest.raises(UsageError, match="is no directory"):
        check_places(tmp_path / "file", [])


@pytest.mark.parametrize("suffix", ["", ".work", ".cache", ".adapter", ".init"])
def test_what_is_read_is_not_written(suffix: str, tmp_path: Path) -> None:
    """The input itself, or something that holds it."""
    out = tmp_path / "out"
    inside = tmp_path / f"out{suffix}" / "deep" / "d.json"
    inside.parent.mkdir(parents=True)
    inside.write_text("[]")
    with pytest.raises(UsageError, match="is read, and"):
        check_places(out, [inside])
    check_places(tmp_path / "other", [tmp_path, inside, None])  # a new directory beside the data is as usual
    if suffix == ".init":  # where the untrained model is kept
        check_places(out, [start_directory(out)])
    else:
        with pytest.raises((UsageError, StorageError)):
            check_places(out, [tmp_path / f"out{suffix}"])


def test_what_others_left_there_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for place, own in ((work_directory(out), "job.json"), (cache_directory(out), "tokens-1")):
        place.mkdir()
        (place / own).touch()
        check_places(out, [])
        (place / "mine.txt").touch()
        with pytest.raises(StorageError, match="mine.txt"):
            check_places(out, [])
        (place / "mine.txt").unlink()
    tidy(out, cache=False)
    assert not work_directory(out).exists() and cache_directory(out).exists()
    tidy(out, cache=True)
    assert not cache_directory(out).exists()


def _hold(out: Path, held: multiprocessing.synchronize.Event, end: multiprocessing.synchronize.Event) -> None:
    with claimed(out):
        held.set()
        end.wait(60)


def test_one_command_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PATIENCE_S", 0.3)
    context = multiprocessing.get_context("fork")
    held, end = context.Event(), context.Event()
    child = context.Process(target=_hold, args=(tmp_path / "out", held, end))
    child.start()
    try:
        assert held.wait(60)
        with pytest.raises(StorageError, match="another command"), claimed(tmp_path / "out"):
            pass
        monkeypatch.setenv("RANK", "1")  # of one run, the first process asks for all
        with claimed(tmp_path / "out"):
            pass
    finally:
        end.set()
        child.join()
    monkeypatch.delenv("RANK")
    with claimed(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())
