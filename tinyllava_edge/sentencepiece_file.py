"""`tokenizer.model`: a SentencePiece model's pieces and normaliser, read from its protocol buffer without running it.

Field numbers are those of SentencePiece's `sentencepiece_model.proto`; other fields are passed over.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError

MAX_BYTES = 64 << 20  # Gemma's 256,000 pieces take 4 MB
SPACE = "\u2581"  # how a piece writes a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # piece types
_BPE = 2  # the model type; 1 is unigram, 3 words, 4 characters


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its place in the list is its id."""

    text: str
    """spelling, spaces as U+2581"""
    score: float
    """higher is merged earlier"""
    kind: int
    """NORMAL … BYTE"""


@dataclass(frozen=True)
class SentencePieceFile:
    """What a BPE model's file says."""

    pieces: tuple[Piece, ...]
    """by id"""
    dummy_prefix: bool
    """whether a space goes in front of every text"""


def read_sentencepiece(path: Path) -> SentencePieceFile:
    """Read `tokenizer.model`.

    Raises:
        CheckpointError: missing, too large, truncated or not such a file; a model that is not BPE, or one whose
            normaliser changes text, because neither llama.cpp nor tokenizer.json would follow it.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, more than a tokenizer takes", _RESTORE)
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})", _RESTORE) from error
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normaliser: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                pieces.append(_piece(_message(value)))
            elif number == 2:
                trainer = dict(_fields(_message(value)))
            elif number == 3:
                normaliser = dict(_fields(_message(value)))
    except (ValueError, struct.error, IndexError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model ({error})", _RESTORE) from error
    _check(path, pieces, trainer, normaliser)
    return SentencePieceFile(tuple(pieces), bool(normaliser.get(3, 1)))


_RESTORE = "copy tokenizer.model again from the language model's release"


def _check(
    path: Path, pieces: list[Piece], trainer: dict[int, int | bytes], normaliser: dict[int, int | bytes]
) -> None:
    if not pieces:
        raise CheckpointError(f"{path}: no pieces", _RESTORE)
    if len({piece.text for piece in pieces}) < len(pieces):
        raise CheckpointError(f"{path}: a piece occurs twice", _RESTORE)
    if sum(piece.kind == UNKNOWN for piece in pieces) != 1:
        raise CheckpointError(f"{path}: needs one unknown piece", _RESTORE)
    if trainer.get(3, 1) != _BPE:
        raise CheckpointError(f"{path}: model type {trainer.get(3, 1)!r}, not 2 (BPE)", "use the model's own tokenizer")
    changes = {
        "a character map": bool(normaliser.get(2)),
        "spaces that are collapsed": bool(normaliser.get(4, 1)),
        "spaces that are not escaped": not normaliser.get(5, 1),
        "spaces at the end of words": bool(trainer.get(24, 0)),
    }
    for name, given in changes.items():
        if given:
            raise CheckpointError(
                f"{path}: the normaliser has {name}, which has no GGUF form", "use the model's own tokenizer"
            )


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _message(value).decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", _message(value))
        elif number == 3:
            kind = int(value) if isinstance(value, int) else -1
    if not text or not NORMAL <= kind <= BYTE or score != score:
        raise ValueError(f"piece {text!r} of type {kind} and score {score}")
    return Piece(text, score, kind)


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a protocol buffer message; fixed 32- and 64-bit values stay bytes."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if number == 0 or size > end - at:
            raise ValueError(f"a field of {size:,} bytes ends behind the file" if number else f"field 0 at byte {at}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"a number runs over at byte {at}")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
