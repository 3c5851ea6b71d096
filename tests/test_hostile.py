"""Checkpoints that someone else made, or broke: one clear error each, no crash, nothing written but where it was asked.

See hostile_child.py for how they are opened.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .hostile_child import JSON_THAT_IS_NONE, Call, assert_one_error, forked, names, program, refused


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    yield from forked()


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def assert_checkpoint_refused(call: Call, root: Path, *words: str) -> None:
    """By loading, exporting and importing alike; none of them leaves anything behind."""
    for name in ("load", "export", "import"):
        if name == "import":
            (root / "model_spec.json").unlink()  # else it says that there is nothing to import
        before = names(root.parent)
        arguments = [root] if name == "load" else [root, root.parent / "out"]
        refused(call(name, *arguments), *words)
        assert names(root.parent) == before, f"{name} left something behind"


def put(value: dict[str, Any], path: str, new: Any) -> None:
    *parts, last = path.split(".")
    for part in parts:
        value = value[part]
    value[last] = new


WRONG_CONFIG: dict[str, tuple[str, Any]] = {
    "string for a size": ("text_config.hidden_size", "256"),
    "list for a size": ("text_config.hidden_size", [256]),
    "negative size": ("text_config.hidden_size", -256),
    "no size": ("text_config.hidden_size", None),
    "size that is a fraction": ("text_config.hidden_size", 256.5),
    "a billion layers": ("text_config.num_hidden_layers", 10**9),
    "a billion tower layers": ("vision_config.num_hidden_layers", 10**9),
    "zero heads": ("text_config.num_attention_heads", 0),
    "heads that don't divide": ("text_config.num_attention_heads", 7),
    "key heads that don't divide": ("text_config.num_key_value_heads", 3),
    "a trillion tokens": ("text_config.vocab_size", 10**12),
    "no text model": ("text_config", None),
    "a list of a text model": ("text_config", []),
    "a text model by name": ("text_config", "llama"),
    "no tower": ("vision_config", None),
    "a tower that is a number": ("vision_config", 5),
    "giant pictures": ("vision_config.image_size", 10**7),
    "patch of zero": ("vision_config.patch_size", 0),
    "other patches than the weights": ("vision_config.patch_size", 16),
    "feature layer by name": ("vision_feature_layer", "last"),
    "feature layer out of the tower": ("vision_feature_layer", 10**6),
    "strategy that is a number": ("vision_feature_select_strategy", 7),
    "unknown activation": ("text_config.hidden_act", "__import__('os')"),
    "activation that is a number": ("vision_config.hidden_act", 3),
    "rope that is a string": ("text_config.rope_parameters", "x"),
    "rope base of zero": ("text_config.rope_parameters.rope_theta", 0),
    "epsilon that is a string": ("text_config.rms_norm_eps", "small"),
    "unknown model type": ("model_type", "bogus"),
    "model type that is a list": ("text_config.model_type", ["llama"]),
    "unknown text model": ("text_config.model_type", "bogus"),
    "image token that is a string": ("image_token_id", "many"),
    "unknown connector": ("connector", "../../x"),
}


@pytest.mark.parametrize("case", WRONG_CONFIG)
def test_config_with_wrong_types(case: str, copy: Path, call: Call) -> None:
    path, new = WRONG_CONFIG[case]
    value = json.loads((copy / "config.json").read_text())
    put(value, path, new)
    if path == "image_token_id":
        value["image_token_index"] = new
    (copy / "config.json").write_text(json.dumps(value))
    before = names(copy.parent)
    found = call("export", copy, copy.parent / "out")
    refused(found, str(copy))
    assert names(copy.parent) == before


@pytest.mark.parametrize("file", ["config.json", "model_spec.json", "tokenizer.json"])
@pytest.mark.parametrize("case", JSON_THAT_IS_NONE)
def test_files_that_are_no_json(file: str, case: str, copy: Path, call: Call) -> None:
    (copy / file).write_bytes(JSON_THAT_IS_NONE[case])
    before = names(copy.parent)
    refused(call("export", copy, copy.parent / "out"), str(copy))
    assert names(copy.parent) == before


def test_code_in_a_checkpoint_is_never_run(copy: Path, call: Call) -> None:
    """auto_map names Python beside the weights: it stays text."""
    witness = copy.parent / "ran"
    (copy / "modeling_x.py").write_text(f"open({str(witness)!r}, 'w')\nclass X: pass\n")
    value = json.loads((copy / "config.json").read_text())
    value["auto_map"] = {"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    value["text_config"]["auto_map"] = value["vision_config"]["auto_map"] = value["auto_map"]
    (copy / "config.json").write_text(json.dumps(value))
    assert call("load", copy)["status"] == 0
    call("import", copy, copy.parent / "out")
    assert not witness.exists()


# weights


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_header(path: Path, header: Any, body: bytes, size: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + body)


def lie(header: dict[str, Any], case: str) -> dict[str, Any]:
    """A header that says something else than the bytes after it."""
    name, other = [key for key in header if key != "__metadata__"][3:5]
    entry = header[name]
    start, end = entry["data_offsets"]
    changes: dict[str, dict[str, Any]] = {
        "beyond the file": {"data_offsets": [start, end + (1 << 40)]},
        "overlapping": {"data_offsets": header[other]["data_offsets"]},
        "backwards": {"data_offsets": [end, start]},
        "another type": {"dtype": "F64"},
        "an unknown type": {"dtype": "F31"},
        "negative shape": {"shape": [-1, *entry["shape"][1:]]},
        "overflowing shape": {"shape": [1 << 33, 1 << 33]},
        "fractional shape": {"shape": [2.5]},
        "no shape": {"shape": None},
        "another shape": {"shape": [entry["shape"][0] * 2, *entry["shape"][1:-1], entry["shape"][-1] // 2]}
        if len(entry["shape"]) > 1
        else {"shape": [entry["shape"][0] // 2, 2]},
    }
    return {**header, name: {**entry, **changes[case]}}


LIES = (
    *("beyond the file", "overlapping", "backwards", "another type", "an unknown type", "negative shape"),
    *("overflowing shape", "fractional shape", "no shape", "another shape"),
)


@pytest.mark.parametrize("case", LIES)
def test_safetensors_whose_header_lies(case: str, copy: Path, call: Call) -> None:
    path = copy / "model.safetensors"
    header, body = read_header(path)
    write_header(path, lie(header, case), body)
    assert_checkpoint_refused(call, copy, str(copy))


def test_safetensors_of_odd_lengths(copy: Path, call: Call) -> None:
    path = copy / "model.safetensors"
    header, body = read_header(path)
    for size in (1 << 62, (1 << 64) - 1, 100_000_001, 3, 0):
        write_header(path, header, body, size)
        refused(call("load", copy), str(path))
    for content in (b"", b"\0" * 7, b"<html>", path.read_bytes()[: len(body) // 2]):
        path.write_bytes(content)
        refused(call("load", copy), str(path))


def test_a_hundred_megabytes_of_nested_header(copy: Path, call: Call) -> None:
    path = copy / "model.safetensors"
    write_header(path, b'{"a":' * 19_000_000, b"")
    assert_checkpoint_refused(call, copy, str(path))


def test_the_same_checkpoint_unharmed(copy: Path, call: Call) -> None:
    """What the others are refused for is their fault alone."""
    for name in ("load", "export", "import"):
        if name == "import":
            (copy / "model_spec.json").unlink()
        found = call(name, *([copy] if name == "load" else [copy, copy.parent / name]))
        assert found["status"] == 0 and not found["kind"], found


def test_nan_weights(copy: Path, call: Call) -> None:
    """Not a file error: the tensor is named, and no bundle is left."""
    from safetensors.numpy import load_file, save_file

    whole = load_file(copy / "model.safetensors")
    for part in ("q_proj", "vision_tower", "linear_1", "embed_tokens"):
        name = next(key for key in whole if part in key and whole[key].ndim > 1)
        broken = whole[name].copy()
        broken.reshape(-1)[5] = np.nan
        save_file({**whole, name: broken}, copy / "model.safetensors", metadata={"format": "pt"})
        before = names(copy.parent)
        refused(call("export", copy, copy.parent / "out"), part, "NaN")
        assert names(copy.parent) == before


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "", 7])
def test_an_index_that_leaves_its_directory(file: Any, copy: Path, call: Call) -> None:
    header, _ = read_header(copy / "model.safetensors")
    (copy / "model.safetensors").rename(copy.parent / "model.safetensors")
    table = {key: file for key in header if key != "__metadata__"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    assert_checkpoint_refused(call, copy, str(copy))


def test_the_program_on_a_hostile_checkpoint(copy: Path) -> None:
    value = json.loads((copy / "config.json").read_text())
    value["text_config"]["num_hidden_layers"] = 10**9
    (copy / "config.json").write_text(json.dumps(value))
    before = names(copy.parent)
    assert_one_error(program("export", copy, "-o", copy.parent / "out"), str(copy))
    assert names(copy.parent) == before


def test_the_program_on_hostile_weights(copy: Path) -> None:
    path = copy / "model.safetensors"
    header, body = read_header(path)
    write_header(path, lie(header, "overlapping"), body)
    before = names(copy.parent)
    assert_one_error(program("export", copy, "-o", copy.parent / "out"), str(copy))
    assert names(copy.parent) == before
