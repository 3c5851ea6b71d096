"""A fast tokenizer → what a GGUF stores of it: SentencePiece's BPE (`llama`) or byte-level BPE (`gpt2`).

llama.cpp has its own tokenizers, so only what they do alike has a form; the rest is refused here by name, and the ids
are proved afterwards (`tokenizer.check_tokenizer`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gguf

from ..errors import ExportError
from ..sentencepiece_file import SPACE
from ..tokenizer_sections import FIRST, NEVER, is_byte_piece, space_prefix
from ..tokenizer_settings import QWEN2_PATTERN

# GPT-2's pattern is built into ByteLevel; others are spelled out in tokenizer.json. Pattern → llama.cpp's name for it.
_GPT2 = "gpt-2"
_DIGITS = "smollm"  # single digits, then GPT-2's pattern
_LLAMA3 = "llama-bpe"
SPLIT_PATTERNS = {
    QWEN2_PATTERN: "qwen2",  # StableLM-2's too
    QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|"): _LLAMA3,
}
HINT = "use the tokenizer of a supported language model: Llama's, Gemma's, Phi-2's, StableLM-2's or Qwen2's"
_UNREACHED = -1e9  # score of pieces that no merge makes


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF stores of a tokenizer."""

    model: str
    """llama.cpp's name of the algorithm: `llama` or `gpt2`"""
    pre: str
    """llama.cpp's name of the pre-tokenizer"""
    tokens: tuple[str, ...]
    """one text per embedding row"""
    types: tuple[int, ...]
    """gguf.TokenType of each row"""
    merges: tuple[str, ...]
    """`gpt2`: merges in order, the two halves parted by a space"""
    scores: tuple[float, ...]
    """`llama`: a higher score is merged earlier"""
    prefix: str
    """where a space goes in front: see tokenizer_sections.space_prefix"""
    nfc: bool
    """whether text is composed (NFC) first"""
    add_bos: bool
    """whether a text starts with the beginning-of-sequence token"""
    add_eos: bool
    """whether a text ends with the end-of-sequence token"""

    @property
    def first_space(self) -> bool:
        """Whether prompts must hold the space that other SentencePiece tokenizers add by themselves."""
        return self.prefix == FIRST


