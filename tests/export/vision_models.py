"""Tiny towers of every family with their own options, every parameter randomised, and their graphs in ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from tinyllava_edge import spec
from tinyllava_edge.connectors import connector_tokens
from tinyllava_edge.model import TinyLlava, build_model
from tinyllava_edge.spec import ModelSpec
from tinyllava_edge.towers import MOF_TYPE

TEXT = {**spec.LLM_BACKBONES["Nano"].config, "num_hidden_layers": 1}
TOWERS: dict[str, dict[str, Any]] = {
    "clip": {**spec.VISION_BACKBONES["NanoC"].config, "num_hidden_layers": 3},
    "siglip": {**spec.VISION_BACKBONES["NanoSig"].config, "num_hidden_layers": 3},
    "siglip2": {
        "model_type": "siglip2_vision_model",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "patch_size": 8,
        "num_patches": 36,  # a 6 x 6 table, resized to the picture's 8 x 8
    },
    "dinov2": {
        "model_type": "dinov2",
        "hidden_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "patch_size": 8,
        "image_size": 48,  # positions of 6 x 6 patches, interpolated to the picture's 8 x 8
        "mlp_ratio": 3,
    },
}
TOWERS["dinov2_registers"] = {**TOWERS["dinov2"], "model_type": "dinov2_with_registers", "num_register_tokens": 3}
TOWERS["mof"] = {"model_type": MOF_TYPE, "first": TOWERS["clip"], "second": TOWERS["dinov2"]}
TOWERS["mof-siglip-registers"] = {
    "model_type": MOF_TYPE,
    "first": TOWERS["siglip"],
    "second": TOWERS["dinov2_registers"],
}
TOWERS["dinov2-swiglu"] = {**TOWERS["dinov2"], "use_swiglu_ffn": True, "image_size": 64}
QUERIES = 7
# One of each counted connector: N divides the grid of 8 x 8 or not, as each allows.
REDUCERS = ("pixelshuffle-16", "ldpv2-16", "ldpv2-25", "avgpool-4", "avgpool-9", f"qformer-{QUERIES}")
_OPTIONS = {
    "resampler": {"num_queries": QUERIES, "num_layers": 2},
    f"qformer-{QUERIES}": {"num_layers": 3, "hidden_size": 96, "num_heads": 4},
}


def make(family: str, connector: str = "mlp2x_gelu") -> tuple[TinyLlava, ModelSpec]:
    """A model with one text layer, and its spec."""
    torch.manual_seed(0)
    tower = TOWERS[family]
    base = spec.model_spec(f"TinyLLaVA-base-{'NanoC' if family == 'clip' else 'NanoSig'}-Nano")
    made = dataclasses.replace(
        base,
        vision_family=family.split("-")[0],
        select_strategy="default" if family[0] in "cd" else "full",
        connector=connector,
        visual_tokens=connector_tokens(connector, 128 if family.startswith("mof") else 64, _OPTIONS.get(connector)),
    )
    text = {**TEXT, "hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3}
    if connector == "identity":
        made = dataclasses.replace(made, embedding_dim=192)
    options = _OPTIONS.get(connector)
    model = build_model(made, tower, text if connector == "identity" else TEXT, 1023, options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.08 + (parameter.ndim == 1) * 0.3)
    return model, made


def eager(model: TinyLlava, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Image embeddings and tower features of the torch model."""
    with torch.no_grad():
        features = model.tower_features(given)
        return model.model.multi_modal_projector(features), features


def pixels(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def run(path: Path, given: torch.Tensor) -> Sequence[npt.NDArray[np.float32]]:
    """Image embeddings and tower features of a graph."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found: Sequence[npt.NDArray[np.float32]] = session.run(
        ["image_embeds", "image_features"], {"pixel_values": given.numpy()}
    )
    return found


def error(got: npt.NDArray[np.float32], wanted: torch.Tensor) -> float:
    """Largest difference / largest value."""
    assert got.shape == tuple(wanted.shape)
    return float(np.abs(got - wanted.numpy()).max() / wanted.abs().max())
