"""The GGUF in llama.cpp against the Hugging Face model: logits, stored tensors, refusals."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
import torch

from tinyllava_edge import checkpoint
from tinyllava_edge.errors import ExportError, StorageError
from tinyllava_edge.export import llm
from tinyllava_edge.export.gguf_shards import shards_of, split_gguf
from tinyllava_edge.export.quantize import quantize_gguf
from tinyllava_edge.model import build_model
from tinyllava_edge.runtimes.headers import check_gguf
from tinyllava_edge.runtimes.llama import Llama
from tinyllava_edge.spec import VISION_BACKBONES

from .llm_models import MODELS, randomise

IDS = [1, *np.random.default_rng(0).integers(3, 1024, 40).tolist()]
# float32 file and cache: only the order of sums differs; ggml's tanh-GELU is a float16 table (Phi, Gemma)
F32_TOLERANCE = {**dict.fromkeys(MODELS, 1e-4), "phi": 5e-3, "gemma": 5e-3}


def random_checkpoint(root: Path, text: dict[str, Any]) -> checkpoint.Checkpoint:
    """The tiny checkpoint's tower and tokenizer around another random language model."""
    tiny = checkpoint.load(root)
    spec = dataclasses.replace(tiny.spec, llm_family=text["model_type"])
    text = copy.deepcopy(text)  # transformers writes into the rope parameters that it is given
    tower = {**VISION_BACKBONES["NanoSig"].config, "num_hidden_layers": 3}
    model = build_model(spec, tower, text, 1024).eval()
    randomise(model, text["model_type"])
    return checkpoint.Checkpoint(root, model, tiny.tokenizer, spec)


def native_logits(path: Path, cache: int) -> npt.NDArray[np.float32]:
    """Logits of every position; `cache` is the ggml type of the KV cache (0: f32, 1: f16)."""
    model = llama_cpp.Llama(
        str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=1, type_k=cache, type_v=cache
    )
    try:
        model.eval(IDS)
        return model.scores[: len(IDS)].copy()
    finally:
        model.close()


def last_logits(path: Path) -> npt.NDArray[np.float32]:
    """Logits of the last position by the device's own wrapper, which keeps quantised weights off AMX."""
    model = Llama(path, n_ctx=128, n_threads=1)
    try:
        return model.decode_tokens(IDS, range(len(IDS)), wanted=[len(IDS) - 1])
    finally:
        model.close()


