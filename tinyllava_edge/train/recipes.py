"""Recipes as plain values: the paper's `base` and `share` (§4.1.2, Figure 3), Factory's share, `full`, nano sizes.

The TOML files in `train/recipes/` hold the same numbers for reading and copying; `load` takes a name or a file.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..errors import UsageError
from ..toml_files import place, read_toml
from .parts import PARTS, parse_mode

SCHEDULERS = ("cosine", "linear", "constant")
LARGEST_BATCH = 1 << 20
PRECISIONS = ("bf16", "fp32")
ATTENTIONS = ("auto", "sdpa", "flash")
TEMPLATES = ("pretrain", "model")


@dataclass(frozen=True)
class StageRecipe:
    """One stage of training."""

    name: str
    """stage name, e.g. `pretrain`"""
    template: str
    """`pretrain`: image and caption (Eq. 1); `model`: the conversation template of the checkpoint (Eq. 3)"""
    llm: str
    """language model and head: `frozen`, `full`, `from-K` (layers K and up, last norm, head), `lora` or `qlora`"""
    learning_rate: float
    """peak learning rate of AdamW"""
    batch_size: int
    """pictures (packs) per optimiser step, over all devices"""
    epochs: float = 1.0
    """passes over the data"""
    connector: str = "full"
    """connector: modes as `llm`"""
    tower: str = "frozen"
    """tower: modes as `llm`; `from-12` is the paper's share, `full` takes its embeddings too"""
    lora_rank: int = 128
    """rank of the adapters of parts in `lora` or `qlora` mode"""
    lora_alpha: float = 256.0
    """adapters are scaled by lora_alpha / lora_rank"""
    lora_dropout: float = 0.05
    """dropout in front of the adapters"""
    micro_batch: int = 0
    """pictures per device and forward pass; the gradients of batch_size are accumulated; 0 takes batch_size at once"""
    warmup_ratio: float = 0.03
    """share of the steps over which the learning rate rises"""
    lr_scheduler: str = "cosine"
    """`cosine`, `linear` or `constant`, after the warm-up"""
    weight_decay: float = 0.0
    """AdamW's decay of matrices"""
    adam_beta2: float = 0.999
    """AdamW's second-moment decay"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm; 0 turns clipping off"""
    max_turns: int = 1
    """single-turn rows on one picture that share its prefix; 1 trains every row by itself"""
    max_length: int = 0
    """positions after which a row is cut, image included; 0 takes the checkpoint's own limit"""
    pack_length: int = 0
    """positions of a sequence in which rows of a micro-batch stand end to end, apart; 0: each its own, padded"""
    group_by_length: bool = True
    """rows of like length come in the same batch; off: any order, as the paper's stage 1"""
    attention: str = "auto"
    """`sdpa`, `flash` (FlashAttention 2: a micro-batch is one sequence without padding) or `auto`, which takes flash
    where it is installed, on a GPU, in bf16, for rows that share no prefix"""
    compile: bool = False
    """compile the language model's layers with torch.compile"""
    precision: str = "bf16"
    """`bf16`: autocast with float32 weights (frozen ones in bf16), where the device has instructions, else as `fp32`"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    save_steps: int = 500
    """optimiser steps between two saved states"""
    seed: int = 42
    """seed of the data order and of everything random"""


@dataclass(frozen=True)
class Recipe:
    """The stages that make a model out of backbones."""

    name: str
    """recipe name, as in a variant's name"""
    stages: tuple[StageRecipe, ...]
    """stages in order"""
    notes: str = ""
    """where the numbers come from"""
    rows: tuple[int, ...] = ()
    """conversations of each stage's own data set, for `--dry-run`; empty where the recipe has none of its own"""

    def stage(self, name: str) -> StageRecipe:
        """A stage by its exact name. Raises UsageError that lists the names."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise UsageError(
            f"recipe {self.name} has no stage {name!r}", f"known: {', '.join(s.name for s in self.stages)}"
        )


# Conversations of the paper's data sets, as its table of §4.1.2 rounds them.
LLAVA_PT, LLAVA_SFT, SHARE_PT, SHARE_SFT = 558_000, 665_000, 1_246_000, 665_000

_BASE_1 = StageRecipe(
    "pretrain", "pretrain", "frozen", 1e-3, 256, micro_batch=32, max_length=2048, gradient_checkpointing=True
)
_BASE_2 = StageRecipe(
    "finetune", "model", "full", 2e-5, 128, micro_batch=8, max_length=2048, gradient_checkpointing=True
)
_FULL_2 = dataclasses.replace(_BASE_2, tower="from-0")
_SHARE_2 = StageRecipe(
    "share-pretrain",
    "pretrain",
    "full",
    2e-5,
    256,
    tower="from-12",
    micro_batch=8,
    max_length=3072,
    gradient_checkpointing=True,
)
_SHARE_3 = dataclasses.replace(_BASE_2, max_length=3072)
_LORA_2 = dataclasses.replace(_SHARE_3, llm="lora", learning_rate=2e-4)
_QLORA_2 = dataclasses.replace(_LORA_2, llm="qlora", micro_batch=4)
_CUSTOM = dataclasses.replace(_LORA_2, learning_rate=1e-4, micro_batch=4)

_NANO_1 = StageRecipe("pretrain", "pretrain", "frozen", 1e-3, 64, epochs=2.0, adam_beta2=0.98, save_steps=200)
_NANO_2 = StageRecipe("finetune", "model", "full", 1e-3, 24, epochs=2.0, adam_beta2=0.98, max_turns=16, save_steps=200)
_NANO_LORA = dataclasses.replace(_NANO_2, llm="lora", learning_rate=2e-3, lora_rank=64, lora_alpha=128.0)
_NANO_SHARE = StageRecipe(
    "share-pretrain",
    "pretrain",
    "full",
    1e-3,
    64,
    epochs=1.0,
    tower="from-2",
    adam_beta2=0.98,
    save_steps=200,
)

PRESETS: dict[str, Recipe] = {
    "base": Recipe(
        "base",
        (_BASE_1, _BASE_2),
        "The paper's base recipe (§4.1.2): stage 1 trains the connector, stage 2 the connector and the language model, "
        "one epoch each. Warm-up, cosine and weight decay as in LLaVA-1.5, maximal lengths as in TinyLLaVA Factory.",
        (LLAVA_PT, LLAVA_SFT),
    ),
    "share": Recipe(
        "share",
        (_BASE_1, _SHARE_2, _SHARE_3),
        "The paper's share recipe (§4.1.2, Figure 3): the connector starts from base's stage 1, then everything but "
        "the first 12 tower layers is trained on long captions, then stage 2 of base. Maximal lengths as in the "
        "released share models.",
        (LLAVA_PT, SHARE_PT, SHARE_SFT),
    ),
    "share-factory": Recipe(
        "share-factory",
        (
            dataclasses.replace(_BASE_1, max_length=3072),
            dataclasses.replace(_SHARE_2, tower="frozen"),
            _SHARE_3,
        ),
        "TinyLLaVA Factory's share scripts: as share, but the tower is frozen in every stage. They train in fp16; this "
        "recipe in bf16.",
        (LLAVA_PT, SHARE_PT, SHARE_SFT),
    ),
    "full": Recipe(
        "full",
        (_BASE_1, _FULL_2),
        "base, with every tower layer that the features pass through trained in stage 2 too; the tower's patch and "
        "position embeddings stay as they are. Not from the paper.",
        (LLAVA_PT, LLAVA_SFT),
    ),
    "lora": Recipe(
        "lora",
        (dataclasses.replace(_BASE_1, max_length=3072), _LORA_2),
        "TinyLLaVA Factory's LoRA script after base's stage 1: adapters of rank 128 in the language model, the "
        "connector whole. It trains in fp16; this recipe in bf16.",
        (LLAVA_PT, LLAVA_SFT),
    ),
    "qlora": Recipe(
        "qlora",
        (dataclasses.replace(_BASE_1, max_length=3072, micro_batch=8), _QLORA_2),
        "lora with the language model's layers in 4 bits (NF4, QLoRA §3), for one GPU of 24 GB. Factory's script has "
        "8 bits.",
        (LLAVA_PT, LLAVA_SFT),
    ),
    "custom": Recipe(
        "custom",
        (_CUSTOM,),
        "TinyLLaVA Factory's script for one's own data: adapters on a trained checkpoint, which --checkpoint names. "
        "For a few thousand rows raise epochs to 3 and lower batch_size to 32.",
    ),
    "base-nano": Recipe(
        "base-nano",
        (_NANO_1, _NANO_2),
        "base for models of a few million parameters and 64 x 64 pictures, on two CPU cores. The learning rate of "
        "stage 2 is 50 times the paper's: a small model bears it, and it has minutes instead of GPU days. The batch "
        "of 24 pictures holds about 250 answers; the paper's holds 128 conversations.",
    ),
    "share-nano": Recipe(
        "share-nano",
        (_NANO_1, _NANO_SHARE, _NANO_2),
        "share for the nano models: the connector starts from base-nano's stage 1, then everything but the first 2 of "
        "the tower's 4 live layers (the paper: 12 of 24) is trained on captions, then stage 2 of base-nano. Learning "
        "rates and batches as in base-nano.",
    ),
    "lora-nano": Recipe(
        "lora-nano",
        (_NANO_1, _NANO_LORA),
        "lora for the nano models: rank 64 of width 256, twice the learning rate of base-nano.",
    ),
    "qlora-nano": Recipe(
        "qlora-nano",
        (_NANO_1, dataclasses.replace(_NANO_LORA, llm="qlora")),
        "lora-nano with the language model's layers in 4 bits; runs on a CPU too, slowly.",
    ),
}


def load(name_or_path: str | Path) -> Recipe:
    """A preset by its exact name, or a TOML file's recipe.

    Raises:
        UsageError: unknown name, unreadable file, unknown or missing key, or a value out of range.
    """
    name = str(name_or_path)
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith(".toml"):
        raise UsageError(f"unknown recipe {name!r}", f"known: {', '.join(PRESETS)}, or the path of a .toml file")
    return recipe_from(read_toml(name, "compare with the files in train/recipes"), place(name))


def recipe_from(value: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from parsed TOML or JSON; `where` is named in errors."""
    _known(value, Recipe, where)
    stages = value.get("stages")
    if not isinstance(stages, list | tuple) or not stages or not all(isinstance(stage, Mapping) for stage in stages):
        raise UsageError(f"{where}: `stages` must be a list of tables", "write [[stages]] in front of each stage")
    texts = {key: value.get(key, "") for key in ("name", "notes")}
    if not texts["name"] or not all(isinstance(text, str) for text in texts.values()):
        raise UsageError(f"{where}: `name` must be text, and `notes` too where given", 'write name = "my-recipe"')
    built = tuple(_stage(stage, f"{where}: stage {k}") for k, stage in enumerate(stages, 1))
    return Recipe(texts["name"], built, texts["notes"], _rows(value.get("rows", ()), len(built), where))


