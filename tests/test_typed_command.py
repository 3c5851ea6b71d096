"""What was typed is kept: in the stamps of builds that passed, without a password."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.commands import keep_command, typed
from tinyllava_edge.export.verify_report import BuildReport, VerifyReport


def test_a_stamp_names_the_command(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of builds that passed just now; older stamps stay as they are, and no stamp appears."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    names = list(read_bundle(root).builds())[:2]
    reports = [BuildReport(name, name == names[0], None, (), 1, 0.0) for name in names]
    read_bundle(root).stamp({names[0]: reports[0].record("ckpt"), "older": {"passed": True}})
    old = read_bundle(root).verified_builds()
    monkeypatch.setattr("sys.argv", ["/x/tinyllava-edge", "verify", "a bundle", "--against", "ckpt"])
    keep_command(root, VerifyReport("m", "", "ckpt", "1", tuple(reports)))
    command = "tinyllava-edge verify 'a bundle' --against ckpt"
    assert read_bundle(root).verified_builds() == {**old, names[0]: {**old[names[0]], "command": command}}


def test_no_password_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "eval", "--judge-url", "https://me:secret@host/v1", "ssh://pi@board/x"])
    assert typed() == "tinyllava-edge eval --judge-url https://host/v1 ssh://pi@board/x"
