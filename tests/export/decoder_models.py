"""Tiny checkpoints of every language model that the ONNX decoder knows, every parameter randomised."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..conftest import make_tokenizer
from .llm_models import MODELS, randomise


def make_checkpoint(
    out: Path, which: str, *, vision: str = "NanoSig", text: dict[str, Any] | None = None, **spec: Any
) -> Path:
    """Write a checkpoint with a three-layer tower and language model MODELS[which], changed by `text` and `spec`."""
    from tinyllava_edge import checkpoint
    from tinyllava_edge.model import build_model
    from tinyllava_edge.spec import VISION_BACKBONES, model_spec

    config = {**MODELS[which], "max_position_embeddings": 512, **(text or {})}
    template = "phi" if which == "phi" else "llama"
    changed = {"llm_family": config["model_type"], "template": template, "max_length": 512, **spec}
    chosen = dataclasses.replace(model_spec(f"TinyLLaVA-base-{vision}-Nano"), **changed)
    tower = {**VISION_BACKBONES[vision].config, "num_hidden_layers": 3}
    model, tokenizer = build_model(chosen, tower, config, 1024), make_tokenizer()
    if template == "phi":
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    checkpoint.add_image_token(model, tokenizer)
    randomise(model, config["model_type"])
    checkpoint.save(model.eval(), tokenizer, chosen, out)
    return out


def hugging_face(model: Any, embeds: Any, tokens: int) -> tuple[Any, list[int]]:
    """Logits (n, v) of every position of a prompt (n, h), and greedy tokens after it, by transformers in float32."""
    prompt = torch.from_numpy(embeds)[None]
    with torch.inference_mode():
        logits = model.lm_head(model.model.language_model(inputs_embeds=prompt).last_hidden_state)[0].numpy()
        found: list[int] = []
        for _ in range(tokens):
            hidden = model.model.language_model(inputs_embeds=prompt).last_hidden_state[:, -1]
            found.append(int(model.lm_head(hidden)[0].argmax()))
            prompt = torch.cat((prompt, model.get_input_embeddings()(torch.tensor([found[-1:]]))), 1)
    return logits, found


def prompt(model: Any) -> Any:
    """Embeddings (60, h) of text with 16 rows of noise, as large as image embeddings are, in the middle."""
    random = np.random.default_rng(1)
    ids = torch.from_numpy(random.integers(3, 1000, (1, 60)))
    embeds = model.get_input_embeddings()(ids)[0].detach().numpy().copy()
    embeds[20:36] = random.normal(0, 1, (16, embeds.shape[1]))
    return embeds
