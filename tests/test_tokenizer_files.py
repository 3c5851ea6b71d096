"""The tokenizer that is read from release files gives the slow tokenizer's ids, and damaged files one clear error."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tinyllava_edge.errors import CheckpointError, UsageError
from tinyllava_edge.tokenizer_files import factory_special_tokens, fast_tokenizer
from tinyllava_edge.tokenizer_sections import ALWAYS, FIRST, NEVER, SectionTokenizer, space_prefix, token_bytes

from . import tiny_tokenizers as tiny

CHUNKS = (
    f"A chat between a curious user and an artificial intelligence assistant. USER: {chr(10)}hello ASSISTANT:",
    "\nwhat color is the shape? ASSISTANT:",
    "  two  spaces\t\ttabs \n\n\n\n\n\n\nnewlines        ",
    " starts with a space",
    "say </s> <image> <|endoftext|> <eos> ▁▁ now",
    "12345 ½ e\u0301 cafe\u0301 中文 😀 ﬁ don't I'LL 'ſ",
    "",
)


@pytest.fixture(scope="module", params=[kind for kind in tiny.KINDS if kind != "qwen2_instruct"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def release(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.KINDS[kind][1](tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="module")
def loaded(release: Path) -> Any:
    return fast_tokenizer(release)


def special_of(tokenizer: Any) -> dict[str, int]:
    return {token.content: k for k, token in tokenizer.added_tokens_decoder.items() if token.special}


def test_plain_text_has_the_slow_ids(kind: str, release: Path, loaded: Any) -> None:
    """Chunks and 400 random texts, nothing in them special: SentencePiece's own library, or BPE written out."""
    slow = tiny.KINDS[kind][2](release, {"\0 none": -1})
    ours = SectionTokenizer(loaded)
    for text in (*CHUNKS, *tiny.random_texts(400)):
        assert ours.start(text) == slow(text), text


def test_whole_chunks_have_the_slow_ids(kind: str, release: Path, loaded: Any) -> None:
    """Text, end-of-turn mark, text: what upstream tokenises in one go, and we section by section around the mark."""
    special = special_of(loaded)
    end = {"llama": "</s>", "llama-legacy": "</s>", "gemma": "<eos>"}.get(kind, tiny.END)
    slow = tiny.KINDS[kind][2](release, special)
    ours = SectionTokenizer(loaded)
    for text in ("USER: and? ASSISTANT: no", " US", "x", "\n", "  USER"):
        wanted = slow(f"\nwhat? ASSISTANT: red{end}{text}{end}")
        got = [*ours.start("\nwhat? ASSISTANT: red"), special[end], *ours.rest(text), special[end]]
        assert got == wanted, text


def test_saved_and_read_back(kind: str, release: Path, loaded: Any, tmp_path: Path) -> None:
    """tokenizer.json alone gives each chunk the slow ids behind the first token; a second reading changes nothing."""
    loaded.save_pretrained(tmp_path)
    slow = tiny.KINDS[kind][2](release, special_of(loaded))
    for again in (PreTrainedTokenizerFast.from_pretrained(tmp_path), fast_tokenizer(tmp_path)):
        start = [again.bos_token_id] if kind in ("llama", "llama-legacy", "gemma") else []
        for text in CHUNKS[:4]:
            assert again(text).input_ids == start + slow(text), text
        assert space_prefix(again) == space_prefix(loaded) and len(again) == len(loaded)
        assert SectionTokenizer(again).rest("USER") == SectionTokenizer(loaded).rest("USER")
        assert again.chat_template is None


def test_bytes_of_tokens_are_the_text(kind: str, loaded: Any) -> None:
    ours, spell = SectionTokenizer(loaded), token_bytes(loaded)
    for text in (*CHUNKS, *tiny.random_texts(50)):
        ids = ours.start(text)
        spelled = b"".join(map(spell, ids)).decode()
        if kind in ("phi", "qwen2_base"):
            assert spelled == (unicodedata.normalize("NFC", text) if kind == "qwen2_base" else text)
            assert loaded.decode(ids, skip_special_tokens=True) == spelled
        else:  # with the space in front, which decoding takes off again
            assert spelled == ours.text(text, True).replace("▁", " ")
            shown = spelled if kind == "gemma" else spelled.removeprefix(" ")
            assert loaded.decode(ids, skip_special_tokens=True) == shown
    assert [spell(k) for k in special_of(loaded).values()] == [b""] * len(special_of(loaded))


