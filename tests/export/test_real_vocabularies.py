"""Llama's, GPT-2's (Phi-2's) and Qwen2's real vocabularies, from llama.cpp's own test files, through our whole road.

TINYLLAVA_EDGE_LLAMA_CPP names llama.cpp's sources, or llama-cpp-python's unpacked source distribution; without it
these are skipped. The files hold each vocabulary, texts, and the ids that Hugging Face's original tokenizers give.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from tinyllava_edge.export.tokenizer import check_tokenizer
from tinyllava_edge.tokenizer_files import fast_tokenizer
from tinyllava_edge.tokenizer_sections import SectionTokenizer

from .. import tiny_tokenizers as tiny
from .vocabularies import vocabulary_gguf

VARIABLE = "TINYLLAVA_EDGE_LLAMA_CPP"


def field(path: Path, key: str) -> Any:
    return gguf.GGUFReader(path).fields[f"tokenizer.ggml.{key}"].contents()


@pytest.fixture(scope="module")
def models() -> Path:
    root = Path(os.environ.get(VARIABLE, ""))
    for place in (root / "models", root / "vendor/llama.cpp/models"):
        if os.environ.get(VARIABLE) and (place / "ggml-vocab-llama-spm.gguf").is_file():
            return place
    pytest.skip(f"{VARIABLE} does not name a directory with llama.cpp's vocabularies")


def cases(models: Path, name: str) -> list[tuple[str, list[int]]]:
    """llama.cpp's texts and the original tokenizer's ids."""
    texts = (models / f"ggml-vocab-{name}.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (models / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")
    return [(text, [int(k) for k in line.split()]) for text, line in zip(texts, lines, strict=False)]


def write_sentencepiece(path: Path, out: Path, legacy: bool) -> Path:
    model = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in zip(field(path, "tokens"), field(path, "scores"), field(path, "token_type"), strict=True):
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.trainer_spec.vocab_size = len(model.pieces)
    model.normalizer_spec.name, model.normalizer_spec.remove_extra_whitespaces = "identity", False
    out.mkdir(exist_ok=True)
    (out / "tokenizer.model").write_bytes(model.SerializeToString())
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


def write_byte_level(path: Path, out: Path, name: str, added: list[str]) -> Path:
    tokens, types = field(path, "tokens"), field(path, "token_type")
    vocab = {text: k for k, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind == 1}
    extra = {len(vocab) + k: text for k, text in enumerate([tiny.END, *added])}
    (out / "vocab.json").write_text(json.dumps(vocab))
    (out / "merges.txt").write_text("\n".join(field(path, "merges")), encoding="utf-8")
    decoder = {str(k): {"content": text, "special": text == tiny.END} for k, text in extra.items()}
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "added_tokens_decoder": decoder}))
    return out


@pytest.mark.parametrize("legacy", [True, False])
def test_llama(models: Path, legacy: bool, tmp_path: Path) -> None:
    """32,000 pieces: SentencePiece's ids on random texts, 29871 13 behind a picture, `USER` behind a mark."""
    release = write_sentencepiece(models / "ggml-vocab-llama-spm.gguf", tmp_path, legacy)
    fast = fast_tokenizer(release)
    ours = SectionTokenizer(fast)
    library = sentencepiece.SentencePieceProcessor(model_file=str(release / "tokenizer.model"))
    for text in tiny.random_texts(1000, seed=3):
        assert ours.start(text) == library.encode(text), text
    for text, ids in cases(models, "llama-spm"):
        assert ours.start(text) == ids, text
    assert ours.start("\nwhat")[:2] == [29871, 13] == fast("\nwhat").input_ids[1:3]
    assert ours.rest("USER") == ([3148, 1001] if legacy else [11889])
    check_tokenizer(vocabulary_gguf(fast, tmp_path / "x.gguf", "</s>", 32064), fast)


def test_phi(models: Path, tmp_path: Path) -> None:
    """50,257 tokens, and Phi-2's runs of spaces and tabs behind them."""
    runs = [*(" " * k for k in range(31, 1, -1)), *("\t" * k for k in range(9, 1, -1))]
    path = models / "ggml-vocab-gpt-2.gguf"
    plain = SectionTokenizer(fast_tokenizer(write_byte_level(path, tmp_path, "GPT2Tokenizer", [])))
    for text, ids in cases(models, "gpt-2"):
        assert plain.start(text) == ids, text
    fast = fast_tokenizer(write_byte_level(path, tmp_path, "CodeGenTokenizer", runs))
    assert fast.convert_tokens_to_ids([tiny.END, " " * 31, "  ", "\t\t"]) == [50256, 50257, 50286, 50294]
    check_tokenizer(vocabulary_gguf(fast, tmp_path / "x.gguf", tiny.END, 51200), fast)


def test_qwen2(models: Path, tmp_path: Path) -> None:
    """151,646 tokens; the vocabulary holds a plain `</s>`, which llama.cpp takes for a control token by its name."""
    path = models / "ggml-vocab-qwen2.gguf"
    release = write_byte_level(path, tmp_path, "Qwen2Tokenizer", ["<|im_start|>", "<|im_end|>"])
    fast = fast_tokenizer(release)
    ours = SectionTokenizer(fast)
    for text, ids in cases(models, "qwen2"):
        assert ours.start(text) == ids, text
    assert fast.convert_tokens_to_ids(["<|im_end|>", "</s>"]) == [151645, 128247]
    check_tokenizer(vocabulary_gguf(fast, tmp_path / "x.gguf", tiny.END, 151936), fast)
