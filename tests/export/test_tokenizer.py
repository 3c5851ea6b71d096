"""Token ids and bytes of llama.cpp against Hugging Face's, for every kind of tokenizer, and the gate on them.

All comparisons are of whole numbers: nothing may differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tinyllava_edge import checkpoint
from tinyllava_edge.errors import ExportError
from tinyllava_edge.export import llm, tokenizer
from tinyllava_edge.prompt import TEMPLATES, Turn
from tinyllava_edge.runtimes.base import IMAGE_PLACE
from tinyllava_edge.runtimes.headers import check_gguf
from tinyllava_edge.runtimes.text import Vocabulary, conversation_ids, gguf_vocabulary
from tinyllava_edge.tokenizer_files import fast_tokenizer
from tinyllava_edge.tokenizer_sections import SectionTokenizer, token_bytes
from tinyllava_edge.tokenizer_settings import QWEN2_PATTERN

from .. import tiny_tokenizers as tiny
from .vocabularies import vocabulary_gguf


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
        (lambda raw: raw.update(normalizer={"type": "NFKC"}), "NFKC"),
        (lambda raw: raw["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda raw: raw["model"].update(byte_fallback=True), "pre-tokenizer"),
        (lambda raw: raw["model"].update(dropout=0.5), "dropout"),
    ]
    for change, message in cases:
        with pytest.raises(ExportError, match=message):
            tokenizer.read_vocabulary(changed(loaded, change), 1088)

    def two_starts(raw: dict[str, Any]) -> None:
        raw["post_processor"]["single"].insert(0, raw["post_processor"]["single"][0])

    with pytest.raises(ExportError, match="post-processor"):
        tokenizer.read_vocabulary(changed(loaded, two_starts), 1088)


def split_by(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("step", "ignore_merges", "name"),
    [
        (split_by(QWEN2_PATTERN), False, "qwen2"),
        (split_by(QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")), True, "llama-bpe"),
        ({"type": "Digits", "individual_digits": True}, False, "smollm"),
    ],
)
def test_known_splittings_have_a_name(
    step: dict[str, Any], ignore_merges: bool, name: str, loaded: checkpoint.Checkpoint, tmp_path: Path
) -> None:
    """Other ways to split before byte-level BPE are told to llama.cpp by name, and give the same ids."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": name == "smollm"}

    def split(raw: dict[str, Any]) -> None:
        raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step, level]}
        raw["model"]["ignore_merges"] = ignore_merges

    other = changed(loaded, split)
    path = vocabulary_gguf(other, tmp_path / "x.gguf", "</s>", 1088)
    assert check_gguf(path)["tokenizer.ggml.pre"] == name.encode()
    tokenizer.check_tokenizer(path, other)


# SentencePiece and byte-level BPE of every kind


@dataclass(frozen=True)
class Family:
    """A kind of tokenizer, in Hugging Face's form and llama.cpp's."""

    name: str
    template: str
    fast: Any
    path: Path
    ours: Vocabulary
    native: llama_cpp.Llama


