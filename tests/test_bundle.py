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