def test_where_a_space_goes(tmp_path: Path) -> None:
    """Llama's two kinds and Gemma's; the file's flag decides for the old kind, `add_prefix_space` for the new one."""
    new = fast_tokenizer(tiny.write_llama(tmp_path / "new", legacy=False))
    old = fast_tokenizer(tiny.write_llama(tmp_path / "old", legacy=None))
    gemma = fast_tokenizer(tiny.write_gemma(tmp_path / "gemma"))
    assert [space_prefix(t) for t in (new, old, gemma)] == [FIRST, ALWAYS, NEVER]
    pieces = {name: SectionTokenizer(t) for name, t in (("new", new), ("old", old), ("gemma", gemma))}
    tokens = {k: [new.convert_ids_to_tokens(p.start("\nx")), p.rest("USER")] for k, p in pieces.items() if k != "gemma"}
    assert tokens["new"] == [["▁", "<0x0A>", "x"], [new.convert_tokens_to_ids("USER")]]
    assert tokens["old"] == [["▁", "<0x0A>", "x"], new.convert_tokens_to_ids(["▁US", "ER"])]
    assert gemma.convert_ids_to_tokens(pieces["gemma"].start("\nx"))[0] != "▁"
    assert fast_tokenizer(tmp_path / "new", legacy=True).init_kwargs["legacy"] is True
    config = tmp_path / "new" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "add_prefix_space": False}))
    assert space_prefix(fast_tokenizer(tmp_path / "new")) == NEVER


@pytest.mark.parametrize("scheme", ["first", "always", "prepend"])
def test_tokenizer_json_of_a_llama(scheme: str, tmp_path: Path) -> None:
    """tokenizer.json alone, in each of the forms that transformers wrote, gives tokenizer.model's ids."""
    source = tiny.write_llama(tmp_path / "release", legacy=False)
    wanted = SectionTokenizer(fast_tokenizer(source))
    fast_tokenizer(source).save_pretrained(tmp_path / "json")
    path = tmp_path / "json" / "tokenizer.json"
    raw = json.loads(path.read_text())
    if scheme != "prepend":
        raw["normalizer"] = None
        raw["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    path.write_text(json.dumps(raw))
    ours = SectionTokenizer(fast_tokenizer(tmp_path / "json"))
    for text in (*CHUNKS, *tiny.random_texts(60)):
        assert ours.start(text) == wanted.start(text) and ours.rest(text) == wanted.rest(text), text
    # without `legacy`, the file's own form counts: `first` is the new kind
    (tmp_path / "json" / "tokenizer_config.json").unlink()
    found = fast_tokenizer(tmp_path / "json", tokenizer_class="LlamaTokenizer")
    assert space_prefix(found) == (FIRST if scheme == "first" else ALWAYS)


def test_a_replacement_of_other_text_is_refused(tmp_path: Path) -> None:
    """Of a SentencePiece-like tokenizer.json only the escape of spaces is known; another one would be lost silently."""
    fast_tokenizer(tiny.write_llama(tmp_path / "release")).save_pretrained(tmp_path / "json")
    path = tmp_path / "json" / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["normalizer"]["normalizers"].append({"type": "Replace", "pattern": {"String": "``"}, "content": '"'})
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="with Replace"):
        fast_tokenizer(tmp_path / "json")


