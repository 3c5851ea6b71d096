"""Quantised GGUFs: the types that were written, fallbacks, and failures inside llama.cpp."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from tinyllava_edge import checkpoint
from tinyllava_edge.errors import ExportError, StorageError, UsageError
from tinyllava_edge.export import llm, quantize

MAIN_TYPES = {"q5_k_m": "q5_k", "q5_k_s": "q5_k", "q4_k_m": "q4_k", "q4_k_s": "q4_k", "q3_k_m": "q3_k"}


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "llm-f16.gguf"
    llm.export_llm(checkpoint.load(tiny_checkpoint), path)
    return path


@pytest.mark.parametrize("llm_type", [name for name in quantize.LLM_TYPES if name not in llm.FLOAT_TYPES])
def test_types_are_read_back(llm_type: str, source: Path, tmp_path: Path) -> None:
    """All 16 matrices leave f16, most of them for the asked type; values move by less than 35 % on average (2 bits)."""
    target = tmp_path / "llm.gguf"
    types = quantize.quantize_gguf(source, target, llm_type, n_threads=1)
    assert types["f32"] == 5 and sum(types.values()) == 21 and "f16" not in types
    main = MAIN_TYPES.get(llm_type, llm_type)
    assert types.get(main, 0) >= 7
    assert quantize.fallbacks(target, llm_type) == {}
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    for tensor in gguf.GGUFReader(target).tensors:
        wanted = before[tensor.name].data.astype(np.float32)
        got = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.abs(got - wanted).mean() < 0.35 * np.abs(wanted).mean(), tensor.name


def test_silence(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """llama.cpp's talk stays off both streams."""
    quantize.quantize_gguf(source, tmp_path / "llm.gguf", "q4_k_m", n_threads=1)
    assert capfd.readouterr() == ("", "")


def test_fallbacks_are_listed(tmp_path: Path) -> None:
    """A matrix 128 wide has no place for 256-wide blocks."""
    path = tmp_path / "narrow.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, width in (("blk.0.attn_q.weight", 128), ("blk.0.ffn_down.weight", 256)):
        writer.add_tensor(name, np.zeros((256, width), dtype=np.float16))
    for add, value in ((writer.add_block_count, 1), (writer.add_head_count, 4), (writer.add_embedding_length, 256)):
        add(value)
    writer.add_context_length(64)
    writer.add_feed_forward_length(256)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    types = quantize.quantize_gguf(path, tmp_path / "out.gguf", "q4_k_m", n_threads=1)
    other = quantize.fallbacks(tmp_path / "out.gguf", "q4_k_m")
    assert list(other) == ["blk.0.attn_q.weight"]
    assert not other["blk.0.attn_q.weight"].endswith("_k") and other["blk.0.attn_q.weight"] in types
    assert quantize.fallbacks(tmp_path / "out.gguf", "q4_0") == {}


def test_failures_name_the_file(source: Path, tmp_path: Path) -> None:
    """Unknown names, missing and damaged sources; nothing is left under the final name."""
    target = tmp_path / "out" / "llm.gguf"
    with pytest.raises(UsageError, match="q4_k_x"):
        quantize.quantize_gguf(source, target, "q4_k_x")
    with pytest.raises(ExportError, match=r"llm\.gguf: llama.cpp can't quantise to q8_0 \(.*absent\.gguf"):
        quantize.quantize_gguf(tmp_path / "absent.gguf", target, "q8_0")
    data = source.read_bytes()
    for name, damaged in (("cut", data[: len(data) // 2]), ("head", data[:100]), ("magic", b"NOPE" + data[4:])):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ExportError, match=r"llm\.gguf: llama.cpp can't quantise"):
            quantize.quantize_gguf(tmp_path / name, target, "q8_0")
    assert not list(target.parent.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_is_named(source: Path, tmp_path: Path) -> None:
    """ENOSPC inside llama.cpp becomes a StorageError with the file's name."""
    (tmp_path / f".llm.gguf.tmp-{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"llm\.gguf: no space left"):
        quantize.quantize_gguf(source, tmp_path / "llm.gguf", "q8_0", n_threads=1)
    assert not list(tmp_path.iterdir())
