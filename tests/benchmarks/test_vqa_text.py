"""The two normalisers and the leave-one-out score, against values worked out by hand from the rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllava_edge.benchmarks import vqa_text
from tinyllava_edge.benchmarks.vqa_text import leave_one_out, line_answers, m4c, m4c_steps, official, official_steps
from tinyllava_edge.errors import DataError

TEXTS = st.text(st.one_of(st.sampled_from(" .,'?!-/()1a\n\ts"), st.characters(codec="utf-8")), max_size=30)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Yes", "yes"),
        ("\tred\nball ", "red ball"),
        ("a  red   ball", "red ball"),
        ("a-b", "b"),  # `a` stands alone after the mark became a space
        ("x-b", "x b"),
        ("x- b-c", "x bc"),  # touches a space once, so it is deleted everywhere
        ("x -b", "x b"),
        ("1,000", "1000"),
        ("1,000-5", "10005"),  # the comma between digits deletes every mark
        ("1, 2", "1 2"),
        ("x,y", "x y"),
        ("5.", "5"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("5.a", "5a"),
        ("a.m.", "am"),
        ("10:30", "10:30"),
        ("50%", "50%"),
        ("$5", "$5"),
        ("none", "0"),
        ("ten or eleven", "10 or eleven"),
        ("The", ""),
        ("dont", "don't"),
        ("don't", "don't"),
        ("Dont", "don't"),
        ("Im", "im"),  # the table's key has a capital and can't match
        ("Ive", "ive"),
        ("somebody'd", "somebodyd"),
        ("somebody'dve", "somebody'd've"),
        ("let's", "let's"),
        ("its", "its"),
        ("mcdonald's", "mcdonald's"),
        ("what?!", "what"),
        ("\r\n", ""),
        ("", ""),
    ],
)
def test_official(text: str, wanted: str) -> None:
    assert official(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Yes.", "yes"),
        ("mcdonald's", "mcdonald 's"),
        ("let's go", "let 's go"),
        ("1,000", "1000"),
        ("1,000-5", "1000 5"),  # the comma is gone before the rule for digits could fire
        ("x,y", "xy"),
        ("x, y", "x y"),
        ("what?", "what"),
        ("IT'S", "it 's"),
        ("-'s", "'s"),  # the space put before `'s` deletes the mark
        ("couldn'tve", "couldn't've"),
        (" , ", ""),
    ],
)
def test_m4c(text: str, wanted: str) -> None:
    assert m4c(text) == wanted


def test_only_32_full_stops_go() -> None:
    assert official("." * 40) == "." * 8
    assert official("a" + ".b" * 33) == "a" + "b" * 32 + ".b"


def test_steps_name_what_happens_and_end_in_the_normal_form() -> None:
    assert official_steps(" The U.S. \n") == (
        ("stripped", "The U.S."),
        ("punctuation", "The US"),
        ("digits and articles", "us"),
    )
    assert m4c_steps("Two, please?") == (
        ("tokenised", "two please"),
        ("stripped", "two please"),
        ("punctuation", "two please"),
        ("digits and articles", "2 please"),
    )


@pytest.mark.parametrize(("matches", "wanted"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)])
def test_ladder(matches: int, wanted: float) -> None:
    assert leave_one_out("a", ["a"] * matches + ["b"] * (10 - matches)) == pytest.approx(wanted)


def test_fewer_annotators_are_scored_as_upstream_does() -> None:
    assert leave_one_out("a", ["a", "a", "a"]) == pytest.approx(2 / 3)
    assert leave_one_out("a", ["a"]) == 0
    with pytest.raises(DataError, match="annotated answers"):
        leave_one_out("a", [])


def test_table_is_whole() -> None:
    """120 entries, of which four can't match words in lower case."""
    table = vqa_text._CONTRACTIONS
    assert len(table) == 120
    assert [key for key in table if key != key.lower()] == ["Id've", "I'dve", "Im", "Ive"]


@given(TEXTS)
def test_normal_forms_are_lower_case_words_without_articles(text: str) -> None:
    for found in (official(text), m4c(text)):
        words = found.split(" ") if found else []
        assert found == " ".join(found.split())
        assert not {"a", "an", "the", "none", "ten"} & set(words)
        assert not any(mark in found for mark in '?!,;"()')


@given(TEXTS)
def test_m4c_is_the_official_form_of_tokenised_text(text: str) -> None:
    assert m4c(text) == official(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))
    assert m4c_steps(text)[-1][1] == m4c(text)
    assert official_steps(text)[-1][1] == official(text)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.sampled_from("abcd"))
def test_score_is_a_share_and_grows_with_agreement(answers: list[str], answer: str) -> None:
    score = leave_one_out(answer, answers)
    assert 0 <= score <= 1
    assert (score == 0) == (answers.count(answer) == 0 or len(answers) == 1)
    assert leave_one_out(answer, [*answers, answer, answer, answer, answer]) >= score


def test_line_answers() -> None:
    assert line_answers({}) is None
    assert line_answers({"answers": "yes"}) == ["yes"] * 10
    assert line_answers({"answers": ["a", "b"]}) == ["a", "b"]
    for wrong in ([], [1], 5, {"a": 1}, [None]):
        with pytest.raises(DataError, match="`answers`"):
            line_answers({"answers": wrong})
    with pytest.raises(DataError, match="holds 2"):
        line_answers({"answers": ["a", "b"]}, exactly=10)
