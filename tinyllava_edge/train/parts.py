"""What a stage trains (Figure 3 of the paper), part by part: frozen, full, from a layer on, or by low-rank adapters."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from ..model import TinyLlava
    from .recipes import StageRecipe

PARTS = {"tower": ".vision_tower.", "connector": ".multi_modal_projector.", "llm": "."}  # name → mark in a key
KINDS = ("frozen", "full", "lora", "qlora")
ADAPTERS = (".lora_A.", ".lora_B.")


@dataclass(frozen=True)
class Mode:
    """How one part is trained."""

    kind: str
    """one of KINDS, or `from`"""
    first: int = 0
    """`from`: the first layer that is trained"""

    @property
    def adapts(self) -> bool:
        """Whether low-rank adapters are trained in its stead."""
        return self.kind in ("lora", "qlora")


def parse_mode(text: str, where: str) -> Mode:
    """A mode as recipes write it. Raises UsageError that lists the known ones."""
    if text in KINDS:
        return Mode(text)
    kind, _, number = text.partition("-")
    if kind == "from" and number.isascii() and number.isdigit() and len(number) < 5:
        return Mode(kind, int(number))
    raise UsageError(f"{where} = {text!r}", f"known: {', '.join(KINDS)}, or from-K for layers K and up, e.g. from-12")


def modes(stage: StageRecipe) -> dict[str, Mode]:
    """Part → mode."""
    return {part: parse_mode(getattr(stage, part), f"stage {stage.name}: {part}") for part in PARTS}


def adapts(stage: StageRecipe) -> bool:
    """Whether a stage trains adapters in any part."""
    return any(mode.adapts for mode in modes(stage).values())


def part_of(key: str) -> str:
    """The part that a parameter or module of the model belongs to: key of PARTS."""
    return next(part for part, mark in PARTS.items() if mark in f".{key}.")


def freeze(model: TinyLlava, stage: StageRecipe) -> None:
    """Mark what a stage trains in `requires_grad`; adapters, where there are any, and whole tensors.

    Raises:
        UsageError: `from-K` for a part that has no layer K.
    """
    from torch import nn

    wanted = modes(stage)
    found = dict.fromkeys(PARTS, 0)
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    for key, parameter in model.named_parameters():
        part = part_of(key)
        trains = _trains(key, wanted[part], model, id(parameter) in embeddings)
        parameter.requires_grad = trains and parameter.is_floating_point()
        found[part] += parameter.requires_grad and layer_of(key) is not None
    for part, mode in wanted.items():
        if mode.kind == "from" and not found[part]:
            raise UsageError(
                f"stage {stage.name}: {part} = 'from-{mode.first}': the {part} has no such layer",
                "count its layers in config.json; a tower's last ones may never be reached",
            )


def _trains(key: str, mode: Mode, model: TinyLlava, is_embedding: bool) -> bool:
    from ..model import is_dead

    if any(mark in key for mark in ADAPTERS):
        return mode.adapts
    config = model.config
    if is_dead(key, int(config.vision_feature_layer), int(config.vision_config.num_hidden_layers)):
        return False
    if mode.kind == "from":
        layer = layer_of(key)
        after = part_of(key) == "llm" and not is_embedding  # the last norm and the head
        return after if layer is None else layer >= mode.first
    return mode.kind == "full"


def layer_of(key: str) -> int | None:
    """Layer that a parameter belongs to; none for embeddings, norms and heads."""
    words = key.split(".")
    for name in ("layers", "layer"):  # DINOv2 and BERT say `layer`
        if name in words[:-1] and words[words.index(name) + 1].isdigit():
            return int(words[words.index(name) + 1])
    return None


def halved(model: TinyLlava) -> list[nn.Linear]:
    """Linear layers whose weights a bf16 stage may keep in bf16: frozen, and no embedding at the same time."""
    from torch import nn

    embedding = model.get_input_embeddings().weight
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear and not module.weight.requires_grad and module.weight is not embedding
    ]


def halve_frozen(model: TinyLlava) -> None:
    """Keep those weights as autocast would make them anew at every step: half the memory, the same results."""
    import torch

    for module in halved(model):
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)


def adapted(model: TinyLlava, stage: StageRecipe) -> dict[str, nn.Linear]:
    """Name → linear layer that gets an adapter: all of a part but its output head, as in TinyLLaVA Factory.

    Those whose result never reaches the answer (the tower's last layer, its head) get none.
    """
    from torch import nn

    from ..model import is_dead

    wanted, config = modes(stage), model.config
    layers = int(config.vision_config.num_hidden_layers)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and wanted[part_of(name)].adapts
        and name != "lm_head"
        and not is_dead(f"{name}.weight", int(config.vision_feature_layer), layers)
    }


def adapter_size(model: TinyLlava, stage: StageRecipe, part: str) -> int:
    """Parameters of a part's adapters: rank x (inputs + outputs) for each linear layer."""
    linear = [module for name, module in adapted(model, stage).items() if part_of(name) == part]
    return sum(stage.lora_rank * (module.in_features + module.out_features) for module in linear)


def recompute(model: TinyLlava, on: bool) -> None:
    """Gradient checkpointing, under the name that transformers knows it by from 5 to 6."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()


def count_parts(model: TinyLlava, stage: StageRecipe) -> dict[str, dict[str, int]]:
    """Part → all of its parameters, and those that the stage trains, its adapters too; before they are put in."""
    freeze(model, stage)
    found = {part: {"parameters": 0, "trainable": adapter_size(model, stage, part)} for part in PARTS}
    for key, parameter in model.named_parameters():
        own = found[part_of(key)]
        own["parameters"] += parameter.numel()
        own["trainable"] += parameter.numel() * parameter.requires_grad
    return {part: found[part] for part in PARTS}
