"""The scripts of benchmarks/ that compare answers, and arm64-run.sh: what can't be meant is refused before anything is
asked, in words and without a traceback. Nothing here needs qemu, a build for arm64 or a browser, where not said.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("arm64_agreement", "stock_agreement", "browser_agreement")


def ask(script: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *map(str, arguments)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def refused(done: subprocess.CompletedProcess[str], code: int, words: str) -> None:
    """One error and one hint, and nothing else was done."""
    assert re.fullmatch(r"error: .+\nhint: .+\n", done.stderr), done.stderr
    assert (done.returncode, done.stdout) == (code, "") and words in done.stderr, done.stderr


def program(path: Path, text: str) -> Path:
    """A shell script that can be started."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """Says a version and does nothing else: what is refused behind it is refused before it is started."""
    return program(tmp_path / "llama-server", "[ $# = 1 ] && echo version")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_result_that_can_not_be_written(script: str, tmp_path: Path) -> None:
    """Said first: the model that is named isn't there, and isn't looked for."""
    refused(ask(script, "nowhere", "--out", tmp_path), 2, f"{tmp_path}: is no regular file")
    (tmp_path / "file").write_text("kept")
    refused(ask(script, "nowhere", "--out", tmp_path / "file" / "x.json"), 1, "file is a file, no directory")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_to_ask(script: str) -> None:
    refused(ask(script, "nowhere", "--questions", "0"), 2, "\nhint: ask at least one")


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_model(script: str, server: Path, tmp_path: Path) -> None:
    given = ["--server", server] if script == "stock_agreement" else []
    refused(ask(script, tmp_path / "nowhere", *given), 1, f"{tmp_path / 'nowhere'}: ")


# stock_agreement.py


@pytest.mark.parametrize(
    ("runner", "words"),
    [
        ("'unclosed", "--runner 'unclosed: No closing quotation"),
        ("no-such-qemu -L x", "no-such-qemu: no such program\nhint: apt-get install qemu-user-static"),
    ],
)
def test_a_runner_that_can_not_be_meant(runner: str, words: str, server: Path) -> None:
    refused(ask("stock_agreement", "nowhere", "--server", server, "--runner", runner), 2, words)


def test_no_threads(server: Path) -> None:
    refused(ask("stock_agreement", "nowhere", "--server", server, "--threads", "0"), 2, "--threads 0")


def test_a_server_that_can_not_be_run(tmp_path: Path) -> None:
    """It is started once, for its version, before the model is looked for."""
    text = tmp_path / "text"
    text.write_text("no program")
    refused(ask("stock_agreement", "nowhere", "--server", text), 1, "text: can't be started (Permission denied)")
    text.chmod(0o755)
    refused(ask("stock_agreement", "nowhere", "--server", text), 1, "text: can't be started (Exec format error)")
    failing = program(tmp_path / "failing", "echo no such library >&2; exit 3")
    words = f"{failing} --version ended with code 3: no such library"
    refused(ask("stock_agreement", "nowhere", "--server", failing), 1, words)
    runner = program(tmp_path / "runner", "echo can not run $1 >&2; exit 4")
    done = ask("stock_agreement", "nowhere", "--server", text, "--runner", runner)
    refused(done, 1, f"ended with code 4: can not run {text}")


# arm64_agreement.py and browser_agreement.py


def only(folder: Path, *names: str) -> str:
    """A PATH with these programs alone."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(str(shutil.which(name)))
    return str(folder)


def test_no_qemu(tiny_bundle: Path, tmp_path: Path) -> None:
    """Said before this machine answers, which would need more time than the test has."""
    path = only(tmp_path / "bin", "bash", "dirname", "basename")
    done = ask("arm64_agreement", tiny_bundle, "--build", "fp32+f16,fp32+f16", "--questions", "100000", PATH=path)
    refused(done, 1, "qemu-aarch64-static is missing\nhint: apt-get install qemu-user-static")


def test_a_build_that_the_bundle_has_not(tiny_bundle: Path) -> None:
    refused(ask("arm64_agreement", tiny_bundle, "--build", "fp32+f16,../x"), 2, "no build '../x'")


def test_web_files_that_the_bundle_has_not(tiny_bundle: Path) -> None:
    refused(ask("browser_agreement", tiny_bundle, "--precision", "q4"), 2, "no web files of precision q4")


# arm64-run.sh


@pytest.fixture
def half_root(tmp_path: Path) -> Path:
    """A repository with the script and a root that lacks what is mounted; the libraries are there by name."""
    script = tmp_path / "runtimes" / "native" / "arm64-run.sh"
    script.parent.mkdir(parents=True)
    shutil.copy2(ROOT / "runtimes" / "native" / script.name, script)
    for name in ("root/made.txt", "llama/libllama.so"):
        (tmp_path / "build" / "arm64" / name).parent.mkdir(parents=True)
        (tmp_path / "build" / "arm64" / name).touch()
    return script


@pytest.mark.skipif(
    shutil.which("qemu-aarch64-static") is None, reason="no qemu-aarch64-static (apt-get install qemu-user-static)"
)
def test_a_half_root_is_named(half_root: Path) -> None:
    done = subprocess.run([str(half_root), "--", "-V"], capture_output=True, text=True)
    refused(done, 1, "root/proc is missing\nhint: make it anew: runtimes/native/arm64-root.sh --force")


def test_the_inner_half_is_not_for_users(half_root: Path) -> None:
    """Outside its own mount namespace it would mount on the machine's directories."""
    variables = {**os.environ, "ROOT": str(half_root.parent), "STARTED_BY": "1"}
    done = subprocess.run([str(half_root), "--inside", "-V"], capture_output=True, text=True, env=variables)
    refused(done, 2, "unknown argument --inside")
