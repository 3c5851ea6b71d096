"""The tokenizer inside a GGUF: byte-level BPE from `tokenizer.json`, and the proof that llama.cpp agrees on the ids."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from ..errors import ExportError
from .native_log import NativeLog, captured

# GPT-2's pattern is built into ByteLevel; others are spelled out in tokenizer.json. Pattern → llama.cpp's name for it.
_GPT2 = "gpt-2"
SPLIT_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}

# Texts on which tokenizers are known to part ways.
STRESS_TEXTS = (
    "",
    " ",
    "a",
    "Hello, world!",
    "  two  spaces   three    four ",
    "trailing space ",
    "\ttab\t\ttabs \t mixed",
    "line\nline\n\nline\r\nline\r\n\r\n",
    "\n\n\n",
    " \n \n  \n   x",
    "USER: \nwhat color is the shape? ASSISTANT:",
    "it's I'll we've they'd I'm you're IT'S I'LL don't 'tis 's't",
    "0 1 12 123 1234 12345678901234567890 3.14 1,000 -7 1e-5 0x1F",
    "Ⅷ ½ ² ٣ ४ 五",
    "naïve café Ñandú cafe\u0301 ﬁ ß Æ İ ı",
    "中文 日本語のテキスト 한국어 ไทย العربية עברית हिन्दी",
    "😀 👍🏽 👨‍👩‍👧‍👦 🇨🇭 ❤️ a😀b",
    "𝒳 𐍈 \U0001f9ff",
    "nbsp\u00a0here ideographic\u3000space thin\u2009space zero\u200bwidth line\u2028sep",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~",
    "...  --- ___ ===> !!!??",
    "CamelCase snake_case kebab-case UPPER lower MiXeD",
    "</s> <s> <unk> <image> <|endoftext|> <pad> [PAD1025]",
    "a<image>b </s>c <s>d",
    "\\n \\t %s {} {{}} \x07\x1b[0m",
    "a" * 300,
    " " * 70,
    "=" * 130,
)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF stores of a tokenizer."""

    pre: str
    """llama.cpp's name of the pre-tokenizer"""
    tokens: tuple[str, ...]
    """one text per embedding row"""
    types: tuple[int, ...]
    """gguf.TokenType of each row"""
    merges: tuple[str, ...]
    """BPE merges in order, the two halves parted by a space"""
    add_bos: bool
    """whether a text starts with the beginning-of-sequence token"""
    add_eos: bool
    """whether a text ends with the end-of-sequence token"""


def read_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Read a Hugging Face fast tokenizer.

    Args:
        tokenizer: the checkpoint's tokenizer.
        rows: rows of the embedding; those beyond the vocabulary become unused tokens.

    Raises:
        ExportError: a part that llama.cpp would apply otherwise, by name; more tokens than rows.
    """
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = pre_tokenizer_name(raw)
    vocab: dict[str, int] = dict(raw["model"]["vocab"])
    kinds = dict.fromkeys(vocab.values(), gguf.TokenType.NORMAL)
    for token in raw.get("added_tokens") or ():
        vocab[token["content"]] = token["id"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    texts = {index: text for text, index in vocab.items()}
    if max(texts) >= rows:
        raise ExportError(
            f"tokenizer: token id {max(texts)}, but the embedding has {rows} rows", "restore the checkpoint"
        )
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"])
    add_bos, add_eos = _added_ends(tokenizer)
    return Vocabulary(
        pre=pre,
        tokens=tuple(texts.get(index, f"[PAD{index}]") for index in range(rows)),
        types=tuple(int(kinds.get(index, gguf.TokenType.UNUSED)) for index in range(rows)),
        merges=tuple(merges),
        add_bos=add_bos,
        add_eos=add_eos,
    )


def pre_tokenizer_name(raw: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits text. Raises ExportError that names the part without one."""
    model = raw["model"]
    for key, plain in (("byte_fallback", False), ("ignore_merges", False), ("dropout", None)):
        if (model.get(key) or plain) != plain:
            raise ExportError(f"tokenizer.json: model.{key}={model[key]!r} has no GGUF form", _HINT)
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ExportError(f"tokenizer.json: model {model['type']} is not byte-level BPE", _HINT)
    if raw.get("normalizer") is not None:
        raise ExportError(f"tokenizer.json: normalizer {_type(raw['normalizer'])} has no GGUF form", _HINT)
    given: dict[str, Any] = raw.get("pre_tokenizer") or {"type": None}
    parts: list[dict[str, Any]] = given["pretokenizers"] if given["type"] == "Sequence" else [given]
    last = parts[-1]
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if len(parts) == 1 and last.get("use_regex", True):
            return _GPT2
        split = parts[0]
        if len(parts) == 2 and split["type"] == "Split" and not last.get("use_regex", True):
            pattern = split["pattern"].get("Regex")
            if pattern in SPLIT_PATTERNS and split["behavior"] == "Isolated" and not split["invert"]:
                return SPLIT_PATTERNS[pattern]
    raise ExportError(f"tokenizer.json: pre-tokenizer {json.dumps(given)[:200]} is not known", _HINT)


