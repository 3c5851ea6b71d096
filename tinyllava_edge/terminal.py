"""`tinyllava-edge run`: one answer, or a chat in the terminal. stdout is the answer, stderr is talk."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .bundle import read_bundle
from .errors import TinyLlavaEdgeError, UsageError
from .image import load_image
from .prompt import Turn
from .runtimes.base import Answer
from .runtimes.engine import Engine, open_bundle
from .runtimes.request import Request, ask

MAX_TEXT_BYTES = 1 << 20  # of a grammar or a schema
HELP = """\
/image PATH   show a picture with the next question; several may be given
/new          forget the conversation
/system TEXT  replace the system text; without TEXT, the model's own again
/stats        what the caches hold
/help         this list
/quit         leave; Ctrl-D does too. Ctrl-C stops an answer, and leaves at the prompt"""


def answer_once(
    bundle: Path,
    question: str,
    images: Sequence[Path],
    engine: Mapping[str, Any],
    request: Mapping[str, Any],
    show: bool,
) -> dict[str, Any]:
    """Answer one question; with `show` the text goes to stdout as it comes and the timings to stderr.

    Args:
        bundle: directory.
        question: what is asked.
        images: pictures that it is about.
        engine: arguments of open_bundle.
        request: fields of Request.
        show: stream for people.

    Returns:
        JSON values: the answer, its build and whether that is verified, counts, timings, what ran where.
    """
    opened = read_bundle(bundle)
    wanted = ask(question, images, **request)
    with open_bundle(opened, **engine) as runtime:
        answer = say(runtime, wanted) if show else runtime.answer(wanted)
        if show:
            print(timing_line(answer, runtime.build), file=sys.stderr)
        return {
            **answer.to_dict(),
            "build": runtime.build,
            "verified": opened.is_verified(opened.build(runtime.build)),
            "environment": runtime.environment(),
        }


def say(engine: Engine, request: Request) -> Answer:
    """Stream an answer to stdout. Ctrl-C cancels it and is passed on."""
    with engine.submit(request) as generation:
        for piece in generation:
            print(piece, end="", flush=True)
        print(flush=True)
        return generation.result()


def timing_line(answer: Answer, build: str) -> str:
    """One line for people: where the time of an answer went."""
    t = answer.timings
    rate = answer.decode_tokens_per_s
    cached = f", {answer.n_cached_tokens} of them cached" if answer.n_cached_tokens else ""
    return (
        f"[{build}] load {t.load_ms:.0f} ms · first token after {t.ttft_ms:.1f} ms "
        f"(decode image {t.decode_image_ms:.1f}, preprocess {t.preprocess_ms:.1f}, vision {t.vision_ms:.1f}, "
        f"prefill {t.prefill_ms:.1f} for {answer.n_prompt_tokens} tokens, "
        f"{answer.n_image_tokens} of them image{cached})" + (f" · {rate:.0f} tokens/s" if rate else "")
    )


def chat(bundle: Path, images: Sequence[Path], engine: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Talk with a build until /quit or the end of stdin; lines that begin with `/` are commands."""
    with open_bundle(bundle, **engine) as runtime:
        talk = Chat(runtime, request)
        for path in images:
            talk.show_picture(str(path))
        tell(f"{runtime.name}, build {runtime.build}. /help lists the commands.")
        with contextlib.suppress(KeyboardInterrupt):  # pressed between two answers: as at the prompt, it leaves
            converse(talk)


def converse(talk: Chat) -> None:
    """Line by line; Ctrl-C inside an answer stops that one only."""
    while (line := read_line()) is not None:
        try:
            if not talk.take(line):
                return
        except KeyboardInterrupt:
            print(flush=True)
            tell("stopped")
        except TinyLlavaEdgeError as error:
            tell(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))


class Chat:
    """One conversation: its turns, its pictures, and what the next question shows."""

    def __init__(self, engine: Engine, request: Mapping[str, Any]) -> None:
        self._engine = engine
        self._request = dict(request)
        self.turns: list[Turn] = []
        self.pictures: list[Path] = []
        self._shown: list[Path] = []

    def take(self, line: str) -> bool:
        """Obey a command or answer a question; False at /quit."""
        command, _, rest = line.strip().partition(" ")
        if not command:
            return True
        if command == "/quit":
            return False
        actions: dict[str, Callable[[], None]] = {
            "/image": lambda: self.show_picture(rest.strip().strip("'\"")),
            "/new": self.forget,
            "/system": lambda: self.set_system(rest.strip()),
            "/stats": lambda: tell(str(self._engine.stats()["caches"])),
            "/help": lambda: tell(HELP),
        }
        if command in actions:
            actions[command]()
        elif command.startswith("/"):
            tell(f"unknown command {command}; /help lists them")
        else:
            self.ask(line.strip())
        return True

    def ask(self, question: str) -> None:
        """Answer a question; the conversation grows only when the answer is whole."""
        turns = [*self.turns, Turn(question, images=len(self._shown))]
        pictures = [*self.pictures, *self._shown]
        answer = say(self._engine, Request(tuple(turns), tuple(pictures), **self._request))
        tell(timing_line(answer, self._engine.build))
        self.turns = [*turns[:-1], replace(turns[-1], answer=answer.text)]
        self.pictures, self._shown = pictures, []

    def show_picture(self, path: str) -> None:
        """Show a picture with the next question. Raises ImageError if it can't be used."""
        height, width, _ = load_image(path).shape
        self._shown.append(Path(path))
        tell(f"{path}: {width} x {height}, shown with the next question")

    def forget(self) -> None:
        """Begin anew."""
        self.turns, self.pictures, self._shown = [], [], []
        tell("a new conversation")

    def set_system(self, text: str) -> None:
        """Replace the system text."""
        self._request["system"] = text or None
        tell("system text " + ("replaced" if text else "is the model's own again"))


def read_line() -> str | None:
    """A line from stdin, asked for with `> ` where somebody types; None at its end or at Ctrl-C."""
    try:
        asked = "> " if sys.stdin.isatty() else ""
        if asked:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  line editing and history for input()
        return input(asked)
    except (EOFError, KeyboardInterrupt):
        return None


def read_limited(path: Path) -> str:
    """A small text file. Raises UsageError where it is missing, too large or not UTF-8."""
    try:
        data = path.read_bytes() if path.stat().st_size <= MAX_TEXT_BYTES else None
    except OSError as error:
        raise UsageError(f"{path}: can't be read ({error.strerror})", "check the path") from error
    if data is None:
        raise UsageError(f"{path}: larger than {MAX_TEXT_BYTES:,} bytes", "a grammar or schema is a small text file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text", "save it as UTF-8") from error


def read_schema(path: Path) -> dict[str, Any]:
    """A JSON schema from a file. Raises UsageError where it is none."""
    try:
        value = json.loads(read_limited(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON ({error})", "a JSON schema is a JSON object") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}: a JSON schema is an object, this is a {type(value).__name__}")
    return value


def tell(text: str) -> None:
    """Talk on stderr."""
    print(text, file=sys.stderr, flush=True)
