"""What goes wrong on real machines, through the real program: one clear line, a next step, nothing lost."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PROGRAM = [sys.executable, "-m", "tinyllava_edge.cli"]
QUESTION = "what color is the shape?"


def call(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=cwd, stdin=subprocess.DEVNULL
    )


def assert_refused(done: subprocess.CompletedProcess[str], *words: str, code: int = 1) -> None:
    """One `error:` line with the words, one `hint:` line, nothing on stdout, no traceback."""
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(lines) == 2 and lines[0].startswith("error:") and lines[1].startswith("hint:"), done.stderr
    for word in words:
        assert word in lines[0], done.stderr
    assert "Traceback" not in done.stderr and done.stdout.strip() == ""


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_a_good_run_streams_an_answer(tiny_bundle: Path, picture: Path) -> None:
    done = call("run", tiny_bundle, "--image", picture, "-n", 4, QUESTION)
    assert done.returncode == 0, done.stderr
    assert "first token after" in done.stderr and done.stdout.endswith("\n")


def huge_png() -> bytes:
    """30,000 x 30,000 pixels promised by a valid header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(90_001))) + chunk(b"IEND", b"")


def test_pictures(tiny_bundle: Path, picture: Path, tmp_path: Path) -> None:
    cut, text, huge = (tmp_path / name for name in ("cut.png", "text.png", "huge.png"))
    cut.write_bytes(picture.read_bytes()[:3000])
    text.write_text("not a picture")
    huge.write_bytes(huge_png())
    assert_refused(call("run", tiny_bundle, "--image", tmp_path / "none.png", QUESTION), "none.png", "no such file")
    assert_refused(call("run", tiny_bundle, "--image", cut, QUESTION), "cut.png", "truncated")
    assert_refused(call("run", tiny_bundle, "--image", text, QUESTION), "text.png", "not a picture")
    assert_refused(call("run", tiny_bundle, "--image", huge, QUESTION), "huge.png", "pixels")


def test_bundles(copy: Path, picture: Path) -> None:
    data = bytearray((copy / "llm-f16.gguf").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "llm-f16.gguf").write_bytes(data)
    assert_refused(call("run", copy, "--image", picture, QUESTION), "llm-f16.gguf", "SHA-256")
    (copy / "llm-f16.gguf").write_bytes(data[:1000])
    assert_refused(call("run", copy, "--image", picture, QUESTION), "llm-f16.gguf", "1,000 bytes")
    (copy / "vision-fp32.onnx").unlink()
    assert_refused(call("run", copy, "--image", picture, QUESTION), "vision-fp32.onnx", "missing")
    (copy / "verified.json").unlink()
    assert_refused(call("run", copy, "--image", picture, "--build", "int8+q4_k_m", QUESTION), "verified")
    allowed = call(
        "run", copy, "--image", picture, "--build", "int8+q4_k_m", "--allow-unverified", "-n", 2, "--json", "a?"
    )
    assert allowed.returncode == 0 and '"verified": false' in allowed.stdout
    assert_refused(call("run", copy, "--image", picture, "--build", "int4+q1", QUESTION), "int4+q1", code=2)


def test_questions(tiny_bundle: Path, picture: Path) -> None:
    assert_refused(call("run", tiny_bundle, "--image", picture, ""), "question", code=2)
    assert_refused(call("run", tiny_bundle, "--image", picture, "  \n "), "question", code=2)
    assert_refused(call("run", tiny_bundle, "--image", picture, "why " * 5000), "n_ctx")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 6 MB: smaller than the tiny bundle."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_during_export(tiny_checkpoint: Path, small_disk: Path) -> None:
    done = call("export", tiny_checkpoint, "-o", small_disk / "bundle", "--no-verify")
    assert_refused(done, "bundle", "no space")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_export_leaves_no_bundle(how: signal.Signals, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    process = subprocess.Popen(
        [*PROGRAM, "export", str(tiny_checkpoint), "-o", str(out), "--no-verify"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # a shell's background job ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".bundle.tmp-*/*")):  # something was written, not everything
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    _, talk = process.communicate(timeout=60)
    assert not out.exists()
    if how is signal.SIGINT:
        assert process.returncode == 1 and "error: interrupted" in talk and "Traceback" not in talk, talk
        assert list(tmp_path.iterdir()) == []
    again = call("export", tiny_checkpoint, "-o", out, "--no-verify", "--llm", "f16", "--vision", "fp32")
    assert again.returncode == 0, again.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]  # what the kill left behind is swept
    assert_refused(call("export", tiny_checkpoint, "-o", out, "--no-verify"), "exists already")


def test_an_export_never_replaces_its_own_checkpoint(tiny_checkpoint: Path) -> None:
    for out in (tiny_checkpoint, tiny_checkpoint.parent):
        assert_refused(call("export", tiny_checkpoint, "-o", out, "--force"), "checkpoint itself", code=2)
    assert (tiny_checkpoint / "model.safetensors").is_file()