@pytest.fixture(scope="module", params=list(tiny.KINDS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    template, write, _ = tiny.KINDS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    fast = fast_tokenizer(write(root / "release"))
    fast.add_tokens(["<image>"], special_tokens=True)
    path = vocabulary_gguf(fast, root / "x.gguf", TEMPLATES[template].end_of_turn, len(fast) + 7)
    native = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    end = fast.convert_tokens_to_ids(TEMPLATES[template].end_of_turn)

    def plain(text: str) -> list[int]:
        return list(native.tokenize(text.encode(), add_bos=False, special=False))

    bos = fast.bos_token_id if fast("x").input_ids[0] == fast.bos_token_id else None
    ours = gguf_vocabulary(plain, check_gguf(path), bos, end, fast.eos_token_id)
    return Family(request.param, template, fast, path, ours, native)


def test_gate_passes_every_kind(family: Family) -> None:
    tokenizer.check_tokenizer(family.path, family.fast)


def test_plain_sections_have_the_slow_ids(family: Family, tmp_path: Path) -> None:
    """llama.cpp, fed as the runtime feeds it, against the slow tokenizers, on random texts."""
    release = tiny.KINDS[family.name][1](tmp_path)
    slow = tiny.KINDS[family.name][2](release, {"\0 none": -1})
    for text in (*tokenizer.STRESS_TEXTS, *tiny.random_texts(300, seed=1)):
        if family.name != "gemma" or "_of_turn>" not in text:  # which SentencePiece itself reads as a token
            assert family.ours.tokenize(text) == slow(text), text


CONVERSATIONS = [
    [Turn("what color is the shape?")],
    [Turn("what?", "red"), Turn("sure?", " yes, two  spaces"), Turn("US")],
    [Turn("one\n\ntwo\t\tthree", ""), Turn("e\u0301 中文 😀", "\nnewline"), Turn("</s><|endoftext|><eos> <image> ▁▁")],
]


@pytest.mark.parametrize("has_image", [True, False])
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_conversations_have_the_same_ids_in_both_runtimes(family: Family, turns: list[Turn], has_image: bool) -> None:
    sections = SectionTokenizer(family.fast)
    theirs = Vocabulary(sections.start, family.ours.bos, family.ours.end_of_turn, family.ours.eos, sections.rest)
    template = TEMPLATES[family.template]
    ids = conversation_ids(turns, template, family.ours, has_image=has_image)
    assert ids == conversation_ids(turns, template, theirs, has_image=has_image)
    special = {k for k, token in family.fast.added_tokens_decoder.items() if token.special}
    assert sum(token in special for token in ids) == (family.ours.bos is not None) + len(turns) - 1


def test_a_prompt_has_the_slow_ids_of_its_chunks(family: Family, tmp_path: Path) -> None:
    """Three turns with a picture: upstream's rule, each chunk by itself, the first token once."""
    release = tiny.KINDS[family.name][1](tmp_path)
    template = TEMPLATES[family.template]
    slow = tiny.KINDS[family.name][2](release, {template.end_of_turn: family.ours.end_of_turn})
    turns = [Turn("what?", "red"), Turn("USER sure?", "yes"), Turn("x")]
    end = template.end_of_turn
    chunks = (
        f"{template.system} USER: ",
        f"\nwhat? ASSISTANT: red{end}USER: USER sure? ASSISTANT: yes{end}USER: x ASSISTANT:",
    )
    start = [] if family.ours.bos is None else [family.ours.bos]
    wanted = (*start, *slow(chunks[0]), IMAGE_PLACE, *slow(chunks[1]))
    assert conversation_ids(turns, template, family.ours, has_image=True) == wanted


def test_bytes_come_back(family: Family) -> None:
    spell = token_bytes(family.fast)
    for text in (*tokenizer.STRESS_TEXTS, *tiny.random_texts(50, seed=2)):
        ids = family.ours.tokenize(text)
        pieces = b"".join(family.native.detokenize([index]) for index in ids[:1])
        assert pieces.lstrip() == b"".join(map(spell, ids[:1])).lstrip()


def test_gate_names_the_first_difference(family: Family, tmp_path: Path) -> None:
    """A file with one score, merge, rule or type changed fails, whatever the kind."""
    vocabulary = tokenizer.read_vocabulary(family.fast, len(family.fast) + 7)
    broken = []
    if vocabulary.model == "llama":
        scores = [0.0 if kind == 1 else score for score, kind in zip(vocabulary.scores, vocabulary.types, strict=True)]
        broken.append((replace(vocabulary, scores=tuple(scores)), "tokenises"))
        other = {"first": "always", "always": "never", "never": "always"}[vocabulary.prefix]
        broken.append((replace(vocabulary, prefix=other), "tokenises"))
        letter = vocabulary.tokens.index("▁chat")
        swapped = (*vocabulary.tokens[:letter], "▁chut", *vocabulary.tokens[letter + 1 :])
        broken.append((replace(vocabulary, tokens=swapped), "tokenises|spells"))
    else:
        broken.append((replace(vocabulary, merges=vocabulary.merges[:-40]), "tokenises"))
        broken.append((replace(vocabulary, pre="qwen2" if vocabulary.pre == "gpt-2" else "gpt-2"), "tokenises"))
        if vocabulary.nfc:
            broken.append((replace(vocabulary, nfc=False), "tokenises"))
    plain = list(vocabulary.types)
    plain[vocabulary.tokens.index("<image>")] = gguf.TokenType.NORMAL
    broken.append((replace(vocabulary, types=tuple(plain)), "tokenises|spells"))
    broken.append((replace(vocabulary, add_bos=not vocabulary.add_bos), "tokenises"))
    for number, (wrong, message) in enumerate(broken):
        path = vocabulary_gguf(family.fast, tmp_path / f"{number}.gguf", "", len(wrong.tokens), wrong)
        with pytest.raises(ExportError, match=f"{number}.gguf: llama.cpp ({message})"):
            tokenizer.check_tokenizer(path, family.fast)


def test_sentencepiece_without_a_gguf_form(tmp_path: Path) -> None:
    fast = fast_tokenizer(tiny.write_llama(tmp_path))
    good = json.loads(fast.backend_tokenizer.to_str())
    with pytest.raises(ExportError, match="519, but the embedding has 400 rows"):
        tokenizer.read_vocabulary(fast, 400)
    for change, message in (
        (lambda raw: raw["model"]["vocab"].pop("<0x41>"), "not every byte"),
        (lambda raw: raw.update(normalizer={"type": "NFC"}), "NFC"),
        (lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (lambda raw: raw["model"].update(ignore_merges=True), "ignore_merges"),
    ):
        raw = json.loads(json.dumps(good))
        change(raw)
        wrong = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(raw)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        with pytest.raises(ExportError, match=message):
            tokenizer.read_vocabulary(wrong, 600)
    doubled = fast_tokenizer(tiny.write_gemma(tmp_path / "gemma"))
    doubled.add_tokens(["▁▁ "])  # spells like the piece of three spaces
    with pytest.raises(ExportError, match="are both"):
        tokenizer.read_vocabulary(doubled, 600)
