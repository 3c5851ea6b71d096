"""What a directory holds, told by `architectures` and by its parts, and where each tensor belongs. Never by its path.

factory      TinyLLaVA Factory, fine-tuned: language_model.*, vision_tower._vision_tower.*, connector._connector.*
components   Factory's pretraining stage: folders language_model, vision_tower, connector
lora         the same folders, `.base_layer` in the names, and a PEFT adapter beside them
legacy       LLaVA's layout: model.layers.*, model.mm_projector.*, model.vision_tower.vision_tower.*
llava        Hugging Face LlavaForConditionalGeneration, any nesting
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint_spec import SPEC_FILE, read_json
from ..connectors import CONNECTORS, MIXED
from ..errors import CheckpointError
from ..tensor_names import CONNECTOR, HEAD, TEXT, TOWER, in_memory, modern
from . import lora
from .lazy import Tensors, lazy
from .pickled import has_weights, open_any

COMPAT = {
    "factory": "factory",
    "components": "factory",
    "lora": "factory",
    "legacy": "legacy",
    "llava": "native",
}
FACTORY = "TinyLlavaForConditionalGeneration"
LLAVA = "LlavaForConditionalGeneration"
LEGACY = {
    "TinyLlavaPhiForCausalLM": "phi",
    "TinyLlavaStablelmForCausalLM": "stablelm",
    "TinyLlavaLlamaForCausalLM": "llama",
}
FOLDERS = ("language_model", "vision_tower", "connector")
# Buffers that every model computes anew; old releases stored them.
BUFFERS = (".rotary_emb.inv_freq", "embeddings.position_ids")
# Connector → its layers' names in the files, and ours.
_LAYERS = {
    "mlp2x_gelu": {"0.": "linear_1.", "2.": "linear_2."},
    "mof_mlp": {
        f"{theirs}.{index}.": f"{ours}.linear_{layer}."
        for theirs, ours in (("clip", "first"), ("dinov2", "second"))
        for index, layer in ((0, 1), (2, 2))
    },
}
Rename = Callable[[str], str | None]


@dataclass(frozen=True)
class Source:
    """A released model, opened: nothing of it is in memory yet."""

    root: Path
    """directory"""
    layout: str
    """key of COMPAT"""
    config: Mapping[str, Any]
    """config.json"""
    text: Mapping[str, Any] | None
    """configuration of the language model as the source gives it"""
    vision: Mapping[str, Any] | None
    """configuration of the tower as the source gives it"""
    vision_id: str
    """published name of the tower that the source gives"""
    vision_id2: str
    """published name of a mixture's second tower; empty for one tower"""
    connector: str
    """key of CONNECTORS"""
    options: Mapping[str, int]
    """`connector_options`"""
    tensors: Tensors
    """in-memory name → tensor; one without a place keeps its own name"""
    notes: tuple[str, ...]
    """what was left out on purpose, one sentence each"""


def open_source(root: Path) -> Source:
    """Detect the layout and open every file.

    Raises:
        CheckpointError: no known layout, a part or connector that can't be imported (named), damaged files.
    """
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such directory", "name a directory with a downloaded model")
    if (root / "bundle.json").is_file():
        raise CheckpointError(f"{root}: an exported bundle, not a model", "name the directory that was downloaded")
    config = read_json(root / "config.json")
    layout = detect(root, config)
    refuse(root, config)
    options: dict[str, int] = {}
    if layout == "llava":
        connector = _llava_connector(root, config)
    else:
        connector, options = _connector(root, config, "mm_projector_type" if layout == "legacy" else "connector_type")
    renames: dict[str, Rename] = {
        "legacy": lambda name: legacy_name(name, connector),
        "llava": in_memory,
    }
    rename = renames.get(layout, lambda name: factory_name(name, connector))
    folders = layout in ("components", "lora")
    raw = _folders(root) if folders else lazy(open_any(root))
    if layout != "lora" and (name := next((name for name in raw if ".base_layer." in name), None)):
        raise CheckpointError(
            f"{root}: {name} is the base of a LoRA adapter, and no {lora.CONFIG} is here",
            "copy the adapter's files too: without them its training would be lost",
        )
    tensors, notes = _renamed(root, raw, rename)
    if layout == "lora":
        tensors = lora.merge(root, tensors, rename)
        notes.append("LoRA adapter merged")
    text: Any = {**config, "model_type": LEGACY[config["architectures"][0]]} if layout == "legacy" else None
    vision: Any = None
    if folders:
        text, vision = (_optional_json(root / folder / "config.json") for folder in FOLDERS[:2])
    vision_id = config.get("mm_vision_tower" if layout == "legacy" else "vision_model_name_or_path")
    return Source(
        root,
        layout,
        config,
        text or config.get("text_config"),
        vision or config.get("vision_config"),
        vision_id if isinstance(vision_id, str) else "",
        str(config.get("vision_model_name_or_path2") or "") if connector in MIXED else "",
        connector,
        options,
        tensors,
        tuple(notes),
    )


def detect(root: Path, config: Mapping[str, Any]) -> str:
    """Layout of a directory: a key of COMPAT. Raises CheckpointError that says what was found and what is known."""
    if (root / SPEC_FILE).is_file():
        raise CheckpointError(f"{root}: is a checkpoint of this program already", "export it as it is")
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str) else None
    if name in LEGACY:
        return "legacy"
    if name == LLAVA:
        return "llava"
    # Factory's first stage and its LoRA recipe save the configuration without an architecture.
    if name == FACTORY or (not named and "connector_type" in config):
        if has_weights(root):
            return "factory"
        missing = [folder for folder in FOLDERS if not has_weights(root / folder)]
        if config.get("connector_type") == "identity" and missing == ["connector"]:
            missing = []
        if missing:
            raise CheckpointError(
                f"{root}: no weights here and none in {', '.join(missing)}", "copy the whole checkpoint again"
            )
        return "lora" if (root / lora.CONFIG).is_file() else "components"
    known = ", ".join((FACTORY, *LEGACY, LLAVA))
    raise CheckpointError(f"{root / 'config.json'}: architectures {str(named)[:120]}", f"known: {known}")


