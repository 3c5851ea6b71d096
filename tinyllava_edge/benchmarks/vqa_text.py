"""How VQA answers are normalised and compared: the official VQA evaluator's way, and m4c's, which EvalAI and LLaVA use.

Both go through the same two stages, "punctuation" and "digits and articles", with quirks that scores depend on:

- A mark is deleted from the whole text when it touches a space anywhere in the text *as it came in*, else it becomes a
  space: `x-y` → `x y`, but `x- y-z` → `x yz`.
- A digit, a comma and a digit anywhere delete every mark: `1,000-5` → `10005`.
- A full stop goes unless a digit follows it, so `5.` → `5`, `a.m.` → `am`, `.5` stays. The official pattern meant to
  spare stops after a digit too, but its look-behind is mistyped and never holds.
- Only the first 32 full stops go: a flag was passed in the place of the count.
- Apostrophe, colon, per cent and dollar signs stay.
- Contraction keys with capitals (`Im`, `Ive`, `Id've`, `I'dve`) never match, because words are lower case by then;
  `let's` and `she's` map to themselves, and `somebody'd` loses its apostrophe.

m4c first makes lower case, deletes `,` and `?`, and puts a space before `'s`. So its comma rule never fires, and
`mcdonald's` becomes `mcdonald 's`, which the official side never produces.

Digits and lower case are those of Python 3. The official script, written for Python 2, knew the digits 0 to 9 only,
and an older Unicode table; nothing else differs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from tinyllava_edge.errors import DataError

Steps = tuple[tuple[str, str], ...]

ANSWERS = 10  # annotators of each question in VQA and TextVQA
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_STOP = re.compile(r"\.(?!\d)")
_MOST_STOPS = 32
_KEPT = 1 << 16  # texts whose normal form is remembered: annotators repeat each other
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_CONTRACTIONS = {
    "aint": "ain't", "arent": "aren't", "cant": "can't", "couldve": "could've", "couldnt": "couldn't",
    "couldn'tve": "couldn't've", "couldnt've": "couldn't've", "didnt": "didn't", "doesnt": "doesn't", "dont": "don't",
    "hadnt": "hadn't", "hadnt've": "hadn't've", "hadn'tve": "hadn't've", "hasnt": "hasn't", "havent": "haven't",
    "hed": "he'd", "hed've": "he'd've", "he'dve": "he'd've", "hes": "he's", "howd": "how'd", "howll": "how'll",
    "hows": "how's", "Id've": "I'd've", "I'dve": "I'd've", "Im": "I'm", "Ive": "I've", "isnt": "isn't", "itd": "it'd",
    "itd've": "it'd've", "it'dve": "it'd've", "itll": "it'll", "let's": "let's", "maam": "ma'am", "mightnt": "mightn't",
    "mightnt've": "mightn't've", "mightn'tve": "mightn't've", "mightve": "might've", "mustnt": "mustn't",
    "mustve": "must've", "neednt": "needn't", "notve": "not've", "oclock": "o'clock", "oughtnt": "oughtn't",
    "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "shant": "shan't", "shed've": "she'd've",
    "she'dve": "she'd've", "she's": "she's", "shouldve": "should've", "shouldnt": "shouldn't",
    "shouldnt've": "shouldn't've", "shouldn'tve": "shouldn't've", "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've", "somebody'dve": "somebody'd've", "somebodyll": "somebody'll",
    "somebodys": "somebody's", "someoned": "someone'd", "someoned've": "someone'd've", "someone'dve": "someone'd've",
    "someonell": "someone'll", "someones": "someone's", "somethingd": "something'd", "somethingd've": "something'd've",
    "something'dve": "something'd've", "somethingll": "something'll", "thats": "that's", "thered": "there'd",
    "thered've": "there'd've", "there'dve": "there'd've", "therere": "there're", "theres": "there's", "theyd": "they'd",
    "theyd've": "they'd've", "they'dve": "they'd've", "theyll": "they'll", "theyre": "they're", "theyve": "they've",
    "twas": "'twas", "wasnt": "wasn't", "wed've": "we'd've", "we'dve": "we'd've", "weve": "we've", "werent": "weren't",
    "whatll": "what'll", "whatre": "what're", "whats": "what's", "whatve": "what've", "whens": "when's",
    "whered": "where'd", "wheres": "where's", "whereve": "where've", "whod": "who'd", "whod've": "who'd've",
    "who'dve": "who'd've", "wholl": "who'll", "whos": "who's", "whove": "who've", "whyll": "why'll", "whyre": "why're",
    "whys": "why's", "wont": "won't", "wouldve": "would've", "wouldnt": "wouldn't", "wouldnt've": "wouldn't've",
    "wouldn'tve": "wouldn't've", "yall": "y'all", "yall'll": "y'all'll", "y'allll": "y'all'll",
    "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've", "youd": "you'd",
    "youd've": "you'd've", "you'dve": "you'd've", "youll": "you'll", "youre": "you're", "youve": "you've",
}  # fmt: skip


def one_line(text: str) -> str:
    """Line breaks and tabs become spaces; both ends are stripped. No other white space is touched inside."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def punctuation(text: str) -> str:
    """Marks deleted or replaced by a space, full stops deleted. What touches a space is looked up in `text` itself."""
    out = text
    digit_comma = _DIGIT_COMMA.search(text) is not None
    for mark in _MARKS:
        if mark in text:
            touches = f"{mark} " in text or f" {mark}" in text
            out = out.replace(mark, "" if touches or digit_comma else " ")
    return _STOP.sub("", out, count=_MOST_STOPS)


