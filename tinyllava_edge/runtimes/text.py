"""Question → prompt ids and ids → streamed text, the same for every runtime; only the tokenizer differs."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ContextError, UsageError
from ..prompt import IMAGE_MARKER, EndOfTurn, Image, Section, Template, Turn, build, sections
from ..sentencepiece_file import SPACE
from ..spec import ModelSpec
from .base import IMAGE_PLACE, OnText
from .stops import StopStrings


@dataclass(frozen=True)
class Vocabulary:
    """What a runtime's tokenizer gives."""

    tokenize: Callable[[str], list[int]]
    """section at the beginning or after a picture → ids: no BOS, and special-token strings stay plain text"""
    bos: int | None
    """id put in front of a prompt, where the model wants one"""
    end_of_turn: int
    """id that ends an answer"""
    eos: int
    """the model's own end token; often the same"""
    tokenize_rest: Callable[[str], list[int]] | None = None
    """section after an end-of-turn mark → ids; None: as any other"""

    @property
    def stops(self) -> frozenset[int]:
        """Ids that end an answer."""
        return frozenset((self.end_of_turn, self.eos))


MODEL = "tokenizer.ggml.model"  # GGUF key; `llama` is SentencePiece
# GGUF keys of our own, for what llama.cpp has no key for. Other programs pass over them.
FIRST_SPACE = "tinyllava.tokenizer.first_space"  # bool: a space goes in front of a section that starts a chunk
NFC = "tinyllava.tokenizer.nfc"  # bool: text is brought into Unicode's composed form first


def gguf_vocabulary(
    tokenize: Callable[[str], list[int]], header: Mapping[str, Any], bos: int | None, end_of_turn: int, eos: int
) -> Vocabulary:
    """llama.cpp's tokenizer by the rules in a GGUF's header.

    llama.cpp knows a space in front of every section or of none; Llama's newer tokenizers put it in front of some. It
    does not normalise, so Qwen2's text is composed here. And it looks for Gemma's runs of spaces before it writes
    spaces as U+2581, so one that was typed is made a space first: SentencePiece takes them for the same.
    """
    pieces, compose, space = header.get(MODEL) == b"llama", header.get(NFC), header.get(FIRST_SPACE)

    def rest(text: str) -> list[int]:
        return tokenize(unicodedata.normalize("NFC", text) if compose else text.replace(SPACE, " ") if pieces else text)

    def start(text: str) -> list[int]:
        return rest(" " + text if space and text else text)

    return Vocabulary(start, bos, end_of_turn, eos, rest)


def prompt_ids(question: str, template: Template, vocabulary: Vocabulary, *, has_image: bool) -> tuple[int, ...]:
    """Ids of a one-question prompt; IMAGE_PLACE marks the picture's place.

    Raises:
        UsageError: the question is empty or blank, or not valid Unicode.
    """
    return conversation_ids([Turn(question)], template, vocabulary, has_image=has_image)


def conversation_ids(
    turns: Sequence[Turn], template: Template, vocabulary: Vocabulary, *, has_image: bool = False
) -> tuple[int, ...]:
    """Ids of a conversation whose last turn is open; IMAGE_PLACE marks each picture's place.

    `has_image` puts one picture in front of the first turn; `Turn.images` says how many stand in front of any turn.
    """
    clean = [Turn(_clean(turn.question), turn.answer, turn.images) for turn in turns]
    if has_image and clean:
        clean[0] = replace(clean[0], images=1)
    ids: list[int] = [] if vocabulary.bos is None else [vocabulary.bos]
    rest = vocabulary.tokenize_rest or vocabulary.tokenize
    for part in sections(build(clean, template)):
        if isinstance(part, Section):
            ids += (vocabulary.tokenize if part.starts else rest)(part.text)
        else:
            ids.append({Image: IMAGE_PLACE, EndOfTurn: vocabulary.end_of_turn}[type(part)])
    return tuple(ids)


def split_at_image(ids: Sequence[int]) -> tuple[list[int], list[int] | None]:
    """Ids before the picture's place and after it; None after it where there is no picture."""
    if IMAGE_PLACE not in ids:
        return list(ids), None
    place = list(ids).index(IMAGE_PLACE)
    return list(ids[:place]), list(ids[place + 1 :])


def default_context(spec: ModelSpec) -> int:
    """Positions that a runtime keeps unless told otherwise: what the model was trained for, at most 2,048."""
    return min(spec.max_length, 2048)


def take(ids: list[int], token: int, limit: int, stops: Collection[int]) -> str:
    """Append a chosen token to an answer; returns `stop`, `length`, or nothing while the answer goes on."""
    if token in stops:
        return "stop"
    ids.append(token)
    return "length" if len(ids) >= limit else ""


def check_max_tokens(max_tokens: int) -> None:
    """Raises UsageError unless at least one token may be generated."""
    if max_tokens < 1:
        raise UsageError(f"max_tokens={max_tokens}", "allow at least one token")


def check_unicode(text: str) -> None:
    """Raises UsageError for halves of surrogate pairs, which badly decoded input holds."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("the text is not valid Unicode", "check the encoding of the terminal or the file") from error


def count_positions(ids: Sequence[int], spec: ModelSpec, n_ctx: int) -> int:
    """Positions that a prompt takes, pictures included. Raises ContextError if they are more than n_ctx."""
    positions = len(ids) + ids.count(IMAGE_PLACE) * (spec.visual_tokens - 1)
    if positions > n_ctx:
        raise too_long(positions, n_ctx)
    return positions


def too_long(positions: int, n_ctx: int) -> ContextError:
    """The error of a prompt that doesn't fit."""
    return ContextError(
        f"prompt of {positions:,} positions does not fit n_ctx={n_ctx:,}",
        "shorten the question, start a new conversation, or raise n_ctx (-c)",
    )


def _clean(question: str) -> str:
    """The question without image markers, which only the runtime may place."""
    if not isinstance(question, str):
        raise UsageError(f"the question is a {type(question).__name__}, not text")
    check_unicode(question)
    clean = question.replace(IMAGE_MARKER, "").strip()
    if not clean:
        raise UsageError("the question is empty", "ask something, e.g. 'What is in the picture?'")
    return clean


class TextStream:
    """Bytes of tokens → text, given out as soon as it is certain; the parts joined are the whole text, stripped.

    Held back: an incomplete UTF-8 character, and white space that may turn out to be the end.
    """

    def __init__(self, on_text: OnText | None = None, stops: StopStrings | None = None) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._on_text = on_text
        self._stops = stops
        self._pending = ""
        self._parts: list[str] = []

    def push(self, data: bytes) -> None:
        """Add one token's bytes."""
        text = self._decoder.decode(data)
        self._give(text if self._stops is None else self._stops.push(text))

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared; it and what follows it don't belong to the text."""
        return self._stops is not None and self._stops.hit is not None

    def finish(self) -> str:
        """End the text and return it whole; a character cut in the middle becomes U+FFFD."""
        text = self._decoder.decode(b"", final=True)
        self._give(text if self._stops is None else self._stops.push(text) + self._stops.finish())
        return "".join(self._parts)

    def _give(self, text: str) -> None:
        self._pending += text
        if not self._parts:
            self._pending = self._pending.lstrip()
        ready = self._pending.rstrip()
        if ready:
            self._pending = self._pending[len(ready) :]
            self._parts.append(ready)
            if self._on_text is not None:
                self._on_text(ready)
