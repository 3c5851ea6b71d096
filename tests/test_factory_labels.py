"""Ids and labels of training rows equal TinyLLaVA Factory's rule, written out here from its description.

Factory tokenises the prompt between pictures as a whole, then finds the answers by counting tokens of its rounds, each
tokenised alone. Where the counts don't add up it drops the whole row. Ours are marked by construction: equal wherever
Factory keeps the row, and kept where it doesn't. No tolerance: every id and every label is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tinyllava_edge.data.llava_json import Row
from tinyllava_edge.prompt import IMAGE_MARKER, SYSTEM, TEMPLATES, Turn
from tinyllava_edge.tokenizer_files import factory_special_tokens, fast_tokenizer
from tinyllava_edge.train.collate import Encoder

from . import tiny_tokenizers as tiny

MASKED, PICTURE, SEPARATOR = -100, -200, " ASSISTANT: "
ENDS = {name: template.end_of_turn for name, template in TEMPLATES.items()}
FAMILIES = {"llama": "llama", "llama-legacy": "llama", "gemma": "gemma", "phi": "phi", "qwen2_base": "qwen2"}


@dataclass(frozen=True)
class Upstream:
    """Factory's tokenizer and rule for one language model."""

    slow: tiny.Encode
    special: dict[str, int]
    bos: int | None
    pad: int
    template: str
    new_llama: bool

    def tokens(self, text: str) -> list[int]:
        """Chunk by chunk around the picture; every chunk's own first token is dropped but the very first one."""
        first = [] if self.bos is None else [self.bos]
        ids = list(first)
        for number, chunk in enumerate(text.split(IMAGE_MARKER)):
            ids += [PICTURE] * (number > 0) + self.slow(chunk)
        return ids

    def labels(self, prompt: str) -> tuple[list[int], list[int], bool]:
        """Ids, labels, and whether the row was kept."""
        ids, end = self.tokens(prompt), ENDS[self.template]
        labels = list(ids)
        if self.template == "pretrain":
            labels[: len(self.tokens(IMAGE_MARKER))] = [MASKED] * len(self.tokens(IMAGE_MARKER))
            return ids, labels, True
        first = 0 if self.bos is None else 1
        place = first
        labels[:first] = [MASKED] * first
        for number, spoken in enumerate(prompt.split(end)):
            halves = spoken.split(SEPARATOR)
            if not spoken or len(halves) != 2:
                break
            less = int(self.new_llama and number > 0)  # such a round alone has one token more than inside the text
            hidden = len(self.tokens(halves[0] + SEPARATOR)) - 1 - first - less
            labels[place : place + hidden] = [MASKED] * hidden
            place += len(self.tokens(spoken)) + 1 - first - less
        labels[place:] = [MASKED] * len(labels[place:])
        total = sum(index != self.pad for index in ids)
        if self.special[end] == self.pad:
            total += prompt.count(end)
        kept = place == total
        return ids, labels if kept else [MASKED] * len(ids), kept


@dataclass(frozen=True)
class Both:
    upstream: Upstream
    fast: Any
    template: str


def both(kind: str, template: str, root: Path) -> Both:
    release = tiny.KINDS[kind][1](root)
    fast = fast_tokenizer(release)
    if kind == "qwen2_instruct":
        fast.eos_token = "<|im_end|>"
    factory_special_tokens(fast, FAMILIES.get(kind, "qwen2"))
    special = {token.content: k for k, token in fast.added_tokens_decoder.items() if token.special}
    slow = tiny.KINDS[kind][2](release, special)
    fast.add_tokens([IMAGE_MARKER], special_tokens=True)
    first = fast.bos_token_id if kind in ("llama", "llama-legacy", "gemma") else None
    return Both(Upstream(slow, special, first, fast.pad_token_id, template, kind == "llama"), fast, template)


