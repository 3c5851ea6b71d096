"""Quantised GGUFs: the types that were written, overrides, fallbacks, and failures inside llama.cpp."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from tinyllava_edge import checkpoint
from tinyllava_edge.errors import ExportError, StorageError, UsageError
from tinyllava_edge.export import llm, llm_types, quantize
from tinyllava_edge.export.gguf_header import matrices, read_header, read_shards
from tinyllava_edge.export.imatrix import UNCOVERED, Imatrix

QUANTISED = [name for name in llm_types.LLM_TYPES if name not in llm_types.FLOAT_LLM_TYPES]


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "llm-f16.gguf"
    llm.export_llm(checkpoint.load(tiny_checkpoint), path)
    return path


@pytest.fixture(scope="module")
def imatrix(source: Path) -> Imatrix:
    """Importance that differs from channel to channel by a factor of up to a hundred."""
    rng = np.random.default_rng(0)
    widths = {name: tensor.shape[0] for name, tensor in matrices(read_header(source)).items() if name not in UNCOVERED}
    sums = {name: (10 ** rng.uniform(0, 2, width)).astype(np.float32) for name, width in widths.items()}
    return Imatrix(sums, dict.fromkeys(sums, 10))


def errors(source: Path, target: Path, weights: Imatrix | None = None) -> dict[str, float]:
    """Matrix → mean relative error, squares weighted by importance where there is one."""
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    found = {}
    for tensor in gguf.GGUFReader(target).tensors:
        if len(tensor.shape) > 1:
            wanted = before[tensor.name].data.astype(np.float32)
            got = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            weight = weights.weights(tensor.name) if weights and tensor.name in weights.sums else np.ones(1)
            found[tensor.name] = float(((got - wanted) ** 2 * weight).mean() / (wanted**2 * weight).mean()) ** 0.5
    return found


def test_the_tables_are_llama_cpps() -> None:
    """Numbers, blocks and bits equal gguf's own tables; every name is spelled as there."""
    for name, kind in llm_types.TENSOR_TYPES.items():
        known = gguf.GGMLQuantizationType(kind.ggml_type)
        block, size = gguf.GGML_QUANT_SIZES[known]
        assert (known.name.lower(), block, size * 8 / block) == (name, kind.block, kind.bits)
    for name, file_type in llm_types.LLM_TYPES.items():
        assert gguf.LlamaFileType(file_type.ftype).name.removeprefix("MOSTLY_").removeprefix("ALL_").lower() == name
        assert file_type.tensor_type in llm_types.TENSOR_TYPES and file_type.bits <= 32
    assert not set(llm_types.LEFT_OUT) & set(llm_types.LLM_TYPES)


@pytest.mark.parametrize("name", QUANTISED)
def test_types_are_read_back(name: str, source: Path, imatrix: Imatrix, tmp_path: Path) -> None:
    """All 16 matrices leave f16, most of them for the asked type, and the size follows from the bits.

    Values move by less than 60 % (2 bits) in the root of the mean square; 8 bits by less than 1 %.
    """
    target, kind = tmp_path / "llm.gguf", llm_types.LLM_TYPES[name]
    types = quantize.quantize_gguf(source, target, name, imatrix=imatrix if kind.needs_imatrix else None, n_threads=1)
    assert types["f32"] == 5 and sum(types.values()) == 21 and "f16" not in types
    assert types.get(kind.tensor_type, 0) >= 7
    assert quantize.fallbacks(target, name) == {}
    assert read_header(target).values["general.file_type"] == kind.ftype
    assert max(errors(source, target).values()) < (0.01 if name == "q8_0" else 0.12 if kind.bits > 4.2 else 0.6)
    assert (
        target.stat().st_size
        < 40_000 + sum(t.bytes for t in read_header(source).tensors.values()) * (kind.bits + 2) / 16
    )


@pytest.mark.parametrize("name", ["q4_k_m", "q4_0", "iq4_xs", "q2_k", "iq3_xxs"])
def test_an_imatrix_reduces_the_weighted_error(name: str, source: Path, imatrix: Imatrix, tmp_path: Path) -> None:
    """With it the file differs, and the error that it weighs is smaller on the covered matrices together.

    iq3_xxs can't be written without one, so an even one stands in for none.
    """
    even = Imatrix({key: np.ones_like(value) for key, value in imatrix.sums.items()}, imatrix.counts)
    plain = even if llm_types.LLM_TYPES[name].needs_imatrix else None
    means = []
    for file, weights in (("plain", plain), ("weighted", imatrix)):
        quantize.quantize_gguf(source, tmp_path / file, name, imatrix=weights, n_threads=1)
        found = errors(source, tmp_path / file, imatrix)
        means.append(np.mean([found[key] for key in imatrix.sums]))
    assert (tmp_path / "plain").read_bytes()[-4096:] != (tmp_path / "weighted").read_bytes()[-4096:]
    assert means[1] < 0.98 * means[0]


