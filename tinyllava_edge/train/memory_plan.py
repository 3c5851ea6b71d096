"""Memory of a training step, per device, from shapes alone.

States follow the ZeRO paper (Rajbhandari et al. 2020, §3): weights, gradients and Adam's two moments, whole or divided
over the devices. Activations are counted as in Korthikanti et al. 2022 (§4), tensor by tensor, for what transformers'
layers really keep for the backward pass: the residual stream and the norms stay float32 under autocast, every linear
layer keeps its own bf16 copy of its input, attention keeps queries, keys, values, result and mask but no scores.

Not counted: the driver's context, communication buffers of the libraries and the allocator's gaps.

Legend: b pictures, n positions, t = b·n tokens, h width, f inner width, a answer tokens, V vocabulary, N devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..towers import FAMILIES

FLOAT, HALF = 4, 2  # bytes
NF4 = 4.127 / 8  # bytes of a weight in 4 bits, with its quantised constants (QLoRA, §3)
CHUNK = 1024  # answer positions whose logits the objective has alive at once
LOGITS = 12  # bytes per logit at the worst moment: log-probabilities, their gradient, the logits' gradient, all float32


@dataclass(frozen=True)
class Engine:
    """How training states lie on the devices."""

    name: str
    """`ddp`, `zero2`, `zero3` or `fsdp`"""
    half_weights: bool
    """whether a bf16 stage keeps weights and gradients in bf16, and a float32 copy with the optimiser (DeepSpeed)"""
    shards: tuple[str, ...]
    """states that are divided over the devices: `weights`, `gradients`, `optimizer`"""


ENGINES = {
    "ddp": Engine("ddp", False, ()),
    "zero2": Engine("zero2", True, ("gradients", "optimizer")),  # P_os+g of the ZeRO paper
    "zero3": Engine("zero3", True, ("weights", "gradients", "optimizer")),  # P_os+g+p
    "fsdp": Engine("fsdp", False, ("weights", "gradients", "optimizer")),
}

# model_type → norms per layer, RMS norm, gated MLP
LAYERS: dict[str, tuple[int, bool, bool]] = {
    "llama": (2, True, True),
    "qwen2": (2, True, True),
    "qwen3": (2, True, True),
    "gemma": (2, True, True),
    "stablelm": (2, False, True),
    "phi": (1, False, False),
    "clip_vision_model": (2, False, False),
    "siglip_vision_model": (2, False, False),
    "siglip2_vision_model": (2, False, False),
    "dinov2": (2, False, False),
    "dinov2_with_registers": (2, False, False),
}
# activation → inner-width tensors kept in the computing type, and in float32 where autocast widens `pow` (on a GPU)
KEPT = {"gelu": (1, 0), "gelu_pytorch_tanh": (1, 0), "silu": (1, 0), "quick_gelu": (2, 0), "gelu_new": (1, 3)}


@dataclass(frozen=True)
class Stack:
    """Transformer layers, as far as memory depends on them."""

    layers: int
    """number of layers"""
    hidden: int
    """width h"""
    inner: int
    """width f of the MLP"""
    heads: int
    """attention heads"""
    queries: int
    """width of all heads together"""
    keys: int
    """width of the keys before they are repeated for each query head"""
    head_norms: bool
    """RMS norms on queries and keys (Qwen3)"""
    norms: int
    """norms in a layer"""
    rms: bool
    """RMS norms, written out in float32, instead of fused layer norms"""
    gated: bool
    """whether the MLP is gated: two linear layers in, one out"""
    activation: str
    """key of KEPT"""
    masked: bool
    """whether attention takes a mask, as the language model's does"""

    @classmethod
    def of(cls, config: Any, layers: int | None = None) -> Stack:
        """From a Hugging Face configuration of a tower or a language model. Raises UsageError for an unknown kind."""
        kind = config.model_type
        activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
        if kind not in LAYERS or activation not in KEPT:
            raise UsageError(
                f"no memory formula for {kind} layers with {activation}",
                f"known: {', '.join(LAYERS)} with {', '.join(KEPT)}",
            )
        norms, rms, gated = LAYERS[kind]
        heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
        head = int(getattr(config, "head_dim", None) or hidden // heads)
        inner = getattr(config, "intermediate_size", None) or hidden * int(getattr(config, "mlp_ratio", 4))
        return cls(
            layers=int(config.num_hidden_layers) if layers is None else layers,
            hidden=hidden,
            inner=int(inner),
            heads=heads,
            queries=heads * head,
            keys=int(getattr(config, "num_key_value_heads", None) or heads) * head,
            head_norms=kind == "qwen3",
            norms=1 if getattr(config, "use_parallel_residual", False) else norms,
            rms=rms,
            gated=gated,
            activation=activation,
            masked=kind not in FAMILIES,
        )


@dataclass(frozen=True)
class Types:
    """Bytes of a number while a layer computes."""

    width: int
    """what linear layers and attention compute in"""
    residual: int
    """residual stream"""

    @property
    def autocast(self) -> bool:
        """Whether linear layers make copies of float32 inputs and weights."""
        return self.width != self.residual


def types(precision: str, engine: Engine) -> Types:
    """Types of a stage in `bf16` or `fp32`."""
    if precision == "fp32":
        return Types(FLOAT, FLOAT)
    return Types(HALF, HALF if engine.half_weights else FLOAT)


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters on every linear layer of a stack."""

    rank: int = 0
    """0 for none"""
    dropout: bool = False
    """whether each adapter drops inputs of its own"""


NONE = Adapters()


def layer_bytes(stack: Stack, positions: float, kind: Types, trained: bool, adapters: Adapters = NONE) -> float:
    """Bytes per token that one layer keeps for the backward pass, its weights' copies aside.

    Args:
        positions: length of the sequence, for the mask.
        trained: whether its own weights get gradients; a frozen layer keeps no inputs of linear layers.
        adapters: what is trained in their stead: each keeps its input, its drop mask and its inner result.

    Source: Korthikanti et al. 2022, §4.1, `sbh(34 + 5as/h)` for GPT with half-precision residuals, dropout and stored
    scores; here each term is what transformers' own layers keep.
    """
    h, f, w = stack.hidden, stack.inner, kind.width
    if stack.rms:
        norm = stack.norms * h * (FLOAT + (kind.residual if trained else 0))
    else:
        norm = stack.norms * h * kind.residual
    if stack.head_norms:
        norm += (stack.queries + stack.keys) * (FLOAT + (w if trained else 0))
    attention = 4 * w * stack.queries + FLOAT * stack.heads + (w * positions if stack.masked else 0)
    narrow, wide = KEPT[stack.activation]
    mlp = f * (w * narrow + (FLOAT if kind.autocast else w) * wide)
    if stack.gated:
        mlp += 2 * w * f  # the activation's result and the other branch, for the product
    inputs = 0.0
    if trained:
        copies = 3 + (2 if stack.gated else 1) if kind.autocast else min(stack.norms, 2)
        inputs = w * (h * copies + f)
    if adapters.rank:
        linear = 7 if stack.gated else 6
        each = h * (3 + linear - 5) + stack.queries + f  # every linear layer's input by itself
        shared = h * min(stack.norms, 2) + f
        own = kind.autocast or adapters.dropout  # its copy in bf16, or what is left of its input
        inputs += w * (each if own else shared) + (each if adapters.dropout else 0) + w * adapters.rank * linear
    return norm + attention + mlp + inputs


def backward_bytes(stack: Stack, kind: Types) -> float:
    """Bytes per token of gradients that are alive inside one layer's backward pass."""
    return (3 if stack.gated else 2) * kind.width * stack.inner + 2 * kind.residual * stack.hidden


@dataclass(frozen=True)
class Counts:
    """Parameters, as far as memory depends on them."""

    all: int
    """all parameters"""
    trained: int
    """parameters that get gradients"""
    linear_trained: int
    """those of them in linear layers, which autocast copies"""
    linear_frozen: int
    """frozen ones in linear layers that gradients pass through, the language model's layers"""
    head: int
    """the output head's, if it is frozen"""
    block: int
    """the largest layer's, or the embedding's if that is larger: what sharded weights are gathered by"""
    layer: int
    """the largest layer's"""
    quantised: int = 0
    """those of all that are kept in 4 bits"""
    adapters: int = 0
    """those of all, and of the trained ones, that are adapters'; float32 in every engine"""
    halved: int = 0
    """frozen ones in linear layers, which plain bf16 training keeps in bf16"""


@dataclass(frozen=True)
class Shape:
    """A stage's model, as far as memory depends on it."""

    llm: Stack
    """language model"""
    tower: Stack
    """tower, all layers that are computed"""
    tower_trained: int
    """tower layers that get gradients"""
    counts: Counts
    """parameters"""
    llm_trained: bool
    """whether the language model gets gradients"""
    vocabulary: int
    """V"""
    image_size: int
    """side of a picture in pixels"""
    patches: int
    """tower tokens of a picture, class token included"""
    visual_tokens: int
    """positions of a picture in the language model"""
    llm_adapters: Adapters = NONE
    """the language model's"""
    tower_adapters: Adapters = NONE
    """the tower's"""


@dataclass(frozen=True)
class Load:
    """One forward and backward pass on one device."""

    pictures: int
    """b"""
    positions: float
    """n"""
    answers: float
    """answer tokens per sequence"""
    accumulate: int
    """passes per optimiser step"""
    features_cached: bool = False
    """the frozen tower does not run during training, its features are kept in host memory"""


@dataclass(frozen=True)
class Memory:
    """Bytes per device. The parts are not all alive at once, so they may add up to more than the peak."""

    weights: float
    """weights, frozen ones included"""
    gradients: float
    """gradients, DDP's communication buckets included"""
    optimizer: float
    """AdamW's moments, and DeepSpeed's float32 weights"""
    copies: float
    """bf16 copies of weights that autocast makes, or the gathered layer of sharded weights"""
    activations: float
    """what is kept for the backward pass"""
    logits: float
    """logits of the answer positions, with their gradients"""
    tower: float
    """the tower's hidden states while it runs; gone before the language model starts, unless it is trained"""
    workspace: float
    """one layer's recomputed activations and gradients"""
    peak: float
    """the most that is alive at once"""
    moment: str
    """when: `tower`, `backward` (its start) or `step`"""


def estimate(shape: Shape, load: Load, precision: str, engine: Engine, devices: int, checkpointing: bool) -> Memory:
    """Peak memory of one training step after the first.

    Args:
        precision: `bf16` or `fp32`.
        devices: over which the engine divides its shards.
        checkpointing: each layer keeps its input alone and is computed again.
    """
    kind, counts = types(precision, engine), shape.counts
    weights, gradients, optimizer = _states(counts, precision, engine, devices)
    tokens = load.pictures * load.positions
    layer = layer_bytes(shape.llm, load.positions, kind, shape.llm_trained, shape.llm_adapters)
    image_tokens = load.pictures * shape.visual_tokens
    tower_tokens = load.pictures * shape.patches

    kept = shape.llm.layers * (kind.residual * shape.llm.hidden if checkpointing else layer) * tokens
    kept += 3 * kind.residual * shape.llm.hidden * tokens  # embeddings, last hidden states, last norm
    kept += tower_tokens * (FLOAT + kind.width) * shape.tower.hidden  # the connector's input
    kept += image_tokens * (2 * kind.width + kind.residual) * shape.llm.hidden
    kept += load.pictures * (load.positions**2 + FLOAT * 3 * shape.image_size**2)  # boolean mask, pixels
    tower_layer = layer_bytes(shape.tower, shape.patches, kind, not shape.tower_adapters.rank, shape.tower_adapters)
    if shape.tower_trained:
        kept += (
            shape.tower_trained
            * (kind.residual * shape.tower.hidden if checkpointing else tower_layer)
            * (tower_tokens)
        )
    workspace = backward_bytes(shape.llm, kind) * tokens
    copied = HALF * counts.layer if kind.autocast else 0
    if checkpointing:
        workspace += layer * tokens + copied
    states = 0.0 if load.features_cached else (shape.tower.layers + 1) * kind.residual * shape.tower.hidden
    tower = tower_tokens * (states + (0 if load.features_cached else backward_bytes(shape.tower, kind)))
    logits = min(load.pictures * load.answers, CHUNK) * shape.vocabulary * LOGITS
    copies = _copies(counts, kind, engine, devices, checkpointing)

    before = gradients if load.accumulate > 1 or (engine.name == "ddp" and devices > 1) else 0.0
    moments = {
        "tower": weights + optimizer + before + tower,
        "backward": weights + optimizer + before + copies + kept + max(logits, workspace),
        "step": weights + optimizer + gradients + workspace,
    }
    moment = max(moments, key=lambda name: moments[name])
    return Memory(weights, gradients, optimizer, copies, kept, logits, tower, workspace, moments[moment], moment)


def _states(counts: Counts, precision: str, engine: Engine, devices: int) -> tuple[float, float, float]:
    """Weights, gradients, optimiser states of one device; ZeRO paper, Figure 1: 2, 2 and K = 12 bytes; ours 4, 4, 8."""
    half = engine.half_weights and precision == "bf16"
    share = {name: devices if name in engine.shards else 1 for name in ("weights", "gradients", "optimizer")}
    number = HALF if half else FLOAT
    buckets = 2 if engine.name == "ddp" and devices > 1 else 1  # DDP keeps its own copy of the gradients
    narrow = counts.halved if precision == "bf16" and not half and not engine.shards else 0
    packed = NF4 * counts.quantised + FLOAT * counts.adapters + HALF * narrow
    return (
        (number * (counts.all - counts.quantised - counts.adapters - narrow) + packed) / share["weights"],
        number * counts.trained * buckets / share["gradients"],
        (12 if half else 8) * counts.trained / share["optimizer"],
    )


def _copies(counts: Counts, kind: Types, engine: Engine, devices: int, checkpointing: bool) -> float:
    if "weights" in engine.shards and devices > 1:
        return 2.0 * kind.width * counts.block  # the layer at work and the next one, fetched ahead
    if not kind.autocast:
        return 0.0
    if not engine.shards:  # frozen weights are kept in bf16
        return float(HALF * counts.linear_trained)
    frozen = counts.head + (0 if checkpointing else counts.linear_frozen)
    return float(HALF * (counts.linear_trained + frozen))
