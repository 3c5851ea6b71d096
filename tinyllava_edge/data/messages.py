"""Hugging Face's `messages` rows, turned into LLaVA's form, so that both pass the same checks.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": "A cat."}]}

A part without a name, and `<image>` in a text, stand for the next entry of the row's `images`. Parts that are text are
joined by newlines, as for `run` and the server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..prompt import IMAGE_MARKER, SYSTEM
from .row import RowFault, shown

_SPEAKERS = {"user": "human", "assistant": "gpt"}
_NAME_KEYS = ("image", "path", "url")


def from_messages(row: Mapping[str, Any], own: Sequence[str] = ()) -> dict[str, Any]:
    """A row with `messages` as one with `conversations` and `images`; other keys stay.

    Args:
        own: pictures that stand beside the row in a shard or directory; names in the row then don't count.

    Raises:
        RowFault: not such a row, or a system message other than the template's own.
    """
    if "conversations" in row:
        raise RowFault("has both `messages` and `conversations`")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise RowFault("`messages` is empty or not a list")
    listed = row.get("images", row.get("image"))
    listed = [] if listed is None else [listed] if isinstance(listed, str) else listed
    if not isinstance(listed, list):
        raise RowFault("`images` is neither text nor a list")
    names: list[str | None] = []  # one for each marker, None where the part has no name
    talk: list[dict[str, str]] = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise RowFault(f"{where} is a {type(message).__name__}, not an object")
        role = message.get("role")
        text, found = _content(message.get("content"), where)
        if role == "system":
            _check_system(text, number, where)
            continue
        if not isinstance(role, str) or role not in _SPEAKERS:
            raise RowFault(f"{where} is from {shown(role)!r}, expected 'user' or 'assistant'")
        names += found
        talk.append({"from": _SPEAKERS[role], "value": text})
    rest = {key: value for key, value in row.items() if key not in ("messages", "image", "images")}
    return {**rest, "images": list(own) or _all_names(names, listed), "conversations": talk}


def _check_system(text: str, number: int, where: str) -> None:
    """The model's own system text may stand in front: the template adds it anyway."""
    if number > 1:
        raise RowFault(f"{where} is from the system, which only the first may be")
    if text.strip() != SYSTEM:
        raise RowFault(f"{where}: its own system text is part of the model; leave the system message out")


def _content(content: Any, where: str) -> tuple[str, list[str | None]]:
    """Text with a marker for each picture in front of it, and the pictures' names."""
    if isinstance(content, str):
        return content, [None] * content.count(IMAGE_MARKER)
    if not isinstance(content, list):
        raise RowFault(f"{where} has no `content` that is text or a list of parts")
    texts: list[str] = []
    names: list[str | None] = []
    pictures = 0
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            names += [None] * part["text"].count(IMAGE_MARKER)
        elif kind in ("image", "image_url"):
            pictures += 1
            names.append(_name(part, where))
        else:
            raise RowFault(f"{where} holds a part that is neither a text nor an image")
    return f"{IMAGE_MARKER}\n" * pictures + "\n".join(texts), names


def _name(part: Mapping[str, Any], where: str) -> str | None:
    """The picture's name in an image part; None where the row's `images` names it."""
    given = part.get("image_url") if part["type"] == "image_url" else None
    if isinstance(given, dict):  # OpenAI's form
        given = given.get("url")
    found = [given] if given is not None else [part[key] for key in _NAME_KEYS if part.get(key) is not None]
    if len(found) > 1 or any(not isinstance(name, str) for name in found):
        raise RowFault(f"{where} holds an image part whose name is not one text")
    return found[0] if found else None


def _all_names(names: list[str | None], listed: list[Any]) -> list[Any]:
    """Names in the order of the markers: those of the parts, and for parts without one those of `images`."""
    if listed and listed == names:
        return listed
    without = names.count(None)
    if without != len(listed):
        raise RowFault(f"{without} picture(s) without a name in the messages, {len(listed)} in `images`")
    waiting = iter(listed)
    return [next(waiting) if name is None else name for name in names]
