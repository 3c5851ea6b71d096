"""Token ids of llama.cpp against Hugging Face's, the gate that compares them, and the chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tinyllava_edge import checkpoint, prompt
from tinyllava_edge.errors import ExportError
from tinyllava_edge.export import llm, tokenizer


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def written(loaded: checkpoint.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "llm.gguf"
    llm.export_llm(loaded, path)
    return path


@pytest.fixture(scope="module")
def native(written: Path) -> llama_cpp.Llama:
    return llama_cpp.Llama(str(written), n_ctx=64, verbose=False, n_threads=1)


def changed(loaded: checkpoint.Checkpoint, change: Callable[[dict[str, Any]], Any]) -> Any:
    """The checkpoint's tokenizer with one thing altered in its tokenizer.json."""
    raw = json.loads(loaded.tokenizer.backend_tokenizer.to_str())
    change(raw)
    special = {f"{name}_token": getattr(loaded.tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)), **special)


def test_same_ids(loaded: checkpoint.Checkpoint, native: llama_cpp.Llama) -> None:
    """Every stress text through the package's public API, with and without the beginning-of-sequence token."""
    for text in tokenizer.STRESS_TEXTS[1:]:
        typed = loaded.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert native.tokenize(text.encode(), add_bos=False, special=False) == typed, text
        assert native.tokenize(text.encode(), add_bos=True, special=False) == [1, *typed], text
        parsed = loaded.tokenizer.encode(text)
        assert native.tokenize(text.encode(), add_bos=True, special=True) == parsed, text
        assert native.detokenize(typed).decode() == text


def test_typed_special_tokens_stay_text(loaded: checkpoint.Checkpoint, native: llama_cpp.Llama) -> None:
    image_id = loaded.model.config.image_token_id
    assert native.tokenize(b"<image></s>", add_bos=False, special=True) == [image_id, 2]
    plain = native.tokenize(b"<image></s>", add_bos=False, special=False)
    assert len(plain) > 4 and not {image_id, 2} & set(plain)


def test_rows_beyond_the_vocabulary(loaded: checkpoint.Checkpoint) -> None:
    """1025 tokens in 1088 rows: the rest are unused tokens with names of their own."""
    vocabulary = tokenizer.read_vocabulary(loaded.tokenizer, 1088)
    kinds = {kind: vocabulary.types.count(kind) for kind in set(vocabulary.types)}
    assert kinds == {gguf.TokenType.NORMAL: 1021, gguf.TokenType.CONTROL: 4, gguf.TokenType.UNUSED: 63}
    assert vocabulary.tokens[1024:1026] == ("<image>", "[PAD1025]") and len(set(vocabulary.tokens)) == 1088
    with pytest.raises(ExportError, match="1000 rows"):
        tokenizer.read_vocabulary(loaded.tokenizer, 1000)


def test_gate_catches_other_tokenizers(loaded: checkpoint.Checkpoint, written: Path) -> None:
    """The written file fails against a tokenizer with other merges, splitting, special tokens or ends."""

    def fewer_merges(raw: dict[str, Any]) -> None:
        del raw["model"]["merges"][-50:]

    def vowels_apart(raw: dict[str, Any]) -> None:
        split = {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}
        raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, raw["pre_tokenizer"]]}

    def image_not_special(raw: dict[str, Any]) -> None:
        raw["added_tokens"][-1]["special"] = False

    def no_start(raw: dict[str, Any]) -> None:
        raw["post_processor"] = None

    def greedy_marker(raw: dict[str, Any]) -> None:
        raw["added_tokens"][-1]["lstrip"] = True

    tokenizer.check_tokenizer(written, loaded.tokenizer)
    for change in (fewer_merges, vowels_apart, image_not_special, no_start, greedy_marker):
        with pytest.raises(ExportError, match="llama.cpp tokenises"):
            tokenizer.check_tokenizer(written, changed(loaded, change))
    broken = written.with_name("broken.gguf")
    broken.write_bytes(written.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"broken\.gguf: llama.cpp can't load"):
        tokenizer.check_tokenizer(broken, loaded.tokenizer)


