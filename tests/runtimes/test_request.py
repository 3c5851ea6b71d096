"""Messages → requests: what is a conversation, and what is said of what is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllava_edge.errors import UsageError
from tinyllava_edge.prompt import TEMPLATES, Turn, build, render
from tinyllava_edge.runtimes.request import Request, as_pictures, ask, converse

RED = np.zeros((4, 4, 3), np.uint8)


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def image(value: Any) -> dict[str, Any]:
    return {"type": "image", "image": value}


def test_one_question() -> None:
    assert ask("why?") == Request((Turn("why?"),))
    asked = ask("why?", ["a.png", b"bytes"], max_tokens=3)
    assert asked.turns == (Turn("why?", images=2),) and asked.pictures == ("a.png", b"bytes")
    assert asked.max_tokens == 3


def test_a_conversation_with_pictures() -> None:
    request = converse(
        [
            {"role": "system", "content": "Be brief."},
            user(text("what"), image("a.png"), text("is it?")),
            {"role": "assistant", "content": "a cat"},
            user(image("b.png"), image(Path("c.png")), text("and these?")),
        ]
    )
    assert request.system == "Be brief."
    assert request.turns == (Turn("what\nis it?", "a cat", 1), Turn("and these?", images=2))
    assert request.pictures == ("a.png", "b.png", Path("c.png"))
    shown = render(build(request.turns, TEMPLATES["llama"]), TEMPLATES["llama"])
    assert shown.endswith(
        "USER: <image>\nwhat\nis it? ASSISTANT: a cat</s>USER: <image>\n<image>\nand these? ASSISTANT:"
    )


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "non-empty"),
        ("hello", "non-empty"),
        ([3], "messages[0]"),
        ([{"role": "tool", "content": "x"}], "tool"),
        ([{"role": "user", "content": None}], "content"),
        ([user({"type": "video"})], "part 0"),
        ([user({"type": "image", "image": 3})], "part 0"),
        ([user("text")], "part 0"),
        ([{"role": "assistant", "content": "x"}], "without a question"),
        ([{"role": "user", "content": "x"}] * 2, "two user messages"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "end with a user"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "must come first"),
        ([{"role": "system", "content": [image("a.png")]}, {"role": "user", "content": "x"}], "only the user"),
    ],
)
def test_what_is_no_conversation(messages: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        converse(messages)
    assert words in caught.value.message


def test_settings_out_of_range() -> None:
    with pytest.raises(UsageError, match="max_tokens"):
        ask("why?", max_tokens=0)
    with pytest.raises(UsageError, match="grammar"):
        ask("why?", grammar="root ::= [a]", json_schema={})
    with pytest.raises(UsageError, match="1 pictures for 0 places"):
        Request((Turn("why?"),), ("a.png",))
    with pytest.raises(UsageError, match="image is a dict"):
        as_pictures({})  # type: ignore[arg-type]
    assert as_pictures(RED)[0] is RED and ask("why?", RED).pictures[0] is not RED
