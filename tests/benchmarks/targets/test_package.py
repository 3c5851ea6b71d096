"""Our code as a zip holds what runs here and asks for what pyproject.toml says; options travel and come back."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import tinyllava_edge
from tinyllava_edge.benchmarks.targets.job import decode, encode
from tinyllava_edge.benchmarks.targets.package import pack, requirements
from tinyllava_edge.errors import DataError, UsageError

ROOT = Path(tinyllava_edge.__file__).parents[1]


def test_unpacked_it_runs_alone(tmp_path: Path) -> None:
    """Another interpreter imports the measuring code from the zip's files and from nowhere else of ours."""
    zipfile.ZipFile(io.BytesIO(pack().content)).extractall(tmp_path)
    code = tmp_path / "tinyllava_edge"
    assert (code / "benchmarks/targets/device.py").is_file() and (code / "benchmarks/report.css").is_file()
    assert not (code / "nano").exists()
    find = "import tinyllava_edge.benchmarks.targets.remote as r, tinyllava_edge.benchmarks.latency; print(r.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", find],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.strip() == str(code / "benchmarks/targets/remote.py")


def test_same_files_same_bytes() -> None:
    first = pack()
    pack.cache_clear()
    assert pack().sha256 == first.sha256 and len(first.content) < 4e6


def test_requirements_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["cpu"]

    def parts(line: str) -> tuple[str, frozenset[str]]:
        name = line.split(">")[0].split("<")[0]
        return name, frozenset(line[len(name) :].split(","))

    assert {parts(line) for line in requirements()} == {parts(line) for line in wanted}


def test_options_there_and_back(tmp_path: Path) -> None:
    picture = tmp_path / "..x y.png"
    picture.write_bytes(b"1")
    options = {"picture": picture, "builds": ("a", "b"), "n": None, "deep": {"sizes": [1, 2.5, "3x4"]}}
    value, files = encode(options)
    (tmp_path / "inputs").mkdir()
    for name, path in files.items():
        assert "/" not in name
        (tmp_path / "inputs" / name).write_bytes(path.read_bytes())
    back = {key: decode(entry, tmp_path / "inputs") for key, entry in value.items()}
    assert back.pop("picture").read_bytes() == b"1"
    assert back == {"builds": ["a", "b"], "n": None, "deep": {"sizes": [1, 2.5, "3x4"]}}


def test_options_that_cant_travel(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a file"):
        encode({"picture": tmp_path})
    with pytest.raises(UsageError, match="a set can't"):
        encode({"builds": {"a"}})
    for name in ("../x", "none"):
        with pytest.raises(DataError, match="no "):
            decode({"$file": name}, tmp_path)
