"""What a tokenizer's JSON files say beside its vocabulary, with checked types, and how slow classes fill the gaps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint_spec import read_json
from .errors import CheckpointError

MAX_BYTES = 128 << 20  # Gemma's tokenizer.json takes 17 MB
RESTORE = "copy the file again from the language model's release"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Tokens that are mark-up whatever tokenizer_config.json calls them: llama.cpp takes them for control tokens by their
# names, so a user must not be able to type them here either.
_MARKUP = re.compile(r"<\|[^|]+\|>|<(fim_(prefix|suffix|middle|pad)|(start|end)_of_turn|eos|EOT|PRE|SUF|MID|PAD)>|</s>")


@dataclass(frozen=True)
class SlowClass:
    """How a slow tokenizer class of transformers 4.40 reads its files, where tokenizer_config.json is silent."""

    files: tuple[str, ...]
    """what it reads"""
    special: dict[str, str]
    """special tokens"""
    add_bos: bool = False
    """whether a text starts with the beginning-of-sequence token"""
    pattern: str = ""
    """how text is split before merging; empty is GPT-2's way"""
    nfc: bool = False
    """whether text is composed (NFC) first"""


@dataclass(frozen=True)
class Settings:
    """tokenizer_config.json, filled up from special_tokens_map.json and added_tokens.json."""

    path: Path
    """tokenizer_config.json, for messages"""
    tokenizer_class: str | None
    """class that wrote it"""
    special: dict[str, str]
    """key of SPECIAL → token"""
    more: tuple[str, ...]
    """further special tokens"""
    added: dict[int, tuple[str, bool]]
    """id → text of a token beside the vocabulary, and whether it is special"""
    add_bos: bool | None
    """whether a text starts with the beginning-of-sequence token"""
    add_eos: bool | None
    """whether a text ends with the end-of-sequence token"""
    add_prefix_space: bool | None
    """whether a space goes in front"""
    legacy: bool | None
    """Llama's old kind of prefix space, after every special token"""
    max_length: int | None
    """longest text in tokens"""


_END = "<|endoftext|>"
BYTE_LEVEL = ("vocab.json", "merges.txt")
_GPT2 = SlowClass(BYTE_LEVEL, {"bos_token": _END, "eos_token": _END, "unk_token": _END})
SLOW_CLASSES = {
    "LlamaTokenizer": SlowClass(
        ("tokenizer.model",), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, add_bos=True
    ),
    "GemmaTokenizer": SlowClass(
        ("tokenizer.model",),
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
        add_bos=True,
    ),
    "GPT2Tokenizer": _GPT2,
    "CodeGenTokenizer": _GPT2,
    "Qwen2Tokenizer": SlowClass(
        BYTE_LEVEL, {"eos_token": _END, "unk_token": _END, "pad_token": _END}, pattern=QWEN2_PATTERN, nfc=True
    ),
}


def is_markup(text: str) -> bool:
    """Whether a token's text is mark-up by its form."""
    return _MARKUP.fullmatch(text) is not None


def read_settings(directory: Path) -> Settings:
    """Read the JSON files that are there. Raises CheckpointError that names the file and the key."""
    path = directory / "tokenizer_config.json"
    given: dict[str, Any] = {}
    special: dict[str, str | None] = {}
    more: list[str] = []
    for file in (directory / "special_tokens_map.json", path):
        if not file.is_file():
            continue
        given = read_object(file)
        special |= {key: _text(file, key, given[key]) for key in SPECIAL if key in given}
        listed = given.get("additional_special_tokens") or []
        if not isinstance(listed, list):
            raise CheckpointError(f"{file}: additional_special_tokens is not a list", RESTORE)
        more += [text for token in listed if (text := _text(file, "additional_special_tokens", token))]
    if not path.is_file():
        given = {}
    length = given.get("model_max_length")
    return Settings(
        path=path,
        tokenizer_class=given["tokenizer_class"] if isinstance(given.get("tokenizer_class"), str) else None,
        special={key: text for key, text in special.items() if text},
        more=tuple(dict.fromkeys(more)),
        added=_added(path, given.get("added_tokens_decoder") or {}),
        add_bos=_flag(path, given, "add_bos_token"),
        add_eos=_flag(path, given, "add_eos_token"),
        add_prefix_space=_flag(path, given, "add_prefix_space"),
        legacy=_flag(path, given, "legacy"),
        max_length=length if isinstance(length, int) and 1 < length < 1 << 24 else None,  # 1e30 means none
    )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of at most MAX_BYTES. Raises CheckpointError."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})", RESTORE) from error
    if size > MAX_BYTES:
        raise CheckpointError(f"{path}: {size:,} bytes, more than a tokenizer takes", RESTORE)
    return read_json(path)


def _flag(path: Path, given: dict[str, Any], key: str) -> bool | None:
    value = given.get(key)
    if not isinstance(value, bool | None):
        raise CheckpointError(f"{path}: {key}={value!r} is not true or false", RESTORE)
    return value


def _text(path: Path, key: str, value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and (not isinstance(text, str) or not text):
        raise CheckpointError(f"{path}: {key}={value!r} is not a token", RESTORE)
    return text


def _added(path: Path, given: Any) -> dict[int, tuple[str, bool]]:
    """`added_tokens_decoder`, then what added_tokens.json knows besides."""
    if not isinstance(given, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder is not an object", RESTORE)
    added: dict[int, tuple[str, bool]] = {}
    for index, token in given.items():
        text = _text(path, "added_tokens_decoder", token)
        if not (index.isascii() and index.isdigit() and len(index) < 8) or text is None or not isinstance(token, dict):
            raise CheckpointError(f"{path}: added_tokens_decoder has {index[:20]!r}: {str(token)[:60]}", RESTORE)
        if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise CheckpointError(
                f"{path}: token {text!r} takes spaces or words around it, which has no GGUF form", "use another token"
            )
        added[int(index)] = (text, token.get("special") is True)
    known = {text for text, _ in added.values()}
    file = path.with_name("added_tokens.json")
    for text, number in (read_object(file) if file.is_file() else {}).items():
        if not text or not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 24:
            raise CheckpointError(f"{file}: {text[:60]!r} has id {number!r}", RESTORE)
        if text not in known:
            if number in added:
                raise CheckpointError(f"{file}: {text[:60]!r} and {added[number][0]!r} share id {number}", RESTORE)
            added[number] = (text, False)
    return added
