"""Bundles that someone else made, or broke: one clear error each, no crash, nothing written beside them.

See hostile_child.py for how they are opened.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
from PIL import Image

from tinyllava_edge.bundle import MANIFEST
from tinyllava_edge.files import sha256_file

from .hostile_child import JSON_THAT_IS_NONE, Call, assert_one_error, forked, names, program, refused


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    yield from forked()


def put(value: dict[str, Any], path: str, new: Any) -> None:
    *parts, last = path.split(".")
    for part in parts:
        value = value[part]
    value[last] = new


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def small(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One build, fp32+f16."""
    from tinyllava_edge.export.bundle_writer import export_bundle

    out = tmp_path_factory.mktemp("small") / "bundle"
    export_bundle(tiny_checkpoint, out, llm=("f16",), vision=("fp32",))
    return out


@pytest.fixture
def bundle(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "bundle"))


def forge(root: Path) -> None:
    """Hashes that agree with the files, as someone who wants to be believed would leave them."""
    value = json.loads((root / MANIFEST).read_text())
    for entry in value["files"]:
        path = root / entry["path"]
        entry["sha256"], entry["bytes"] = sha256_file(path), path.stat().st_size
    (root / MANIFEST).write_text(json.dumps(value))


def assert_bundle_refused(call: Call, root: Path, checkpoint: Path, picture: Path, *words: str) -> None:
    before = names(root.parent)
    refused(call("edge", root, True), *words)
    refused(call("edge", root, False), *words)
    refused(call("verify", root, checkpoint, picture), *words)
    assert names(root.parent) <= before | {"bundle/verified.json"}  # the stamp of nothing


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def header(tensors: int, pairs: int) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, pairs)


