"""A bundle's manifest is read strictly and its files are compared with their hashes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllava_edge import bundle as b
from tinyllava_edge.errors import BundleError, UnverifiedError, UsageError
from tinyllava_edge.spec import DEFAULT_VARIANT, model_spec

FILES = {
    "preprocess.onnx": ("preprocess", "uint8"),
    "vision-fp32.onnx": ("vision", "fp32"),
    "vision-int8.onnx": ("vision", "int8"),
    "llm-f16.gguf": ("llm", "f16"),
    "llm-q8_0.gguf": ("llm", "q8_0"),
}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    root.mkdir()
    for name in FILES:
        (root / name).write_bytes(name.encode() * 10)
    files = [b.describe_file(root, name, role, precision, {"F16": 1}) for name, (role, precision) in FILES.items()]
    b.write_manifest(root, model_spec(DEFAULT_VARIANT), files, {"name": "c", "sha256": "0"}, {"onnx": "1"})
    return root


def test_builds(made: Path) -> None:
    bundle = b.read_bundle(made)
    assert list(bundle.builds()) == ["fp32+f16", "int8+f16", "fp32+q8_0", "int8+q8_0"]
    assert bundle.build().name == "fp32+f16"
    assert bundle.build("int8+q8_0").bytes == sum(
        len(n) * 10 for n in ("preprocess.onnx", "vision-int8.onnx", "llm-q8_0.gguf")
    )
    with pytest.raises(UsageError, match="no build") as error:
        bundle.build("fp16+f16")
    assert "int8+q8_0" in error.value.hint
    bundle.check()


def test_changed_truncated_and_missing_files_are_named(made: Path) -> None:
    bundle = b.read_bundle(made)
    path = made / "vision-int8.onnx"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"vision-int8\.onnx: its SHA-256"):
        bundle.check()
    bundle.check(bundle.build("fp32+f16"))  # other builds are still good
    path.write_bytes(data[:5])
    with pytest.raises(BundleError, match=r"vision-int8\.onnx: 5 bytes"):
        bundle.check()
    path.unlink()
    with pytest.raises(BundleError, match=r"vision-int8\.onnx: missing"):
        bundle.check(bundle.build("int8+f16"))


def test_stamp_belongs_to_one_manifest(made: Path) -> None:
    bundle = b.read_bundle(made)
    build = bundle.build()
    with pytest.raises(UnverifiedError) as error:
        bundle.require_verified(build)
    assert "verify" in error.value.hint
    bundle.require_verified(build, allow_unverified=True)
    bundle.stamp({build.name: {"passed": True}, "int8+f16": {"passed": False}})
    assert bundle.is_verified(build) and not bundle.is_verified(bundle.build("int8+f16"))
    (made / "bundle.json").write_text((made / "bundle.json").read_text() + " ")
    assert not b.read_bundle(made).is_verified(build)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 99},
        {"files": 3},
        {"files": []},
        {"model": {"image_size": 1}},
        {"name": None},
        {"source": {"sha256": 5}},
    ],
)
def test_wrong_manifests_are_refused(made: Path, change: dict[str, object]) -> None:
    manifest = json.loads((made / "bundle.json").read_text())
    (made / "bundle.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(BundleError, match=r"bundle\.json"):
        b.read_bundle(made)


@pytest.mark.parametrize(
    ("key", "value"),
    [("precision", "../../x/int8"), ("path", "\ud800"), ("path", "a" * 5000), ("bytes", 10**30), ("role", "x" * 999)],
)
def test_odd_entries_are_refused_in_one_short_line(made: Path, key: str, value: object) -> None:
    manifest = json.loads((made / "bundle.json").read_text())
    manifest["files"][0][key] = value
    (made / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as error:
        b.read_bundle(made)
    assert len(error.value.message) < 300 + len(str(made)) and error.value.message.isprintable()


def test_a_role_of_a_newer_version(made: Path) -> None:
    """Named, with both ways out."""
    manifest = made / b.MANIFEST
    manifest.write_text(manifest.read_text().replace('"role": "llm"', '"role": "sound"'))
    with pytest.raises(BundleError, match="odd role or precision: 'sound'") as caught:
        b.read_bundle(made)
    assert "update tinyllava-edge here" in caught.value.hint and "export it again" in caught.value.hint


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Its GGUF has three shards and its vision graph keeps the weights beside itself; an mmproj and a text."""
    root = tmp_path / "split"
    root.mkdir()
    shards = [f"llm-f16-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    others = ["preprocess.onnx", "vision-fp32.onnx", "vision-fp32.onnx.data", "mmproj-m-f16.gguf", "Modelfile"]
    for name in [*shards, *others]:
        (root / name).write_bytes(name.encode() * 10)
    files = [
        b.describe_file(root, "preprocess.onnx", "preprocess", "uint8", {}),
        b.describe_file(root, "vision-fp32.onnx", "vision", "fp32", {}, ["vision-fp32.onnx.data"]),
        b.describe_file(root, shards[0], "llm", "f16", {"f16": 3}, shards[1:]),
        b.describe_file(root, "mmproj-m-f16.gguf", "mmproj", "f16", {}),
        b.describe_file(root, "Modelfile", "text", "text", {}),
    ]
    b.write_manifest(root, model_spec(DEFAULT_VARIANT), files, {"name": "c", "sha256": "0"}, {"onnx": "1"})
    return root


def test_parts_are_found_counted_and_checked(split: Path) -> None:
    bundle = b.read_bundle(split)
    (build,) = bundle.builds().values()
    names = {p.name for p in split.iterdir()}
    assert {p.name for file in bundle.files for p in bundle.paths(file)} == names - {"bundle.json"}
    assert bundle.path(build.llm).name == "llm-f16-00001-of-00003.gguf"
    assert [p.name[8:13] for p in bundle.paths(build.llm)] == ["00001", "00002", "00003"]
    extra = ("Modelfile", "mmproj-m-f16.gguf", "bundle.json")
    assert build.bytes == sum(10 * len(name) for name in names if name not in extra)
    bundle.check()
    (split / "Modelfile").unlink()
    bundle.check(build)  # running needs no text
    with pytest.raises(BundleError, match="Modelfile: missing"):
        bundle.check()
    for name in ("vision-fp32.onnx.data", "llm-f16-00003-of-00003.gguf"):
        data = (split / name).read_bytes()
        (split / name).write_bytes(b"x" + data[1:])
        with pytest.raises(BundleError, match=f"{name}: its SHA-256"):
            bundle.check(build)
        (split / name).write_bytes(data)


@pytest.mark.parametrize(
    "parts",
    [
        "llm",
        [{"path": "../x", "sha256": "0", "bytes": 1}],
        [{"path": "x", "sha256": "0"}],
        [{"path": "x", "sha256": "0", "bytes": True}],
        [{"path": "x", "sha256": "0", "bytes": -1}],
        [{"path": "preprocess.onnx", "sha256": "0", "bytes": 1}],
        [3],
    ],
)
def test_odd_parts_are_refused(split: Path, parts: object) -> None:
    """Also a part that leaves the bundle, and a file that is listed twice."""
    manifest = json.loads((split / "bundle.json").read_text())
    manifest["files"][2]["parts"] = parts
    (split / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as error:
        b.read_bundle(split)
    assert len(error.value.message) < 300 + len(str(split)) and error.value.message.isprintable()


def test_manifests_without_parts_stay_as_they_were(made: Path) -> None:
    """What earlier versions wrote opens, and files without parts are written that way still."""
    assert all("parts" not in entry for entry in json.loads((made / "bundle.json").read_text())["files"])
    assert all(file.parts == () for file in b.read_bundle(made).files)


@pytest.mark.parametrize("entry", ["../llm.gguf", "/etc/passwd"])
def test_entries_can_not_leave_the_bundle(made: Path, entry: str) -> None:
    manifest = json.loads((made / "bundle.json").read_text())
    manifest["files"][0]["path"] = entry
    (made / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="leaves the bundle"):
        b.read_bundle(made)


@pytest.mark.parametrize(
    ("role", "place"),
    [
        ("mobile", "bundle.json"),
        ("mobile", "verified.json"),
        ("mobile", "profile.json"),
        ("mobile", "mobile.ort"),
        ("web", "llm.onnx"),
        ("web", "mobile/a.onnx"),
        ("text", "bundle.json"),
        ("text", "verified.json"),
        ("text", "./bundle.json"),
        ("text", "mobile//a"),
    ],
)
@pytest.mark.parametrize("part", [False, True])
def test_files_lie_in_the_place_of_their_role(made: Path, role: str, place: str, part: bool) -> None:
    """Nothing stands for our own two files, and nothing else for what apps and pages load."""
    known = {"sha256": "0", "bytes": 1}
    right = f"{role}/a" if role != "text" else "NOTES.md"
    entry = {"path": place, "role": role, "precision": "x", "tensor_types": {}, **known}
    if part:
        entry |= {"path": right, "parts": [{"path": place, **known}]}
    with_files(made, entry | {"path": right, "parts": []})
    assert b.read_bundle(made).files[-1].path == right
    with_files(made, entry)
    with pytest.raises(BundleError, match="lies outside|in the place of|odd path"):
        b.read_bundle(made)


def with_files(root: Path, *entries: dict[str, object]) -> None:
    """Put entries behind the five of FILES."""
    manifest = json.loads((root / "bundle.json").read_text())
    manifest["files"][len(FILES) :] = entries
    (root / "bundle.json").write_text(json.dumps(manifest))


def web_entry(path: str, precision: str) -> dict[str, object]:
    return {"path": path, "role": "web", "precision": precision, "sha256": "0", "bytes": 1, "tensor_types": {}}


def test_one_graph_of_a_kind_and_precision(made: Path) -> None:
    """Else the order of the list would decide which one is run. What only begins like a graph is none."""
    stems = ("vision_encoder", "embed_tokens", "decoder_model_merged")
    texts = [web_entry(f"web/{name}.json", "text") for name in ("tokenizer", "tokenizer_config", "generation_config")]
    graphs = [web_entry(f"web/onnx/{stem}_q4.onnx", "q4") for stem in stems]
    more = [web_entry("web/onnx/decoder_model_merged.onnx.bak", "q4"), web_entry("web/onnx/decoder_model_x.onnx", "q4")]
    with_files(made, *more, *graphs, *texts)
    assert b.read_bundle(made).web_builds()["web-q4"].decoder.path == "web/onnx/decoder_model_merged_q4.onnx"
    for stem in stems:
        with_files(made, web_entry(f"web/onnx/{stem}_evil.onnx", "q4"), *graphs, *texts)
        with pytest.raises(BundleError, match=f"lists two files for {stem} of precision q4"):
            b.read_bundle(made)
    with_files(made, web_entry("llm-evil.gguf", "f16") | {"role": "llm"})
    with pytest.raises(BundleError, match="lists two files for llm of precision f16"):
        b.read_bundle(made)


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle\.json"):
        b.read_bundle(tmp_path)
    (tmp_path / "bundle.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="not valid JSON"):
        b.read_bundle(tmp_path)
    (tmp_path / "bundle.json").write_text('{"schema_version": 1,')
    with pytest.raises(BundleError, match="not valid JSON"):
        b.read_bundle(tmp_path)


@pytest.mark.parametrize(
    "value", ["\ud800", {"\udce9": 1}, float("nan"), -float("inf"), 1 << 63, -(1 << 63), [[10**400]]]
)
def test_a_stamp_that_no_results_file_could_keep_is_refused(value: object, made: Path) -> None:
    """It would be written into every line about the bundle, which nobody could read again."""
    bundle = b.read_bundle(made)
    bundle.stamp({"fp32+f16": {"passed": True, "command": "é 😀", "least": (1 << 63) - 1}})
    assert bundle.is_verified(bundle.build("fp32+f16"))
    stamp = {"bundle_sha256": bundle.sha256, "builds": {"fp32+f16": {"passed": True, "command": value}}}
    (made / b.STAMP).write_text(json.dumps(stamp))
    with pytest.raises(BundleError, match=r"verified\.json: ") as caught:
        bundle.verified_builds()
    assert "verify" in caught.value.hint and len(caught.value.message) < 500
