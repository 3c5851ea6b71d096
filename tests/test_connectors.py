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


def built(name: str, features: int | None = None, **options: int) -> nn.Module:
    torch.manual_seed(0)
    connector = connectors.build_connector(name, *((256, 256) if name == "identity" else WIDTHS), options, features)
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5 + (parameter.ndim == 1))
    return connector.eval()


def test_the_table() -> None:
    """Exact names; each turns (b, p, v) into (b, t, h)."""
    names = ["identity", "linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "mlp4x_gelu", "mof_mlp", "resampler"]
    assert list(connectors.CONNECTORS) == names
    for name in names:
        width = 256 if name == "identity" else 192
        with torch.no_grad():
            embeds = built(name)(torch.randn(2, 10, width))
        tokens = 128 if name == "resampler" else 10
        assert embeds.shape == (2, tokens, 256) and connectors.connector_tokens(name, 10) == tokens
    assert list(connectors.COUNTED) == ["pixelshuffle", "ldpv2", "avgpool", "qformer"]
    for stem in connectors.COUNTED:
        options = {"num_layers": 2, "hidden_size": 64, "num_heads": 2} if stem == "qformer" else {}
        connector = built(f"{stem}-4", 16, **options).train()
        embeds = connector(torch.randn(2, 16, 192))
        assert embeds.shape == (2, 4, 256) and connectors.connector_tokens(f"{stem}-4", 16) == 4
        assert connectors.connector_options(f"{stem}-4") == tuple(connectors.COUNTED[stem].options)
        (embeds**2).sum().backward()  # every parameter learns
        assert all(float(parameter.grad.abs().sum()) > 0 for parameter in connector.parameters())
    assert connectors.connector_tokens("resampler", 9, {"num_queries": 5}) == 5


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


def test_mof_mlp() -> None:
    """Even tokens through one MLP, odd ones through the other, in float64; an odd number of tokens is refused."""
    connector = built("mof_mlp")
    x, state = torch.randn(2, 6, 192), {key: tensor.double() for key, tensor in connector.state_dict().items()}
    wanted = torch.empty(2, 6, 256, dtype=torch.float64)
    for start, part in enumerate(("first", "second")):
        hidden = x[:, start::2].double() @ state[f"{part}.linear_1.weight"].T + state[f"{part}.linear_1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        wanted[:, start::2] = hidden @ state[f"{part}.linear_2.weight"].T + state[f"{part}.linear_2.bias"]
    with torch.no_grad():
        torch.testing.assert_close(connector(x).double(), wanted, rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match="63 tower tokens are no pairs"):
        connector(torch.randn(1, 63, 192))


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


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def layer(state: dict[str, torch.Tensor], key: str, x: torch.Tensor) -> torch.Tensor:
    return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]


def standard(x: torch.Tensor, eps: float) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


def check(connector: nn.Module, x: torch.Tensor, wanted: torch.Tensor, limit: float = 1e-5) -> None:
    """Relative to the largest value."""
    with torch.no_grad():
        got = connector(x)
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max() / wanted.abs().max()) < limit


def doubles(connector: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.double() for key, value in connector.state_dict().items()}


@pytest.mark.parametrize(("n", "m"), [(8, 4), (9, 3), (6, 6), (6, 1)])
def test_pixel_shuffle(n: int, m: int) -> None:
    """Patch by patch in float64: an output's r x r patches side by side, rows first, then norm and MLP."""
    connector = built(f"pixelshuffle-{m * m}", n * n)
    state, x, r = doubles(connector), torch.randn(2, n * n, 192), n // m
    outputs = []
    for row in range(m):
        for column in range(m):
            places = [(row * r + i) * n + column * r + j for i in range(r) for j in range(r)]
            outputs.append(torch.cat([x[:, place].double() for place in places], dim=-1))
    joined = standard(torch.stack(outputs, dim=1), 1e-5) * state["layer_norm.weight"] + state["layer_norm.bias"]
    check(connector, x, layer(state, "linear_2", gelu(layer(state, "linear_1", joined))))


