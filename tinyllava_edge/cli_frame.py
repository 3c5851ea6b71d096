"""The frame around the commands: failures become one line and an exit code; stdout is data, stderr is talk."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import typer

from .errors import TinyLlavaEdgeError

EXTRAS = {
    "torch": "train",
    "transformers": "train",
    "accelerate": "train",
    "safetensors": "train",
    "tokenizers": "train",
    "peft": "lora",
    "tensorboard": "train",
    "onnx": "export",
    "onnxscript": "export",
    "gguf": "export",
    "easy_vqa": "data",
    "matplotlib": "report",
    "scipy": "compare",
    "statsmodels": "compare",
    "openai": "judge",
    "openpyxl": "mmbench",
    "onnxruntime": "cpu",
    "uvicorn": "serve",
    "h11": "serve",
    "prometheus_client": "serve",
    "llguidance": "grammar",
    "onnxruntime_genai": "decoder",
    "onnx_ir": "export",
    "ml_dtypes": "export",
    "optimum": "optimum",
    "huggingface_hub": "train",
}
RECENT_S = 30.0  # a failure so soon after Ctrl-C comes from it; a chat goes on after one that stopped an answer
_TYPER_INTERRUPTED = 130  # typer swallows Ctrl-C and returns this


def run_app(app: typer.Typer) -> None:
    """Run the app and leave with its exit code."""

    def call() -> int:
        code = app(standalone_mode=False)
        if code == _TYPER_INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0

    for stream in (sys.stdout, sys.stderr):  # where output goes to a file, Windows would write an old code page
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.exit(guarded(call))


def guarded(call: Callable[[], int]) -> int:
    """Call it and turn every expected failure into one line, its hint, and an exit code that the process ends with.

    Ctrl-C inside a library's `try` may come out as another error, which ours then explain: whatever a command fails
    with after Ctrl-C, it was interrupted.
    """
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells of every temporary file
    pressed = remember_ctrl_c()
    try:
        return call()
    except (KeyboardInterrupt, typer.Abort):
        interrupted()
    except Exception as error:
        if pressed and time.monotonic() - pressed[-1] < RECENT_S:
            interrupted()
        failed(error)


def remember_ctrl_c() -> list[float]:
    """Times (time.monotonic) at which Ctrl-C was pressed, appended as it happens; it still raises KeyboardInterrupt."""
    pressed: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        pressed.append(time.monotonic())
        signal.default_int_handler(number, frame)

    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handle)
    return pressed


def failed(error: Exception) -> NoReturn:
    """Explain an expected failure and leave with its exit code; a bug is raised."""
    if isinstance(error, TinyLlavaEdgeError):
        fail(str(error), error.hint, error.exit_code)
    if isinstance(error, MemoryError):
        fail("out of memory", "close other programs, or choose a smaller build", 1)
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()
        sys.exit(1)
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").partition(".")[0]
        if name in EXTRAS:
            fail(f"this command needs the package {error.name}", f"pip install 'tinyllava-edge[{EXTRAS[name]}]'", 1)
    if isinstance(error, OSError):
        fail(
            f"{error.filename or 'file'}: {error.strerror or error}", "check the path, its permissions and the disk", 1
        )
    usage_exit(error)


def usage_exit(error: Exception) -> NoReturn:
    """Typer's own usage errors print their usual text and exit with 2; anything else is a bug and is raised."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if show is None or code is None:
        raise error
    show()
    sys.exit(code)


def interrupted() -> NoReturn:
    """Say so and leave at once: after Ctrl-C inside exec'd code Python would end itself by signal, not with a code."""
    explain("interrupted; nothing was left half-written", "run the same command again to continue")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def fail(message: str, hint: str, code: int) -> NoReturn:
    """Explain and leave."""
    explain(message, hint)
    sys.exit(code)


def explain(message: str, hint: str) -> None:
    """Print `error: …` and, after it, `hint: …` on stderr."""
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    if hint:
        print(f"hint: {printable(hint)}", file=sys.stderr)


def talk(message: str) -> None:
    """One line of progress on stderr."""
    print(printable(message), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text with what a terminal might obey written as an escape; line breaks and tabs stay, as in a log."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def emit(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
