"""More types for a bundle: what is made, what stays the same bytes, what is refused; nothing is ever half done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tinyllava_edge.bundle import MANIFEST, STAMP, Bundle, read_bundle
from tinyllava_edge.errors import BundleError, ExportError, StorageError, UsageError
from tinyllava_edge.export import calibrate, imatrix, requantize
from tinyllava_edge.export.bundle_writer import FIGURES, export_bundle
from tinyllava_edge.export.gguf_header import read_header
from tinyllava_edge.runtimes.edge import open_edge


@pytest.fixture(scope="module")
def calibration(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> imatrix.Imatrix:
    found = calibrate.collect(tiny_checkpoint, calibrate.calibration_rows(limit=2))
    return imatrix.save_imatrix(found, tmp_path_factory.mktemp("imatrix") / "calib.gguf")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Own copy: f16 and q4_k_m with fp32 and int8, all stamped."""
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_type_is_added_in_place(
    bundle: Path, calibration: imatrix.Imatrix, capfd: pytest.CaptureFixture[str]
) -> None:
    """Kept files are the same bytes and keep their stamps; the new builds run and carry none; nothing is left over."""
    before, told = contents(bundle), list[str]()
    old = read_bundle(bundle)
    made = requantize.quantize_bundle(bundle, ["iq2_xs", "q6_k"], imatrix=calibration, progress=told.append)
    after = contents(bundle)
    assert set(after) - set(before) == {"llm-iq2_xs.gguf", "llm-q6_k.gguf"} and set(before) <= set(after)
    assert all(after[name] == data for name, data in before.items() if name not in (MANIFEST, STAMP, FIGURES))
    assert set(json.loads(after[FIGURES])["llm"]) == {"q4_k_m", "iq2_xs", "q6_k"}
    assert json.loads(after[FIGURES])["llm"]["iq2_xs"]["imatrix_sha256"] == calibration.sha256
    assert list(made.builds()) == [f"{v}+{t}" for t in ("f16", "q6_k", "q4_k_m", "iq2_xs") for v in ("fp32", "int8")]
    assert [name for name, build in made.builds().items() if made.is_verified(build)] == list(old.builds())
    made.check()
    assert made.source["iq2_xs.imatrix_sha256"] == calibration.sha256 and made.source["sha256"] == old.source["sha256"]
    assert read_header(bundle / "llm-iq2_xs.gguf").values["tinyllava_edge.imatrix_sha256"] == calibration.sha256
    assert "quantize" in made.tool_versions and made.sha256 != old.sha256
    with open_edge(made, "int8+iq2_xs", allow_unverified=True, n_threads=1, n_ctx=256) as runtime:
        assert runtime.answer(None, "what?", max_tokens=2).token_ids is not None
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"] and told
    assert capfd.readouterr() == ("", "")


def test_a_type_is_replaced(bundle: Path, tmp_path: Path, calibration: imatrix.Imatrix) -> None:
    """With `out` the old bundle stays as it was; the replaced builds lose their stamps; overrides are recorded."""
    before = contents(bundle)
    options = {"blk.0.ffn": "q6_k"}
    made = requantize.quantize_bundle(bundle, ["q4_k_m"], imatrix=calibration, overrides=options, out=tmp_path / "new")
    assert contents(bundle) == before and made.root == tmp_path / "new"
    assert made.source["q4_k_m.overrides"] == "blk.0.ffn=q6_k" and len(made.source["q4_k_m.imatrix_sha256"]) == 64
    assert contents(made.root)["llm-q4_k_m.gguf"] != before["llm-q4_k_m.gguf"]
    assert [name for name in made.verified_builds()] == ["fp32+f16", "int8+f16"]
    assert (made.root / "llm-f16.gguf").samefile(bundle / "llm-f16.gguf")  # linked, not copied
    again = requantize.quantize_bundle(made.root, ["q4_k_m"])
    assert not {key for key in again.source if key.startswith("q4_k_m.")}
    assert contents(made.root)["llm-q4_k_m.gguf"] == before["llm-q4_k_m.gguf"]


def test_other_files_go_with_it(bundle: Path, tmp_path: Path) -> None:
    """Texts and folders that no manifest lists stay; links do not, because they may lead out of the bundle."""
    (bundle / "web").mkdir()
    (bundle / "web" / "page.html").write_text("page")
    (bundle / "link").symlink_to("/etc/hostname")
    made = requantize.quantize_bundle(bundle, ["q8_0"], out=tmp_path / "new")
    assert (made.root / "web" / "page.html").read_text() == "page" and not (made.root / "link").exists()


