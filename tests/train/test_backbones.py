"""Backbones go into the untrained checkpoint tensor by tensor; the rest is a seeded connector and one new token."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tinyllava_edge
from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.errors import CheckpointError, StorageError, UsageError
from tinyllava_edge.train.backbones import init_checkpoint

VARIANT = "TinyLLaVA-base-NanoSig-Nano"
TOKENIZER = Path(tinyllava_edge.__file__).parent / "nano" / "llm"


@dataclass(frozen=True)
class Dirs:
    vision: Path
    llm: Path


def randomise(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def vision(out: Path, **changes: int) -> Path:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6}
    config = SiglipVisionConfig(**{**sizes, "image_size": 64, "patch_size": 8, **changes})
    randomise(SiglipVisionModel(config), 1).half().save_pretrained(out)
    return out


def llm(out: Path, **changes: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**{**sizes, "num_key_value_heads": 2, "vocab_size": 1024, **changes})
    randomise(LlamaForCausalLM(config), 2).half().save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, out / name)
    return out


@pytest.fixture(scope="module")
def dirs(tmp_path_factory: pytest.TempPathFactory) -> Dirs:
    root = tmp_path_factory.mktemp("backbones")
    return Dirs(vision(root / "vision"), llm(root / "llm"))


def test_every_tensor_of_the_backbones_arrives(dirs: Dirs, tmp_path: Path) -> None:
    init_checkpoint(VARIANT, tmp_path / "start", vision_dir=dirs.vision, llm_dir=dirs.llm)
    loaded = checkpoints.load(tmp_path / "start")
    model = loaded.model.model
    for path, module in ((dirs.vision, model.vision_tower), (dirs.llm, model.language_model)):
        wanted, got = load_file(path / "model.safetensors"), module.state_dict()
        for name, tensor in wanted.items():
            if name == "lm_head.weight":
                found = loaded.model.lm_head.weight
            else:
                found = got[name.removeprefix("model.") if path == dirs.llm else name]
            assert torch.equal(found[: tensor.shape[0]].detach(), tensor.float()), name
    assert loaded.tokenizer.convert_tokens_to_ids("<image>") == 1024 == loaded.model.config.image_token_id
    assert loaded.model.get_input_embeddings().weight.shape == (1088, 256)
    assert not loaded.model.lm_head.weight[1024:].any()
    assert loaded.spec.name == VARIANT


def test_the_seed_decides_the_connector_and_nothing_else(dirs: Dirs, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        init_checkpoint(VARIANT, tmp_path / name, vision_dir=dirs.vision, llm_dir=dirs.llm, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = {name for name in a if not torch.equal(a[name], c[name])}
    assert other and all("multi_modal_projector" in name for name in other)


def test_what_does_not_fit_or_is_missing_is_named(dirs: Dirs, tmp_path: Path) -> None:
    out = tmp_path / "start"
    with pytest.raises(UsageError, match="unknown variant"):
        init_checkpoint("TinyLLaVA-base-Sig-Nano", out)
    with pytest.raises(UsageError, match="siglip-so400m-patch14-384 are not part of this package"):
        init_checkpoint("TinyLLaVA-base-Sig-TL", out)
    with pytest.raises(CheckpointError, match=r"no config.json"):
        init_checkpoint(VARIANT, out, vision_dir=tmp_path, llm_dir=dirs.llm)
    with pytest.raises(CheckpointError, match="patch_size is 16, .* needs 8"):
        init_checkpoint(VARIANT, out, vision_dir=vision(tmp_path / "v", patch_size=16), llm_dir=dirs.llm)
    with pytest.raises(CheckpointError, match="hidden_size is 128, .* needs 256"):
        init_checkpoint(VARIANT, out, vision_dir=dirs.vision, llm_dir=llm(tmp_path / "l", hidden_size=128))
    cut = tmp_path / "cut"
    shutil.copytree(dirs.llm, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="can't load it"):
        init_checkpoint(VARIANT, out, vision_dir=dirs.vision, llm_dir=cut)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(StorageError, match="exists already"):
        init_checkpoint(VARIANT, out, vision_dir=dirs.vision, llm_dir=dirs.llm)


def test_a_pickled_backbone_is_not_opened(dirs: Dirs, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(dirs.llm, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        init_checkpoint(VARIANT, tmp_path / "start", vision_dir=dirs.vision, llm_dir=pickled)
