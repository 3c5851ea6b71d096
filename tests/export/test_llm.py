"""The GGUF in llama.cpp against the Hugging Face model: logits, stored tensors, refusals."""

from __future__ import annotations

import dataclasses
import os
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
from tinyllava_edge.model import build_model
from tinyllava_edge.spec import LLM_BACKBONES, VISION_BACKBONES

IDS = [1, *np.random.default_rng(0).integers(3, 1024, 40).tolist()]
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1088,
}
NANO = {**LLM_BACKBONES["Nano"].config, **SMALL}
HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
MODELS: dict[str, dict[str, Any]] = {
    "llama": NANO,
    "llama-tied": {**NANO, "tie_word_embeddings": True},
    "llama-bias-narrow-heads": {**NANO, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "qwen2": {
        "model_type": "qwen2",
        **SMALL,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "phi": {
        **LLM_BACKBONES["Phi"].config,
        **SMALL,
        "num_key_value_heads": 4,
        "intermediate_size": 1024,
        "rope_parameters": HALF_ROPE,
    },
    "stablelm": {**LLM_BACKBONES["SLM"].config, **SMALL, "num_key_value_heads": 2},
    "stablelm-parallel": {
        **LLM_BACKBONES["SLM"].config,
        **SMALL,
        "num_key_value_heads": 4,
        "use_qkv_bias": False,
        "use_parallel_residual": True,
    },
}
# float32 file and cache: only the order of sums differs; ggml's tanh-GELU is a float16 table (Phi)
F32_TOLERANCE = {**dict.fromkeys(MODELS, 1e-4), "phi": 5e-3}


def random_checkpoint(root: Path, text: dict[str, Any]) -> checkpoint.Checkpoint:
    """The tiny checkpoint's tower and tokenizer around another random language model."""
    tiny = checkpoint.load(root)
    torch.manual_seed(5)
    spec = dataclasses.replace(tiny.spec, llm_family=text["model_type"])
    tower = {**VISION_BACKBONES["NanoSig"].config, "num_hidden_layers": 3}
    model = build_model(spec, tower, text, 1024).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(
                    torch.randn_like(parameter) * (0.5 if "embed" in name else 1.5) / parameter.shape[-1] ** 0.5
                )
            else:
                parameter.copy_(0.2 * torch.randn_like(parameter) + ("norm" in name and name.endswith("weight")))
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


def torch_logits(loaded: checkpoint.Checkpoint) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        return loaded.model(input_ids=torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("name", list(MODELS))
def test_f32_logits(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Weights and cache in f32: logits (standard deviation 0.5 to 1.6) equal Hugging Face's within F32_TOLERANCE."""
    loaded = random_checkpoint(tiny_checkpoint, MODELS[name])
    types = llm.export_llm(loaded, tmp_path / "llm.gguf", "f32")
    assert set(types) == {"f32"}
    wanted = torch_logits(loaded)
    assert wanted.std() > 0.4
    np.testing.assert_allclose(native_logits(tmp_path / "llm.gguf", cache=0), wanted, atol=F32_TOLERANCE[name], rtol=0)


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
    """What llama.cpp would compute otherwise, and weights that are lost, are refused; no file is left."""
    target = tmp_path / "llm.gguf"
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for change, message in (
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": scaled}, "linear"),
        ({"model_type": "gpt_neox", "num_key_value_heads": None}, "gpt_neox"),
    ):
        with pytest.raises(ExportError, match=message):
            llm.export_llm(random_checkpoint(tiny_checkpoint, {**NANO, **change}), target)
    for value, message in ((float("nan"), "NaN"), (1e6, "beyond float16")):
        loaded = checkpoint.load(tiny_checkpoint)
        with torch.no_grad():
            loaded.model.model.language_model.layers[1].mlp.up_proj.weight[3, 4] = value
        with pytest.raises(ExportError, match=f"layers.1.mlp.up_proj.weight.*{message}"):
            llm.export_llm(loaded, target)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "llm.gguf"
    (tmp_path / f".llm.gguf.tmp-{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"llm\.gguf: no space left"):
        llm.export_llm(checkpoint.load(tiny_checkpoint), target)
    assert not list(tmp_path.iterdir())


def test_disk_fills_between_tensors(tiny_checkpoint: Path, small_disk: Callable[[int], Path]) -> None:
    """A short write inside numpy carries no error number; it is a full disk all the same."""
    place = small_disk(1500)
    with pytest.raises(StorageError, match=r"llm\.gguf: no space left"):
        llm.export_llm(checkpoint.load(tiny_checkpoint), place / "llm.gguf")
    assert not list(place.iterdir())