def write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, tokenizer: Any, end_of_turn: str) -> None:
    """Add the tokenizer's keys.

    Args:
        writer: GGUF under construction.
        vocabulary: from read_vocabulary.
        tokenizer: the same tokenizer, for its special ids.
        end_of_turn: the template's end-of-turn token; empty for none.

    Raises:
        ExportError: `end_of_turn` is no token, or there is no end-of-sequence token.
    """
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    if tokenizer.eos_token_id is None:
        raise ExportError("tokenizer: no end-of-sequence token", "set eos_token in tokenizer_config.json")
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None:
            add(index)
    if end_of_turn:
        if end_of_turn not in vocabulary.tokens:
            raise ExportError(
                f"tokenizer: no token {end_of_turn!r}, which ends a turn", "correct `template` in model_spec.json"
            )
        if vocabulary.tokens.index(end_of_turn) != tokenizer.eos_token_id:
            writer.add_eot_token_id(vocabulary.tokens.index(end_of_turn))
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(False)


def check_tokenizer(path: Path, tokenizer: Any) -> None:
    """Prove that llama.cpp tokenises like the checkpoint: STRESS_TEXTS and every token's own text, special or typed.

    Raises:
        ExportError: naming the first text whose ids differ, or a file that llama.cpp refuses.
    """
    from tokenizers import Tokenizer

    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.no_padding()
    raw.no_truncation()
    tokens = [tokenizer.decode([index]) for index in range(len(tokenizer))]
    with captured() as log:
        vocab = _NativeVocab(path, log)
        try:
            for parse_special in (False, True):
                raw.encode_special_tokens = not parse_special
                for texts, add_special in ((STRESS_TEXTS, True), (STRESS_TEXTS, False), (tokens, False)):
                    wanted = raw.encode_batch(list(texts), add_special_tokens=add_special)
                    for text, encoding in zip(texts, wanted, strict=True):
                        ids = vocab.tokenize(text, add_special, parse_special)
                        _compare(path, text, ids, encoding.ids, parse_special)
        finally:
            vocab.close()


def _compare(path: Path, text: str, ours: list[int], theirs: list[int], parse_special: bool) -> None:
    if ours == theirs:
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    raise ExportError(
        f"{path}: llama.cpp tokenises {text[:60]!r} otherwise: ids from position {at} are {ours[at : at + 6]}, "
        f"not {theirs[at : at + 6]} (special tokens {'parsed' if parse_special else 'plain'})",
        _HINT,
    )


class _NativeVocab:
    """A GGUF's vocabulary inside llama.cpp, without its tensors."""

    def __init__(self, path: Path, log: NativeLog) -> None:
        import llama_cpp

        self._api = llama_cpp
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise ExportError(
                f"{path}: llama.cpp can't load the vocabulary ({log.reason()})", "report this with tokenizer.json"
            )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._api.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
        return list(ids[: max(count, 0)])

    def close(self) -> None:
        self._api.llama_model_free(self._model)


_HINT = "use a byte-level BPE tokenizer with GPT-2's splitting, as the nano model's"


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
        f"tokenizer.json: post-processor turns {list(plain)} into {list(full)}, which has no GGUF form", _HINT
    )


def _type(part: Any) -> str:
    return str(part.get("type")) if isinstance(part, dict) else repr(part)
