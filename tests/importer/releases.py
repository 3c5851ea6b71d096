"""Tiny random models, written in every layout that TinyLLaVA weights are released in.

Everything here is written out by hand from the facts of the layouts: nothing of the importer is used. Each parameter is
random, biases and norms too; configurations have the fields of transformers 4.40, which made the released ones.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

ROWS = {"llama": 520, "stablelm": 576, "phi": 576, "qwen2": 576, "gemma": 520}  # tokens: 520, so two lack a spare row
END = {"llama": "</s>", "stablelm": "<|endoftext|>", "phi": "<|endoftext|>", "qwen2": "<|endoftext|>", "gemma": "<eos>"}
_TEXT = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 9000.0, "max_position_embeddings": 2048},
    "stablelm": {"num_key_value_heads": 4, "use_qkv_bias": True, "partial_rotary_factor": 0.25, "rope_theta": 9000.0},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.25, "rope_theta": 9000.0, "hidden_act": "gelu_new"},
    "qwen2": {"num_key_value_heads": 2, "rope_theta": 9e5, "tie_word_embeddings": True, "use_sliding_window": False},
    "gemma": {"num_key_value_heads": 1, "head_dim": 96, "hidden_activation": None, "rope_theta": 9000.0},
}
_VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 7, "hidden_act": "quick_gelu"},
    "siglip": {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7},
}
LEGACY = {
    "phi": "TinyLlavaPhiForCausalLM",
    "stablelm": "TinyLlavaStablelmForCausalLM",
    "llama": "TinyLlavaLlamaForCausalLM",
}


ENDS = ["<|endoftext|>", "<eos>", "<|im_end|>"]


def make_tokenizer() -> Any:
    """520 tokens, the end-of-turn tokens of all templates among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    raw.decoder = decoders.ByteLevel()
    words = " ".join(f"{a}{b}{c}" for a in "abcdefgh" for b in "uvwxyz" for c in "bcdfghjkl")
    special = ["<unk>", "<s>", "</s>", *ENDS]
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["what color is the shape? yes no red blue", words], trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert raw.get_vocab_size() == 520, raw.get_vocab_size()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<|endoftext|>"
    )


@dataclass(frozen=True)
class Parts:
    """A model in three Hugging Face parts."""

    llm: nn.Module
    tower: nn.Module
    connector: nn.Sequential
    text: dict[str, Any]
    vision: dict[str, Any]


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1:
                parameter.copy_(noise * (0.5 if "embed" in key else 1.2) / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.2 * noise + ("norm" in key and key.endswith("weight")))


@functools.cache
def parts(llm: str, tower: str, tied: bool | None = None) -> Parts:
    """The model of one pair of families, always the same."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    torch.manual_seed(len(llm) * 10 + len(tower))
    text = {"model_type": llm, "vocab_size": ROWS[llm], "bos_token_id": 1, "eos_token_id": 2, **_TEXT, **TEXT[llm]}
    if tied is not None:
        text["tie_word_embeddings"] = tied
    vision = {**VISION[tower], **_VISION}
    language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text)).float().eval()
    vision_tower = AutoModel.from_config(AutoConfig.for_model(**vision)).float().eval()
    connector = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256))
    for module in (language_model, vision_tower, connector):
        randomise(module)
    return Parts(language_model, vision_tower, connector, text, vision)


def expected(
    model: Parts, ids: torch.Tensor, pixels: torch.Tensor, *, drop_first: bool, at: int, old_gemma: bool = False
) -> torch.Tensor:
    """Logits of the written-out model: tower, connector, and the picture spliced between ids[:at] and ids[at:]."""
    with torch.no_grad():
        features = model.tower(pixels, output_hidden_states=True).hidden_states[-2]
        if drop_first:
            features = features[:, 1:]
        picture = torch.nn.functional.linear(
            torch.nn.functional.gelu(
                torch.nn.functional.linear(features, model.connector[0].weight, model.connector[0].bias)
            ),
            model.connector[2].weight,
            model.connector[2].bias,
        )
        if old_gemma:  # transformers 4.40 multiplied every input embedding of Gemma, the picture's too
            picture = picture * model.text["hidden_size"] ** 0.5
        words = model.llm.get_input_embeddings()(ids)
        return model.llm(inputs_embeds=torch.cat((words[:, :at], picture, words[:, at:]), dim=1)).logits


# Names and files


def llm_state(model: Parts) -> dict[str, torch.Tensor]:
    """As `named_parameters()` gives them: a tied head is not there."""
    return {name: tensor.detach().clone() for name, tensor in model.llm.named_parameters()}


def tower_state(model: Parts) -> dict[str, torch.Tensor]:
    """With the level of names that transformers had before 5."""
    return {
        f"vision_model.{name.removeprefix('vision_model.')}": tensor.detach().clone()
        for name, tensor in model.tower.named_parameters()
    }


def connector_state(model: Parts) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.connector.named_parameters()}


def factory_config(model: Parts, **changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "llm_model_name_or_path": "somewhere/llm",
        "vision_model_name_or_path": "somewhere/tower",
        "vision_model_name_or_path2": "",
        "connector_type": "mlp2x_gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "square",
        "image_token_index": -200,
        "hidden_size": 256,
        "tokenizer_model_max_length": 3072,
        "text_config": model.text,
        "vision_config": {**model.vision, "model_name_or_path": "somewhere/tower"},
        "torch_dtype": "float32",
        **changes,
    }


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_factory(out: Path, model: Parts) -> Path:
    """(A) One safetensors file; buffers of old releases in it."""
    state = {f"language_model.{name}": tensor for name, tensor in llm_state(model).items()}
    state |= {f"vision_tower._vision_tower.{name}": tensor for name, tensor in tower_state(model).items()}
    state |= {f"connector._connector.{name}": tensor for name, tensor in connector_state(model).items()}
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["vision_tower._vision_tower.vision_model.embeddings.position_ids"] = torch.arange(9)[None]
    write_json(out / "config.json", factory_config(model))
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def write_components(out: Path, model: Parts) -> Path:
    """(B) Three folders of torch files; the configuration names no architecture."""
    config = factory_config(model)
    del config["architectures"]
    write_json(out / "config.json", config)
    write_json(out / "language_model/config.json", model.text)
    write_json(out / "vision_tower/config.json", model.vision)
    (out / "connector").mkdir()
    torch.save(llm_state(model), out / "language_model/pytorch_model.bin")
    torch.save(tower_state(model), out / "vision_tower/pytorch_model.bin")
    torch.save({f"_connector.{k}": v for k, v in connector_state(model).items()}, out / "connector/pytorch_model.bin")
    return out


class Whole(nn.Module):
    """Factory's nesting, for PEFT to wrap."""

    def __init__(self, model: Parts) -> None:
        super().__init__()
        self.language_model = model.llm
        self.vision_tower = nn.Module()
        self.vision_tower._vision_tower = model.tower
        self.connector = nn.Module()
        self.connector._connector = model.connector


