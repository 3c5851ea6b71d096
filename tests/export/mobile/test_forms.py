"""Names of the forms, and packages that are missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tinyllava_edge.errors import DependencyError, UsageError
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.export.mobile.forms import MOBILE_FORMS, PACKAGES, check_forms

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


def test_order_and_unknown_names() -> None:
    """The table's order, each once; an unknown name is told with the known ones."""
    assert check_forms(()) == ()
    assert check_forms(("coreml", "ort", "coreml")) == ("ort", "coreml")
    with pytest.raises(UsageError, match="unknown mobile form 'tflite'") as raised:
        check_forms(("ort", "tflite"))
    assert all(name in raised.value.hint for name in MOBILE_FORMS)


@pytest.mark.parametrize("form", PACKAGES)
def test_a_missing_package_is_told_before_the_work(
    form: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its extra exists and is named; nothing is written."""
    monkeypatch.setitem(sys.modules, PACKAGES[form], None)
    steps: list[str] = []
    with pytest.raises(DependencyError) as raised:
        export_bundle(tiny_checkpoint, tmp_path / "bundle", mobile=("ort", form), progress=steps.append)
    assert raised.value.hint == f"pip install 'tinyllava-edge[{form}]'"
    assert not steps and not list(tmp_path.iterdir())
    assert f"\n{form} = [" in PYPROJECT.read_text(encoding="utf-8")


def test_the_command_line_refuses_unknown_forms(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Exit code 2, one line and a hint, nothing on stdout."""
    command = [sys.executable, "-m", "tinyllava_edge.cli", "export", tiny_checkpoint, "-o", tmp_path / "b"]
    done = subprocess.run([*command, "--mobile", "ort,mlmodel"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "b").exists()
    assert "error: unknown mobile form 'mlmodel'\nhint: known: ort, coreml, executorch, litert" in done.stderr