ARCHITECTURE = pair(b"general.architecture", 8, string(b"llama"))
HUGE = (1 << 63) - 1
GGUFS: dict[str, bytes] = {
    "tensors": header(HUGE, 0),
    "metadata": header(0, HUGE),
    "a string": header(0, 1) + struct.pack("<Q", HUGE) + b"x",
    "a string that wraps": header(0, 1) + struct.pack("<Q", (1 << 64) - 1) + b"x" * 64,
    "an array": header(0, 2) + ARCHITECTURE + pair(b"tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, HUGE)),
    "an array that wraps": header(0, 2) + ARCHITECTURE + pair(b"x", 9, struct.pack("<IQ", 10, 1 << 61)),
    "arrays in arrays": header(0, 2) + ARCHITECTURE + pair(b"x", 9, struct.pack("<IQ", 9, 1) * 10_000),
    "an unknown type": header(0, 1) + pair(b"x", 99, b"\0" * 64),
    "a version of tomorrow": struct.pack("<4sIQQ", b"GGUF", 77, 0, 0),
    "nothing but a header": header(0, 0),
}


@pytest.mark.parametrize("case", GGUFS)
def test_gguf_with_huge_counts(case: str, bundle: Path, tiny_checkpoint: Path, picture: Path, call: Call) -> None:
    (bundle / "llm-f16.gguf").write_bytes(GGUFS[case])
    forge(bundle)
    assert_bundle_refused(call, bundle, tiny_checkpoint, picture, "llm-f16.gguf")


def first_tensor(path: Path) -> tuple[int, int]:
    """Where the first tensor's rank stands in a GGUF, and its rank."""
    field = gguf.GGUFReader(path).tensors[0].field
    return int(field.offset) + 8 + len(bytes(field.parts[1])), int(field.parts[2][0])


@pytest.mark.parametrize("case", ["dimensions", "a size", "sizes that overflow", "no size", "a type", "an offset"])
def test_gguf_tensor_that_is_too_large(
    case: str, bundle: Path, tiny_checkpoint: Path, picture: Path, call: Call
) -> None:
    path = bundle / "llm-f16.gguf"
    data = bytearray(path.read_bytes())
    place, rank = first_tensor(path)
    assert struct.unpack_from("<I", data, place)[0] == rank == 2
    sizes, kind, offset = place + 4, place + 4 + 8 * rank, place + 8 + 8 * rank
    changes: dict[str, tuple[str, int, tuple[int, ...]]] = {
        "dimensions": ("<I", place, (1 << 31,)),
        "a size": ("<Q", sizes, (HUGE,)),
        "sizes that overflow": ("<QQ", sizes, (1 << 33, 1 << 33)),
        "no size": ("<Q", sizes, (0,)),
        "a type": ("<I", kind, (4_000_000_000,)),
        "an offset": ("<Q", offset, ((1 << 62) // 32 * 32,)),
    }
    form, where, values = changes[case]
    struct.pack_into(form, data, where, *values)
    path.write_bytes(data)
    forge(bundle)
    assert_bundle_refused(call, bundle, tiny_checkpoint, picture, "llm-f16.gguf")


@pytest.mark.parametrize("case", ["up", "absolute", "link", "self", "beyond", "beside"])
def test_onnx_with_weights_elsewhere(case: str, bundle: Path, tiny_checkpoint: Path, picture: Path, call: Call) -> None:
    """External data may lie in files that the manifest lists, and nowhere else."""
    secret = bundle.parent / "secret.bin"
    path = bundle / "vision-fp32.onnx"
    model = onnx.load(path)
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    secret.write_bytes(tensor.raw_data)
    if case == "link":
        (bundle / "weights.bin").symlink_to(secret)
    if case in ("beside", "beyond"):
        shutil.copyfile(secret, bundle / "weights.bin")
    location = {"up": "../secret.bin", "absolute": str(secret), "self": "vision-fp32.onnx"}.get(case, "weights.bin")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entries = {"location": location, "offset": "0", "length": str(1 << 40 if case == "beyond" else 4096)}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    forge(bundle)
    assert_bundle_refused(call, bundle, tiny_checkpoint, picture, "vision-fp32.onnx")


ONNXES: dict[str, bytes] = {
    "empty": b"",
    "text": b"<html>not found</html>",
    "a field that never ends": b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + b"x" * 100,
    "a number that never ends": b"\x08" + b"\xff" * 100,
    "nested": b"\x3a\x80\x80\x04" + b"\x0a\xff\x7f" * 20_000,
    "an empty graph": onnx.ModelProto(ir_version=10).SerializeToString(),
}


@pytest.mark.parametrize("case", ONNXES)
@pytest.mark.parametrize("file", ["vision-fp32.onnx", "preprocess.onnx"])
def test_onnx_that_is_none(
    case: str, file: str, bundle: Path, tiny_checkpoint: Path, picture: Path, call: Call
) -> None:
    (bundle / file).write_bytes(ONNXES[case])
    forge(bundle)
    assert_bundle_refused(call, bundle, tiny_checkpoint, picture, file)


WRONG_MANIFEST: dict[str, tuple[str, Any]] = {
    "schema": ("schema_version", 99),
    "schema as text": ("schema_version", "1"),
    "files as a table": ("files", {}),
    "no files": ("files", []),
    "files of nothing": ("files", [None]),
    "a name that is a list": ("name", []),
    "a name of two lines": ("name", "a\nerror: b"),
    "versions that are numbers": ("tool_versions", {"a": 1}),
    "no source": ("source", None),
    "no model": ("model", None),
    "a picture of zero": ("model.image_size", 0),
    "a giant picture": ("model.image_size", 10**9),
    "a size as text": ("model.visual_tokens", "64"),
    "a size that is true": ("model.visual_tokens", True),
    "an unknown template": ("model.template", "nonsense"),
    "an unknown policy": ("model.image_policy", "stretch"),
    "means of two": ("model.image_mean", [0.5, 0.5]),
    "means of text": ("model.image_mean", ["a", "b", "c"]),
}


@pytest.mark.parametrize("case", WRONG_MANIFEST)
def test_manifest_with_wrong_values(case: str, bundle: Path, call: Call) -> None:
    path, new = WRONG_MANIFEST[case]
    value = json.loads((bundle / MANIFEST).read_text())
    put(value, path, new)
    (bundle / MANIFEST).write_text(json.dumps(value))
    refused(call("edge", bundle, True), *([] if case == "an unknown template" else [str(bundle)]))


@pytest.mark.parametrize("case", JSON_THAT_IS_NONE)
def test_manifest_that_is_no_json(case: str, bundle: Path, call: Call) -> None:
    (bundle / MANIFEST).write_bytes(JSON_THAT_IS_NONE[case])
    refused(call("open", bundle), MANIFEST)


@pytest.mark.parametrize("path", ["../llm-f16.gguf", "/etc/passwd", "a/../../x", "", "x\0y", "a\\b"])
def test_manifest_entries_that_leave_the_bundle(path: str, bundle: Path, call: Call) -> None:
    value = json.loads((bundle / MANIFEST).read_text())
    value["files"][-1]["path"] = path
    (bundle / MANIFEST).write_text(json.dumps(value))
    refused(call("open", bundle), str(bundle))


def test_the_program_on_a_hostile_bundle(bundle: Path, tiny_checkpoint: Path, picture: Path) -> None:
    (bundle / "llm-f16.gguf").write_bytes(GGUFS["an array"])
    forge(bundle)
    done = program("run", bundle, "--allow-unverified", "--image", picture, "what is it?")
    assert_one_error(done, "llm-f16.gguf")
    done = program("verify", bundle, "--against", tiny_checkpoint, "--image", picture)
    assert_one_error(done, "llm-f16.gguf")


# chat templates: programs in a GGUF

TEMPLATES: dict[str, str] = {
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "never ends": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "eats memory": "{{ 'a' * 100000000000 }}",
    "floods": "{{ 'a' * 100000000 }}",
    "is no jinja": "{% for %}",
    "is too long": "x" * 70_000,
    "raises": "{{ raise_exception('no') }}",
    "names what is not there": "{{ nothing.at.all }}",
    "divides by zero": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_hostile_chat_templates(case: str) -> None:
    from tinyllava_edge.errors import EngineError
    from tinyllava_edge.export.render_chat import render

    with pytest.raises(EngineError, match="chat template") as caught:
        render(TEMPLATES[case], [{"messages": []}], seconds=2)
    assert "\n" not in caught.value.message


def test_a_plain_chat_template() -> None:
    from tinyllava_edge.export.render_chat import render

    assert render("{{ a }}{% if b %}!{% endif %}", [{"a": "é", "b": True}, {"a": "x"}]) == ["é!", "x"]
