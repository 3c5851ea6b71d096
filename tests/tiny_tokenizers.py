"""Small tokenizers of every kind, in a release's files, and slow oracles that share no code with the package.

The oracles follow transformers 4.40's slow classes: SentencePiece's own library for Llama and Gemma, and byte-level BPE
written out here, over the `regex` package, for GPT-2, CodeGen (Phi-2) and Qwen2.
"""

from __future__ import annotations

import io
import json
import random
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import regex
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

TEXT = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,",
    "detailed, and polite answers to the user's questions. what color is the shape? ASSISTANT: red yes no",
    "is there a small blue circle in the image? yes no green triangle rectangle US ER US ER USA HER USER",
    "def f(x):\n    return x\n\n\n        if a  ==  b:   pass\t\tdone 12 345 2024",
    "naïve café cafe\u0301 中文 日本語 한국어 😀 the then them there",
] * 8

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END = "<|endoftext|>"
Encode = Callable[[str], list[int]]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Strings of what tokenizers trip over: runs of spaces and newlines, marks, other scripts, special tokens' text."""
    rng = random.Random(seed)
    pool = [*" abcU\n\t.,'\"?:", "  ", "\n\n", "中", "文", "é", "e\u0301", "😀", "the", "USER", "▁", "<0x0A>", "12"]
    texts = ["".join(rng.choices(pool, k=rng.randint(1, 40))) for _ in range(count)]
    return texts + [rng.choice("a =-\n") * rng.randint(1, 70) for _ in range(count // 8)]


# SentencePiece


def _trained(**options: Any) -> Any:
    """A BPE model as Llama's: every byte has a piece, text isn't normalised, digits stand alone."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXT for line in text.split("\n")),
        model_writer=file,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.98,
        minloglevel=2,
        **options,
    )
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file.getvalue())
    return model


def llama_model() -> Any:
    """Llama's kind. As in Llama's own vocabulary `USER` is a piece and `▁USER` is not, so a space changes its count."""
    model = _trained(vocab_size=520, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    kept = [piece for piece in model.pieces if "USE" not in piece.piece and piece.piece not in ("US", "ER", "▁US")]
    best = max(piece.score for piece in kept if piece.type == 1)
    del model.pieces[len(kept) :]
    for place, piece in enumerate(kept):
        model.pieces[place].CopyFrom(piece)
    letters = {piece.piece for piece in kept}
    wanted = [*(letter for letter in "USER" if letter not in letters), "US", "ER", "▁US", "USER"]
    for place, text in enumerate(wanted):  # before all other merges, in this order
        model.pieces.add(piece=text, score=best + 0.5 - 0.01 * place, type=1)
    return model


def gemma_model() -> Any:
    """Gemma's kind: no space in front, runs of spaces and newlines are pieces that are taken out first."""
    runs = ["\n" * k for k in range(2, 6)] + ["▁" * k for k in range(2, 6)]
    model = _trained(
        vocab_size=560,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        add_dummy_prefix=False,
        user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>", *runs, "<table>"],
    )
    return model


def write_llama(out: Path, *, legacy: bool | None = False) -> Path:
    """Directory with Llama's release files; `legacy` None leaves the key out, as old releases do."""
    config = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048, "bos_token": "<s>", "eos_token": "</s>"}
    if legacy is not None:
        config["legacy"] = legacy
    return _write(out, llama_model(), config)


def write_gemma(out: Path) -> Path:
    """Directory with Gemma's release files."""
    config = {"tokenizer_class": "GemmaTokenizer", "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}
    return _write(out, gemma_model(), config)


def _write(out: Path, model: Any, config: dict[str, Any]) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(model.SerializeToString())
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


def slow_sentencepiece(directory: Path, special: dict[str, int]) -> Encode:
    """Slow LlamaTokenizer or GemmaTokenizer on a chunk, without its first token; `special` is parsed out of text."""
    config = json.loads((directory / "tokenizer_config.json").read_text())
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((directory / "tokenizer.model").read_bytes())
    new = config["tokenizer_class"] == "LlamaTokenizer" and config.get("legacy", True) is False
    if new:
        model.normalizer_spec.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    split = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")

    def encode(text: str) -> list[int]:
        if new and text:
            text = "▁" + text.replace("▁", " ")
        parts = [part for part in split.split(text) if part]
        if new and len(parts) > 1 and parts[0] == "▁" and parts[1] in special:
            del parts[0]
        ids: list[int] = []
        for part in parts:
            ids += [special[part]] if part in special else processor.encode(part)
        return ids

    return encode


# byte-level BPE


def write_byte_level(out: Path, name: str, special: Sequence[str], added: Sequence[str] = ()) -> Path:
    """Directory with vocab.json and merges.txt; `name` is the slow class, `added` are tokens that are not special."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name != "Qwen2Tokenizer")
    raw.pre_tokenizer = level
    if name == "Qwen2Tokenizer":
        raw.normalizer = normalizers.NFC()
        raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), level])
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(TEXT, trainer)
    model = json.loads(raw.to_str())["model"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    extra = [(text, True) for text in special] + [(text, False) for text in added]
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    decoder = {
        str(len(model["vocab"]) + k): {"content": text, "special": marks, "normalized": not marks, **flags}
        for k, (text, marks) in enumerate(extra)
    }
    config = {"tokenizer_class": name, "added_tokens_decoder": decoder, "eos_token": END, "add_prefix_space": False}
    config |= {"pad_token": END, "bos_token": None, "unk_token": None} if name == "Qwen2Tokenizer" else {}
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


def write_phi(out: Path) -> Path:
    """Phi-2's kind: GPT-2's splitting, runs of spaces and tabs as added tokens."""
    runs = [*(" " * k for k in range(7, 1, -1)), *("\t" * k for k in range(4, 1, -1))]
    return write_byte_level(out, "CodeGenTokenizer", [END], runs)


def write_qwen2(out: Path) -> Path:
    """Qwen2.5's kind: its own splitting, NFC, and mark-up that its release does not call special."""
    return write_byte_level(out, "Qwen2Tokenizer", [END, "<|im_start|>", "<|im_end|>"], ["<|fim_pad|>", "<tool_call>"])


def slow_byte_level(directory: Path, special: dict[str, int]) -> Encode:
    """Slow GPT2Tokenizer, CodeGenTokenizer or Qwen2Tokenizer; `special` and added tokens are parsed out of text."""
    config = json.loads((directory / "tokenizer_config.json").read_text())
    vocab = json.loads((directory / "vocab.json").read_text())
    lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    qwen = config["tokenizer_class"] == "Qwen2Tokenizer"
    pattern = regex.compile(QWEN2 if qwen else GPT2)
    tokens = special | {t["content"]: int(k) for k, t in config["added_tokens_decoder"].items() if not t["special"]}
    split = regex.compile("(" + "|".join(regex.escape(t) for t in sorted(tokens, key=len, reverse=True)) + ")")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + k) for k, byte in enumerate(hidden)}

    def word(text: str) -> list[int]:
        parts = [letters[byte] for byte in text.encode()]
        while True:
            pairs = [(ranks.get((a, b), len(ranks)), k) for k, (a, b) in enumerate(zip(parts, parts[1:]))]  # noqa: B905
            if not pairs or min(pairs)[0] == len(ranks):
                return [vocab[part] for part in parts]
            k = min(pairs)[1]
            parts[k : k + 2] = [parts[k] + parts[k + 1]]

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        for part in split.split(unicodedata.normalize("NFC", text) if qwen else text):
            if part in tokens:
                ids.append(tokens[part])
            else:
                for piece in pattern.findall(part):
                    ids += word(piece)
        return ids

    return encode


# template of each kind, its end-of-turn token, the writer of its files, and its oracle
KINDS: dict[str, tuple[str, Callable[[Path], Path], Callable[[Path, dict[str, int]], Encode]]] = {
    "llama": ("llama", lambda out: write_llama(out, legacy=False), slow_sentencepiece),
    "llama-legacy": ("llama", lambda out: write_llama(out, legacy=None), slow_sentencepiece),
    "gemma": ("gemma", write_gemma, slow_sentencepiece),
    "phi": ("phi", write_phi, slow_byte_level),
    "qwen2_base": ("qwen2_base", write_qwen2, slow_byte_level),
    "qwen2_instruct": ("qwen2_instruct", write_qwen2, slow_byte_level),
}