@pytest.mark.parametrize("name", [name for name in QUANTISED if llm_types.LLM_TYPES[name].needs_imatrix])
def test_types_that_need_an_imatrix(name: str, source: Path, tmp_path: Path) -> None:
    """The message names the command that makes one; and llama.cpp really refuses to write this type without."""
    with pytest.raises(UsageError, match=f"{name} needs an importance matrix") as caught:
        quantize.quantize_gguf(source, tmp_path / "llm.gguf", name)
    assert "tinyllava-edge imatrix" in caught.value.hint
    assert native_code(source, tmp_path / "llm.gguf", name) != 0


@pytest.mark.parametrize("name", [name for name in QUANTISED if not llm_types.LLM_TYPES[name].needs_imatrix][::4])
def test_other_types_need_none(name: str, source: Path, tmp_path: Path) -> None:
    assert native_code(source, tmp_path / "llm.gguf", name) == 0


def native_code(source: Path, target: Path, name: str) -> int:
    """What llama.cpp itself says to a type, asked without our checks."""
    import ctypes

    import llama_cpp

    from tinyllava_edge.export.native_log import captured

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = llm_types.LLM_TYPES[name].ftype, 1
    with captured():
        return int(llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)))


def test_overrides(source: Path, imatrix: Imatrix, tmp_path: Path) -> None:
    """The first pattern that matches counts; head and embedding can be named; what was asked stands in the file."""
    chosen = {r"blk\.1\.attn_v": "f16", "attn_v|ffn_down": "q6_k", r"^output\.": "q8_0", "token_embd": "q4_0"}
    quantize.quantize_gguf(source, tmp_path / "a.gguf", "iq2_xs", imatrix=imatrix, overrides=chosen, n_threads=1)
    header = read_header(tmp_path / "a.gguf")
    types = {name: tensor.type for name, tensor in header.tensors.items()}
    assert types["blk.1.attn_v.weight"] == "f16" and types["blk.0.attn_v.weight"] == "q6_k"
    assert {types["blk.0.ffn_down.weight"], types["blk.1.ffn_down.weight"]} == {"q6_k"}
    assert (types["output.weight"], types["token_embd.weight"]) == ("q8_0", "q4_0")
    assert types["blk.0.attn_q.weight"] == "iq2_xs"  # `attn_output` isn't `^output`, and the rest is as asked
    assert header.values["tinyllava_edge.override.1"] == "attn_v|ffn_down=q6_k"
    assert header.values["quantize.imatrix.entries_count"] == 14


