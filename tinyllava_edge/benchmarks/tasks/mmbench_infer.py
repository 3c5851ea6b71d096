"""Which option an MMBench answer means: the rules of VLMEvalKit without its judge model (`exact_matching`)."""

from __future__ import annotations

import re
from collections.abc import Mapping

UNREAD = "Z"  # what exact matching counts an answer as that names no option
_SPACED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SENTENCE = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
_LAST_WORDS = 4  # how near to the end a letter must first occur


def infer(answer: str, options: Mapping[str, str]) -> str:
    """Letter of the option, or `Z` for a refusal, an ambiguous answer or one that names none.

    Args:
        answer: what the model said.
        options: letter → text.

    Order, as upstream: refusals; the only option letter among the words, if its first place is one of the last four
    words; `answer is X`, of which the first letter of a word will do (`answer is a dog` is A); the only option whose
    text occurs in the answer, unless the answer is more than twice as long as all options together.
    """
    return infer_letter(answer, options) or infer_text(answer, options) or UNREAD


def infer_letter(answer: str, options: Mapping[str, str]) -> str:
    """Letter that the answer names, `Z` for a refusal, empty where neither is clear."""
    if _FAILED in answer:
        return ""
    if any(refusal in answer for refusal in _REFUSALS):
        return UNREAD
    words = answer.translate(_SPACED).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    if not named and UNREAD in words:
        return UNREAD
    found = _SENTENCE.search(answer)
    letter = found.group(1).upper() if found else ""
    return letter if letter in options else ""


def infer_text(answer: str, options: Mapping[str, str]) -> str:
    """Letter of the only option whose text is part of the answer, case ignored; empty where none or several are."""
    lower = answer.lower()
    if len(lower) > 2 * sum(len(text) for text in options.values()):
        return ""
    named = [letter for letter, text in options.items() if text.lower() in lower]
    return named[0] if len(named) == 1 else ""
