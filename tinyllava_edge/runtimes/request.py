"""What a caller asks for: a conversation with pictures, and how it is to be answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..image import check_array
from ..prompt import Turn
from .base import Picture
from .sampling import GREEDY, Sampling
from .stops import check_stops
from .text import check_max_tokens, check_unicode

Message = Mapping[str, Any]  # {"role": …, "content": text or parts}, as OpenAI's chat API has it
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Request:
    """One answer to be made."""

    turns: tuple[Turn, ...]
    """the conversation; its last turn is open. `Turn.images` says how many of the pictures stand in front of a turn"""
    pictures: tuple[Picture, ...] = ()
    """in order of appearance"""
    system: str | None = None
    """stands in place of the template's system text; None keeps what the model was trained with"""
    max_tokens: int = 128
    """most tokens to generate"""
    stop: tuple[str, ...] = ()
    """the answer ends before the first of these strings"""
    sampling: Sampling = GREEDY
    """how tokens are chosen"""
    grammar: str | None = None
    """GBNF that the answer must follow"""
    json_schema: Mapping[str, Any] | None = None
    """JSON schema that the answer must follow; not together with `grammar`"""

    def __post_init__(self) -> None:
        """Raises UsageError for a setting out of range or pictures that no turn places, ImageError for a bad array."""
        check_max_tokens(self.max_tokens)
        check_stops(self.stop)
        for text in (self.system, *(turn.answer for turn in self.turns)):
            check_unicode(text or "")
        placed = sum(turn.images for turn in self.turns)
        if placed != len(self.pictures):
            raise UsageError(f"{len(self.pictures)} pictures for {placed} places in the conversation")
        # arrays are copied, because a camera may overwrite its frame while the request waits
        kept = tuple(check_array(p).copy() if isinstance(p, np.ndarray) else p for p in self.pictures)
        object.__setattr__(self, "pictures", kept)
        if self.grammar is not None and self.json_schema is not None:
            raise UsageError("a grammar and a JSON schema were given", "give one of the two")


def ask(question: str, image: Picture | Sequence[Picture] | None = None, **options: Any) -> Request:
    """One question about no, one or several pictures; options are Request's fields."""
    pictures = as_pictures(image)
    return Request((Turn(question, images=len(pictures)),), pictures, **options)


def converse(messages: Sequence[Message], **options: Any) -> Request:
    """A conversation in OpenAI's shape → a request; options are Request's fields.

    Args:
        messages: at most one `system` message, in front; then `user` and `assistant` in turns, `user` last. Content is
            text or a list of parts: {"type": "text", "text": …} and {"type": "image", "image": a path, a file's bytes
            or RGB}. Pictures of a message go in front of its text, as in training; texts are joined by newlines.

    Raises:
        UsageError: anything else; the message's number is named.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise UsageError("messages must be a non-empty list", 'e.g. [{"role": "user", "content": "What is it?"}]')
    system: str | None = None
    turns: list[Turn] = []
    pictures: list[Picture] = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        role, text, found = _read(message, place)
        if role != "user" and found:
            raise UsageError(f"{place}: only the user's messages may hold pictures", "move it to a user message")
        if role == "system":
            if number:
                raise UsageError(f"{place}: a system message must come first", "put it in front")
            system = text
        elif role == "user":
            if turns and turns[-1].answer is None:
                raise UsageError(f"{place}: two user messages in a row", "join them, or put the answer between them")
            turns.append(Turn(text, images=len(found)))
            pictures += found
        else:
            if not turns or turns[-1].answer is not None:
                raise UsageError(f"{place}: an answer without a question", "begin with a user message")
            turns[-1] = Turn(turns[-1].question, text, turns[-1].images)
    if not turns or turns[-1].answer is not None:
        raise UsageError("messages must end with a user message", "add the question")
    return Request(tuple(turns), tuple(pictures), system, **options)


def as_pictures(image: Picture | Sequence[Picture] | None) -> tuple[Picture, ...]:
    """None, one picture or several → a tuple. Raises UsageError for what is none of these."""
    if image is None:
        return ()
    if isinstance(image, str | Path | bytes | np.ndarray):
        return (image,)
    if not isinstance(image, list | tuple) or not all(isinstance(p, str | Path | bytes | np.ndarray) for p in image):
        raise UsageError(
            f"image is a {type(image).__name__}", "pass a path, a file's bytes, uint8 RGB, or a list of them"
        )
    return tuple(image)


def _read(message: Any, place: str) -> tuple[str, str, list[Picture]]:
    """Role, text and pictures of one message."""
    if not isinstance(message, Mapping):
        raise UsageError(f"{place} is a {type(message).__name__}, not an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UsageError(f"{place}: unknown role {str(role)[:40]!r}", f"known: {', '.join(ROLES)}")
    if isinstance(content, str):
        return role, content, []
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise UsageError(f"{place}: content is a {type(content).__name__}", "give text or a list of parts")
    texts: list[str] = []
    pictures: list[Picture] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image" and isinstance(part.get("image"), str | Path | bytes | np.ndarray):
            pictures.append(part["image"])
        else:
            raise UsageError(
                f"{place}: part {index} is neither a text nor an image",
                'parts are {"type": "text", "text": …} and {"type": "image", "image": …}',
            )
    return role, "\n".join(texts), pictures