def write_lora(out: Path, model: Parts, *, pickled: bool = False, **options: Any) -> tuple[Path, Parts]:
    """(C) The folders with `.base_layer` and an adapter by PEFT; also the model that PEFT itself merges."""
    import copy

    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(model)
    whole = Whole(model)
    targets = [
        name
        for name, module in whole.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("language_model") and "head" not in name
    ]
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.05, **options}
    wrapped = get_peft_model(whole, LoraConfig(target_modules=targets, **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    wrapped.save_pretrained(out, safe_serialization=not pickled)
    config = factory_config(model)
    del config["architectures"]
    write_json(out / "config.json", config)
    write_json(out / "language_model/config.json", model.text)
    write_json(out / "vision_tower/config.json", model.vision)
    (out / "connector").mkdir()
    base = {k: v.detach().clone() for k, v in model.llm.named_parameters() if "lora_" not in k}
    assert any(".base_layer." in name for name in base)
    torch.save(base, out / "language_model/pytorch_model.bin")
    torch.save(tower_state(model), out / "vision_tower/pytorch_model.bin")
    torch.save({f"_connector.{k}": v for k, v in connector_state(model).items()}, out / "connector/pytorch_model.bin")
    wrapped.merge_and_unload()
    return out, model


def write_legacy(out: Path, model: Parts, *, tower: bool = True) -> Path:
    """(D) LLaVA's layout; SigLIP has lost its last layer and its head. The tower's configuration is elsewhere."""
    state = llm_state(model)
    if tower:
        for name, tensor in tower_state(model).items():
            lost = model.vision["model_type"] == "siglip_vision_model" and (".layers.2." in name or ".head." in name)
            if not lost:
                state[f"model.vision_tower.vision_tower.{name}"] = tensor
    state |= {f"model.mm_projector.{name}": tensor for name, tensor in connector_state(model).items()}
    config = {
        **model.text,
        "architectures": [LEGACY[model.text["model_type"]]],
        "model_type": "tinyllava",
        "mm_vision_tower": "somewhere/tower",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": 64,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 3072,
        "torch_dtype": "float16",
    }
    write_json(out / "config.json", config)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def write_vision_dir(out: Path, model: Parts, *, weights: bool = False) -> Path:
    """The tower's own release: both towers' configuration, and weights with a text tower beside them."""
    kind = model.vision["model_type"].removesuffix("_vision_model")
    write_json(out / "config.json", {"model_type": kind, "vision_config": model.vision, "text_config": {}})
    if weights:
        state = {**tower_state(model), "logit_scale": torch.ones(1), "text_model.embeddings.weight": torch.ones(2, 2)}
        save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def write_llava(out: Path, model: Parts, *, nesting: str, image_id: int, strategy: str, version: str = "") -> Path:
    """(E) Hugging Face Llava: `old` until 4.51, `new` since, `five` as transformers 5 writes it."""
    rows = -(-(image_id + 1) // 64) * 64
    names = {
        "old": ("language_model.model.", "language_model.lm_head.", "vision_tower.", "multi_modal_projector."),
        "new": ("model.language_model.", "lm_head.", "model.vision_tower.", "model.multi_modal_projector."),
        "five": ("model.language_model.model.", "lm_head.", "model.vision_tower.", "model.multi_modal_projector."),
    }[nesting]
    state: dict[str, torch.Tensor] = {}
    for name, tensor in llm_state(model).items():
        if name in ("model.embed_tokens.weight", "lm_head.weight") and rows > tensor.shape[0]:
            tensor = torch.cat((tensor, torch.randn(rows - tensor.shape[0], tensor.shape[1])))
        prefix = names[0] if name.startswith("model.") else names[1]
        state[prefix + name.split(".", 1)[1]] = tensor
    for name, tensor in tower_state(model).items():
        state[names[2] + (name.removeprefix("vision_model.") if nesting == "five" else name)] = tensor
    for name, tensor in connector_state(model).items():
        state[names[3] + name.replace("0.", "linear_1.").replace("2.", "linear_2.")] = tensor
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": strategy,
        "text_config": {**model.text, "vocab_size": max(rows, model.text["vocab_size"])},
        "vision_config": model.vision,
        "pad_token_id": 0,
        **({"transformers_version": version} if version else {}),
    }
    write_json(out / "config.json", config)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out
