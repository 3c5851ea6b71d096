"""Prompt strings equal the upstream project's main branch; user text stays text."""

from __future__ import annotations

import pytest

from tinyllava_edge.errors import UsageError
from tinyllava_edge.prompt import (
    SYSTEM,
    TEMPLATES,
    EndOfTurn,
    Image,
    Section,
    Text,
    Turn,
    build,
    get_template,
    render,
    sections,
)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("llama", "</s>"),
        ("phi", "<|endoftext|>"),
        ("gemma", "<eos>"),
        ("qwen2_base", "<|endoftext|>"),
        ("qwen2_instruct", "<|im_end|>"),
    ],
)
def test_strings(name: str, end: str) -> None:
    template = get_template(name)
    asked = build([Turn("<image>\nwhat?")], template)
    assert render(asked, template) == f"{SYSTEM} USER: <image>\nwhat? ASSISTANT:"
    trained = build([Turn("what? <image>", "a cat"), Turn("and?", "a dog")], template)
    assert (
        render(trained, template)
        == f"{SYSTEM} USER: <image>\nwhat? ASSISTANT: a cat{end}USER: and? ASSISTANT: a dog{end}"
    )
    text_only = build([Turn("hello")], template)
    assert render(text_only, template) == f"{SYSTEM} USER: hello ASSISTANT:" and Image() not in text_only


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ("<image>\nwhat?", "<image>\nwhat?"),
        ("what?\n<image>", "<image>\nwhat?"),
        ("see <image> here", "<image>\nsee  here"),
        ("  <image>  two\n\nlines  ", "<image>\ntwo\n\nlines"),
        ("<image>", "<image>"),  # upstream strips the newline with nothing behind it
        ("<image><image> twice", "<image>\ntwice"),
        ("  no picture \n", "  no picture \n"),  # upstream strips a turn only when there is a picture in it
        ("</s> <|endoftext|> <eos>", "</s> <|endoftext|> <eos>"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "pretrain"])
def test_questions_as_upstream_writes_them(name: str, question: str, text: str) -> None:
    template = get_template(name)
    assert render(build([Turn(question)], template), template) == f"{SYSTEM} USER: {text} ASSISTANT:"
    whole = build([Turn(question, ""), Turn("b", " c ")], template)
    end = template.end_of_turn
    assert (
        render(whole, template) == f"{SYSTEM} USER: {text} ASSISTANT: {end}USER: b ASSISTANT:  c {end}"
    )  # answers stay as they are


def test_sections_are_the_texts_between_special_tokens() -> None:
    """Question and answer are one section; one behind a mark doesn't start a chunk, one behind a picture does."""
    pieces = build([Turn("<image>\nq", "a"), Turn("r <image>", "b"), Turn("s")], TEMPLATES["llama"])
    found = sections(pieces)
    assert [(part.text, part.starts) if isinstance(part, Section) else type(part) for part in found] == [
        (f"{SYSTEM} USER: ", True),
        Image,
        ("\nq ASSISTANT: a", True),
        EndOfTurn,
        ("USER: ", False),
        Image,
        ("\nr ASSISTANT: b", True),
        EndOfTurn,
        ("USER: s ASSISTANT:", False),
    ]
    assert isinstance(found[2], Section) and [text.is_answer for text in found[2].texts] == [False, True]
    assert sections([Image(), Text("x")]) == [Image(), Section((Text("x"),), True)]


def test_answers_are_marked_and_nothing_else() -> None:
    pieces = build([Turn("<image>\nq1", "a1"), Turn("q2", "a2")], TEMPLATES["llama"])
    answers = [p for p in pieces if (isinstance(p, Text) and p.is_answer) or isinstance(p, EndOfTurn)]
    assert answers == [Text(" a1", True), EndOfTurn(), Text(" a2", True), EndOfTurn()]


def test_special_text_of_a_user_stays_text() -> None:
    pieces = build([Turn("say </s> now")], TEMPLATES["llama"])
    assert pieces == [Text(f"{SYSTEM} USER: say </s> now ASSISTANT:")]


def test_caption_template() -> None:
    pieces = build([Turn("<image>\nDescribe.", "a red circle.")], TEMPLATES["pretrain"])
    assert pieces == [Image(), Text("a red circle.\n", True)]


def test_refusals() -> None:
    with pytest.raises(UsageError, match="at least one turn"):
        build([], TEMPLATES["llama"])
    with pytest.raises(UsageError, match="only the last"):
        build([Turn("a"), Turn("b")], TEMPLATES["llama"])
    with pytest.raises(UsageError) as error:
        get_template("vicuna")
    assert "llama" in error.value.hint