def torch_logits(loaded: checkpoint.Checkpoint) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        return loaded.model(input_ids=torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("name", list(MODELS))
def test_f32_logits(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Weights and cache in f32: logits (standard deviation 0.5 to 1.6) equal Hugging Face's within F32_TOLERANCE."""
    loaded = random_checkpoint(tiny_checkpoint, MODELS[name])
    types = llm.export_llm(loaded, tmp_path / "llm.gguf", "f32")
    assert set(types) == {"f32"}
    check_gguf(tmp_path / "llm.gguf")  # the device takes it
    wanted = torch_logits(loaded)
    assert wanted.std() > 0.4
    np.testing.assert_allclose(native_logits(tmp_path / "llm.gguf", cache=0), wanted, atol=F32_TOLERANCE[name], rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "stablelm"])
def test_image_embeddings(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Rows given as embeddings count as `inputs_embeds` do in Hugging Face, also in Gemma, which scales its tokens'."""
    loaded = random_checkpoint(tiny_checkpoint, MODELS[name])
    llm.export_llm(loaded, tmp_path / "llm.gguf", "f32")
    embeds = torch.randn(1, 20, 256)
    with torch.no_grad():
        hidden = loaded.model.model.language_model(inputs_embeds=embeds).last_hidden_state
        wanted = loaded.model.lm_head(hidden[:, -1]).numpy()
    model = Llama(tmp_path / "llm.gguf", n_ctx=64, n_threads=1)
    try:
        got = model.decode_embeddings(embeds[0].numpy(), 0, wanted=[19])
    finally:
        model.close()
    np.testing.assert_allclose(got, wanted, atol=F32_TOLERANCE[name], rtol=0)


@pytest.mark.parametrize("which", ["tiny_checkpoint", "tiny_checkpoint_clip"])
def test_f16_logits(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """f16 weights, default f16 cache: within 2 % of the logits' standard deviation, same first choice at >= 95 %."""
    loaded = checkpoint.load(request.getfixturevalue(which))
    types = llm.export_llm(loaded, tmp_path / "llm.gguf")
    assert types == {"f16": 16, "f32": 5}  # matrices; norms
    wanted, got = torch_logits(loaded), native_logits(tmp_path / "llm.gguf", cache=1)
    assert np.abs(got - wanted).max() < 0.02 * wanted.std()
    assert (got.argmax(-1) == wanted.argmax(-1)).mean() >= 0.95


def test_tied_head_is_stored_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    loaded = random_checkpoint(tiny_checkpoint, MODELS["llama-tied"])
    llm.export_llm(loaded, tmp_path / "llm.gguf", progress=(steps := []).append)
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "llm.gguf").tensors]
    assert "token_embd.weight" in names and "output.weight" not in names
    assert len(steps) == len(names)


def test_keys(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The keys that no logit on a short text would miss."""
    llm.export_llm(checkpoint.load(tiny_checkpoint), tmp_path / "llm.gguf")
    fields = gguf.GGUFReader(tmp_path / "llm.gguf").fields
    wanted = {
        "general.architecture": "llama",
        "general.name": "TinyLLaVA-base-NanoSig-Nano",
        "llama.context_length": 2048,
        "llama.vocab_size": 1088,
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert {key: fields[key].contents() for key in wanted} == wanted
    assert [p.name for p in tmp_path.iterdir()] == ["llm.gguf"]


def test_refusals(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What llama.cpp would compute otherwise is refused before anything is written."""
    target = tmp_path / "llm.gguf"
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    half = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    for base, change, message in (
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"rope_parameters": dynamic}, "dynamic"),
        ("llama", {"rope_parameters": half}, "partial_rotary_factor"),
        ("llama", {"model_type": "gpt_neox", "num_key_value_heads": None}, "gpt_neox"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("gemma", {"tie_word_embeddings": False}, "a head of its own"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
    ):
        with pytest.raises(ExportError, match=message):
            llm.export_llm(random_checkpoint(tiny_checkpoint, {**MODELS[base], **change}), target)
    assert not list(tmp_path.iterdir())


def test_lost_values_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """NaN anywhere; values beyond float16 only where float16 is written. No file is left."""
    target = tmp_path / "llm.gguf"
    for value, message in ((float("nan"), "NaN"), (-float("inf"), "NaN or infinity"), (-1e6, "reaches 1e.06, beyond")):
        loaded = checkpoint.load(tiny_checkpoint)
        with torch.no_grad():
            loaded.model.model.language_model.layers[1].mlp.up_proj.weight[3, 4] = value
        with pytest.raises(ExportError, match=f"layers.1.mlp.up_proj.weight.*{message}"):
            llm.export_llm(loaded, target)
        assert not list(tmp_path.iterdir())
    assert llm.export_llm(loaded, target, "bf16") == {"bf16": 16, "f32": 5}


@pytest.mark.parametrize("name", ["llama-llama3-rope", "phi"])
def test_shards(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """llama.cpp finds all shards from the first: logits equal the single file's, and no shard is beyond the limit."""
    loaded, limit = random_checkpoint(tiny_checkpoint, MODELS[name]), 1_500_000
    whole = llm.export_llm(loaded, tmp_path / "one" / "llm.gguf", "f32")
    parts = llm.export_llm(loaded, tmp_path / "many" / "llm.gguf", "f32", max_shard_bytes=limit)
    shards = shards_of(tmp_path / "many" / "llm.gguf")
    assert whole == parts and len(shards) > 3 and shards == sorted((tmp_path / "many").iterdir())
    assert shards[0].name == f"llm-00001-of-{len(shards):05d}.gguf"
    tensors = [tensor for shard in shards for tensor in gguf.GGUFReader(shard).tensors]
    single = gguf.GGUFReader(tmp_path / "one" / "llm.gguf").tensors
    assert [t.name for t in tensors] == [t.name for t in single]
    for shard in shards:
        sizes = [tensor.n_bytes for tensor in gguf.GGUFReader(shard).tensors]
        assert sum(sizes) <= limit or len(sizes) == 1
    np.testing.assert_array_equal(
        native_logits(shards[0], cache=0), native_logits(tmp_path / "one" / "llm.gguf", cache=0)
    )
    shards[1].unlink()
    with pytest.raises(ExportError, match=r"llm-00002-of-.*missing"):
        llm.tensor_types(shards[0])


def test_a_quantised_file_is_split_later(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """llama.cpp quantises from shards into one file; split again, every key and tensor is the same."""
    llm.export_llm(checkpoint.llm_source(tiny_checkpoint), tmp_path / "llm.gguf", max_shard_bytes=1_000_000)
    quantize_gguf(shards_of(tmp_path / "llm.gguf")[0], tmp_path / "q.gguf", "q8_0")
    whole = gguf.GGUFReader(tmp_path / "q.gguf")
    keys = {key: (field.contents(), field.types) for key, field in whole.fields.items() if not key.startswith("GGUF.")}
    data = {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in whole.tensors}
    wanted = last_logits(tmp_path / "q.gguf")
    assert split_gguf(tmp_path / "q.gguf", 1 << 30) == [tmp_path / "q.gguf"]
    shards = split_gguf(tmp_path / "q.gguf", 500_000)
    assert len(shards) > 2 and not (tmp_path / "q.gguf").exists()
    readers = [gguf.GGUFReader(shard) for shard in shards]
    assert {t.name: (t.tensor_type, t.data.tobytes()) for reader in readers for t in reader.tensors} == data
    found = {key: (readers[0].fields[key].contents(), readers[0].fields[key].types) for key in keys}
    assert found == keys
    np.testing.assert_array_equal(last_logits(shards[0]), wanted)


def test_streamed_equals_loaded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Read from the files one at a time or from a model in memory: the same tensors, byte for byte."""
    llm.export_llm(checkpoint.llm_source(tiny_checkpoint), tmp_path / "a.gguf", "bf16")
    llm.export_llm(checkpoint.load(tiny_checkpoint), tmp_path / "b.gguf", "bf16")
    first, second = (
        {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}
        for path in (tmp_path / "a.gguf", tmp_path / "b.gguf")
    )
    assert first == second


def test_tied_head_where_llama_cpp_wants_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """StableLM's graph reads no embedding as head, so a tied one is stored; logits within 1e-4."""
    loaded = random_checkpoint(tiny_checkpoint, {**MODELS["stablelm"], "tie_word_embeddings": True})
    llm.export_llm(loaded, tmp_path / "llm.gguf", "f32")
    np.testing.assert_allclose(native_logits(tmp_path / "llm.gguf", cache=0), torch_logits(loaded), atol=1e-4, rtol=0)


def test_full_disk_is_named(tiny_checkpoint: Path, small_disk: Callable[[int], Path]) -> None:
    """Not even the header fits."""
    place = small_disk(16)
    with pytest.raises(StorageError, match=r"llm\.gguf: no space left"):
        llm.export_llm(checkpoint.load(tiny_checkpoint), place / "llm.gguf")
    assert not list(place.iterdir())


def test_disk_fills_between_tensors(tiny_checkpoint: Path, small_disk: Callable[[int], Path]) -> None:
    """A short write inside numpy carries no error number; it is a full disk all the same."""
    place = small_disk(1500)
    with pytest.raises(StorageError, match=r"llm\.gguf: no space left"):
        llm.export_llm(checkpoint.load(tiny_checkpoint), place / "llm.gguf")
    assert not list(place.iterdir())