def _rows(given: Any, stages: int, where: str) -> tuple[int, ...]:
    good = isinstance(given, list | tuple) and all(type(count) is int and 0 < count < 1 << 40 for count in given)
    if not good or len(given) not in (0, stages):
        raise UsageError(
            f"{where}: `rows` must be a list of {stages} numbers of conversations, one for each stage",
            "leave it out, or write rows = [558000, 665000]",
        )
    return tuple(given)


def override(stage: StageRecipe, changes: Mapping[str, Any]) -> StageRecipe:
    """The stage with some fields changed. Raises UsageError for an unknown field or a value out of range."""
    return _stage({**dataclasses.asdict(stage), **changes}, f"stage {stage.name}")


def _stage(value: Mapping[str, Any], where: str) -> StageRecipe:
    _known(value, StageRecipe, where)
    hints = get_type_hints(StageRecipe)
    clean: dict[str, Any] = {}
    for field in dataclasses.fields(StageRecipe):
        if field.name not in value:
            if field.default is dataclasses.MISSING:
                raise UsageError(f"{where}: {field.name} is missing", f"needed: {', '.join(_needed())}")
            continue
        clean[field.name] = _typed(value[field.name], hints[field.name], f"{where}: {field.name}")
    stage = StageRecipe(**clean)
    _check(stage, where)
    return stage


