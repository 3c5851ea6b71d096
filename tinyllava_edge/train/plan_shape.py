"""A model as memory and time see it: sizes, what is trained, and operations of one sequence and one picture."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..model import TinyLlava
from ..spec import ModelSpec
from ..towers import TOWERS
from ..towers.mof import MixtureOfFeatures
from .memory_plan import NONE, Adapters, Counts, Shape, Stack
from .parts import Mode, adapted, adapter_size, halved, modes, part_of
from .plan_data import Lengths
from .recipes import StageRecipe


def model_shape(model: TinyLlava, spec: ModelSpec, stage: StageRecipe) -> Shape:
    """What memory depends on, for a model whose `requires_grad` flags are set and whose adapters are not put in yet."""
    llm, tower = model.model.language_model, model.model.vision_tower
    tower_layers = _tower_layers(tower)
    tower_config = getattr(model.config.vision_config, "first", model.config.vision_config)  # of two: alike in size
    head = model.lm_head.weight
    linear = {id(p): p for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    layers = [_size(layer) for layer in [*_layers(llm), *tower_layers]]
    embedding = model.get_input_embeddings().weight.numel()
    targets, wanted = adapted(model, stage), modes(stage)
    packed = {id(module) for name, module in targets.items() if wanted[part_of(name)].kind == "qlora"}
    inserted = sum(adapter_size(model, stage, part) for part in wanted)
    given = Adapters(stage.lora_rank, stage.lora_dropout > 0)
    return Shape(
        llm=Stack.of(model.config.text_config),
        tower=Stack.of(tower_config, len(tower_layers)),
        tower_trained=len(_trained(tower_layers, wanted["tower"], stage, model)),
        counts=Counts(
            all=_size(model) + inserted,
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad) + inserted,
            linear_trained=sum(p.numel() for p in linear.values() if p.requires_grad) + inserted,
            linear_frozen=sum(p.numel() for p in llm.parameters() if id(p) in linear and not p.requires_grad),
            head=0 if head.requires_grad else head.numel(),
            block=max(*layers, embedding),
            layer=max(layers),
            quantised=sum(module.weight.numel() for module in targets.values() if id(module) in packed),
            adapters=inserted,
            halved=sum(
                p.numel()
                for module in halved(model)
                if id(module) not in packed
                for p in module.parameters(recurse=False)
            ),
        ),
        llm_trained=head.requires_grad,
        vocabulary=head.shape[0],
        image_size=spec.image_size,
        patches=spec.patches + TOWERS[spec.vision_family].class_token,
        visual_tokens=spec.visual_tokens,
        llm_adapters=given if wanted["llm"].adapts else NONE,
        tower_adapters=given if wanted["tower"].adapts else NONE,
    )


def _trained(layers: Sequence[nn.Module], mode: Mode, stage: StageRecipe, model: TinyLlava) -> list[nn.Module]:
    """The tower layers that get gradients, by adapters or of their own."""
    if mode.adapts:
        chosen = {id(module) for module in adapted(model, stage).values()}
        return [layer for layer in layers if any(id(module) in chosen for module in layer.modules())]
    return [layer for layer in layers if any(p.requires_grad for p in layer.parameters())]


def _layers(module: nn.Module) -> list[nn.Module]:
    """The transformer layers of a tower or a language model: its longest list of modules."""
    lists = [list(item) for item in module.modules() if isinstance(item, nn.ModuleList)]
    return max(lists, key=len)


def _tower_layers(tower: nn.Module) -> list[nn.Module]:
    """The layers of a tower, or of both towers of a mixture."""
    parts = [tower.first, tower.second] if isinstance(tower, MixtureOfFeatures) else [tower]
    return [layer for part in parts for layer in _layers(part)]


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def sequence_flop(model: TinyLlava, shape: Shape, found: Lengths, stage: StageRecipe) -> float:
    """Operations of the language model, its head and the connector for one sequence, forwards and backwards.

    2 per weight and token forwards (Kaplan et al. 2020, §2.1), as much for the gradients of the inputs, as much again
    for those of trained weights, and forwards once more with gradient checkpointing; attention's products likewise.
    Not counted: logits beyond CHUNK answers, which are computed twice.
    """
    layers = sum(_size(layer) for layer in _layers(model.model.language_model))
    own = [p for layer in _layers(model.model.language_model) for p in layer.parameters() if p.requires_grad]
    times = 2 + sum(p.numel() for p in own) / layers + stage.gradient_checkpointing
    low_rank = (3 + stage.gradient_checkpointing) * 2.0 * adapter_size(model, stage, "llm")
    n, stack = found.positions, shape.llm
    attention = (3 + stage.gradient_checkpointing) * 4.0 * n * n * stack.queries * stack.layers
    head = (2 + shape.llm_trained) * 2.0 * found.answers * model.lm_head.weight.numel()
    connector = 3 * 2.0 * found.with_picture * shape.visual_tokens * _size(model.model.multi_modal_projector)
    return n * (times * 2.0 * layers + low_rank) + attention + head + connector


def tower_flop(model: TinyLlava, shape: Shape, stage: StageRecipe) -> float:
    """Operations of the tower for one picture: all layers forwards, the trained ones backwards too."""
    layers = _tower_layers(model.model.vision_tower)
    mode = modes(stage)["tower"]
    trained = _trained(layers, mode, stage, model)
    n, stack = shape.patches, shape.tower
    attention = 4.0 * n * n * stack.queries
    again = (1 if mode.adapts else 2) + stage.gradient_checkpointing
    total = sum(2.0 * n * _size(layer) + attention for layer in layers)
    total += sum(again * 2.0 * n * _size(layer) + (2 + stage.gradient_checkpointing) * attention for layer in trained)
    return total + (3 + stage.gradient_checkpointing) * 2.0 * n * adapter_size(model, stage, "tower")
