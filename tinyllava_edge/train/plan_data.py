"""How long a data set's rows are: measured with the training encoder, or counted in characters without a tokenizer."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.llava_json import BadRow, Row, check_bad
from ..errors import DataError
from ..prompt import EndOfTurn, Image, Template, build, sections
from .collate import pack
from .encode import Encoded, Encoder
from .source import Source, open_source

CHARACTERS = 4.0  # per token, where there is no tokenizer: an assumption for English, and it is printed as one
SAMPLE = 20_000  # rows that are tokenised; of a larger set some pictures with all their rows


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
    images: Path | Sequence[Path],
    template: Template,
    tokenizer: Any | None,
    visual_tokens: int,
    max_length: int,
    max_turns: int,
    *,
    max_bad: int | float = 0,
) -> Lengths:
    """Read, check and encode rows as training does, but for the pictures' contents.

    Args:
        tokenizer: with an `<image>` token; None counts characters.
        max_length: positions after which a row is cut.

    Raises:
        DataError: unusable files, more than `max_bad` bad rows, or no usable row.
    """
    found = _sample(data, images, max_bad)
    encoder = (
        CharacterEncoder(template, visual_tokens, max_length)
        if tokenizer is None
        else Encoder(tokenizer, template, visual_tokens, max_length)
    )
    encoded = _encode(encoder, found.rows)
    if not encoded:
        raise DataError(f"{found.source}: no usable row for this stage", "is it the other stage's data set?")
    packs = pack(encoded, max_turns)
    scale = found.good / len(found.rows)
    answers = [sum(int(row.is_answer.sum()) for row in item.rows) for item in packs]
    how = "a tokenizer" if tokenizer is not None else f"{CHARACTERS:g} characters a token (no tokenizer: an assumption)"
    part = f", {len(found.rows):,} of {found.good:,} rows" if found.share > 1 else ""
    part += f", each drawn {found.drawn:.3g} times an epoch" if found.drawn != 1 else ""
    return Lengths(
        rows=round(len(encoded) * scale),
        packs=round(len(packs) * scale * found.drawn),
        pictures=len({name for row in found.rows for name in row.images}) * found.share,
        with_picture=sum(bool(item.images) for item in packs) / len(packs),
        positions=sum(item.length for item in packs) / len(packs),
        longest=max(item.length for item in packs),
        answers=sum(answers) / len(packs),
        most_answers=max(answers),
        refused=round((len(found.rows) - len(encoded)) * scale),
        source=f"measured with {how}{part}",
    )


@dataclass(frozen=True)
class _Sample:
    rows: tuple[Row, ...]
    good: int  # rows in all
    share: int  # one of so many pictures was taken
    drawn: float  # how often an epoch draws a row, by its set's weight
    source: Source


def _sample(data: Path | Sequence[Path], images: Path | Sequence[Path], max_bad: int | float) -> _Sample:
    """Rows to tokenise: all, or those of one in 2, 4, 8 … pictures, chosen by their names' hashes.

    Memory holds twice SAMPLE rows at most, however many there are.
    """
    kept: list[tuple[int, Row]] = []
    bad: list[BadRow] = []
    good, share, drawn = 0, 1, 0.0
    with tempfile.TemporaryDirectory() as index:
        source = open_source(data, images, Path(index))
        for of, row in source.rows():
            if isinstance(row, BadRow):
                bad.append(row)
                continue
            good += 1
            drawn += source.sets[of].weight
            key = "\0".join(row.images) or f"\0{good}"
            place = zlib.crc32(f"{of}\0{key}".encode())
            if place % share == 0:
                kept.append((place, row))
            if len(kept) > 2 * SAMPLE:
                share *= 2
                kept = [item for item in kept if item[0] % share == 0]
    check_bad(bad, max_bad, good + len(bad))
    if not kept:
        raise DataError(f"{source}: no usable row", "give LLaVA JSON with at least one conversation")
    return _Sample(tuple(row for _, row in kept), good, share, drawn / good, source)


def _encode(encoder: Encoder | CharacterEncoder, rows: Sequence[Row]) -> list[tuple[Row, Encoded]]:
    """Rows that training would take; it refuses the others by name, so here they just don't count."""
    encoded = []
    for row in rows:
        try:
            encoded.append((row, encoder.encode(row)))
        except DataError:
            continue
    return encoded
