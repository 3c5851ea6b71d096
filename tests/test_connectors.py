"""Connectors against independent references, with every parameter randomised."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from tinyllava_edge import connectors
from tinyllava_edge.errors import CheckpointError

WIDTHS = (192, 256)  # tower, language model


def built(name: str, **options: int) -> nn.Module:
    torch.manual_seed(0)
    connector = connectors.build_connector(name, *((256, 256) if name == "identity" else WIDTHS), options)
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5 + (parameter.ndim == 1))
    return connector.eval()


def test_the_table() -> None:
    """Exact names; each turns (b, p, v) into (b, t, h)."""
    names = ["identity", "linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "mlp4x_gelu", "resampler"]
    assert list(connectors.CONNECTORS) == names
    for name in names:
        width = 256 if name == "identity" else 192
        with torch.no_grad():
            embeds = built(name)(torch.randn(2, 9, width))
        assert embeds.shape == (2, 128 if name == "resampler" else 9, 256)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_mlps(depth: int) -> None:
    """Linear layers with erf-GELU between them, none after the last; the tanh form would be 1e-4 off."""
    connector = built(f"mlp{depth}x_gelu")
    keys = [key.removesuffix(".weight") for key in connector.state_dict() if key.endswith("weight")]
    assert keys == (["linear_1", "linear_2"] if depth == 2 else [f"layers.{2 * i}" for i in range(depth)])
    x = torch.randn(2, 5, 192)
    with torch.no_grad():
        got, wanted = connector(x), x.double()
        for i, key in enumerate(keys):
            weight, bias = (connector.state_dict()[f"{key}.{part}"].double() for part in ("weight", "bias"))
            wanted = wanted @ weight.T + bias
            if i < depth - 1:
                wanted = wanted * 0.5 * (1 + torch.erf(wanted / math.sqrt(2)))
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)


def resampler_by_hand(state: dict[str, torch.Tensor], x: torch.Tensor, depth: int) -> torch.Tensor:
    """The resampler written head by head in float64, from the description of the released model."""

    def norm(x: torch.Tensor, key: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], state[f"{key}.weight"], state[f"{key}.bias"], 1e-5)

    media = x @ state["linear.weight"].T + state["linear.bias"]
    latents = state["latents"].repeat(len(x), 1, 1)
    for i in range(depth):
        a, b = f"layers.{i}.0", f"layers.{i}.1"
        asked = norm(latents, f"{a}.norm_latents")
        seen = torch.cat([norm(media, f"{a}.norm_media"), asked], dim=1)
        query = asked @ state[f"{a}.to_q.weight"].T
        key, value = (seen @ state[f"{a}.to_kv.weight"].T).split(512, dim=-1)
        heads = []
        for head in range(8):
            part = slice(64 * head, 64 * head + 64)
            score = query[..., part] @ key[..., part].mT * 64**-0.5
            heads.append(score.softmax(-1) @ value[..., part])
        latents = latents + torch.cat(heads, dim=-1) @ state[f"{a}.to_out.weight"].T
        hidden = norm(latents, f"{b}.0") @ state[f"{b}.1.weight"].T
        latents = latents + functional.gelu(hidden) @ state[f"{b}.3.weight"].T
    return norm(latents, "norm")


def test_resampler() -> None:
    """Factory's key names, and its arithmetic to 1e-5 of the largest value."""
    connector = built("resampler", num_queries=7, num_layers=2)
    layer = [f"layers.0.0.{n}" for n in ("norm_media", "norm_latents", "to_q", "to_kv", "to_out")]
    layer += [f"layers.0.1.{n}" for n in (0, 1, 3)]
    stems = {key.removesuffix(".weight").removesuffix(".bias") for key in connector.state_dict()}
    assert {stem for stem in stems if ".1." not in stem[:9]} == {"latents", "linear", "norm", *layer}
    assert not [k for k in connector.state_dict() if k.endswith("bias") and "norm" not in k and ".1.0." not in k][1:]
    x = torch.randn(2, 30, 192)
    wanted = resampler_by_hand({k: v.double() for k, v in connector.state_dict().items()}, x.double(), 2)
    with torch.no_grad():
        got = connector(x)
    assert got.shape == (2, 7, 256)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_refusals() -> None:
    cases: list[tuple[object, object, str]] = [
        ("mlp5x_gelu", None, "unknown connector 'mlp5x_gelu'"),
        (["mlp"], None, "unknown connector"),
        ("linear", {"num_queries": 3}, "connector linear: options"),
        ("resampler", {"queries": 3}, "connector resampler: options"),
        ("resampler", "many", "connector resampler: options"),
        ("resampler", {"num_queries": 0}, "num_queries=0 is not in"),
        ("resampler", {"num_layers": True}, "num_layers=True is not in"),
        ("resampler", {"num_queries": 1 << 40}, "is not in"),
        ("identity", None, "widths 192 and 256"),
    ]
    for name, options, message in cases:
        with pytest.raises(CheckpointError, match=message):
            connectors.build_connector(name, *WIDTHS, options)
