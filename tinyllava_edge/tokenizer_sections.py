"""A tokenizer the way prompts need it: plain text between two special tokens → ids, and ids → bytes.

SentencePiece tokenizers put a space in front of text. Of Llama's there are two kinds: the old one (`legacy`) adds it
after every special token, the new one only where a chunk starts, at the beginning or after a picture. Upstream
tokenises each chunk by itself, so both give `▁\\n` after a picture, and they differ after an end-of-turn mark.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .sentencepiece_file import SPACE

ALWAYS, FIRST, NEVER = "always", "first", "never"


def space_prefix(tokenizer: Any) -> str:
    """Where a fast tokenizer adds a space: ALWAYS after a special token, FIRST where a chunk starts, or NEVER.

    tokenizer.json knows a `Prepend` normaliser for both of Llama's kinds; `legacy` false in tokenizer_config.json
    marks the new one, as in the slow tokenizer that upstream uses.
    """
    backend = tokenizer.backend_tokenizer
    if _has(_state(backend.normalizer), "Prepend", "normalizers"):
        return FIRST if tokenizer.init_kwargs.get("legacy", True) is False else ALWAYS
    scheme = _find(_state(backend.pre_tokenizer), "Metaspace", "pretokenizers").get("prepend_scheme", NEVER)
    return {"always": ALWAYS, "first": FIRST}.get(scheme, NEVER)


class SectionTokenizer:
    """Sections of plain text → ids: no BOS, and special-token strings stay plain text."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer, normalizers

        self.prefix = space_prefix(tokenizer)
        raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        raw.no_padding()
        raw.no_truncation()
        if self.prefix != NEVER:  # spaces are added here, in the open
            raw.normalizer = normalizers.Replace(" ", SPACE)
            raw.pre_tokenizer = None
        raw.encode_special_tokens = True
        self.bare = raw

    def text(self, section: str, starts: bool) -> str:
        """The section with its space in front, if it gets one; `starts` is true where a chunk starts."""
        added = self.prefix == ALWAYS or (self.prefix == FIRST and starts)
        return " " + section if added and section else section

    def encode(self, section: str, starts: bool = True) -> tuple[list[int], list[int]]:
        """Ids, and for each the place in `section` behind its last character."""
        text = self.text(section, starts)
        encoding = self.bare.encode(text, add_special_tokens=False)
        shift = len(text) - len(section)
        return list(encoding.ids), [max(end - shift, 0) for _, end in encoding.offsets]

    def start(self, section: str) -> list[int]:
        """Ids of a section at the beginning of a prompt or after a picture."""
        return self.encode(section)[0]

    def rest(self, section: str) -> list[int]:
        """Ids of a section after another special token."""
        return self.encode(section, starts=False)[0]


def token_bytes(tokenizer: Any) -> Callable[[int], bytes]:
    """Id → the bytes that it stands for in an answer; special tokens stand for nothing.

    Bytes rather than text, because a character may be spread over several tokens.
    """
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    pieces = is_sentencepiece(tokenizer)
    alphabet = byte_alphabet()

    def of(index: int) -> bytes:
        token = added.get(index)
        if token is not None and token.special:
            return b""
        text = token.content if token is not None else backend.id_to_token(index)
        if text is None:
            return b""
        if pieces:
            return bytes([int(text[3:5], 16)]) if is_byte_piece(text) else str(text).replace(SPACE, " ").encode()
        return text.encode() if token is not None else bytes(alphabet[letter] for letter in text)

    return of


def is_sentencepiece(tokenizer: Any) -> bool:
    """Whether tokens spell spaces as U+2581 and single bytes as <0x0A>, rather than bytes as letters."""
    decoder = _state(tokenizer.backend_tokenizer.decoder)
    return _has(decoder, "ByteFallback", "decoders") or _has(decoder, "Metaspace", "decoders")


def is_byte_piece(text: str) -> bool:
    """Whether a piece is one of <0x00> … <0xFF>."""
    return len(text) == 6 and text[:3] == "<0x" and text[5] == ">" and all(c in "0123456789ABCDEF" for c in text[3:5])


def byte_alphabet() -> dict[str, int]:
    """The letters that byte-level BPE writes bytes with: printable Latin-1 as itself, the rest from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + k): byte for k, byte in enumerate(other)}


def _state(part: Any) -> dict[str, Any]:
    return {} if part is None else dict(json.loads(part.__getstate__()))


def _find(state: dict[str, Any], kind: str, parts: str) -> dict[str, Any]:
    """The first part of a kind in a component or its sequence; empty if there is none."""
    for part in (state, *state.get(parts, ())):
        if part.get("type") == kind:
            return dict(part)
    return {}


def _has(state: dict[str, Any], kind: str, parts: str) -> bool:
    return bool(_find(state, kind, parts))
