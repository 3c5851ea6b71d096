"""Sizes from a GGUF's header against what llama.cpp says it allocates."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tinyllava_edge.errors import UsageError
from tinyllava_edge.runtimes.gguf_sizes import gguf_sizes, repacked_types
from tinyllava_edge.runtimes.kv_cache import KV_TYPES
from tinyllava_edge.runtimes.llama import Llama, native_api, repacks

MIB = 1 << 20
# name: architecture, width, feed-forward, heads, key heads, rotated channels, gated
SHAPES = {
    "llama": ("llama", 2048, 5632, 32, 4, 64, True),
    "phi2": ("phi2", 2560, 10240, 32, 32, 32, False),
    "stablelm": ("stablelm", 2048, 5632, 32, 32, 16, True),
}


def write_gguf(path: Path, name: str, *, tied: bool = False, layers: int = 2, vocab: int = 512) -> Path:
    """A language model of full width with two layers of zeros, which the file system doesn't store."""
    import gguf

    architecture, width, inner, heads, key_heads, rotated, gated = SHAPES[name]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(1 << 17)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(rotated)
    writer.add_file_type(15)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{number}" for number in range(vocab)])
    writer.add_token_types([1] * vocab)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    keys = key_heads * width // heads
    biased = name != "llama"
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, width), "output_norm.weight": (width,)}
    shapes |= {"output_norm.bias": (width,)} if biased else {}
    shapes |= {} if tied else {"output.weight": (vocab, width)}
    shapes |= {"output.bias": (vocab,)} if name == "phi2" else {}
    for layer in range(layers):
        block = {"attn_norm.weight": (width,), "attn_q.weight": (width, width), "attn_k.weight": (keys, width)}
        block |= {"attn_v.weight": (keys, width), "attn_output.weight": (width, width)}
        block |= {"ffn_up.weight": (inner, width), "ffn_down.weight": (width, inner)}
        block |= {"attn_norm.bias": (width,)} if biased else {}
        block |= {"ffn_norm.weight": (width,), "ffn_gate.weight": (inner, width)} if gated else {}
        block |= {"ffn_norm.bias": (width,)} if gated and biased else {}
        if name == "phi2":
            block |= {f"attn_{part}.bias": (width,) for part in ("q", "k", "v", "output")}
            block |= {"ffn_up.bias": (inner,), "ffn_down.bias": (width,)}
        shapes |= {f"blk.{layer}.{part}": shape for part, shape in block.items()}
    total = 0
    for key, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q4_K
        block_size, bytes_ = gguf.GGML_QUANT_SIZES[kind]
        size = int(np.prod(shape)) // block_size * bytes_
        stored = shape if len(shape) == 1 else gguf.quant_shape_to_byte_shape(shape, kind)
        dtype = np.dtype(np.float32 if len(shape) == 1 else np.uint8)
        writer.add_tensor_info(key, stored, dtype, size, raw_dtype=kind)
        total += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + total)
    return path


@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_reserves_what_was_expected(tmp_path: Path, name: str, flash_attention: bool) -> None:
    """Its own figures, given in steps of 0.01 MiB: KV cache, compute buffer, logits, repacked weights."""
    path = write_gguf(tmp_path / "m.gguf", name)
    api = native_api()
    sizes = gguf_sizes(path, api.llama_print_system_info() if repacks(api) else b"")
    for n_ctx in (300, 4096):
        llama = Llama(path, n_ctx=n_ctx, n_threads=1, flash_attention=flash_attention)
        found = llama.placement.buffers_mib
        llama.close()
        compute = found["compute"]["CPU"] + found["output"]["CPU"]
        working = 2 * 256 * sizes.inner / MIB  # llama.cpp allocates it when it first computes, and doesn't say
        assert sizes.kv_cache(n_ctx) / MIB == pytest.approx(found["kv"]["CPU"], abs=0.01)
        assert sizes.compute(n_ctx, 256, flash_attention) / MIB - working == pytest.approx(compute, abs=0.05)
        assert sizes.repacked / MIB == pytest.approx(found["model"].get("CPU_REPACK", 0.0), abs=0.02)


@pytest.mark.parametrize(("type_k", "type_v"), [("f32", "f32"), ("q8_0", "q4_0"), ("bf16", "iq4_nl"), ("q5_1", "q5_0")])
def test_types_of_the_kv_cache(tmp_path: Path, type_k: str, type_v: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama")
    llama = Llama(path, n_ctx=512, n_threads=1, flash_attention=True, type_k=type_k, type_v=type_v)
    found = llama.placement.buffers_mib["kv"]["CPU"]
    llama.close()
    assert gguf_sizes(path).kv_cache(512, type_k, type_v) / MIB == pytest.approx(found, abs=0.01)


def test_an_unknown_type_of_the_kv_cache(tmp_path: Path) -> None:
    sizes = gguf_sizes(write_gguf(tmp_path / "m.gguf", "llama"))
    with pytest.raises(UsageError, match="q3_k"):
        sizes.kv_cache(512, "q3_k")
    assert all(sizes.kv_cache(512, kind, kind) for kind in KV_TYPES)


def test_a_head_that_is_the_embedding_is_repacked_too(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", tied=True)
    api = native_api()
    llama = Llama(path, n_ctx=256, n_threads=1)
    found = llama.placement.repacked_mib
    llama.close()
    info = api.llama_print_system_info() if repacks(api) else b""  # not on processors with AMX
    assert gguf_sizes(path, info).repacked / MIB == pytest.approx(found, abs=0.02)


def test_what_is_repacked_depends_on_the_processor() -> None:
    assert repacked_types(b"CPU : AVX2 = 1 | AVX512 = 0 | REPACK = 1 | ") == {2: 8, 12: 8, 20: 8, 39: 8}
    assert 10 in repacked_types(b"CPU : AVX2 = 1 | AVX512 = 1 | REPACK = 1 | ")
    assert repacked_types(b"CPU : NEON = 1 | DOTPROD = 1 | REPACK = 1 | ")[8] == 4  # q8_0, as on a phone
    assert repacked_types(b"CPU : NEON = 1 | REPACK = 1 | ") == {}
    assert repacked_types(b"CPU : AVX2 = 1 | ") == {}  # built without