def test_slow_files_win_over_tokenizer_json(tmp_path: Path) -> None:
    """StableLM-2's release names GPT2Tokenizer, whose splitting isn't its tokenizer.json's; both can be had."""
    source = tiny.write_byte_level(tmp_path / "release", "GPT2Tokenizer", [tiny.END])
    qwen = tiny.write_byte_level(tmp_path / "qwen", "Qwen2Tokenizer", [tiny.END])
    fast_tokenizer(source).save_pretrained(tmp_path / "json")
    fast_tokenizer(qwen).save_pretrained(tmp_path / "qwen-json")
    raw = json.loads((tmp_path / "json" / "tokenizer.json").read_text())
    other = json.loads((tmp_path / "qwen-json" / "tokenizer.json").read_text())
    raw["pre_tokenizer"] = other["pre_tokenizer"]
    (source / "tokenizer.json").write_text(json.dumps(raw))
    slow, fast = (SectionTokenizer(fast_tokenizer(source, source=s)) for s in ("slow", "json"))
    assert slow.start("x\n\nthe") == tiny.slow_byte_level(source, {"\0": -1})("x\n\nthe")
    split = [t for t in ("what (the) color", "1234 a\n\n the") if slow.start(t) != fast.start(t)]
    assert split, "the two splittings must differ somewhere"


def test_special_tokens(tmp_path: Path) -> None:
    """Ids and flags of the releases; mark-up that llama.cpp knows by name is special whatever the file says."""
    qwen = fast_tokenizer(tiny.write_qwen2(tmp_path / "qwen"))
    assert qwen.bos_token is None and qwen.eos_token == qwen.pad_token == tiny.END and qwen.unk_token == tiny.END
    flags = {token.content: token.special for token in qwen.added_tokens_decoder.values()}
    assert flags == {
        tiny.END: True, "<|im_start|>": True, "<|im_end|>": True, "<|fim_pad|>": True, "<tool_call>": False,
    }  # fmt: skip
    phi = fast_tokenizer(tiny.write_phi(tmp_path / "phi"))
    assert phi.bos_token == phi.eos_token == phi.unk_token == tiny.END and phi.pad_token is None
    assert phi("x").input_ids == SectionTokenizer(phi).start("x")  # no first token
    assert phi.tokenize("a   b")[1] == "   " and not phi.added_tokens_decoder[len(phi) - 1].special
    llama = fast_tokenizer(tiny.write_llama(tmp_path / "llama"))
    assert [llama.unk_token_id, llama.bos_token_id, llama.eos_token_id] == [0, 1, 2] and llama.model_max_length == 2048
    gemma = fast_tokenizer(tiny.write_gemma(tmp_path / "gemma"))
    assert [gemma.pad_token_id, gemma.eos_token_id, gemma.bos_token_id, gemma.unk_token_id] == [0, 1, 2, 3]
    assert gemma("x").input_ids[0] == 2


def test_what_factory_sets_after_loading(tmp_path: Path) -> None:
    """pad = unk for Llama, Phi and Gemma; unk = pad for Qwen2; StableLM untouched."""
    makers: dict[str, Callable[[Path], Path]] = {
        "llama": tiny.write_llama, "phi": tiny.write_phi, "gemma": tiny.write_gemma, "qwen2": tiny.write_qwen2,
        "stablelm": tiny.write_phi,
    }  # fmt: skip
    found = {}
    for name, write in makers.items():
        tokenizer = fast_tokenizer(write(tmp_path / name))
        factory_special_tokens(tokenizer, name)
        tokenizer.save_pretrained(tmp_path / f"{name}-saved")
        again = PreTrainedTokenizerFast.from_pretrained(tmp_path / f"{name}-saved")
        found[name] = again.pad_token, again.unk_token, again.eos_token
    assert found == {
        "llama": ("<unk>", "<unk>", "</s>"),
        "phi": (tiny.END, tiny.END, tiny.END),
        "gemma": ("<unk>", "<unk>", "<eos>"),
        "qwen2": (tiny.END, tiny.END, tiny.END),
        "stablelm": (None, tiny.END, tiny.END),
    }
    with pytest.raises(UsageError, match="bloom"):
        factory_special_tokens(None, "bloom")


# files that are missing, damaged or hostile


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json here"):
        fast_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(CheckpointError, match=r"no vocab\.json and merges\.txt here"):
        fast_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ArcadeTokenizer"}))
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match="ArcadeTokenizer") as error:
        fast_tokenizer(tmp_path)
    assert "CodeGenTokenizer" in str(error.value)
    for argument in ({"source": "fast"}, {"tokenizer_class": "BertTokenizer"}):
        with pytest.raises(UsageError, match="known|tokenizer"):
            fast_tokenizer(tmp_path, **argument)


