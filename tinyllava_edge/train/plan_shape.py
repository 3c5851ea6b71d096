"""A model as memory and time see it: sizes, what is trained, and operations of one sequence and one picture."""

from __future__ import annotations

from torch import nn

from ..model import TinyLlava
from ..spec import ModelSpec
from ..towers import TOWERS
from ..towers.mof import MixtureOfFeatures
from .memory_plan import Counts, Shape, Stack
from .plan_data import Lengths
from .recipes import StageRecipe


def model_shape(model: TinyLlava, spec: ModelSpec) -> Shape:
    """What memory depends on, for a model whose `requires_grad` flags are set."""
    llm, tower = model.model.language_model, model.model.vision_tower
    tower_layers = _tower_layers(tower)
    tower_config = getattr(model.config.vision_config, "first", model.config.vision_config)  # of two: alike in size
    head = model.lm_head.weight
    linear = {id(p): p for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    layers = [_size(layer) for layer in [*_layers(llm), *tower_layers]]
    embedding = model.get_input_embeddings().weight.numel()
    return Shape(
        llm=Stack.of(model.config.text_config),
        tower=Stack.of(tower_config, len(tower_layers)),
        tower_trained=sum(any(p.requires_grad for p in layer.parameters()) for layer in tower_layers),
        counts=Counts(
            all=_size(model),
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            linear_trained=sum(p.numel() for p in linear.values() if p.requires_grad),
            linear_frozen=sum(p.numel() for p in llm.parameters() if id(p) in linear and not p.requires_grad),
            head=0 if head.requires_grad else head.numel(),
            block=max(*layers, embedding),
            layer=max(layers),
        ),
        llm_trained=head.requires_grad,
        vocabulary=head.shape[0],
        image_size=spec.image_size,
        patches=spec.patches + TOWERS[spec.vision_family].class_token,
        visual_tokens=spec.visual_tokens,
    )


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
    """
    trained = shape.llm_trained
    times = 2 + trained + stage.gradient_checkpointing
    layers = sum(_size(layer) for layer in _layers(model.model.language_model))
    n, stack = found.positions, shape.llm
    attention = (3 + stage.gradient_checkpointing) * 4.0 * n * n * stack.queries * stack.layers
    head = (2 + trained) * 2.0 * found.answers * model.lm_head.weight.numel()
    connector = 3 * 2.0 * found.with_picture * shape.visual_tokens * _size(model.model.multi_modal_projector)
    return times * 2.0 * n * layers + attention + head + connector


def tower_flop(model: TinyLlava, shape: Shape, stage: StageRecipe) -> float:
    """Operations of the tower for one picture: all layers forwards, the trained ones backwards too."""
    layers = _tower_layers(model.model.vision_tower)
    trained = [layer for layer in layers if any(p.requires_grad for p in layer.parameters())]
    n, stack = shape.patches, shape.tower
    attention = 4.0 * n * n * stack.queries
    again = 2 + stage.gradient_checkpointing
    total = sum(2.0 * n * _size(layer) + attention for layer in layers)
    return total + again * sum(2.0 * n * _size(layer) + attention for layer in trained)
