"""runtimes/native/build.sh before it compiles: it refuses what it can't use, in words, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "runtimes" / "native" / "build.sh"
BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(BASH is None, reason="no bash")


def build(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [str(BASH), str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, env=environment
    )


def test_help() -> None:
    done = build("--help")
    assert done.returncode == 0 and not done.stderr
    for word in ("--arch", "--native", "--work", "--jobs", "--sdist", "build/arm64/llama"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--arch", "x86-64"),
        ("--arch", "armv8-a; rm"),
        ("--arch", "armv8-a/../.."),
        ("--arch",),
        ("--arch", ""),
        ("--native", "--arch", "armv8-a"),
        ("--jobs", "0"),
        ("--jobs", "many"),
        ("everything",),
    ],
)
def test_command_lines_that_are_refused(arguments: tuple[str, ...]) -> None:
    done = build(*arguments)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .+\nhint: build.sh --help\n", done.stderr)


def test_missing_tools_are_named(tmp_path: Path) -> None:
    """All at once, with the packages that bring them."""
    for name in ("dirname", "cat", "sed", "nproc"):  # what the script needs until it looks for its tools
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    done = build("--work", str(tmp_path / "work"), PATH=str(tmp_path))
    assert done.returncode == 1
    for word in ("cmake", "ninja-build", "gcc-aarch64-linux-gnu", "g++-aarch64-linux-gnu", "python3-pip"):
        assert word in done.stderr
    assert not (tmp_path / "work").exists()


@pytest.fixture
def tools() -> None:
    """What build.sh looks for before it takes the sources."""
    for name in ("cmake", "ninja", "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", "aarch64-linux-gnu-strip"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name}: see build.sh's message")


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("arch", ["armv9", "armv8-a+nothing"])
def test_the_compiler_knows_what_arch_can_be(arch: str, tmp_path: Path) -> None:
    """It is asked before the sources are fetched."""
    done = build("--arch", arch, "--work", str(tmp_path / "work"))
    assert done.returncode == 2 and not (tmp_path / "work").exists()
    assert re.fullmatch(
        rf"error: --arch {re.escape(arch)}: the compiler doesn't know it\nhint: it takes .+\n", done.stderr
    )


@pytest.mark.usefixtures("tools")
def test_paths_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    work, nowhere = ("--work", str(tmp_path / "work")), str(tmp_path / "nowhere")
    for arguments, variables, words in (
        ((*work, "--sdist", nowhere), {}, f"--sdist {nowhere}: no file"),
        ((*work, "--sdist", str(tmp_path)), {}, f"--sdist {tmp_path}: no file"),
        (("--work", str(tmp_path / "file")), {}, "file: no directory that can be made or written to"),
        (work, {"PYTHON": nowhere}, f"PYTHON={nowhere}: no such program"),
    ):
        done = build(*arguments, **variables)
        assert done.returncode == 1 and re.fullmatch(r"error: .+\nhint: .+\n", done.stderr), done.stderr
        assert words in done.stderr and "python3-pip" not in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


CMAKE_LISTS = """
cmake_minimum_required(VERSION 3.14)
project(small C)
add_library(small SHARED small.c)
foreach(name llama-server llama-mtmd-cli)
  add_executable(${name} main.c)
  target_link_libraries(${name} small)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