def test_every_truncation_of_tokenizer_model_is_refused_or_harmless(tmp_path: Path) -> None:
    source = tiny.write_llama(tmp_path / "x")
    path = source / "tokenizer.model"
    whole = path.read_bytes()
    refused = 0
    for size in [*range(0, len(whole), 173), *range(len(whole) - 40, len(whole))]:
        path.write_bytes(whole[:size])
        try:
            fast_tokenizer(source)
        except CheckpointError as error:
            assert str(path) in str(error) or "tokenizer_config.json" in str(error)
            refused += 1
    assert refused > len(whole) // 173 / 2
    for start in range(0, len(whole), 211):
        path.write_bytes(whole[:start] + b"\xff" * 12 + whole[start + 12 :])
        with pytest.raises(CheckpointError, match="tokenizer"):
            fast_tokenizer(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.trainer_spec, "model_type", 1), "model type 1"),
        (lambda m: setattr(m.normalizer_spec, "remove_extra_whitespaces", True), "collapsed"),
        (lambda m: setattr(m.normalizer_spec, "precompiled_charsmap", b"abc"), "character map"),
        (lambda m: setattr(m.normalizer_spec, "escape_whitespaces", False), "not escaped"),
        (lambda m: setattr(m.trainer_spec, "treat_whitespace_as_suffix", True), "end of words"),
        (lambda m: setattr(m.pieces[5], "piece", m.pieces[6].piece), "twice"),
        (lambda m: setattr(m.pieces[0], "type", 1), "one unknown"),
        (lambda m: setattr(m.pieces[300], "score", float("nan")), "nan"),
    ],
)
def test_sentencepiece_models_without_an_exact_form(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    model = tiny.llama_model()
    change(model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=message) as error:
        fast_tokenizer(tmp_path)
    assert "tokenizer.model" in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "not an object"),
        ("tokenizer_config.json", '{"tokenizer_class": "CodeGenTokenizer", "eos_token": 3}', "eos_token=3"),
        ("tokenizer_config.json", '{"tokenizer_class": "CodeGenTokenizer", "add_bos_token": "yes"}', "add_bos_token"),
        ("tokenizer_config.json", '{"tokenizer_class": "CodeGenTokenizer", "eos_token": "<gone>"}', "'<gone>'"),
        ("tokenizer_config.json", '{"tokenizer_class": "CodeGenTokenizer", "added_tokens_decoder": []}', "end"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "CodeGenTokenizer", "added_tokens_decoder": {"9999": {"content": "<|endoftext|>"}}}',
            "9999",
        ),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "CodeGenTokenizer", "added_tokens_decoder": {"x": {"content": "a"}}}',
            "'x'",
        ),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "CodeGenTokenizer", "added_tokens_decoder": {"9": {"content": "a", "lstrip": true}}}',
            "takes spaces",
        ),
        ("vocab.json", "{}", "empty"),
        ("vocab.json", '{"a": 0, "b": 0}', "share an id"),
        ("vocab.json", '{"a": "0"}', "'a' has id '0'"),
        ("vocab.json", "[" * 100_000, "vocab.json"),
        ("merges.txt", "#version: 0.2\na b c\n", "line 2"),
        ("merges.txt", "q zzzz\n", "line 1"),
        ("added_tokens.json", '{"<x>": -1}', "-1"),
    ],
)
def test_byte_level_files_that_are_wrong(name: str, text: str, message: str, tmp_path: Path) -> None:
    source = tiny.write_phi(tmp_path / "x")
    (source / name).write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        fast_tokenizer(source)
    assert str(source) in str(error.value) and error.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "not BPE"),
        ('{"model": {"type": "Unigram", "vocab": []}}', "Unigram"),
        ('{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}', "not a tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "q"]]}}', "not a tokenizer"),
    ],
)
def test_tokenizer_json_that_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        fast_tokenizer(tmp_path)
    assert "tokenizer.json" in str(error.value)


def test_nothing_is_run_from_the_directory(tmp_path: Path) -> None:
    """A tokenizer class of the directory's own and its code are passed over."""
    source = tiny.write_phi(tmp_path / "x")
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    fast_tokenizer(source)
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(source)