REFUSED: dict[str, tuple[dict[str, str], str, str]] = {
    "unknown type": ({"attn": "q9"}, "q4_k_m", "unknown tensor type 'q9'"),
    "left out": ({"attn": "tq1_0"}, "q4_k_m", "trained with ternary weights"),
    "no match": ({"attn_qkv": "q8_0"}, "q4_k_m", "'attn_qkv' matches no matrix"),
    "norms aren't quantised": ({"attn_norm": "q8_0"}, "q4_k_m", "matches no matrix"),
    "not a pattern": ({"attn(": "q8_0"}, "q4_k_m", "is no regular expression"),
    "too long": ({"a" * 101: "q8_0"}, "q4_k_m", "pattern of 101 bytes"),
    "empty": ({"": "q8_0"}, "q4_k_m", "pattern of 0 bytes"),
    "float file": ({"attn": "q8_0"}, "bf16", "no effect on bf16"),
    "2 bits": ({"attn_q": "iq2_xs"}, "q4_k_m", "iq2_xs needs an importance matrix"),
    "embedding in 2 bits": ({"token_embd": "iq2_xxs"}, "q4_k_m", "needs an importance matrix of token_embd"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_overrides_that_cannot_be(name: str, source: Path, tmp_path: Path) -> None:
    """Among them one for which llama.cpp would end the process: an embedding in 2 bits."""
    overrides, llm_type, message = REFUSED[name]
    with pytest.raises(UsageError, match=message) as caught:
        quantize.quantize_gguf(source, tmp_path / "llm.gguf", llm_type, overrides=overrides)
    assert caught.value.hint and "\n" not in caught.value.message and not list(tmp_path.iterdir())


def test_an_embedding_in_2_bits_stays_refused_with_an_imatrix(source: Path, imatrix: Imatrix, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="importance matrix of token_embd"):
        quantize.quantize_gguf(source, tmp_path / "a", "q4_0", imatrix=imatrix, overrides={"token_embd": "iq2_xs"})


def test_silence(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """llama.cpp's talk stays off both streams."""
    quantize.quantize_gguf(source, tmp_path / "llm.gguf", "q4_k_m", n_threads=1)
    assert capfd.readouterr() == ("", "")


def test_shards_are_merged(tiny_checkpoint: Path, source: Path, tmp_path: Path) -> None:
    """Tensors equal those made from one file, whichever shard is named."""
    llm.export_llm(checkpoint.load(tiny_checkpoint), tmp_path / "s.gguf", max_shard_bytes=1_000_000)
    shards = sorted(tmp_path.glob("s-*.gguf"))
    assert len(shards) > 2 and set(read_shards(shards[0]).tensors) == set(read_header(source).tensors)
    quantize.quantize_gguf(source, tmp_path / "one.gguf", "q4_k_m", n_threads=1)
    for number, name in enumerate((tmp_path / "s.gguf", shards[1])):
        quantize.quantize_gguf(name, tmp_path / f"{number}.gguf", "q4_k_m", n_threads=1)
        merged = {t.name: t.data.tobytes() for t in gguf.GGUFReader(tmp_path / f"{number}.gguf").tensors}
        assert merged == {t.name: t.data.tobytes() for t in gguf.GGUFReader(tmp_path / "one.gguf").tensors}
    shards[-1].unlink()
    with pytest.raises(ExportError, match=r"s-00\d+-of-00\d+\.gguf: missing"):
        quantize.quantize_gguf(shards[0], tmp_path / "x.gguf", "q4_k_m")


def narrow(path: Path, width: int) -> Imatrix:
    """A GGUF with one matrix of a width that 256 doesn't divide."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, columns in (("blk.0.attn_q.weight", width), ("blk.0.ffn_down.weight", 256)):
        writer.add_tensor(name, np.ones((256, columns), dtype=np.float16))
    for add, value in ((writer.add_block_count, 1), (writer.add_head_count, 4), (writer.add_embedding_length, 256)):
        add(value)
    writer.add_context_length(64)
    writer.add_feed_forward_length(256)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sums = {"blk.0.attn_q.weight": np.ones(width, np.float32), "blk.0.ffn_down.weight": np.ones(256, np.float32)}
    return Imatrix(sums, dict.fromkeys(sums, 1))


FALLBACKS = {
    "q4_k_m": "q5_0",
    "q6_k": "q8_0",
    "q2_k": "q4_0",
    "iq4_xs": "iq4_nl",
    "iq3_s": "iq4_nl",
    "iq2_xs": "iq4_nl",
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_fallbacks_are_listed(name: str, tmp_path: Path) -> None:
    """A matrix 128 wide has no place for 256-wide blocks; one 144 wide has none for 32-wide blocks either."""
    for width, expected in ((128, FALLBACKS[name]), (144, "f16")):
        weights = narrow(tmp_path / "narrow.gguf", width)
        types = quantize.quantize_gguf(
            tmp_path / "narrow.gguf", tmp_path / "out.gguf", name, imatrix=weights, n_threads=1
        )
        assert quantize.fallbacks(tmp_path / "out.gguf", name) == {"blk.0.attn_q.weight": expected}
        assert expected in types
    narrow(tmp_path / "narrow.gguf", 128)
    quantize.quantize_gguf(tmp_path / "narrow.gguf", tmp_path / "out.gguf", "q4_0", n_threads=1)
    assert quantize.fallbacks(tmp_path / "out.gguf", "q4_0") == {}


def test_overrides_must_fit_the_width(tmp_path: Path) -> None:
    """llama.cpp would fall back for a layer, and end the process for head and embedding."""
    narrow(tmp_path / "narrow.gguf", 128)
    with pytest.raises(UsageError, match=r"q6_k has blocks of 256, blk\.0\.attn_q\.weight is 128 wide") as caught:
        quantize.quantize_gguf(tmp_path / "narrow.gguf", tmp_path / "o.gguf", "q4_0", overrides={"attn_q": "q6_k"})
    assert "q8_0" in caught.value.hint and "q4_k" not in caught.value.hint


def test_failures_name_the_file(source: Path, tmp_path: Path) -> None:
    """Unknown names, missing and damaged sources, a quantised source; nothing is left under the final name."""
    target = tmp_path / "out" / "llm.gguf"
    with pytest.raises(UsageError, match="q4_k_x"):
        quantize.quantize_gguf(source, target, "q4_k_x")
    with pytest.raises(UsageError, match="below 2 bits"):
        quantize.quantize_gguf(source, target, "iq1_s")
    with pytest.raises(ExportError, match=r"llm\.gguf: can't quantise to q8_0: .*absent\.gguf"):
        quantize.quantize_gguf(tmp_path / "absent.gguf", target, "q8_0")
    data = source.read_bytes()
    for name, damaged in (("cut", data[: len(data) // 2]), ("head", data[:100]), ("magic", b"NOPE" + data[4:])):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ExportError, match=r"llm\.gguf: can't quantise to q8_0"):
            quantize.quantize_gguf(tmp_path / name, target, "q8_0")
    quantize.quantize_gguf(source, tmp_path / "q8.gguf", "q8_0", n_threads=1)
    with pytest.raises(ExportError, match="is q8_0 already; quantising twice") as caught:
        quantize.quantize_gguf(tmp_path / "q8.gguf", target, "q4_0")
    assert "f16" in caught.value.hint
    assert not target.exists()


NAN = np.float16(np.nan).tobytes()


def test_what_llama_cpp_refuses_is_quoted(source: Path, tmp_path: Path) -> None:
    """A NaN in the weights: its own check speaks, and its line is in the message."""
    data = bytearray(source.read_bytes())
    place = read_header(source).tensors["blk.0.attn_q.weight"].offset
    data[place : place + 2] = NAN
    (tmp_path / "nan.gguf").write_bytes(data)
    with pytest.raises(ExportError, match=r"out\.gguf: llama.cpp can't quantise to q4_k_m \(.*"):
        quantize.quantize_gguf(tmp_path / "nan.gguf", tmp_path / "out.gguf", "q4_k_m", n_threads=1)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_is_named(source: Path, tmp_path: Path) -> None:
    """ENOSPC inside llama.cpp becomes a StorageError with the file's name."""
    (tmp_path / f".llm.gguf.tmp-{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"llm\.gguf: no space left"):
        quantize.quantize_gguf(source, tmp_path / "llm.gguf", "q8_0", n_threads=1)
    assert not list(tmp_path.iterdir())


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "huge tensor count": lambda data: data[:8] + (1 << 60).to_bytes(8, "little") + data[16:],
    "huge metadata count": lambda data: data[:16] + (1 << 60).to_bytes(8, "little") + data[24:],
    "huge key": lambda data: data[:24] + (1 << 60).to_bytes(8, "little") + data[32:],
    "tensors past the end": lambda data: data[: len(data) - 40_000],
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(name: str, source: Path, tmp_path: Path) -> None:
    """One error, at once, and nothing is allocated for counts that the file can't hold."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(HEADERS[name](source.read_bytes()))
    with pytest.raises(ExportError, match=r"bad\.gguf: not a sound GGUF file") as caught:
        read_header(path)
    assert "\n" not in caught.value.message


def test_a_plan_writes_nothing_and_names_another_target(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp

    before, real, seen = source.read_bytes(), llama_cpp.llama_model_quantize, []

    def watched(given: bytes, target: bytes, parameters: object) -> int:
        code: int = real(given, target, parameters)
        seen.append((Path(os.fsdecode(given)), Path(os.fsdecode(target)), Path(os.fsdecode(target)).exists()))
        return code

    monkeypatch.setattr(llama_cpp, "llama_model_quantize", watched)
    assert quantize.planned_types(source, "q8_0")
    [(given, target, written)] = seen
    assert given == source != target and not written and source.read_bytes() == before


def test_an_engine_without_a_dry_run_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ctypes takes a name that isn't a field without a word, and the engine would quantise in earnest."""
    import llama_cpp

    class Older(ctypes.Structure):
        _fields_ = [field for field in llama_cpp.llama_model_quantize_params._fields_ if field[0] != "dry_run"]

    monkeypatch.setattr(llama_cpp, "llama_model_quantize_default_params", Older)
    monkeypatch.setattr(llama_cpp, "llama_model_quantize", lambda *_: pytest.fail("it was called"))
    with pytest.raises(ExportError, match="no dry run"):
        quantize.planned_types(source, "q8_0")