endforeach()
set_target_properties(small PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
"""


def test_sources_of_unknown_origin_give_way(tmp_path: Path) -> None:
    """The script with a small program's sources and their digest: it unpacks them anew where the mark is missing or
    another one, and BUILD.txt says so."""
    if missing := [name for name in ("cmake", "ninja", "cc", "c++", "strip") if shutil.which(name) is None]:
        pytest.skip(f"no {missing[0]}: see build.sh's message")
    name, sdist = f"llama_cpp_python-{pinned()}", tmp_path / "sources.tar.gz"
    main = "int small(void); int main(void) { return small(); }"
    files = {
        "CMakeLists.txt": CMAKE_LISTS,
        "main.c": main,
        "small.c": "int small(void) { return 7; }",
        "LICENSE": "ours",
    }
    with tarfile.open(sdist, "w:gz") as archive:
        for file, text in files.items():
            member = tarfile.TarInfo(f"{name}/vendor/llama.cpp/{file}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    script = tmp_path / "runtimes" / "native" / "build.sh"
    script.parent.mkdir(parents=True)
    script.write_text(re.sub(r"echo [0-9a-f]{64} ;;", f"echo {digest} ;;", SCRIPT.read_text()))
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    whole, built = tmp_path / "build" / "llama.cpp" / name, tmp_path / "build" / "native" / "llama"

    def unpacked() -> str:
        command = [str(BASH), str(script), "--native", "--jobs", "1", "--sdist", str(sdist)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert subprocess.run([str(built / "llama-server")]).returncode == 7
        assert [path.name for path in whole.parent.glob("*.tmp-*")] == []
        lines = (built / "BUILD.txt").read_text().splitlines()
        assert lines[0].endswith(digest)
        return lines[1]

    whole.mkdir(parents=True)
    (whole / "strange").touch()  # sources from nobody knows where
    assert unpacked() == "sources unpacked by this run" and not (whole / "strange").exists()
    assert unpacked() == "sources unpacked by an earlier run and not read again"
    (whole / ".sdist-sha256").write_text("0" * 64)
    assert unpacked() == "sources unpacked by this run"


def pinned() -> str:
    version = re.search(r"^llama_cpp_python==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert version is not None
    return version[1]


@pytest.mark.usefixtures("tools")
def test_another_source_distribution_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "llama_cpp_python.tar.gz"
    wrong.write_bytes(b"something else")
    done = build("--work", str(tmp_path / "work"), "--sdist", str(wrong))
    assert done.returncode == 1
    assert f"error: {wrong} has SHA-256 " in done.stderr and "hint: " in done.stderr
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.usefixtures("tools")
def test_no_code_of_another_source_distribution_is_run(tmp_path: Path) -> None:
    """An index offers other sources of the pinned name and version: pip refuses them before it asks their backend."""
    name, mark = f"llama_cpp_python-{pinned()}", tmp_path / "was-run"
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "PKG-INFO": f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {pinned()}\n",
        "backend.py": f"open({str(mark)!r}, 'w')\n",
    }
    index = tmp_path / "index"
    index.mkdir()
    with tarfile.open(index / f"{name}.tar.gz", "w:gz") as archive:
        for file, text in files.items():
            member = tarfile.TarInfo(f"{name}/{file}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    pip = {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}
    done = build("--work", str(tmp_path / "work"), **pip)
    assert done.returncode == 1 and "error: pip can't download" in done.stderr and "hint: " in done.stderr
    assert not mark.exists() and list((tmp_path / "work").iterdir()) == []


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_cut_download_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """The index takes the connection and says nothing, so pip waits until the signal comes."""
    work = tmp_path / "work"
    with socket.create_server(("127.0.0.1", 0)) as index:
        url = f"http://127.0.0.1:{index.getsockname()[1]}/"
        pip = {"PYTHON": sys.executable, "PIP_INDEX_URL": url, "PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1"}
        process = subprocess.Popen(
            [str(BASH), str(SCRIPT), "--work", str(work)],
            env={**os.environ, **pip},
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            index.settimeout(60)
            with index.accept()[0]:  # pip asks
                assert [path.name for path in work.iterdir()] == [f"download.tmp-{process.pid}"]
                os.killpg(process.pid, number)
                assert process.wait(60) == 128 + number
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert list(work.iterdir()) == []


def test_the_pinned_version_is_known() -> None:
    """A new pin in constraints.txt needs a new digest."""
    assert re.search(rf"^ *{re.escape(pinned())}\) echo [0-9a-f]{{64}} ;;$", SCRIPT.read_text(), re.MULTILINE)
