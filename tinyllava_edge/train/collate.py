"""Conversations → token ids with answer marks → batches, where turns about one picture share its prefix.

A row becomes ids and, by construction, the indicator of Eq. 3: a position counts when it holds answer text or the mark
that ends an answer. A pack is one or more single-turn rows about one picture: the prefix (beginning of sequence, system
text, image) stands once, each turn sees the prefix and itself only, and its positions restart after the prefix. So the
loss of a pack is the sum of its rows' losses, while the picture and the system text are computed once.

Legend: b packs, n positions, a answer tokens of the fullest pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..data.llava_json import Row
from ..errors import CheckpointError, DataError
from ..prompt import IMAGE_MARKER, EndOfTurn, Image, Section, Template, build, sections
from ..tokenizer_sections import SectionTokenizer

IGNORED = -100  # the label that no loss counts
Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Encoded:
    """One row as ids."""

    ids: Ids
    """(n,), image slots included"""
    is_answer: npt.NDArray[np.bool_]
    """(n,), Eq. 3's indicator: answer text and its end mark"""
    shared: int
    """positions at the front, through the last image slot, that rows on the same picture have in common; 0 for none"""


@dataclass(frozen=True)
class Pack:
    """Rows that are trained as one sequence."""

    rows: tuple[Encoded, ...]
    """one row, or several that share their first `shared` ids"""
    image: str | None
    """their picture"""

    @property
    def length(self) -> int:
        """Positions of the sequence."""
        shared = self.rows[0].shared
        return shared + sum(len(row.ids) - shared for row in self.rows)


