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
    bundle = b.open_bundle(made)
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
    bundle = b.open_bundle(made)
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
    bundle = b.open_bundle(made)
    build = bundle.build()
    with pytest.raises(UnverifiedError) as error:
        bundle.require_verified(build)
    assert "verify" in error.value.hint
    bundle.require_verified(build, allow_unverified=True)
    bundle.stamp({build.name: {"passed": True}, "int8+f16": {"passed": False}})
    assert bundle.is_verified(build) and not bundle.is_verified(bundle.build("int8+f16"))
    (made / "bundle.json").write_text((made / "bundle.json").read_text() + " ")
    assert not b.open_bundle(made).is_verified(build)


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
        b.open_bundle(made)


@pytest.mark.parametrize(
    ("key", "value"),
    [("precision", "../../x/int8"), ("path", "\ud800"), ("path", "a" * 5000), ("bytes", 10**30), ("role", "x" * 999)],
)
def test_odd_entries_are_refused_in_one_short_line(made: Path, key: str, value: object) -> None:
    manifest = json.loads((made / "bundle.json").read_text())
    manifest["files"][0][key] = value
    (made / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as error:
        b.open_bundle(made)
    assert len(error.value.message) < 300 + len(str(made)) and error.value.message.isprintable()


@pytest.mark.parametrize("entry", ["../llm.gguf", "/etc/passwd"])
def test_entries_can_not_leave_the_bundle(made: Path, entry: str) -> None:
    manifest = json.loads((made / "bundle.json").read_text())
    manifest["files"][0]["path"] = entry
    (made / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="leaves the bundle"):
        b.open_bundle(made)


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle\.json"):
        b.open_bundle(tmp_path)
    (tmp_path / "bundle.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="not valid JSON"):
        b.open_bundle(tmp_path)
    (tmp_path / "bundle.json").write_text('{"schema_version": 1,')
    with pytest.raises(BundleError, match="not valid JSON"):
        b.open_bundle(tmp_path)
