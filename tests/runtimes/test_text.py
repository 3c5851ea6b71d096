"""Prompt ids and streamed text."""

from __future__ import annotations

import pytest

from tinyllava_edge.errors import UsageError
from tinyllava_edge.prompt import SYSTEM, TEMPLATES, Turn
from tinyllava_edge.runtimes.base import IMAGE_PLACE
from tinyllava_edge.runtimes.text import (
    FIRST_SPACE,
    MODEL,
    NFC,
    TextStream,
    Vocabulary,
    conversation_ids,
    gguf_vocabulary,
    prompt_ids,
    split_at_image,
    take,
)

LETTERS = Vocabulary(lambda text: [ord(letter) for letter in text], bos=1, end_of_turn=2, eos=2)


def spell(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_one_question() -> None:
    ids = prompt_ids(" what? ", TEMPLATES["llama"], LETTERS, has_image=True)
    assert list(ids) == [1, *spell(f"{SYSTEM} USER: "), IMAGE_PLACE, *spell("\nwhat? ASSISTANT:")]
    assert split_at_image(ids) == ([1, *spell(f"{SYSTEM} USER: ")], spell("\nwhat? ASSISTANT:"))
    plain = prompt_ids("what?", TEMPLATES["llama"], LETTERS, has_image=False)
    assert list(plain) == [1, *spell(f"{SYSTEM} USER: what? ASSISTANT:")]
    assert split_at_image(plain) == (list(plain), None)


def test_caption_template() -> None:
    assert prompt_ids("anything", TEMPLATES["pretrain"], LETTERS, has_image=True) == (1, IMAGE_PLACE)


def test_conversation() -> None:
    turns = [Turn("one", "1"), Turn("two")]
    ids = conversation_ids(turns, TEMPLATES["llama"], LETTERS, has_image=True)
    after = [*spell("\none ASSISTANT:"), *spell(" 1"), 2, *spell("USER: two ASSISTANT:")]
    assert list(ids) == [1, *spell(f"{SYSTEM} USER: "), IMAGE_PLACE, *after]


def test_sections_are_tokenised_as_a_whole() -> None:
    """A merge may cross from a question into its answer, and behind an end-of-turn mark there is another tokenizer."""
    seen: list[tuple[str, str]] = []
    words = Vocabulary(
        lambda text: seen.append(("start", text)) or [5],  # type: ignore[func-returns-value]
        bos=1,
        end_of_turn=2,
        eos=2,
        tokenize_rest=lambda text: seen.append(("rest", text)) or [6],  # type: ignore[func-returns-value]
    )
    turns = [Turn("one", "1"), Turn("two", ""), Turn("three")]
    assert conversation_ids(turns, TEMPLATES["phi"], words, has_image=True) == (1, 5, IMAGE_PLACE, 5, 2, 6, 2, 6)
    assert seen == [
        ("start", f"{SYSTEM} USER: "),
        ("start", "\none ASSISTANT: 1"),
        ("rest", "USER: two ASSISTANT: "),
        ("rest", "USER: three ASSISTANT:"),
    ]


@pytest.mark.parametrize(
    ("header", "start", "rest"),
    [
        ({}, "e\u0301▁", "e\u0301▁"),
        ({NFC: True}, "é▁", "é▁"),
        ({MODEL: b"llama"}, "e\u0301 ", "e\u0301 "),
        ({MODEL: b"llama", FIRST_SPACE: True}, " e\u0301 ", "e\u0301 "),
        ({MODEL: b"gpt2", NFC: False, FIRST_SPACE: False}, "e\u0301▁", "e\u0301▁"),
    ],
)
def test_rules_of_a_gguf(header: dict[str, object], start: str, rest: str) -> None:
    """What llama.cpp leaves to its caller: composing, and a space where a chunk starts."""
    words = gguf_vocabulary(spell, header, 1, 2, 3)
    assert words.tokenize_rest is not None
    assert words.tokenize("e\u0301▁") == spell(start) and words.tokenize_rest("e\u0301▁") == spell(rest)
    assert words.tokenize("") == [] and (words.bos, words.end_of_turn, words.eos) == (1, 2, 3)


def test_no_questions() -> None:
    for question in ("", " ", "<image>", "\n<image>\n"):
        with pytest.raises(UsageError, match="empty"):
            prompt_ids(question, TEMPLATES["llama"], LETTERS, has_image=True)
    with pytest.raises(UsageError, match="not text"):
        prompt_ids(None, TEMPLATES["llama"], LETTERS, has_image=True)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        conversation_ids([], TEMPLATES["llama"], LETTERS, has_image=True)


@pytest.mark.parametrize("text", ["  a 😀 naïve\n 日本 \n\t", "", "   ", "ab", " \u00a0x\u00a0 "])
def test_stream(text: str) -> None:
    """Byte by byte: no half character, no white space at either end, nothing lost between."""
    pieces: list[str] = []
    stream = TextStream(pieces.append)
    for byte in text.encode():
        stream.push(bytes([byte]))
    assert stream.finish() == "".join(pieces) == text.strip()
    assert "\ufffd" not in "".join(pieces)


def test_stream_gives_early() -> None:
    pieces: list[str] = []
    stream = TextStream(pieces.append)
    stream.push(b"red ")
    assert pieces == ["red"]
    stream.push("😀".encode()[:2])
    assert pieces == ["red"]
    stream.push("😀".encode()[2:])
    assert pieces == ["red", " 😀"]
    stream.push("é".encode()[:1])
    assert stream.finish() == "red 😀\ufffd"


def test_take() -> None:
    ids: list[int] = []
    assert [take(ids, token, 3, {2}) for token in (5, 6)] == ["", ""]
    assert take(ids, 2, 3, {2}) == "stop" and ids == [5, 6]
    assert take(ids, 7, 3, {2}) == "length" and ids == [5, 6, 7]