def test_texts_name_the_new_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A type that was split comes back as one file: Modelfile and guide say so, the manifest has their hashes."""
    options = {"llm": ["f16", "q4_k_m"], "vision": ["fp32"], "mmproj": ["f16"], "max_shard_bytes": 400_000}
    old = export_bundle(tiny_checkpoint, tmp_path / "old", **options)  # type: ignore[arg-type]
    named = next(file.path for file in old.files if file.precision == "q4_k_m")
    assert "-00001-of-" in named and named in (old.root / "Modelfile").read_text()
    made = requantize.quantize_bundle(old.root, ["q4_k_m"], out=tmp_path / "new")
    made.check()
    assert not list(made.root.glob("llm-q4_k_m-*")) and (made.root / "llm-q4_k_m.gguf").is_file()
    for name in ("Modelfile", "STOCK_HOSTS.md"):
        text = (made.root / name).read_text()
        assert named not in text and "llm-q4_k_m.gguf" in text and named in (old.root / name).read_text()
    old.check()


def without_f16(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"] = [file for file in manifest["files"] if file["precision"] != "f16"]
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    (bundle / "llm-f16.gguf").unlink()


def test_from_the_checkpoint(bundle: Path, tiny_checkpoint: Path, tiny_checkpoint_clip: Path) -> None:
    """A bundle without float weights names both ways out; only its own checkpoint is taken."""
    expected = requantize.quantize_bundle(bundle, ["q6_k"], out=bundle.parent / "a").root / "llm-q6_k.gguf"
    without_f16(bundle)
    with pytest.raises(UsageError, match="holds no float language model") as caught:
        requantize.quantize_bundle(bundle, ["q6_k"])
    assert "--against" in caught.value.hint and "--llm f16" in caught.value.hint
    with pytest.raises(UsageError, match="is not the checkpoint of"):
        requantize.quantize_bundle(bundle, ["q6_k"], checkpoint=tiny_checkpoint_clip)
    made = requantize.quantize_bundle(bundle, ["q6_k"], checkpoint=tiny_checkpoint)
    assert (bundle / "llm-q6_k.gguf").read_bytes() == expected.read_bytes()
    assert list(made.builds())[0] == "fp32+q6_k" and not (bundle / "float.gguf").exists()


def test_refused(bundle: Path, tmp_path: Path, calibration: imatrix.Imatrix) -> None:
    """Each with its next step, and the bundle is left exactly as it was."""
    before = contents(bundle)
    taken = tmp_path / "taken"
    taken.mkdir()
    for types, options, error, message in (
        (["q9"], {}, UsageError, "unknown LLM type 'q9'"),
        ([], {}, UsageError, "no LLM type asked for"),
        (["q8_0", "f16"], {}, UsageError, "f16 is what the others are made from"),
        (["iq2_xs"], {}, UsageError, "iq2_xs needs an importance matrix"),
        (["q8_0"], {"overrides": {"nothing": "q4_0"}}, UsageError, "matches no matrix"),
        (["q8_0"], {"out": taken}, StorageError, "taken exists already"),
        (["q8_0"], {"out": bundle.parent, "force": True}, UsageError, "lie in one another"),
        (["q8_0"], {"out": bundle / "new"}, UsageError, "lie in one another"),
    ):
        with pytest.raises(error, match=message) as caught:
            requantize.quantize_bundle(bundle, types, **options)  # type: ignore[arg-type]
        assert caught.value.hint and contents(bundle) == before
    foreign = imatrix.Imatrix({"blk.0.attn_q.weight": calibration.sums["blk.0.attn_q.weight"]}, calibration.counts)
    with pytest.raises(ExportError, match="belongs to another model"):
        requantize.quantize_bundle(bundle, ["q4_0"], imatrix=foreign)
    assert contents(bundle) == before and sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "taken"]


def test_a_changed_float_file_is_refused(bundle: Path) -> None:
    data = bytearray((bundle / "llm-f16.gguf").read_bytes())
    data[-1] ^= 1
    (bundle / "llm-f16.gguf").write_bytes(data)
    with pytest.raises(BundleError, match=r"llm-f16\.gguf: its SHA-256 differs"):
        requantize.quantize_bundle(bundle, ["q8_0"])


def test_a_full_disk_leaves_the_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure after the GGUF was made: the old bundle still opens, and no temporary name is left."""
    before = contents(bundle)

    def full(*_args: object) -> Bundle:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(requantize, "write_manifest", full)
    with pytest.raises(StorageError, match="no space left"):
        requantize.quantize_bundle(bundle, ["q8_0"])
    assert contents(bundle) == before and [path.name for path in bundle.parent.iterdir()] == ["bundle"]