def digits_and_articles(text: str) -> str:
    """Lower case; number words to digits, `none` included; no articles; contractions; one space between words."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def tokenised(text: str) -> str:
    """m4c's first step: lower case, no `,` and `?`, a space before `'s`, both ends stripped."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def official_steps(text: str) -> Steps:
    """Name and value of each stage of the official VQA evaluator, the normalised answer last.

    The official evaluator does this to no answer at all where the annotators agree; that rule is the scorer's.
    """
    stripped = one_line(text)
    marked = punctuation(stripped)
    return (
        ("stripped", stripped),
        ("punctuation", marked),
        ("digits and articles", digits_and_articles(marked)),
    )


def m4c_steps(text: str) -> Steps:
    """Name and value of each stage of m4c's and EvalAI's answer processor, the normalised answer last."""
    tokens = tokenised(text)
    return (("tokenised", tokens), *official_steps(tokens))


@lru_cache(_KEPT)
def official(text: str) -> str:
    """`text` as the official VQA evaluator normalises it where the annotators differ."""
    return digits_and_articles(punctuation(one_line(text)))


@lru_cache(_KEPT)
def m4c(text: str) -> str:
    """`text` as m4c normalises it: TextVQA's scorer, and LLaVA's uploads to the VQA server."""
    return official(tokenised(text))


def leave_one_out(given: str, answers: Sequence[str]) -> float:
    """VQA accuracy, 0..1: for each annotator min(1, matches among the others / 3), averaged.

    With ten annotators 1, 2, 3 and 4 matches give 0.3, 0.6, 0.9 and 1, not min(1, matches / 3).

    Args:
        given: the answer, normalised.
        answers: the annotators', normalised the same way.

    Raises:
        DataError: no answers.
    """
    if not answers:
        raise DataError("a question without annotated answers can't be scored", "restore the official file")
    matches = sum(answer == given for answer in answers)
    return sum(min(1, (matches - (answer == given)) / 3) for answer in answers) / len(answers)


def line_answers(line: Mapping[str, Any], *, exactly: int | None = None) -> list[str] | None:
    """`answers` of an `--explain` line: a list of texts as it stands, one text as ten annotators' answer, or None.

    Raises:
        DataError: anything else, an empty list, or not `exactly` so many.
    """
    answers = line.get("answers")
    if answers is None:
        return None
    if isinstance(answers, str):
        return [answers] * ANSWERS
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"`answers` is {answers!r:.80}", "give a text, or a list of texts")
    if exactly is not None and len(answers) != exactly:
        raise DataError(f"`answers` holds {len(answers)} texts", f"give {exactly}, or one that stands for all")
    return answers
