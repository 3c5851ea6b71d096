"""Question → prompt ids and ids → streamed text, the same for every runtime; only the tokenizer differs."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ..errors import ContextError, UsageError
from ..prompt import IMAGE_MARKER, EndOfTurn, Image, Template, Text, Turn, build
from ..spec import ModelSpec
from .base import IMAGE_PLACE, OnText


@dataclass(frozen=True)
class Vocabulary:
    """What a runtime's tokenizer gives."""

    tokenize: Callable[[str], list[int]]
    """plain text → ids: no BOS, and special-token strings stay plain text"""
    bos: int | None
    """id put in front of a prompt, where the model wants one"""
    end_of_turn: int
    """id that ends an answer"""
    eos: int
    """the model's own end token; often the same"""

    @property
    def stops(self) -> frozenset[int]:
        """Ids that end an answer."""
        return frozenset((self.end_of_turn, self.eos))


def prompt_ids(question: str, template: Template, vocabulary: Vocabulary, *, has_image: bool) -> tuple[int, ...]:
    """Ids of a one-question prompt; IMAGE_PLACE marks the picture's place.

    Raises:
        UsageError: the question is empty or blank, or not valid Unicode.
    """
    return conversation_ids([Turn(question)], template, vocabulary, has_image=has_image)


def conversation_ids(
    turns: Sequence[Turn], template: Template, vocabulary: Vocabulary, *, has_image: bool
) -> tuple[int, ...]:
    """Ids of a conversation whose last turn is open; the picture, if any, belongs to the first turn."""
    clean = [Turn(_clean(turn.question), turn.answer) for turn in turns]
    if has_image and clean:
        clean[0] = Turn(f"{IMAGE_MARKER}\n{clean[0].question}", clean[0].answer)
    ids: list[int] = [] if vocabulary.bos is None else [vocabulary.bos]
    for piece in build(clean, template):
        if isinstance(piece, Text):
            ids += vocabulary.tokenize(piece.text)
        else:
            ids.append({Image: IMAGE_PLACE, EndOfTurn: vocabulary.end_of_turn}[type(piece)])
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


def count_positions(ids: Sequence[int], spec: ModelSpec, n_ctx: int) -> int:
    """Positions that a prompt takes, the picture's included. Raises ContextError if they are more than n_ctx."""
    positions = len(ids) + (spec.visual_tokens - 1 if IMAGE_PLACE in ids else 0)
    if positions > n_ctx:
        raise too_long(positions, n_ctx)
    return positions


def too_long(positions: int, n_ctx: int) -> ContextError:
    """The error of a prompt that doesn't fit."""
    return ContextError(
        f"prompt of {positions:,} positions does not fit n_ctx={n_ctx:,}", "shorten the question, or raise n_ctx (-c)"
    )


def _clean(question: str) -> str:
    """The question without image markers, which only the runtime may place."""
    if not isinstance(question, str):
        raise UsageError(f"the question is a {type(question).__name__}, not text")
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            "the question is not valid Unicode", "check the encoding of the terminal or the file"
        ) from error
    clean = question.replace(IMAGE_MARKER, "").strip()
    if not clean:
        raise UsageError("the question is empty", "ask something, e.g. 'What is in the picture?'")
    return clean


class TextStream:
    """Bytes of tokens → text, given out as soon as it is certain; the parts joined are the whole text, stripped.

    Held back: an incomplete UTF-8 character, and white space that may turn out to be the end.
    """

    def __init__(self, on_text: OnText | None = None) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._on_text = on_text
        self._pending = ""
        self._parts: list[str] = []

    def push(self, data: bytes) -> None:
        """Add one token's bytes."""
        self._give(self._decoder.decode(data))

    def finish(self) -> str:
        """End the text and return it whole; a character cut in the middle becomes U+FFFD."""
        self._give(self._decoder.decode(b"", final=True))
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
