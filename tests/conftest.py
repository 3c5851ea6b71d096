"""Tiny random checkpoints: real Hugging Face classes, every parameter randomised (zeros and ones hide lost tensors)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,",
    "detailed, and polite answers to the user's questions. USER: what color is the shape? ASSISTANT: red",
    "is there a small blue circle in the image? yes no green triangle rectangle",
] * 4


def make_tokenizer(vocab_size: int = 1024) -> Any:
    """Byte-level BPE with GPT-2's regex, as the nano model's; filled up with unused merges of digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f"{a}{b}{c}" for a in "abcdefghijklmnopqrst" for b in "uvwxyz" for c in "bcdfghjkl"]
    raw.train_from_iterator([*SENTENCES, " ".join(words)], trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert raw.get_vocab_size() == vocab_size, raw.get_vocab_size()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def make_checkpoint(out: Path, vision: str, seed: int = 0) -> Path:
    """Write a tiny random checkpoint of the nano architecture with two LM layers and every parameter randomised."""
    import torch

    from tinyllava_edge import checkpoint, spec
    from tinyllava_edge.model import build_model

    torch.manual_seed(seed)
    name = f"TinyLLaVA-base-{vision}-Nano"
    tower = {**spec.VISION_BACKBONES[vision].config, "num_hidden_layers": 3}
    text = {**spec.LLM_BACKBONES["Nano"].config, "num_hidden_layers": 2}
    model = build_model(spec.model_spec(name), tower, text, 1023)
    tokenizer = make_tokenizer()
    checkpoint.add_image_token(model, tokenizer)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(
                    torch.randn_like(parameter) * (0.5 if "embed" in key else 1.5) / parameter.shape[-1] ** 0.5
                )
            elif "norm" in key and key.endswith("weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    checkpoint.save(model.eval(), tokenizer, spec.model_spec(name), out)
    return out


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SigLIP-style tower (3 layers) + Llama (2 layers)."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "siglip", "NanoSig")


@pytest.fixture(scope="session")
def tiny_checkpoint_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP-style tower (3 layers) + Llama (2 layers)."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "clip", "NanoC")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SigLIP-style checkpoint as a bundle of fp32+f16 and int8+q4_k_m, stamped as verified."""
    from tinyllava_edge.export.bundle_writer import export_bundle

    out = tmp_path_factory.mktemp("bundle") / "tiny"
    bundle = export_bundle(tiny_checkpoint, out, llm=("f16", "q4_k_m"), vision=("fp32", "int8"))
    bundle.stamp({name: {"passed": True} for name in bundle.builds()})
    return out