def test_unknown_tokenizers_are_named(loaded: checkpoint.Checkpoint) -> None:
    cases: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (lambda raw: raw.update(pre_tokenizer=None), "null"),
        (lambda raw: raw["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
        (lambda raw: raw["pre_tokenizer"].update(use_regex=False), "use_regex"),
        (lambda raw: raw.update(normalizer={"type": "NFC"}), "NFC"),
        (lambda raw: raw["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda raw: raw["model"].update(byte_fallback=True), "byte_fallback"),
    ]
    for change, message in cases:
        with pytest.raises(ExportError, match=message):
            tokenizer.read_vocabulary(changed(loaded, change), 1088)

    def two_starts(raw: dict[str, Any]) -> None:
        raw["post_processor"]["single"].insert(0, raw["post_processor"]["single"][0])

    with pytest.raises(ExportError, match="post-processor"):
        tokenizer.read_vocabulary(changed(loaded, two_starts), 1088)


def test_spelled_out_pattern_has_a_name(loaded: checkpoint.Checkpoint) -> None:
    """A Split with Qwen2's pattern is told to llama.cpp by name."""
    pattern = next(iter(tokenizer.SPLIT_PATTERNS))
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    sequence = {"type": "Sequence", "pretokenizers": [split, level]}
    other = changed(loaded, lambda raw: raw.update(pre_tokenizer=sequence))
    assert tokenizer.read_vocabulary(other, 1088).pre == "qwen2"


MARKED = "<image>\nwhat is it?"
PARTS = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "data:"}}]
CONVERSATIONS: list[tuple[list[prompt.Turn], list[Any]]] = [
    ([prompt.Turn("hello")], ["hello"]),
    ([prompt.Turn(MARKED)], [MARKED]),
    ([prompt.Turn(MARKED)], [PARTS]),
    ([prompt.Turn(MARKED)], [PARTS[::-1]]),
    ([prompt.Turn("what is it? <image>")], ["what is it? <image>"]),
    ([prompt.Turn(MARKED, "a cat"), prompt.Turn(" really? ")], [PARTS, "a cat", " really? "]),
    ([prompt.Turn("one", "1"), prompt.Turn(MARKED, "2"), prompt.Turn("three")], ["one", "1", MARKED, "2", "three"]),
    ([prompt.Turn("quotes \" ' {{ braces }} \\ \n tail")], ["quotes \" ' {{ braces }} \\ \n tail"]),
]


@pytest.mark.parametrize(("turns", "contents"), CONVERSATIONS)
def test_chat_template(turns: list[prompt.Turn], contents: list[Any], native: llama_cpp.Llama) -> None:
    """The stored Jinja renders prompt.build's text, the beginning-of-sequence token in front."""
    jinja = native.metadata["tokenizer.chat_template"]
    template = prompt.TEMPLATES["llama"]
    messages: Any = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    formatter = Jinja2ChatFormatter(template=jinja, eos_token="</s>", bos_token="<s>")
    wanted = prompt.render(prompt.build(turns, template), template)
    assert formatter(messages=messages).prompt == "<s>" + wanted


def test_chat_template_markers_and_system(native: llama_cpp.Llama) -> None:
    """llama.cpp's own marker is moved like ours; a system message replaces the default one."""
    formatter = Jinja2ChatFormatter(
        template=native.metadata["tokenizer.chat_template"], eos_token="</s>", bos_token="<s>"
    )
    part = {"type": "media_marker", "text": "<__media__>"}
    for content in ([part, PARTS[0]], "<__media__>what is it?", "what is it? <__media__>"):
        messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
        assert formatter(messages=messages).prompt == "<s>Be brief. USER: <__media__>\nwhat is it? ASSISTANT:"
