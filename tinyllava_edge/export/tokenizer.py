"""The tokenizer inside a GGUF, and the proof that llama.cpp gives the checkpoint's ids and bytes with it."""

from __future__ import annotations

import ctypes
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gguf

from ..errors import ExportError
from ..runtimes.text import FIRST_SPACE, MODEL, NFC, gguf_vocabulary
from ..sentencepiece_file import SPACE
from ..tokenizer_sections import ALWAYS, FIRST, SectionTokenizer, token_bytes
from .native_log import NativeLog, captured
from .vocabulary import HINT, SPLIT_PATTERNS, Vocabulary, read_vocabulary

__all__ = ["SPLIT_PATTERNS", "STRESS_TEXTS", "Vocabulary", "check_tokenizer", "read_vocabulary", "write_vocabulary"]

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
    "A\u030angstro\u0308m \u1100\u1161\u11a8 \u212b \u0301alone q\u0323\u0307",
    "中文 日本語のテキスト 한국어 ไทย العربية עברית हिन्दी",
    "😀 👍🏽 👨‍👩‍👧‍👦 🇨🇭 ❤️ a😀b",
    "𝒳 𐍈 \U0001f9ff",
    "nbsp\u00a0here ideographic\u3000space thin\u2009space zero\u200bwidth line\u2028sep",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~",
    "...  --- ___ ===> !!!??",
    "CamelCase snake_case kebab-case UPPER lower MiXeD",
    "</s> <s> <unk> <image> <|endoftext|> <pad> [PAD1025]",
    "a<image>b </s>c <s>d",
    "</ s> <s</s>> <0x0A> <0xE2> \u2581\u2581x <|im_end|> <|im_start|> <bos><eos> <end_of_turn>",
    "\\n \\t %s {} {{}} \x07\x1b[0m",
    "a" * 300,
    " " * 70,
    "=" * 130,
    "\n" * 40 + "\t" * 40,
    "ab" * 60 + " ." * 40,
)


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
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    else:
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
    writer.add_add_space_prefix(vocabulary.prefix == ALWAYS)
    if vocabulary.first_space:  # llama.cpp has no word for it; the runtime and the chat template add the space
        writer.add_bool(FIRST_SPACE, True)
    if vocabulary.nfc:
        writer.add_bool(NFC, True)


def check_tokenizer(path: Path, tokenizer: Any) -> None:
    """Prove that llama.cpp tokenises like the checkpoint, and gives the same bytes back.

    Sections as the runtimes tokenise them (special tokens typed by a user stay text; at the beginning of a chunk and
    behind an end-of-turn mark), whole texts as other hosts do (special tokens read), on STRESS_TEXTS and on every
    token's own text; then every token's bytes.

    Raises:
        ExportError: naming the first text or token that differs, or a file that llama.cpp refuses.
    """
    from tokenizers import Tokenizer

    plain = SectionTokenizer(tokenizer)
    whole = plain.bare if plain.prefix == FIRST else Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    whole.no_padding()
    whole.no_truncation()
    spell = token_bytes(tokenizer)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    size = tokenizer.backend_tokenizer.get_vocab_size()
    own = [added[k].content if k in added else spell(k).decode("utf-8", "replace") for k in range(size)]
    texts = [*STRESS_TEXTS, *(f"a {token.content}{token.content} b" for token in added.values()), *own]
    texts = [text.encode("utf-8", "replace").decode() for text in texts]  # no lone surrogates
    with captured() as log:
        native = _NativeVocab(path, log)
        try:
            rules = gguf_vocabulary(native.plain, native.rules, None, 0, 0)
            plain.bare.encode_special_tokens = True
            for starts in (True, False) if plain.prefix == FIRST else (True,):
                tokenize = rules.tokenize if starts else rules.tokenize_rest or rules.tokenize
                wanted = plain.bare.encode_batch([plain.text(t, starts) for t in texts], add_special_tokens=False)
                _compare_all(path, texts, map(tokenize, texts), wanted, "as plain text")
            whole.encode_special_tokens = False
            # llama.cpp takes tokens with certain names for control tokens: in Qwen2, one that no merge reaches, `</s>`
            named = [k for k in range(size) if native.is_control(k) and not (k in added and added[k].special)]
            marks = re.compile("|".join(re.escape(token.content) for token in added.values()) or "(?!)")
            texts = [*STRESS_TEXTS, *filter(marks.search, texts)]  # others can't differ from plain text
            texts = [text for text in texts if not any(own[k] in text for k in named)]
            for add_special in (False, True):
                given = (native.tokenize(native.prepare(text), add_special, True) for text in texts)
                wanted = whole.encode_batch(texts, add_special_tokens=add_special)
                _compare_all(path, texts, given, wanted, "with special tokens")
            for index in set(range(size)) - set(named):
                if native.piece(index) != spell(index):
                    raise ExportError(
                        f"{path}: llama.cpp spells token {index} as {native.piece(index)!r}, not {spell(index)!r}", HINT
                    )
        finally:
            native.close()


def _compare_all(path: Path, texts: Iterable[str], given: Iterable[list[int]], wanted: Iterable[Any], how: str) -> None:
    for text, ours, encoding in zip(texts, given, wanted, strict=True):
        theirs: Sequence[int] = encoding.ids
        if ours == theirs:
            continue
        pairs = enumerate(zip(ours, theirs, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        raise ExportError(
            f"{path}: llama.cpp tokenises {text[:60]!r} otherwise {how}: ids from position {at} are "
            f"{ours[at : at + 6]}, not {theirs[at : at + 6]}",
            HINT,
        )


class _NativeVocab:
    """A GGUF's vocabulary inside llama.cpp, without its tensors."""

    def __init__(self, path: Path, log: NativeLog) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._ids, self._bytes = (ctypes.c_int32 * 4096)(), ctypes.create_string_buffer(4096)
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise ExportError(
                f"{path}: llama.cpp can't load the vocabulary ({log.reason()})", "report this with tokenizer.json"
            )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.rules = {key: self._text(key) == b"true" for key in (FIRST_SPACE, NFC)} | {MODEL: self._text(MODEL)}

    def plain(self, text: str) -> list[int]:
        """Ids, special-token strings being plain text."""
        return self.tokenize(text, False, False)

    def prepare(self, text: str) -> str:
        """The text with what llama.cpp leaves to its caller done: see runtimes.text.gguf_vocabulary."""
        text = unicodedata.normalize("NFC", text) if self.rules[NFC] else text
        return text.replace(SPACE, " ") if self.rules[MODEL] == b"llama" else text

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        if len(data) + 8 > len(self._ids):
            self._ids = (ctypes.c_int32 * (2 * len(data) + 8))()
        ids, room = self._ids, len(self._ids)
        count = self._api.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
        return list(ids[: max(count, 0)])

    def piece(self, index: int) -> bytes:
        count = self._api.llama_token_to_piece(self._vocab, index, self._bytes, len(self._bytes), 0, False)
        return self._bytes.raw[: max(count, 0)]

    def is_control(self, index: int) -> bool:
        return bool(self._api.llama_vocab_get_attr(self._vocab, index) & self._api.LLAMA_TOKEN_ATTR_CONTROL)

    def _text(self, key: str) -> bytes:
        count = self._api.llama_model_meta_val_str(self._model, key.encode(), self._bytes, len(self._bytes))
        return bytes(self._bytes.value) if count >= 0 else b""

    def close(self) -> None:
        self._api.llama_model_free(self._model)
