"""The family as data: names, sizes and counts."""

from __future__ import annotations

import dataclasses

import pytest

from tinyllava_edge import spec
from tinyllava_edge.errors import CheckpointError, UsageError
from tinyllava_edge.model import count_parameters

# Billions, computed once from the Hugging Face classes of transformers 5.23 on the meta device.
COUNTS = {
    "C-TL": (1_409_851_392, 1_397_253_120),
    "Sig-TL": (1_534_831_680, 1_504_351_520),
    "C-SLM": (1_954_318_336, 1_941_720_064),
    "Sig-SLM": (2_079_298_624, 2_048_818_464),
    "C-Phi": (3_092_371_456, 3_079_773_184),
    "Sig-Phi": (3_217_417_280, 3_186_937_120),
}
TABLE_1 = {"C": 0.3, "Sig": 0.4, "TL": 1.1, "SLM": 1.6, "Phi": 2.7}


def test_twelve_variants_of_table_a1() -> None:
    assert len(spec.VARIANTS) == 12
    for name, chosen in spec.VARIANTS.items():
        assert name == f"TinyLLaVA-{chosen.recipe}-{chosen.vision}-{chosen.llm}"
        assert chosen.size_paper == pytest.approx(TABLE_1[chosen.vision] + TABLE_1[chosen.llm])


@pytest.mark.parametrize("pair", COUNTS)
def test_counts_are_exact_and_near_the_paper(pair: str) -> None:
    counts = count_parameters(f"TinyLLaVA-base-{pair}")
    assert (counts["parameters"], counts["parameters_exported"]) == COUNTS[pair]
    nominal = spec.VARIANTS[f"TinyLLaVA-base-{pair}"].size_paper
    assert nominal is not None and abs(counts["parameters"] / 1e9 / nominal - 1) < 0.05


@pytest.mark.parametrize("abbr", ["C", "Sig"])
def test_exported_count_is_what_an_independent_count_says(abbr: str) -> None:
    """The dead part = one encoder layer + post-norm (+ SigLIP's pooling head), counted on the HF tower itself."""
    import torch
    from transformers import AutoConfig, AutoModel

    backbone = spec.VISION_BACKBONES[abbr]
    with torch.device("meta"):
        tower = AutoModel.from_config(AutoConfig.for_model(**backbone.config))
    layers = tower.encoder.layers if hasattr(tower, "encoder") else tower.vision_model.encoder.layers
    inner = tower if hasattr(tower, "encoder") else tower.vision_model
    dead = [layers[-1], inner.post_layernorm, *([inner.head] if hasattr(inner, "head") else [])]
    expected = sum(p.numel() for module in dead for p in module.parameters())
    counts = count_parameters(f"TinyLLaVA-base-{abbr}-TL")
    assert counts["parameters"] - counts["parameters_exported"] == expected


def test_token_counts() -> None:
    assert spec.model_spec("TinyLLaVA-base-Sig-Phi").visual_tokens == 729
    assert spec.model_spec("TinyLLaVA-base-C-Phi").visual_tokens == 576
    assert spec.model_spec(spec.DEFAULT_VARIANT).visual_tokens == 64


def test_tower_tokens() -> None:
    """What the connector reads: patches and class token, less the first where the strategy drops it."""
    clip, siglip = (spec.model_spec(f"TinyLLaVA-base-{name}-Phi") for name in ("C", "Sig"))
    assert (clip.patches, clip.feature_tokens) == (576, 576)
    assert dataclasses.replace(clip, select_strategy="full").feature_tokens == 577
    assert (siglip.patches, siglip.feature_tokens) == (729, 729)
    assert dataclasses.replace(siglip, select_strategy="default").feature_tokens == 728
    dinov2 = dataclasses.replace(clip, vision_family="dinov2", image_size=224)
    assert dinov2.feature_tokens == 256


def test_optional_fields() -> None:
    """A spec that was written before they existed is read with their defaults."""
    good = spec.model_spec("TinyLLaVA-share-C-TL").to_dict()
    old = {key: value for key, value in good.items() if key not in ("crop_resize", "resample")}
    assert spec.ModelSpec.from_dict(old, "x").to_dict() == good
    assert (good["crop_resize"], good["resample"]) == (0, "bicubic")
    changed = spec.ModelSpec.from_dict({**good, "crop_resize": 384, "resample": "bilinear"}, "x")
    assert (changed.crop_resize, changed.resample) == (384, "bilinear")


def test_tokens_in_a_connectors_name() -> None:
    names = {"ldpv2-144": 144, "a-b-1": 1, "avgpool-99999": 99999}
    none = ("mlp2x_gelu", "ldpv2-", "-9", "ldpv2-0", "ldpv2-09", "ldpv2-9.0", "ldpv2-\u0669", "x-" + "9" * 200, "")
    assert {name: spec.named_tokens(name) for name in (*names, *none)} == {**names, **dict.fromkeys(none)}
    good = {**spec.model_spec("TinyLLaVA-base-C-TL").to_dict(), "connector": "ldpv2-144", "visual_tokens": 144}
    assert spec.ModelSpec.from_dict(good, "x").to_dict() == good


def test_spec_json_round_trip_and_refusals() -> None:
    good = spec.model_spec("TinyLLaVA-share-C-TL")
    assert spec.ModelSpec.from_dict(good.to_dict(), "x") == good
    for change in (
        {"image_size": 0},
        {"image_policy": "stretch"},
        {"template": 3},
        {"pad_color": [1, 2]},
        {"extra": 1},
        {"crop_resize": 100},
        {"crop_resize": -1},
        {"crop_resize": True},
        {"resample": "lanczos"},
        {"vision_family": "dino"},
        {"connector": "ldpv2-144"},
    ):
        with pytest.raises(CheckpointError, match="x: "):
            spec.ModelSpec.from_dict({**good.to_dict(), **change}, "x")
    with pytest.raises(UsageError) as error:
        spec.variant("TinyLLaVA-base-C-GPT")
    assert "TinyLLaVA-base-C-TL" in error.value.hint
    assert all(field.name in good.to_dict() for field in dataclasses.fields(good))
