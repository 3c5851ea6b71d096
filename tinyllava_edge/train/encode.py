"""Conversations → token ids with answer marks.

A row becomes ids and, by construction, the indicator of Eq. 3: a position counts when it holds answer text or the mark
that ends an answer. A picture is one `<image>` id while a row is made and stored, and as many as it has visual tokens
when it is trained on.

Legend: n positions, c compact ids, where a picture is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.llava_json import Row
from ..errors import CheckpointError, DataError
from ..prompt import IMAGE_MARKER, EndOfTurn, Image, Section, Template, build, sections
from ..tokenizer_sections import SectionTokenizer

Ids = npt.NDArray[np.int32]
Marks = npt.NDArray[np.bool_]
KNOWN = 4096  # sections whose ids are remembered; data sets repeat the system text and many questions


@dataclass(frozen=True)
class Encoded:
    """One row as ids."""

    ids: Ids
    """(n,), image slots included"""
    is_answer: Marks
    """(n,), Eq. 3's indicator: answer text and its end mark"""
    shared: int
    """positions at the front, through the last slot, that rows on the same picture have in common; 0 for none"""
    images: int = 0
    """pictures whose slots stand in `ids`; later ones of the row were cut off"""


@dataclass(frozen=True)
class Compact:
    """One row as it is stored."""

    ids: Ids
    """(c,), one `<image>` id for each picture"""
    is_answer: Marks
    """(c,), as Encoded's"""
    shared: int
    """compact ids at the front that rows on the same picture have in common; 0 for none"""
    images: int
    """pictures in `ids`"""


def expand(row: Compact, image_id: int, visual_tokens: int) -> Encoded:
    """The row with `visual_tokens` slots for each picture."""
    if not row.images:
        return Encoded(row.ids, row.is_answer, 0)
    if row.shared:  # one picture, and its place is known: three times as fast
        more = visual_tokens - 1
        ids = np.concatenate((row.ids[: row.shared], np.full(more, image_id, np.int32), row.ids[row.shared :]))
        no = np.zeros(more, np.bool_)
        marks = np.concatenate((row.is_answer[: row.shared], no, row.is_answer[row.shared :]))
        return Encoded(ids, marks, row.shared + more, row.images)
    widths = np.where(row.ids == image_id, visual_tokens, 1)
    return Encoded(np.repeat(row.ids, widths), np.repeat(row.is_answer, widths), 0, row.images)


class Encoder:
    """Tokenises rows for one template; text that users typed never becomes a special token."""

    def __init__(self, tokenizer: Any, template: Template, visual_tokens: int, max_length: int) -> None:
        if not tokenizer.is_fast:
            raise CheckpointError("the tokenizer gives no offsets", "save it as tokenizer.json with a fast tokenizer")
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.image_id, self.visual_tokens = special_id(tokenizer, IMAGE_MARKER), visual_tokens
        self.end = [special_id(tokenizer, template.end_of_turn)] if template.end_of_turn else []
        bos = tokenizer.bos_token_id
        self.start = [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []
        self._sections = SectionTokenizer(tokenizer)
        self._known: dict[tuple[str, bool], tuple[list[int], list[int]]] = {}  # repeated sections → ids, ends

    def encode(self, row: Row) -> Encoded:
        """Ids and answer marks of a row, cut at `max_length` on the right as upstream does.

        A picture that the cut would go through is cut off whole, with what follows.

        Raises:
            DataError: no answer token is left within `max_length`, or stage 1 meets a row without a picture.
        """
        return expand(self.compact(row), self.image_id, self.visual_tokens)

    def compact(self, row: Row) -> Compact:
        """As `encode`, with one id for each picture. Raises DataError as it does."""
        wanted = len(row.images)
        if self.template.caption_only and wanted != 1:
            found = "several pictures" if wanted else "a picture"
            raise DataError(
                f"a caption row with{'' if wanted else 'out'} {found}", "stage 1 trains on captions; give one picture"
            )
        ids, marks, images, shared = list(self.start), [False] * len(self.start), 0, 0
        for part in sections(build(row.turns, self.template)):
            if isinstance(part, Image):
                ids.append(self.image_id)
                marks.append(False)
                images, shared = images + 1, len(ids)
            elif isinstance(part, EndOfTurn):
                ids += self.end
                marks += [part.is_answer]
            else:
                part_ids, part_marks = self._text(part)
                ids += part_ids
                marks += part_marks
        if images != wanted:
            raise DataError(f"{images} places for {wanted} pictures", "put one <image> for each picture")
        if images != 1 or len(row.turns) != 1:
            shared = 0
        if len(ids) + images * (self.visual_tokens - 1) > self.max_length:
            kept = self._fitting(ids)
            ids, marks = ids[:kept], marks[:kept]
            images = ids.count(self.image_id)
        if not any(marks):
            raise DataError(f"no answer token within {self.max_length} positions", "shorten the row")
        return Compact(np.array(ids, np.int32), np.array(marks, np.bool_), shared, images)

    def _fitting(self, ids: list[int]) -> int:
        """How many compact ids fit."""
        widths = np.where(np.array(ids) == self.image_id, self.visual_tokens, 1)
        return int(np.searchsorted(np.cumsum(widths), self.max_length, side="right"))

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
            if len(self._known) > KNOWN:
                self._known.clear()
            self._known[key] = self._sections.encode(*key)
        return self._known[key]


def special_id(tokenizer: Any, text: str) -> int:
    """Id of a special token. Raises CheckpointError if the tokenizer lacks it."""
    token = tokenizer.convert_tokens_to_ids(text)
    if token is None or (token == tokenizer.unk_token_id and text != tokenizer.unk_token):
        raise CheckpointError(f"the tokenizer has no {text!r} token", "the template does not fit the language model")
    return int(token)
