"""What `bench` measures: the grid on the command line, and llama-bench's two tests on the decoder alone.

`-p 512` is the test `pp512`: 512 text tokens through the decoder at once. `-n 128` is `tg128`: 128 tokens one after the
other, from an empty context on. As in llama-bench the tokens are arbitrary, neither tokenising nor choosing a token
counts, and both are given in tokens per second. What differs is the batch: it is the runtime's own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllava_edge.errors import UsageError

if TYPE_CHECKING:
    from tinyllava_edge.runtimes.llama import Llama

REPETITIONS, MIN_TIME_S, MAX_TIME_S = 20, 3.0, 600.0  # `bench` without flags
RESOLUTION = 0.05  # with it, a build that is 10 % slower is all but sure to be found
QUESTION, MAX_TOKENS = "what color is the shape?", 16
DEVICES = ("cpu", "cuda")
MOST_TOKENS = 1 << 20
MOST_SIDE = 8192  # pixels of a generated picture's side
MOST_THREADS = 1024
ANSWER, PREFILL, DECODE = "answer", "pp", "tg"  # kinds of Task
Size = tuple[int, int]
_SIZE = re.compile(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", re.ASCII)
_COUNT = re.compile(r"[1-9]\d{0,7}", re.ASCII)


@dataclass(frozen=True)
class Task:
    """One thing that every build is measured on in every round."""

    kind: str
    """`answer`, `pp` or `tg`"""
    size: int = 0
    """tokens of a `pp` or `tg` test"""
    picture: Path | None = None
    """picture of an answer; None asks without one"""
    picture_size: Size | None = None
    """its width and height"""
    mark: str = ""
    """what is appended to the stages' names; empty for the grid's first picture"""

    @property
    def name(self) -> str:
        """`answer`, `pp512`, `tg128`."""
        return self.kind if self.kind == ANSWER else f"{self.kind}{self.size}"


def counts(text: str, flag: str, most: int = MOST_TOKENS) -> tuple[int, ...]:
    """`128,512` → (128, 512), without repeats; nothing for an empty text. Raises UsageError that names the part."""
    found = [_count(part, flag, most) for part in _parts(text)]
    return tuple(dict.fromkeys(found))


def image_sizes(values: str | Sequence[str | int | Sequence[int]]) -> tuple[Size, ...]:
    """`64,640x480`, or a list of such parts → widths and heights, without repeats. Raises UsageError."""
    parts = _parts(values) if isinstance(values, str) else values
    return tuple(dict.fromkeys(_image_size(part) for part in parts))


def devices(values: str | Sequence[str]) -> tuple[str, ...]:
    """`cpu,cuda` → names, without repeats. Raises UsageError for an unknown one or none at all."""
    parts = tuple(dict.fromkeys(_parts(values) if isinstance(values, str) else values))
    for part in parts:
        if part not in DEVICES:
            raise UsageError(f"--device {str(part)[:40]!r}", f"known: {', '.join(DEVICES)}")
    if not parts:
        raise UsageError("--device names none", f"known: {', '.join(DEVICES)}")
    return parts


def tasks(
    picture: Path | None, sizes: Sequence[Size], prompt_tokens: Sequence[int], gen_tokens: Sequence[int], scratch: Path
) -> list[Task]:
    """What to measure, in order: an answer per picture, then the decoder's tests.

    Args:
        picture: the user's picture, its own size; a generated scene otherwise.
        sizes: scenes of these sizes; without any, and without decoder tests either, one of the model's smallest size.
        prompt_tokens: sizes of `pp` tests.
        gen_tokens: sizes of `tg` tests.
        scratch: directory for the scenes.

    Raises:
        UsageError: a picture as well as sizes.
    """
    if picture is not None and sizes:
        raise UsageError("--image has a size of its own", "give --image or --image-size, not both")
    decoder = [Task(PREFILL, n) for n in prompt_tokens] + [Task(DECODE, n) for n in gen_tokens]
    if picture is not None:
        return [Task(ANSWER, picture=picture, picture_size=_size_of(picture)), *decoder]
    if not sizes and decoder:
        return decoder
    answers = []
    for number, size in enumerate(sizes or [(64, 64)]):
        mark = f"@{spelled(size)}" if number else ""
        answers.append(Task(ANSWER, picture=scene(size, scratch), picture_size=size, mark=mark))
    return [*answers, *decoder]


def spelled(size: Size) -> str:
    """(640, 480) → `640x480`."""
    return f"{size[0]}x{size[1]}"


def scene(size: Size, directory: Path) -> Path:
    """A generated scene of this size as a PNG, the same bytes every time with one version of Pillow."""
    from PIL import Image

    from tinyllava_edge.data.scenes import render

    path = directory / f"scene-{spelled(size)}.png"
    picture = render(seed=0).image
    (picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)).save(path)
    return path


def check_fits(work: Sequence[Task], n_ctx: int) -> None:
    """Raise UsageError if a decoder test needs more positions than there are."""
    for task in work:
        if task.size > n_ctx:
            flag = "-p" if task.kind == PREFILL else "-n"
            raise UsageError(f"{flag} {task.size}: the context has {n_ctx} positions", f"ask for at most {n_ctx}")


def decoder_test(llama: Llama, task: Task) -> float:
    """Milliseconds of one `pp` or `tg` test, from an empty context on; the context is empty again afterwards."""
    ids = any_tokens(llama, task.size)
    llama.clear()
    start = time.perf_counter()
    if task.kind == PREFILL:
        llama.decode_tokens(ids, range(len(ids)), wanted=[len(ids) - 1])
    else:
        for place, token in enumerate(ids):
            llama.decode_tokens([token], [place], wanted=[0])
    elapsed = 1000 * (time.perf_counter() - start)
    llama.clear()
    return elapsed


def any_tokens(llama: Llama, n: int) -> list[int]:
    """Arbitrary ids, the same every time: BOS where the model has one, then any of the vocabulary."""
    import numpy as np

    ids: list[int] = np.random.default_rng(0).integers(0, llama.n_vocab, n).tolist()
    return ids if llama.bos is None else [llama.bos, *ids[1:]]


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text.strip() else []


def _count(part: str, flag: str, most: int) -> int:
    if not _COUNT.fullmatch(part) or int(part) > most:
        raise UsageError(f"{flag} {part[:40]!r}: not a number from 1 to {most}", f"write a comma list: {flag} 1,2")
    return int(part)


def _image_size(part: Any) -> Size:
    text = "x".join(map(str, part)) if isinstance(part, (list, tuple)) else str(part).strip()
    match = _SIZE.fullmatch(text)
    if not match or max(int(match[1]), int(match[2] or 0)) > MOST_SIDE:
        raise UsageError(
            f"--image-size {text[:40]!r}: neither N nor WxH in pixels, up to {MOST_SIDE}",
            "write a comma list: --image-size 64,640x480",
        )
    from tinyllava_edge.image import MAX_ASPECT  # numpy, which `--help` can do without

    width, height = int(match[1]), int(match[2] or match[1])
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UsageError(f"--image-size {text}: thinner than 1:{MAX_ASPECT}", "no runtime takes such a picture")
    return width, height


def _size_of(picture: Path) -> Size | None:
    """Width and height by the file's header; None where only the runtime will say what is wrong with it."""
    from PIL import Image

    if not picture.is_file():  # a pipe would never answer
        return None
    try:
        with Image.open(picture) as opened:
            return opened.width, opened.height
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
