"""llama.cpp's own programs, cross-built for arm64, under qemu: they answer from our files as our runtimes do.

Built by `make native` (runtimes/native/build.sh). Nothing is timed: qemu's clock says nothing about a device. The
trained model is the demo's; TINYLLAVA_EDGE_DEMO names its directory, `demo/` of the repository by default.
"""

from __future__ import annotations

import base64
import contextlib
import io
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tinyllava_edge.bundle import Bundle
from tinyllava_edge.errors import EngineError
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.runtimes.edge import open_edge
from tinyllava_edge.runtimes.mtmd import open_mtmd

from .conftest import BUILT, DEMO

PROGRAMS = BUILT / "llama"
LIBRARIES = Path("/usr/aarch64-linux-gnu")  # libc and libstdc++ of Debian's cross compilers
QEMU = shutil.which("qemu-aarch64-static")
QUESTION = "what color is the shape?"
LEAST = 0.99
EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")  # float16 attention turns near-ties of random weights

pytestmark = [
    pytest.mark.skipif(
        not (PROGRAMS / "llama-server").is_file(), reason="llama.cpp is not built for arm64 (make native)"
    ),
    pytest.mark.skipif(QEMU is None, reason="no qemu-aarch64-static (apt-get install qemu-user-static)"),
    pytest.mark.skipif(not LIBRARIES.is_dir(), reason=f"no {LIBRARIES} (apt-get install g++-aarch64-linux-gnu)"),
    pytest.mark.timeout(3600),
]
RUNNER = [str(QEMU), "-L", str(LIBRARIES)]


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Random weights, float32 on both sides: what differs is arithmetic's order alone."""
    out = tmp_path_factory.mktemp("stock") / "tiny"
    return export_bundle(tiny_checkpoint, out, llm=("f32",), vision=("fp32",), mmproj=("f32",))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo's checkpoint with what stock hosts need."""
    checkpoint = DEMO / "checkpoint"
    if not checkpoint.is_dir():
        pytest.skip(f"no trained model in {DEMO} (make demo, or set TINYLLAVA_EDGE_DEMO)")
    out = tmp_path_factory.mktemp("stock") / "trained"
    return export_bundle(checkpoint, out, llm=("f16", "q4_0"), vision=("fp32",), mmproj=("f16",))