def refuse(root: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for whole features that would be imported wrongly, each by its name."""
    where = root / "config.json"
    if config.get("quantization_config"):
        raise CheckpointError(f"{where}: quantization_config: the weights are quantised", "import the full weights")
    second, connector = config.get("vision_model_name_or_path2"), config.get("connector_type")
    if bool(second) != (connector in MIXED):
        raise CheckpointError(
            f"{where}: vision_model_name_or_path2 {str(second)[:80]!r} with connector {str(connector)[:40]!r}",
            "a mixture of two towers has the connector mof_mlp, and no other model has it",
        )
    if config.get("mm_use_im_start_end"):
        raise CheckpointError(f"{where}: mm_use_im_start_end: marker tokens around pictures", "it can't be imported")
    if config.get("mm_patch_merge_type", "flat") != "flat":
        raise CheckpointError(
            f"{where}: mm_patch_merge_type {str(config['mm_patch_merge_type'])[:40]!r}", "known: flat"
        )


def factory_name(name: str, connector: str) -> str | None:
    """In-memory name of a Factory tensor, `.base_layer` left out; None if it has no place."""
    name = name.replace(".base_layer.", ".")
    for prefix, ours in (("language_model.model.", TEXT), ("language_model.lm_head.", HEAD)):
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    for prefix, part in (("clip.", "first."), ("dinov2.", "second.")) if connector in MIXED else (("", ""),):
        if name.startswith(f"vision_tower._vision_tower.{prefix}"):
            return tower_name(name.removeprefix(f"vision_tower._vision_tower.{prefix}"), part)
    if name.startswith("connector._connector."):
        return connector_name(name.removeprefix("connector._connector."), connector)
    return None


def legacy_name(name: str, connector: str) -> str | None:
    """In-memory name of a tensor in LLaVA's own layout; None if it has no place."""
    if name.startswith("model.vision_tower.vision_tower."):
        return tower_name(name.removeprefix("model.vision_tower.vision_tower."))
    if name.startswith("model.mm_projector."):
        return connector_name(name.removeprefix("model.mm_projector."), connector)
    if name.startswith(("model.vision_", "model.image_")):
        return None
    if name.startswith("model."):
        return TEXT + name.removeprefix("model.")
    return name if name.startswith(HEAD) else None


def tower_name(name: str, part: str = "") -> str:
    """In-memory name of a tensor in a tower's own files; `part` is the tower's place in a mixture."""
    return f"{TOWER}{part}" + modern(f".{name.removeprefix('vision_model.')}")[1:]


def connector_name(name: str, connector: str) -> str | None:
    """In-memory name of a connector's tensor; MLPs are stored as a sequence of layers."""
    if connector in _LAYERS:
        for stored, ours in _LAYERS[connector].items():
            if name.startswith(stored):
                return CONNECTOR + ours + name.removeprefix(stored)
        return None
    return CONNECTOR + ("layers." if connector.startswith("mlp") else "") + name


def _connector(root: Path, config: Mapping[str, Any], key: str) -> tuple[str, dict[str, int]]:
    """Name and options of the connector. Raises CheckpointError for one that isn't in CONNECTORS."""
    name = config.get(key)
    if not isinstance(name, str) or name not in CONNECTORS or (name == "resampler" and key == "mm_projector_type"):
        raise CheckpointError(
            f"{root / 'config.json'}: {key} {str(name)[:80]!r} can't be imported", f"known: {', '.join(CONNECTORS)}"
        )
    if name != "resampler":
        return name, {}
    given = {"num_queries": config.get("num_queries"), "num_layers": config.get("num_resampler_layers")}
    return name, {option: value for option, value in given.items() if value is not None}


def _llava_connector(root: Path, config: Mapping[str, Any]) -> str:
    for key, known in (("projector_hidden_act", "gelu"), ("multimodal_projector_bias", True)):
        if config.get(key, known) != known:
            raise CheckpointError(
                f"{root / 'config.json'}: {key} {str(config[key])[:40]!r} can't be imported", f"known: {known}"
            )
    return "mlp2x_gelu"


def _folders(root: Path) -> Tensors:
    """Tensors of the three folders under the names that the whole model gives them."""
    prefixes = {"language_model": "language_model.", "vision_tower": "vision_tower.", "connector": "connector."}
    tensors: Tensors = {}
    for folder in FOLDERS:
        if not has_weights(root / folder):
            continue  # identity has none
        for name, tensor in lazy(open_any(root / folder)).items():
            # The tower is saved from inside its wrapper, the connector from outside.
            inner = "_vision_tower." if folder == "vision_tower" and not name.startswith("_vision_tower.") else ""
            tensors[prefixes[folder] + inner + name] = tensor
    return tensors


def _renamed(root: Path, raw: Tensors, rename: Rename) -> tuple[Tensors, list[str]]:
    kept = {name: tensor for name, tensor in raw.items() if not name.endswith(BUFFERS)}
    notes = [f"{len(raw) - len(kept)} stored buffers left out: they are computed"] if len(kept) < len(raw) else []
    tensors: Tensors = {}
    for name, tensor in kept.items():
        ours = rename(name) or name
        if ours in tensors:
            raise CheckpointError(f"{root}: {name} and {tensors[ours].name} are the same tensor", "restore the files")
        tensors[ours] = tensor
    return tensors, notes


def _optional_json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None
