"""How MMMU reads answers: letters of multiple choice, and the numbers and phrases of open questions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

_EDGES = (",", ".", "!", "?", ";", ":", "'")  # stripped one after the other, each once
_LONG_ANSWER = 5  # words that an answer must exceed before option texts are searched in it
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset((*":,.!?;'",))
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 1.2
)


def fixed_choice(name: str, choices: Sequence[str]) -> str:
    """The choice that stands for upstream's unseeded random one: SHA-256 of the question's id, modulo their number."""
    return choices[int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest(), "big") % len(choices)]


def parse_choice(answer: str, options: Mapping[str, str]) -> str:
    """Letter that the answer means; empty where upstream draws one at random.

    As parse_multi_choice_response in TinyLLaVA Factory and in MMMU: letters in brackets, else letters between spaces,
    else (in answers of more than five words) option texts; of several, the one that comes last. White space at the
    edges is not stripped before the marks are: `A.\\n` names no letter.
    """
    for edge in _EDGES:
        answer = answer.strip(edge)
    text = f" {answer} "
    for pattern in ("({})", " {} "):
        places = {letter: text.rfind(pattern.format(letter)) for letter in options}
        if any(place >= 0 for place in places.values()):
            return max(places, key=places.__getitem__)
    if len(text.split()) > _LONG_ANSWER:
        places = {letter: text.lower().rfind(option.lower()) for letter, option in options.items()}
        if any(place >= 0 for place in places.values()):
            return max(places, key=places.__getitem__)
    return ""


def parse_open(answer: str) -> list[str | float]:
    """Phrases and numbers that an open answer may mean, normalised, in order, without repetition.

    As parse_open_response: of each line what follows the last key word (is, so, answer, …; in the last line also =),
    the shortest such tail, else the whole answer; then every number in them. The answer is lowered before it is split,
    so upstream's split at full stops before a capital never happens.
    """
    phrases = _key_phrases(answer.strip().strip(".").lower())
    numbers = [number for phrase in phrases for pattern in _NUMBERS for number in pattern.findall(phrase)]
    return list(dict.fromkeys(value for text in (*phrases, *numbers) for value in normalise(text)))


def _key_phrases(answer: str) -> list[str]:
    lines = answer.split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        shortest = ""
        for key in (*_KEYS, "=") if number == len(lines) else _KEYS:
            if key in line:
                tail = line.split(key)[-1].strip()
                if not shortest or len(tail) < len(shortest):  # an empty tail gives way to the next, as upstream
                    shortest = tail
        if shortest and shortest not in _TRIVIAL:
            found.append(shortest)
    return found or [answer]


def normalise(text: str) -> list[str | float]:
    """A number rounded to two decimals, else the words in lower case; one character gets a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def open_matches(gold: str | Sequence[str], found: Sequence[str | float]) -> bool:
    """Whether an accepted answer equals a number found, or is part of a phrase found. As eval_open."""
    accepted = [value for text in ([gold] if isinstance(gold, str) else gold) for value in normalise(text)]
    words = [value for value in accepted if isinstance(value, str)]
    return any(any(word in value for word in words) if isinstance(value, str) else value in accepted for value in found)