def png(seed: int, side: int = 64) -> bytes:
    """A coloured square on noise; PNG, because JPEG decoders round in different ways."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    pixels[16:48, 16:48] = [200 * (seed % 2), 90, 40 * seed]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def path_of(bundle: Bundle, role: str, precision: str | None = None) -> Path:
    return next(bundle.path(f) for f in bundle.files if f.role == role and precision in (None, f.precision))


def ask_cli(model: Path, mmproj: Path, picture: Path, tokens: int) -> str:
    """llama-mtmd-cli's greedy answer to QUESTION, stripped."""
    command = [*RUNNER, str(PROGRAMS / "llama-mtmd-cli"), "-m", str(model), "--mmproj", str(mmproj), "--jinja"]
    command += ["-c", "512", "-t", "1", "--temp", "0", "-n", str(tokens), "--no-warmup", "--offline", *EXACT]
    done = subprocess.run(
        [*command, "--image", str(picture), "-p", QUESTION],
        capture_output=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.decode("utf-8", "replace").strip()  # random weights break characters apart, as our runtimes do


@pytest.fixture(scope="module")
def tiny_server(tiny: Bundle, scripts: Any) -> Iterator[Any]:
    """llama-server with the tiny model, its cache in float32 as ours is for such a file."""
    files, exact = (path_of(tiny, "llm"), path_of(tiny, "mmproj")), EXACT
    with scripts.stock_server.StockServer(
        PROGRAMS / "llama-server", *files, runner=RUNNER, context=512, arguments=exact
    ) as server:
        yield server


def test_programs_are_arm64() -> None:
    """Every file is an arm64 ELF; the libraries beside the programs are found there, and nothing else but Debian's."""
    for path in PROGRAMS.iterdir():
        if path.name not in ("LICENSE", "BUILD.txt"):
            head = path.read_bytes()[:20]
            assert head[:5] == b"\x7fELF\x02" and int.from_bytes(head[18:20], "little") == 183, path
    done = subprocess.run([*RUNNER, str(PROGRAMS / "llama-server"), "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and "aarch64" in done.stderr + done.stdout


def test_cli_answers(tiny: Bundle, tmp_path: Path) -> None:
    """The same tokens as the edge runtime's and mtmd's on this machine."""
    picture = tmp_path / "picture.png"
    picture.write_bytes(png(1))
    with contextlib.closing(open_edge(tiny, "fp32+f32", allow_unverified=True)) as runtime:
        wanted = runtime.answer(picture, QUESTION, max_tokens=8).text
    with contextlib.closing(open_mtmd(tiny, "fp32+f32")) as runtime:
        assert runtime.answer(picture, QUESTION, max_tokens=8).text == wanted
    assert wanted
    assert ask_cli(path_of(tiny, "llm"), path_of(tiny, "mmproj"), picture, 8) == wanted


def test_server_answers(tiny: Bundle, tiny_server: Any) -> None:
    """Several pictures, and one picture again with another question: the server's prefix cache is in use."""
    asked = [(png(1), QUESTION), (png(2), QUESTION), (png(1), "how many?"), (png(3, 48), QUESTION)]
    with contextlib.closing(open_edge(tiny, "fp32+f32", allow_unverified=True)) as runtime:
        wanted = [runtime.answer(picture, question, max_tokens=8).text for picture, question in asked]
    assert [tiny_server.ask(picture, question, max_tokens=8) for picture, question in asked] == wanted
    assert len(set(wanted)) > 1  # it does look at the pictures


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + base64.b64encode(png(1)[:60]).decode(),
        "data:image/png;base64,AAAA",
        "data:text/plain;base64,AAAA",
        "file:///etc/passwd",
        "",
    ],
)
def test_bad_pictures_are_refused(url: str, tiny_server: Any) -> None:
    """An error, and the server goes on."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    body = {"temperature": 0, "max_tokens": 2, "messages": [{"role": "user", "content": content}]}
    status, reply = tiny_server.post("/v1/chat/completions", body)
    assert 400 <= status < 600 and "error" in reply
    assert tiny_server.ask(png(1), QUESTION, max_tokens=2)


@pytest.mark.parametrize("role", ["llm", "mmproj"])
def test_truncated_files_end_the_server(role: str, tiny: Bundle, scripts: Any, tmp_path: Path) -> None:
    """It ends by itself, with an error code, and within the time it has to start."""
    files = {name: path_of(tiny, name) for name in ("llm", "mmproj")}
    cut = tmp_path / files[role].name
    cut.write_bytes(files[role].read_bytes()[: files[role].stat().st_size // 2])
    files[role] = cut
    with pytest.raises(EngineError, match=r"ended with code [1-9]"):
        scripts.stock_server.StockServer(
            PROGRAMS / "llama-server", files["llm"], files["mmproj"], runner=RUNNER, context=512
        )


@pytest.mark.parametrize(
    ("llm", "cpu", "questions"), [("f16", "max", 40), ("f16", "cortex-a53", 10), ("q4_0", "max", 20)]
)
def test_agreement(
    llm: str, cpu: str, questions: int, trained: Bundle, scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's model on easy-VQA: what the script measures, in small. benchmarks/results has the long run."""
    monkeypatch.setenv("QEMU_CPU", cpu)
    found = scripts.stock_agreement.compare(trained, llm, "f16", PROGRAMS / "llama-server", RUNNER, questions)
    assert found["questions"] == questions
    assert found["equal"] >= LEAST, found["differ"]
    assert found["right"] >= found["edge_right"] - (1 - LEAST)
