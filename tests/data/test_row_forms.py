"""One conversation in every form gives one row; several pictures keep their order; each bad form is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tinyllava_edge import prompt
from tinyllava_edge.data.llava_json import read
from tinyllava_edge.data.row import Row
from tinyllava_edge.errors import DataError
from tinyllava_edge.prompt import SYSTEM, TEMPLATES, Turn


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name in "abc":
        (folder / f"{name}.png").write_bytes(b"x")
    return folder


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(values)]


def said(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]


def picture(name: str | None = None, key: str = "image") -> dict[str, Any]:
    return {"type": "image"} if name is None else {"type": "image", key: name}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def rows(tmp_path: Path, images: Path, *values: Any) -> tuple[Row, ...]:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(values))
    return read(path, images).rows


ONE = {"id": "7", "image": "a.png", "conversations": talk("<image>\nWhat?", "A cat.", "Sure?", "Yes.")}
TWO = {"id": "7", "image": ["a.png", "b.png"], "conversations": talk("<image>\n<image>\nWhich?", "The first.")}
EQUAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "named part": (ONE, {"id": "7", "messages": said([picture("a.png"), text("What?")], "A cat.", "Sure?", "Yes.")}),
    "path": (ONE, {"id": 7, "messages": said([picture("a.png", "path"), text("What?")], "A cat.", "Sure?", "Yes.")}),
    "url": (ONE, {"id": 7, "messages": said([picture("a.png", "url"), text("What?")], "A cat.", "Sure?", "Yes.")}),
    "image_url": (
        ONE,
        {
            "id": 7,
            "messages": said(
                [{"type": "image_url", "image_url": {"url": "a.png"}}, text("What?")], "A cat.", "Sure?", "Yes."
            ),
        },
    ),
    "listed": (
        ONE,
        {"id": 7, "images": ["a.png"], "messages": said([picture(), text("What?")], [text("A cat.")], "Sure?", "Yes.")},
    ),
    "listed and named": (
        ONE,
        {"id": 7, "images": ["a.png"], "messages": said([picture("a.png"), text("What?")], "A cat.", "Sure?", "Yes.")},
    ),
    "marker in a text": (ONE, {"id": 7, "image": "a.png", "messages": said("<image>What?", "A cat.", "Sure?", "Yes.")}),
    "marker behind": (ONE, {**ONE, "conversations": talk("What?\n<image>", "A cat.", "Sure?", "Yes.")}),
    "the model's system text": (
        ONE,
        {
            "id": 7,
            "messages": [
                {"role": "system", "content": SYSTEM},
                *said([picture("a.png"), text("What?")], "A cat.", "Sure?", "Yes."),
            ],
        },
    ),
    "two": (TWO, {"id": "7", "messages": said([picture("a.png"), picture("b.png"), text("Which?")], "The first.")}),
    "two, one named": (
        TWO,
        {"id": 7, "images": ["a.png"], "messages": said([picture(), picture("b.png"), text("Which?")], "The first.")},
    ),
    "two, key images": (TWO, {"id": 7, "images": ["a.png", "b.png"], "conversations": TWO["conversations"]}),
    "text": (
        {"id": 1, "conversations": talk("Hi", "Hello")},
        {"id": 1, "messages": said([text("Hi")], [text("Hello")])},
    ),
    "parts": (
        {"id": 1, "conversations": talk("a\nb", "c\nd")},
        {"id": 1, "messages": said([text("a"), text("b")], "c\nd")},
    ),
}


@pytest.mark.parametrize("case", EQUAL)
def test_both_forms_give_equal_rows(case: str, tmp_path: Path, images: Path) -> None:
    first, second = (rows(tmp_path, images, value)[0] for value in EQUAL[case])
    assert first == second


def test_a_messages_row_needs_no_id(tmp_path: Path, images: Path) -> None:
    value = {"messages": said("Hi", "Hello")}
    assert [row.id for row in rows(tmp_path, images, value, {**value, "id": "x"}, value)] == ["1", "x", "3"]


def test_several_pictures_become_the_prompt_that_run_builds(tmp_path: Path, images: Path) -> None:
    """k lines of pictures, then the question, wherever the markers stood."""
    asked = talk("Is <image> like <image>?", "No.", "And <image>?", "Yes.", "Why?", "So.")
    (row,) = rows(tmp_path, images, {"id": 1, "image": ["c.png", "a.png", "b.png"], "conversations": asked})
    assert row.images == ("c.png", "a.png", "b.png") and row.image == "c.png"
    assert row.turns == (Turn("Is  like ?", "No.", 2), Turn("<image>\nAnd ?", "Yes."), Turn("Why?", "So."))
    wanted = f"{SYSTEM} USER: <image>\n<image>\nIs  like ? ASSISTANT: No.</s>USER: <image>\nAnd ? ASSISTANT: Yes.</s>"
    assert prompt.render(prompt.build(row.turns, TEMPLATES["llama"]), TEMPLATES["llama"]).startswith(wanted)
    (same,) = rows(
        tmp_path, images, {"id": 1, "image": ["a.png", "a.png"], "conversations": talk("<image><image>", "x")}
    )
    assert same.images == ("a.png", "a.png") and same.turns == (Turn("", "x", 2),)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "fewer markers": ({**TWO, "conversations": talk("<image>\nWhich?", "x")}, "1 <image> marker(s) for 2"),
    "more markers": ({**ONE, "conversations": talk("<image><image>", "x")}, "2 <image> marker(s) for 1"),
    "second missing": ({**TWO, "image": ["a.png", "no.png"]}, "'no.png' is not in"),
    "list of numbers": ({**TWO, "image": ["a.png", 3]}, "not text"),
    "object": ({**ONE, "image": {"bytes": "x"}}, "not text"),
    "both keys": ({**ONE, "images": ["a.png"]}, "both `image` and `images`"),
    "both forms": ({**ONE, "messages": said("Hi", "x")}, "both `messages` and `conversations`"),
    "http": ({"messages": said([picture("https://example.org/a.png")], "x")}, "is a URL"),
    "data": ({"messages": said([picture("data:image/png;base64,AAAA")], "x")}, "is a URL"),
    "http in LLaVA": ({**ONE, "image": "http://example.org/a.png"}, "is a URL"),
    "other system text": (
        {"messages": [{"role": "system", "content": "Be rude."}, *said("Hi", "x")]},
        "its own system text is part of the model",
    ),
    "late system text": ({"messages": [*said("Hi", "x"), {"role": "system", "content": SYSTEM}]}, "only the first"),
    "tool": ({"messages": [{"role": "tool", "content": "x"}] * 2}, "from 'tool'"),
    "a role that is a list": ({"messages": [{"role": [["x"]], "content": "x"}] * 2}, "from 'a list'"),
    "no messages": ({"messages": []}, "`messages` is empty"),
    "text as messages": ({"messages": "Hi"}, "`messages` is empty or not a list"),
    "text as message": ({"messages": ["Hi", "x"]}, "message 1 is a str"),
    "no content": ({"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, "no `content`"),
    "number as content": ({"messages": said(3, "x")}, "no `content`"),
    "video": ({"messages": said([{"type": "video", "video": "a.mp4"}], "x")}, "neither a text nor an image"),
    "text as part": ({"messages": said(["Hi"], "x")}, "neither a text nor an image"),
    "two names": ({"messages": said([{"type": "image", "image": "a.png", "url": "b.png"}], "x")}, "not one text"),
    "number as name": ({"messages": said([{"type": "image", "image": 3}], "x")}, "not one text"),
    "picture without a name": ({"messages": said([picture(), text("?")], "x")}, "1 picture(s) without a name"),
    "name without a picture": ({"images": ["a.png"], "messages": said("Hi", "x")}, "0 picture(s) without a name"),
    "number as images": ({"images": 3, "messages": said("Hi", "x")}, "neither text nor a list"),
    "object in images": ({"images": [{}], "messages": said([picture()], "x")}, "not text"),
    "picture in an answer": ({"messages": said("Hi", [picture("a.png"), text("x")])}, "an answer that holds"),
    "user twice": ({"messages": [{"role": "user", "content": "x"}] * 2}, "expected 'gpt'"),
    "no answer": ({"messages": said("Hi")}, "needs an answer"),
    "blank answer": ({"messages": said("Hi", [text(" ")])}, "message 2 is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_form_is_refused_by_name_and_reason(case: str, tmp_path: Path, images: Path) -> None:
    value, reason = BAD[case]
    with pytest.raises(DataError) as error:
        rows(tmp_path, images, {"id": "good", "conversations": talk("Hi", "x")}, {**value, "id": "bad"})
    assert "row 2 (id 'bad')" in error.value.message and reason in error.value.message
    assert "\n" not in error.value.message