def read_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Read a Hugging Face fast tokenizer.

    Args:
        tokenizer: the checkpoint's tokenizer.
        rows: rows of the embedding; those beyond the vocabulary become unused tokens.

    Raises:
        ExportError: a part that llama.cpp would apply otherwise, by name; more tokens than rows.
    """
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    model = raw["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ExportError(f"tokenizer.json: model {model['type']} is neither byte-level nor SentencePiece's BPE", HINT)
    if model.get("dropout"):
        raise ExportError(f"tokenizer.json: model.dropout={model['dropout']!r} has no GGUF form", HINT)
    pieces = bool(model.get("byte_fallback"))
    if pieces:
        _check_pieces(raw)
    pre, nfc = ("default", False) if pieces else pre_tokenizer(raw)
    tokens, types = _tokens(raw, pieces, rows)
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    add_bos, add_eos = _added_ends(tokenizer)
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=() if pieces else tuple(" ".join(merge) for merge in merges),
        scores=_scores(tokens, merges) if pieces else (),
        prefix=space_prefix(tokenizer) if pieces else NEVER,
        nfc=nfc,
        add_bos=add_bos,
        add_eos=add_eos,
    )


def pre_tokenizer(raw: dict[str, Any]) -> tuple[str, bool]:
    """llama.cpp's name for how a byte-level tokenizer.json splits text, and whether it composes text (NFC) first.

    Raises:
        ExportError: naming the part without a name there.
    """
    normaliser = raw.get("normalizer")
    if normaliser is not None and normaliser.get("type") != "NFC":
        raise ExportError(f"tokenizer.json: normalizer {_type(normaliser)} has no GGUF form", HINT)
    given: dict[str, Any] = raw.get("pre_tokenizer") or {"type": None}
    parts: list[dict[str, Any]] = given["pretokenizers"] if given["type"] == "Sequence" else [given]
    name = _split_name(parts)
    if name is None:
        raise ExportError(f"tokenizer.json: pre-tokenizer {json.dumps(given)[:200]} is not known", HINT)
    whole = bool(raw["model"].get("ignore_merges"))
    if whole != (name == _LLAMA3):
        raise ExportError(f"tokenizer.json: model.ignore_merges={whole} has no GGUF form with {name!r} splitting", HINT)
    return name, normaliser is not None


def _split_name(parts: Sequence[dict[str, Any]]) -> str | None:
    *splits, last = parts
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(splits) > 1:
        return None
    if last.get("use_regex", True):
        if not splits:
            return _GPT2
        return _DIGITS if splits[0]["type"] == "Digits" and splits[0].get("individual_digits") else None
    if not splits or splits[0]["type"] != "Split" or splits[0]["behavior"] != "Isolated" or splits[0]["invert"]:
        return None
    return SPLIT_PATTERNS.get(splits[0]["pattern"].get("Regex", ""))


def _check_pieces(raw: dict[str, Any]) -> None:
    """A SentencePiece-like tokenizer may escape spaces and add one in front, and nothing else."""
    normaliser, pre = raw.get("normalizer") or {}, raw.get("pre_tokenizer") or {}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    known = (spaces, {"type": "Prepend", "prepend": SPACE})
    steps = normaliser.get("normalizers") or ([normaliser] if normaliser else [])
    if any(step not in known for step in steps):
        raise ExportError(f"tokenizer.json: normalizer {json.dumps(normaliser)[:200]} has no GGUF form", HINT)
    escapes = pre.get("type") == "Metaspace" and pre.get("replacement") == SPACE and pre.get("split") is False
    idle = pre.get("type") == "Split" and pre.get("pattern") == {"String": " "}  # no space is left: Gemma's
    if not (escapes or (spaces in steps and (idle or not pre))):
        raise ExportError(f"tokenizer.json: pre-tokenizer {json.dumps(pre)[:200]} is not known", HINT)
    model = raw["model"]
    if sum(is_byte_piece(text) for text in model["vocab"]) != 256:
        raise ExportError("tokenizer.json: not every byte has a piece, without which llama.cpp ends the process", HINT)
    if model.get("ignore_merges") or model.get("unk_token") not in model["vocab"]:
        raise ExportError(f"tokenizer.json: unk_token={model.get('unk_token')!r} or ignore_merges has no form", HINT)


def _tokens(raw: dict[str, Any], pieces: bool, rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and types of all rows."""
    vocab: dict[str, int] = raw["model"]["vocab"]
    texts = {index: text for text, index in vocab.items()}
    kinds = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    for token in raw.get("added_tokens") or ():
        index, text = token["id"], token["content"]
        kinds[index] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        # llama.cpp looks for these in text whose spaces are not yet escaped
        texts[index] = text.replace(SPACE, " ") if pieces and not token["special"] else text
    if pieces:
        kinds |= {index: gguf.TokenType.BYTE for text, index in vocab.items() if is_byte_piece(text)}
        kinds[vocab[raw["model"]["unk_token"]]] = gguf.TokenType.UNKNOWN
    if max(texts) >= rows:
        raise ExportError(
            f"tokenizer: token id {max(texts)}, but the embedding has {rows} rows", "restore the checkpoint"
        )
    tokens = tuple(texts.get(index, f"[PAD{index}]") for index in range(rows))
    seen: dict[str, int] = {}
    for index, text in enumerate(tokens):
        if seen.setdefault(text, index) != index or not text:
            raise ExportError(
                f"tokenizer: ids {seen[text]} and {index} are both {text!r}, which ends llama.cpp's process", HINT
            )
    return tokens, tuple(int(kinds.get(index, gguf.TokenType.UNUSED)) for index in range(rows))


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> tuple[float, ...]:
    """Scores that make llama.cpp merge in the order of the list: minus the place of a piece's first merge."""
    first: dict[str, int] = {}
    for place, merge in enumerate(merges):
        first.setdefault("".join(merge), place)
    return tuple(-float(first[text]) if text in first else _UNREACHED for text in tokens)


def _added_ends(tokenizer: Any) -> tuple[bool, bool]:
    """What the post-processor adds around a text, learned from what it does. Raises ExportError for other additions."""
    plain: Sequence[int] = tokenizer.encode("a", add_special_tokens=False)
    full: Sequence[int] = tokenizer.encode("a", add_special_tokens=True)
    for add_bos in (False, True):
        for add_eos in (False, True):
            expected = [tokenizer.bos_token_id] * add_bos + list(plain) + [tokenizer.eos_token_id] * add_eos
            if list(full) == expected:
                return add_bos, add_eos
    raise ExportError(
        f"tokenizer.json: post-processor turns {list(plain)} into {list(full)}, which has no GGUF form", HINT
    )


def _type(part: Any) -> str:
    return str(part.get("type")) if isinstance(part, dict) else repr(part)