def test_pixel_shuffle_is_internvls() -> None:
    """transformers' InternVL with the same weights, by name; and the order of Idefics3 and SmolVLM."""
    from transformers import InternVLConfig
    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

    connector = built("pixelshuffle-16", 64)
    sizes = {"vision_config": {"hidden_size": 192}, "text_config": {"model_type": "qwen2", "hidden_size": 256}}
    theirs = InternVLMultiModalProjector(InternVLConfig(**sizes, downsample_ratio=0.5))
    theirs.load_state_dict(connector.state_dict())
    x = torch.randn(2, 64, 192)
    shuffled = InternVLModel.pixel_shuffle(None, x.reshape(2, 8, 8, 192)).flatten(1, 2)  # type: ignore[arg-type]
    with torch.no_grad():
        check(connector, x, theirs(shuffled))
    assert torch.equal(SmolVLMConnector.pixel_shuffle(None, x), shuffled)  # type: ignore[arg-type]


def pooled(x: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Window by window, as PyTorch documents adaptive average pooling."""
    grid, cells = x.reshape(len(x), n, n, -1), []
    edges = [(math.floor(i * n / m), math.ceil((i + 1) * n / m)) for i in range(m)]
    for top, bottom in edges:
        for left, right in edges:
            cells.append(grid[:, top:bottom, left:right].mean((1, 2)))
    return torch.stack(cells, dim=1)


GRIDS = [(8, 4), (8, 3), (27, 12), (24, 12), (7, 7), (5, 1)]


@pytest.mark.parametrize(("n", "m"), GRIDS)
def test_average_pooling(n: int, m: int) -> None:
    """Windows that overlap where m doesn't divide n; the MLP has the names of Llava's own projector."""
    connector = built(f"avgpool-{m * m}", n * n)
    state, x = doubles(connector), torch.randn(2, n * n, 192)
    assert set(state) == set(built("mlp2x_gelu").state_dict())
    means = pooled(x.double(), n, m)
    module = nn.AdaptiveAvgPool2d(m)(x.double().mT.unflatten(2, (n, n))).flatten(2).mT
    torch.testing.assert_close(means, module)
    check(connector, x, layer(state, "linear_2", gelu(layer(state, "linear_1", means))))


@pytest.mark.parametrize(("n", "m"), GRIDS)
def test_ldpv2(n: int, m: int) -> None:
    """MobileVLM V2's names; MLP, pooling, then every cell plus its weighted neighbours, channel by channel."""
    connector = built(f"ldpv2-{m * m}", n * n)
    state, x = doubles(connector), torch.randn(2, n * n, 192)
    names = ("mlp.mlp.0", "mlp.mlp.2", "peg.peg.0")
    assert list(state) == [f"{name}.{part}" for name in names for part in ("weight", "bias")]
    grid = pooled(layer(state, names[1], gelu(layer(state, names[0], x.double()))), n, m).reshape(2, m, m, 256)
    wanted = grid + state["peg.peg.0.bias"]
    for row in range(m):
        for column in range(m):
            for i in range(3):
                for j in range(3):
                    up, left = row + i - 1, column + j - 1
                    if 0 <= up < m and 0 <= left < m:
                        wanted[:, row, column] += grid[:, up, left] * state["peg.peg.0.weight"][:, 0, i, j]
    check(connector, x, wanted.flatten(1, 2))


QFORMER = {"num_layers": 3, "hidden_size": 64, "num_heads": 4}


def qformer_by_hand(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """BERT's post-norm layers in float64, head by head; layers 0 and 2 look at the picture, too."""

    def norm(x: torch.Tensor, key: str) -> torch.Tensor:
        return standard(x, 1e-12) * state[f"{key}.weight"] + state[f"{key}.bias"]

    def attend(asking: torch.Tensor, seen: torch.Tensor, key: str) -> torch.Tensor:
        query = layer(state, f"{key}.attention.query", asking)
        keys, values = (layer(state, f"{key}.attention.{name}", seen) for name in ("key", "value"))
        parts = [slice(16 * head, 16 * head + 16) for head in range(4)]
        scores = [(query[..., part] @ keys[..., part].mT / 4).softmax(-1) for part in parts]
        heads = [score @ values[..., part] for score, part in zip(scores, parts, strict=True)]
        answer = layer(state, f"{key}.output.dense", torch.cat(heads, dim=-1))
        return norm(answer + asking, f"{key}.output.LayerNorm")

    hidden = norm(state["query_tokens"].repeat(len(x), 1, 1), "qformer.layernorm")
    for i in range(3):
        key = f"qformer.encoder.layer.{i}"
        hidden = attend(hidden, hidden, f"{key}.attention")
        if i % 2 == 0:
            hidden = attend(hidden, x, f"{key}.crossattention")
        wide = gelu(layer(state, f"{key}.intermediate_query.dense", hidden))
        hidden = norm(layer(state, f"{key}.output_query.dense", wide) + hidden, f"{key}.output_query.LayerNorm")
    return layer(state, "language_projection", hidden)


def test_qformer() -> None:
    """The formula, and transformers' own forward of the whole Q-Former; any number of tower tokens, 63 included."""
    connector = built("qformer-5", **QFORMER)
    state, x = doubles(connector), torch.randn(2, 63, 192)
    assert not any(key.endswith("crossattention.attention.key.weight") and ".1." in key for key in state)
    check(connector, x, qformer_by_hand(state, x.double()))
    queries = state["query_tokens"].float().repeat(2, 1, 1)
    with torch.no_grad():
        theirs = connector.qformer(query_embeds=queries, encoder_hidden_states=x).last_hidden_state
        check(connector, x, connector.language_projection(theirs))


def test_qformer_has_blip2s_names_and_sizes() -> None:
    """A BLIP-2 checkpoint's query tokens, Q-Former and projection fit by name and shape."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    text = {"model_type": "opt", "hidden_size": 256, "word_embed_proj_dim": 256, "num_hidden_layers": 1}
    with torch.device("meta"):
        blip2 = Blip2ForConditionalGeneration(
            Blip2Config(vision_config={"num_hidden_layers": 1}, text_config={**text, "num_attention_heads": 4})
        )
        ours = connectors.build_connector("qformer-32", 1408, 256)
    kept = ("query_tokens", "qformer.", "language_projection.")
    wanted = {key: tensor.shape for key, tensor in blip2.state_dict().items() if key.startswith(kept)}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == wanted
    assert len([key for key in wanted if ".crossattention." in key and key.endswith("query.weight")]) == 6


def test_what_fits_is_listed() -> None:
    """Sizes that a grid can't take: the message names the grid, the hint what is possible or what else to do."""
    cases = [
        ("pixelshuffle-144", 729, "27 x 27 patches can't become 144", "possible for pixelshuffle: 1, 9, 81, 729"),
        ("pixelshuffle-8", 64, "8 x 8 patches can't become 8", "possible for pixelshuffle: 1, 4, 16, 64"),
        ("avgpool-8", 9, "3 x 3 patches can't become 8", "possible for avgpool: 1, 4, 9"),
        ("ldpv2-100", 64, "8 x 8 patches can't become 100", "possible for ldpv2: 1, 4, 9, 16, 25, 36, 49, 64"),
        (
            "ldpv2-144",
            728,
            "728 tower tokens are none",
            "the first patch is dropped: keep it with select_strategy full",
        ),
        ("avgpool-144", 577, "577 tower tokens are none", "drop it with select_strategy default"),
        ("avgpool-4", 12, "12 tower tokens are none", "any number of tokens"),
        ("avgpool-4", None, "nobody said", "feature_tokens"),
        ("avgpool-4", True, "feature_tokens=True", ""),
        ("avgpool-4", 1 << 40, "is not in 1..65536", ""),
    ]
    for name, features, message, hint in cases:
        with pytest.raises(CheckpointError) as caught:
            connectors.build_connector(name, *WIDTHS, None, features)
        assert message in caught.value.message and hint in caught.value.hint, name
    with pytest.raises(CheckpointError, match="made for 8 x 8 patches, and the tower gives 63 tokens"):
        built("avgpool-4", 64)(torch.randn(1, 63, 192))


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
        ("avgpool", None, "unknown connector 'avgpool'"),
        ("avgpool-", None, "unknown connector"),
        ("avgpool-04", None, "unknown connector"),
        ("avgpool--4", None, "unknown connector"),
        ("avgpool-\u0664", None, "unknown connector"),
        (f"avgpool-{10**6}", None, "unknown connector"),
        ("-4", None, "unknown connector"),
        ("mlp2x_gelu-4", None, "unknown connector"),
        ("resampler-4", None, "unknown connector"),
        ("qformer-4", {"num_queries": 3}, "connector qformer-4: options"),
        ("qformer-4", {"hidden_size": 100, "num_heads": 7}, "hidden_size 100 is no multiple of num_heads 7"),
        ("qformer-4", {"num_layers": 65}, "num_layers=65 is not in 1..64"),
    ]
    for name, options, message in cases:
        with pytest.raises(CheckpointError, match=message):
            connectors.build_connector(name, *WIDTHS, options)