class Encoder:
    """Tokenises rows for one template; text that users typed never becomes a special token."""

    def __init__(self, tokenizer: Any, template: Template, visual_tokens: int, max_length: int) -> None:
        if not tokenizer.is_fast:
            raise CheckpointError("the tokenizer gives no offsets", "save it as tokenizer.json with a fast tokenizer")
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.image_slots = [_special(tokenizer, IMAGE_MARKER)] * visual_tokens
        self.end = [_special(tokenizer, template.end_of_turn)] if template.end_of_turn else []
        bos = tokenizer.bos_token_id
        self.start = [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []
        self._sections = SectionTokenizer(tokenizer)
        self._known: dict[tuple[str, bool], tuple[list[int], list[int]]] = {}  # repeated sections → ids, ends

    def encode(self, row: Row) -> Encoded:
        """Ids and answer marks of a row, cut at `max_length` on the right as upstream does.

        Raises:
            DataError: no answer token is left within `max_length`, or stage 1 meets a row without a picture.
        """
        if self.template.caption_only and row.image is None:
            raise DataError("a caption row without a picture", "stage 1 trains on captions; give image-caption rows")
        ids, marks, shared = list(self.start), [False] * len(self.start), 0
        for part in sections(build(row.turns, self.template)):
            if isinstance(part, Image):
                ids += self.image_slots
                marks += [False] * len(self.image_slots)
                shared = len(ids) if len(row.turns) == 1 else 0
            elif isinstance(part, EndOfTurn):
                ids += self.end
                marks += [part.is_answer]
            else:
                part_ids, part_marks = self._text(part)
                ids += part_ids
                marks += part_marks
        if len(ids) > self.max_length:
            ids, marks = ids[: self.max_length], marks[: self.max_length]
        if not any(marks) or shared > self.max_length:
            raise DataError(f"no answer token within {self.max_length} positions", "shorten the row")
        return Encoded(np.array(ids, np.int32), np.array(marks, np.bool_), shared)

    def _text(self, section: Section) -> tuple[list[int], list[bool]]:
        """Tokenise a section as a whole, then mark each token by the text that its last character comes from."""
        ids, ends = self._tokenise(section)
        texts = section.texts
        marks: list[bool] = []
        limit, k = len(texts[0].text), 0
        for end in ends:
            while end > limit and k + 1 < len(texts):
                k += 1
                limit += len(texts[k].text)
            marks.append(texts[k].is_answer)
        return ids, marks

    def _tokenise(self, section: Section) -> tuple[list[int], list[int]]:
        """Ids, and for each token the place behind its last character."""
        key = section.text, section.starts
        if key not in self._known:
            if len(self._known) > 4096:
                self._known.clear()
            self._known[key] = self._sections.encode(*key)
        return self._known[key]


def _special(tokenizer: Any, text: str) -> int:
    token = tokenizer.convert_tokens_to_ids(text)
    if token is None or (token == tokenizer.unk_token_id and text != tokenizer.unk_token):
        raise CheckpointError(f"the tokenizer has no {text!r} token", "the template does not fit the language model")
    return int(token)


def pack(rows: Sequence[tuple[Row, Encoded]], max_turns: int) -> list[Pack]:
    """Group single-turn rows by picture, up to `max_turns` a pack in packs of even size; other rows stay alone."""
    together: dict[str, list[Encoded]] = {}
    packs: list[Pack] = []
    for row, encoded in rows:
        if row.image is not None and encoded.shared and max_turns > 1:
            together.setdefault(row.image, []).append(encoded)
        else:
            packs.append(Pack((encoded,), row.image))
    for image, turns in together.items():
        count = -(-len(turns) // max_turns)
        packs += [Pack(tuple(turns[k::count]), image) for k in range(count)]
    return packs


def collate(packs: Sequence[Pack], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors of some packs.

    Returns:
        input_ids (b, n); position_ids (b, n); attention_mask, bool, (b, n) for ordinary causal rows or (b, 1, n, n)
        when a pack holds several turns; labels (b, a): the answer tokens, then -100; sources (b, a): the position
        whose hidden state predicts each label.
    """
    laid = [_lay_out(item) for item in packs]
    n = max(len(item.ids) for item in laid)
    a = max(len(item.sources) for item in laid)
    ids = np.full((len(packs), n), pad_id, np.int64)
    positions = np.zeros((len(packs), n), np.int64)
    turns = np.full((len(packs), n), -1, np.int64)
    sources = np.zeros((len(packs), a), np.int64)
    labels = np.full((len(packs), a), IGNORED, np.int64)
    for k, item in enumerate(laid):
        ids[k, : len(item.ids)] = item.ids
        positions[k, : len(item.ids)] = item.positions
        turns[k, : len(item.ids)] = item.turns
        sources[k, : len(item.sources)] = item.sources
        labels[k, : len(item.sources)] = item.labels
    shares = any(len(item.rows) > 1 for item in packs)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "attention_mask": _block_mask(torch.from_numpy(turns)) if shares else torch.from_numpy(turns >= 0),
        "sources": torch.from_numpy(sources),
        "labels": torch.from_numpy(labels),
    }


@dataclass(frozen=True)
class _Sequence:
    ids: Ids
    positions: Ids
    turns: Ids  # 0 for the prefix and for lone rows, then 1, 2 … for the turns
    sources: Ids
    labels: Ids


def _lay_out(item: Pack) -> _Sequence:
    shared = item.rows[0].shared if len(item.rows) > 1 else 0
    first = item.rows[0]
    ids, positions, turns = [first.ids[:shared]], [np.arange(shared)], [np.zeros(shared)]
    sources, labels, offset = [], [], shared
    for number, row in enumerate(item.rows, 1):
        own = len(row.ids) - shared
        answers = np.flatnonzero(row.is_answer[shared:])
        answers = answers[answers + shared > 0]  # the very first position has nothing to be predicted from
        ids.append(row.ids[shared:])
        positions.append(shared + np.arange(own))
        turns.append(np.full(own, number if shared else 0))
        sources.append(np.where(answers == 0, shared, offset + answers) - 1)  # a turn's first token follows the prefix
        labels.append(row.ids[shared + answers])
        offset += own
    joined = (np.concatenate(part).astype(np.int32) for part in (ids, positions, turns, sources, labels))
    return _Sequence(*joined)


def _block_mask(turns: torch.Tensor) -> torch.Tensor:
    """Who sees whom: (b, n) → bool (b, 1, n, n). Causal, within a turn or towards the prefix; padding sees itself."""
    n = turns.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    query, key = turns.unsqueeze(2), turns.unsqueeze(1)  # (b, n, 1), (b, 1, n)
    seen = causal & (key >= 0) & ((key == 0) | (key == query))
    return (seen | torch.eye(n, dtype=torch.bool)).unsqueeze(1)