@pytest.fixture(scope="module", params=list(tiny.KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return both(request.param, tiny.KINDS[request.param][0], tmp_path_factory.mktemp(request.param))


def prompt_of(turns: Sequence[tuple[str, str]], end: str) -> str:
    """Factory's training text of a conversation."""
    text = SYSTEM + " "
    for question, answer in turns:
        if IMAGE_MARKER in question:
            question = f"{IMAGE_MARKER}\n{question.replace(IMAGE_MARKER, '').strip()}".strip()
        text += f"USER: {question} ASSISTANT: {answer}{end}"
    return text


def ours(pair: Both, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
    has_image = any(IMAGE_MARKER in question for question, _ in turns)
    row = Row("r", ("a.png",) if has_image else (), tuple(Turn(*turn) for turn in turns))
    encoded = Encoder(pair.fast, TEMPLATES[pair.template], 1, 4096).encode(row)
    slot = pair.fast.convert_tokens_to_ids(IMAGE_MARKER)
    ids = [PICTURE if index == slot else index for index in encoded.ids.tolist()]
    marks = encoded.is_answer.tolist()
    return ids, [index if mark else MASKED for index, mark in zip(ids, marks, strict=True)]


ROWS: list[list[tuple[str, str]]] = [
    [("<image>\nwhat color is the shape?", "red")],
    [("what color? <image>", "a small blue circle, detailed.")],
    [("is <image> there?", "yes")],
    [("<image>", "no question at all")],
    [("<image>\nwhat?", "")],
    [("<image>\nwhat?", " a space more")],
    [("<image>\nwhat?", "\na newline first")],
    [("<image>\nwhat?", '"quoted" and (more)')],
    [("<image>\n  12 345 2024 ½  ", "7")],
    [("<image>\nnaïve 中文 😀?", "é 日本語 😀!")],
    [("<image>\ntabs\t\tand\n\nlines   here", "if a  ==  b:\n        pass\n\n\n")],
    [("hello", "a text without a picture")],
    [(" kept  as it is \n", "trailing space ")],
    [("<image>\nwhat?", "red"), ("sure?", "yes"), ("and now?", "no")],
    [("one", "1"), ("two", ""), ("three", "US ER")],
    [("<image>\nwhat?", "ends in a space "), ("   spaces", " and more "), ("USER", "USER:")],
]


@pytest.mark.parametrize("turns", ROWS)
def test_ids_and_labels_equal_factorys(pair: Both, turns: list[tuple[str, str]]) -> None:
    ids, labels, kept = pair.upstream.labels(prompt_of(turns, ENDS[pair.template]))
    assert kept, "a row that Factory keeps"
    assert ours(pair, turns) == (ids, labels)
    assert any(label != MASKED for label in labels)


@pytest.mark.parametrize("answer", ["see USER: x ASSISTANT: y", "an END inside", "two END END ends"])
def test_rows_that_factory_drops_are_kept(pair: Both, answer: str) -> None:
    """The separator or the end mark as text: Factory masks the row, here the answer and its end are labelled."""
    end = ENDS[pair.template]
    turns = [("<image>\nwhat?", answer.replace("END", end)), ("and?", "no")]
    ids, labels, kept = pair.upstream.labels(prompt_of(turns, end))
    assert not kept and set(labels) == {MASKED}
    mine, marked = ours(pair, turns)
    index = pair.upstream.special[end]
    assert mine.count(index) == len(turns)  # what was typed stays text
    assert [label for label in marked if label == index] == [index] * len(turns)
    if end not in turns[0][1]:
        assert mine == ids


def test_special_tokens_that_a_user_types_are_the_one_difference(pair: Both) -> None:
    """Factory reads them out of questions and answers; here they stay text, and everything around them is equal."""
    end = ENDS[pair.template]
    text = "<|endoftext|>" if pair.template == "qwen2_instruct" else end
    typed = pair.upstream.special[text]
    turns = [(f"<image>\nsay {text} now", "yes")]
    ids, mine = pair.upstream.tokens(prompt_of(turns, end)), ours(pair, turns)[0]
    assert ids.count(typed) == mine.count(typed) + 1
    at = ids.index(typed, 1) - 2  # a space in front of it may join what was typed
    assert mine[:at] == ids[:at] and mine[-3:] == ids[-3:]


@pytest.mark.parametrize("kind", ["llama", "llama-legacy", "gemma", "phi", "qwen2_base"])
@pytest.mark.parametrize("caption", ["a red circle.", " starts with a space", "two\nlines", "", "中 😀"])
def test_stage_1(kind: str, caption: str, tmp_path: Path) -> None:
    """Picture and first token masked, the caption and its newline labelled."""
    pair = both(kind, "pretrain", tmp_path)
    ids, labels, _ = pair.upstream.labels(f"{IMAGE_MARKER}{caption}\n")
    assert ours(pair, [("<image>\nanything", caption)]) == (ids, labels)
