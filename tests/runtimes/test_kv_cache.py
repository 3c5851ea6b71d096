"""KV-cache types on real llama.cpp: what is let through is right, what would be wrong is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tinyllava_edge.errors import EngineError, UsageError
from tinyllava_edge.runtimes.kv_cache import PLAIN
from tinyllava_edge.runtimes.llama import Llama

from .conftest import Pair

IDS = list(range(5, 105))


def write_phi(path: Path, head_dim: int, heads: int = 4, layers: int = 2) -> Path:
    """A random phi2 GGUF: biases and norms too, 512 tokens, heads of any width."""
    import gguf

    width, vocabulary = head_dim * heads, 512
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "phi2")
    for add, value in (
        (writer.add_context_length, 512),
        (writer.add_embedding_length, width),
        (writer.add_block_count, layers),
        (writer.add_feed_forward_length, 4 * width),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, heads),
        (writer.add_rope_dimension_count, 32),
        (writer.add_vocab_size, vocabulary),
        (writer.add_file_type, 1),
        (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 0),
    ):
        add(value)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"<{i}>" for i in range(vocabulary)])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["< 1"])

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        values = rng.standard_normal((rows, columns)) * scale / columns**0.5
        writer.add_tensor(f"{name}.weight", values.astype(np.float16))

    def vector(name: str, size: int, mean: float = 0.0) -> None:
        writer.add_tensor(name, (mean + 0.2 * rng.standard_normal(size)).astype(np.float32))

    def norm(name: str) -> None:
        vector(f"{name}.weight", width, 1.0)
        vector(f"{name}.bias", width)

    matrix("token_embd", vocabulary, width, 20)
    norm("output_norm")
    matrix("output", vocabulary, width)
    vector("output.bias", vocabulary)
    for layer in range(layers):
        norm(f"blk.{layer}.attn_norm")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{part}", width, width, 1.5)
            vector(f"blk.{layer}.{part}.bias", width)
        matrix(f"blk.{layer}.ffn_up", 4 * width, width)
        vector(f"blk.{layer}.ffn_up.bias", 4 * width)
        matrix(f"blk.{layer}.ffn_down", width, 4 * width)
        vector(f"blk.{layer}.ffn_down.bias", width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def last_logits(path: Path, **options: Any) -> npt.NDArray[np.float32]:
    decoder = Llama(path, n_ctx=256, n_threads=1, **options)
    decoder.decode_tokens(IDS, range(100))
    logits = decoder.decode_tokens([7], [100], wanted=[0])[0]
    decoder.close()
    return logits


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("phi")
    return {head_dim: write_phi(root / f"{head_dim}.gguf", head_dim) for head_dim in (64, 80)}


@pytest.fixture(scope="module")
def exact(siglip: Pair, phi: dict[int, Path]) -> dict[str, tuple[Path, npt.NDArray[np.float32]]]:
    """File and its logits with a float32 KV cache."""
    files = {"llama-64": siglip.bundle / "llm-f16.gguf", "phi-64": phi[64], "phi-80": phi[80]}
    return {name: (path, last_logits(path, type_k="f32", type_v="f32")) for name, path in files.items()}


# Type → lowest correlation of the logits with those of a float32 cache.
CORRELATION = {"f16": 0.9999, "bf16": 0.999, "q8_0": 0.999, "q5_1": 0.98, "q5_0": 0.98, "q4_1": 0.95, "iq4_nl": 0.95}


@pytest.mark.parametrize("kind", [*CORRELATION, "q4_0"])
@pytest.mark.parametrize("model", ["llama-64", "phi-64", "phi-80"])
def test_kv_cache_types(kind: str, model: str, exact: dict[str, tuple[Path, npt.NDArray[np.float32]]]) -> None:
    """What is let through computes the same logits up to the type's rounding; what would be wrong is refused."""
    path, wanted = exact[model]
    limit = CORRELATION.get(kind, 0.9)
    plain = kind in PLAIN
    if model == "phi-80" and not plain:  # llama.cpp opens the K cache without flash attention, and computes NaN
        for options in ({"type_k": kind}, {"type_v": kind, "flash_attention": True}, {"type_k": kind, "type_v": kind}):
            with pytest.raises(UsageError, match=f"{kind} needs heads of a multiple of 32 channels.* 80") as caught:
                Llama(path, n_ctx=256, n_threads=1, **options)
            assert "f16" in caught.value.hint
        return
    assert np.corrcoef(last_logits(path, type_k=kind), wanted)[0, 1] > limit
    assert np.corrcoef(last_logits(path, type_k=kind, type_v=kind, flash_attention=True), wanted)[0, 1] > limit
    if not plain:
        with pytest.raises(UsageError, match=f"type_v={kind} needs flash attention"):
            Llama(path, n_ctx=256, n_threads=1, type_v=kind)


def test_kv_cache_settings(siglip: Pair) -> None:
    """What was chosen is recorded; the default follows the file; an unknown name lists the known ones."""
    options: list[tuple[str, dict[str, Any], str]] = [
        ("f16", {}, "f16"),
        ("f32", {}, "f32"),
        ("f16", {"type_k": "q8_0"}, "q8_0/f16"),
        ("f16", {"type_k": "q8_0", "type_v": "q8_0", "flash_attention": True}, "q8_0"),
    ]
    for file, chosen, recorded in options:
        decoder = Llama(siglip.bundle / f"llm-{file}.gguf", n_ctx=256, n_threads=1, **chosen)
        assert decoder.settings["kv_cache"] == recorded
        decoder.close()
    with pytest.raises(UsageError, match="type_k='q9'") as caught:
        Llama(siglip.bundle / "llm-f16.gguf", n_ctx=256, n_threads=1, type_k="q9")
    assert "iq4_nl" in caught.value.hint


def test_phi_with_80_channels_needs_the_check(phi: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for the check: without it llama.cpp 0.3.36 opens the context and the logits are not finite."""
    monkeypatch.setattr("tinyllava_edge.runtimes.llama.check_kv_types", lambda *_args: None)
    with pytest.raises(EngineError, match="not finite"):
        last_logits(phi[80], type_k="q8_0")