def _typed(given: Any, hint: Any, where: str) -> Any:
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in kinds and type(given) is int and abs(given) < 1 << 53:
        return float(given)
    if type(given) not in kinds:
        names = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
        raise UsageError(f"{where} = {_short(given)}: not of type {names}", "compare with the files in train/recipes")
    return given


def _check(stage: StageRecipe, where: str) -> None:
    for name, known in (
        ("lr_scheduler", SCHEDULERS),
        ("precision", PRECISIONS),
        ("template", TEMPLATES),
        ("attention", ATTENTIONS),
    ):
        if getattr(stage, name) not in known:
            raise UsageError(f"{where}: {name} = {getattr(stage, name)!r}", f"known: {', '.join(known)}")
    kinds = [parse_mode(getattr(stage, part), f"{where}: {part}").kind for part in PARTS]
    if set(kinds) == {"frozen"}:
        raise UsageError(f"{where}: every part is frozen", 'train one, e.g. connector = "full"')
    if stage.batch_size > LARGEST_BATCH:
        raise UsageError(f"{where}: batch_size = {_short(stage.batch_size)}", f"it must be at most {LARGEST_BATCH:,}")
    lowest: dict[str, float] = {
        "batch_size": 1,
        "max_turns": 1,
        "save_steps": 1,
        "micro_batch": 0,
        "max_length": 0,
        "pack_length": 0,
        "seed": 0,
    }
    lowest |= {"weight_decay": 0, "max_grad_norm": 0, "lora_rank": 1}
    for name, limit in lowest.items():
        given = getattr(stage, name)
        if given is not None and not limit <= given < 2**31:
            raise UsageError(f"{where}: {name} = {_short(given)}", f"it must be at least {limit:g}")
    if not stage.name or not 0 < stage.learning_rate < 1 or not 0 < stage.epochs <= 1000:
        raise UsageError(
            f"{where}: learning_rate = {stage.learning_rate}, epochs = {stage.epochs}",
            "a name, a learning rate between 0 and 1, and 0 < epochs <= 1000 are needed",
        )
    if not 0 < stage.lora_alpha < 1e6 or not 0 <= stage.lora_dropout < 1:
        raise UsageError(
            f"{where}: lora_alpha = {stage.lora_alpha:g}, lora_dropout = {stage.lora_dropout:g}",
            "alpha above 0, and 0 <= dropout < 1",
        )
    if stage.attention == "flash" and stage.max_turns > 1:
        raise UsageError(
            f"{where}: attention = 'flash' with max_turns = {stage.max_turns}",
            "FlashAttention knows no shared prefix: set max_turns = 1, or attention = 'sdpa'",
        )
    if not 0 <= stage.warmup_ratio < 1 or not 0 < stage.adam_beta2 < 1:
        raise UsageError(
            f"{where}: warmup_ratio = {stage.warmup_ratio}, adam_beta2 = {stage.adam_beta2}", "0 <= value < 1"
        )
    if stage.micro_batch and stage.batch_size % stage.micro_batch:
        raise UsageError(
            f"{where}: batch_size = {stage.batch_size} is no multiple of micro_batch = {stage.micro_batch}",
            "choose a micro_batch that divides batch_size",
        )


def _short(given: Any) -> str:
    """A value as messages repeat it."""
    if type(given) is int and abs(given) >= 1 << 63:
        return "a very large number"
    return repr(given)[:40] if isinstance(given, str | int | float) else f"a {type(given).__name__}"


def _known(value: Mapping[str, Any], kind: type, where: str) -> None:
    fields = [field.name for field in dataclasses.fields(kind)]
    unknown = [key for key in value if key not in fields]
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}", f"known: {', '.join(fields)}")


def _needed() -> list[str]:
    return [field.name for field in dataclasses.fields(StageRecipe) if field.default is dataclasses.MISSING]
