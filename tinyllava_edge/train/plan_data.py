"""How long a data set's rows are: measured with the training encoder, or counted in characters without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.llava_json import Row, read
from ..errors import DataError
from ..prompt import EndOfTurn, Image, Template, build, sections
from .collate import pack
from .encode import Encoded, Encoder

CHARACTERS = 4.0  # per token, where there is no tokenizer: an assumption for English, and it is printed as one
SAMPLE = 20_000  # rows that are tokenised; of a larger set evenly spaced pictures with all their rows


@dataclass(frozen=True)
class Lengths:
    """What a stage's rows come to."""

    rows: int
    """conversations"""
    packs: int
    """sequences that they are packed into"""
    pictures: int
    """different pictures"""
    with_picture: float
    """share of the packs that hold a picture, 0 to 1"""
    positions: float
    """mean length of a pack, image included"""
    longest: int
    """length of the longest pack that was seen"""
    answers: float
    """mean answer tokens of a pack"""
    most_answers: int
    """answer tokens of the pack that holds most"""
    refused: int
    """rows that training would not take, e.g. a caption row without a picture"""
    source: str
    """where the lengths come from, in words"""


class CharacterEncoder:
    """Stands in for `Encoder` where there is no tokenizer: as many made-up ids as the characters suggest."""

    def __init__(self, template: Template, visual_tokens: int, max_length: int) -> None:
        self.template, self.visual_tokens, self.max_length = template, visual_tokens, max_length

    def encode(self, row: Row) -> Encoded:
        """Lengths as `Encoder.encode` would give them. Raises DataError as it does."""
        wanted = len(row.images)
        if self.template.caption_only and wanted != 1:
            raise DataError(f"a caption row with {wanted} pictures", "stage 1 trains on captions; give one picture")
        marks: list[bool] = [False]
        shared = 0
        for part in sections(build(row.turns, self.template)):
            if isinstance(part, Image):
                marks += [False] * self.visual_tokens
                shared = len(marks) if len(row.turns) == 1 == wanted else 0
            elif isinstance(part, EndOfTurn):
                marks.append(part.is_answer)
            else:
                for text in part.texts:
                    marks += [text.is_answer] * max(1, round(len(text.text) / CHARACTERS))
        marks = marks[: self.max_length]
        if not any(marks):
            raise DataError(f"no answer token within {self.max_length} positions", "shorten the row")
        return Encoded(np.zeros(len(marks), np.int32), np.array(marks, np.bool_), shared, wanted)


def measure(
    data: Path | Sequence[Path],
    images: Path,
    template: Template,
    tokenizer: Any | None,
    visual_tokens: int,
    max_length: int,
    max_turns: int,
    *,
    max_bad: int = 0,
) -> Lengths:
    """Read, check and encode rows as training does, but for the pictures' contents.

    Args:
        tokenizer: with an `<image>` token; None counts characters.
        max_length: positions after which a row is cut.

    Raises:
        DataError: unusable files, more than `max_bad` bad rows, or no usable row.
    """
    rows = read(data, images, max_bad=max_bad).rows
    by_picture: dict[str, list[Row]] = {}
    for number, row in enumerate(rows):
        by_picture.setdefault("\n".join(row.images) or f"\0{number}", []).append(row)
    step = max(1, round(len(rows) / SAMPLE))
    chosen = [row for group in list(by_picture.values())[::step] for row in group]
    encoder = (
        CharacterEncoder(template, visual_tokens, max_length)
        if tokenizer is None
        else Encoder(tokenizer, template, visual_tokens, max_length)
    )
    encoded = _encode(encoder, chosen)
    if not encoded:
        raise DataError(f"{data}: no usable row for this stage", "is it the other stage's data set?")
    packs = pack(encoded, max_turns)
    scale = len(rows) / len(chosen)
    answers = [sum(int(row.is_answer.sum()) for row in item.rows) for item in packs]
    how = "a tokenizer" if tokenizer is not None else f"{CHARACTERS:g} characters a token (no tokenizer: an assumption)"
    part = f", {len(chosen):,} of {len(rows):,} rows" if step > 1 else ""
    return Lengths(
        rows=round(len(encoded) * scale),
        packs=round(len(packs) * scale),
        pictures=len({name for row in rows for name in row.images}),
        with_picture=sum(bool(item.images) for item in packs) / len(packs),
        positions=sum(item.length for item in packs) / len(packs),
        longest=max(item.length for item in packs),
        answers=sum(answers) / len(packs),
        most_answers=max(answers),
        refused=round((len(chosen) - len(encoded)) * scale),
        source=f"measured with {how}{part}",
    )


def _encode(encoder: Encoder | CharacterEncoder, rows: Sequence[Row]) -> list[tuple[Row, Encoded]]:
    """Rows that training would take; it refuses the others by name, so here they just don't count."""
    encoded = []
    for row in rows:
        try:
            encoded.append((row, encoder.encode(row)))
        except DataError:
            continue
    return encoded
