"""Which model a training starts from when it starts a new one: a variant of the paper, or parts of one's own."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..connectors import connector_tokens
from ..errors import StorageError, UsageError
from ..files import write_json
from ..model import TinyLlava, build_model
from ..spec import DEFAULT_VARIANT, LLM_BACKBONES, VISION_BACKBONES, ModelSpec, model_spec
from ..spec import variant as find_variant
from .backbones import backbone_directory, init_checkpoint, tower_config
from .compose import read_llm, read_towers, spec_of

MAX_LENGTH = 1 << 20  # positions; more than any language model's


@dataclass(frozen=True)
class NewModel:
    """A model that is not trained yet."""

    spec: ModelSpec
    """how it must be fed"""
    vision: tuple[Path, ...]
    """directories of its tower, or of both of a mixture; none where a variant's are not there"""
    llm: Path | None
    """directory of its language model, or none likewise"""

    def without_weights(self) -> TinyLlava:
        """Its architecture on the meta device; a variant's needs no directory."""
        if self.vision and self.llm:
            vision, text = tower_config(read_towers(self.vision).configs), dict(read_llm(self.llm).to_dict())
        else:
            chosen = find_variant(self.spec.name)
            vision, text = dict(VISION_BACKBONES[chosen.vision].config), dict(LLM_BACKBONES[chosen.llm].config)
        with torch.device("meta"):
            return build_model(self.spec, vision, text, int(text["vocab_size"]) - 1)

    def write(self, out: Path) -> None:
        """Its checkpoint: pretrained tower and language model, random connector, unless that very one is there.

        What it was made of is kept beside it. Raises as `init_checkpoint`.
        """
        vision, llm = self.vision, self.llm
        if not vision or llm is None:
            chosen = find_variant(self.spec.name)
            vision = vision or (backbone_directory(None, VISION_BACKBONES[chosen.vision].hub_id, "--vision"),)
            llm = llm or backbone_directory(None, LLM_BACKBONES[chosen.llm].hub_id, "--llm")
        made_of = {"spec": self.spec.to_dict(), "parts": [_facts(path) for path in (*vision, llm)]}
        record = out.parent / f"{out.name}.json"
        try:
            if out.is_dir() and json.loads(record.read_text(encoding="utf-8")) == json.loads(json.dumps(made_of)):
                return
        except (OSError, ValueError, RecursionError):
            pass
        if out.exists() and not record.is_file():
            raise StorageError(f"{out}: stands where the untrained model is kept", "move it, or name another -o")
        record.unlink(missing_ok=True)
        init_checkpoint(self.spec, out, vision_dir=vision, llm_dir=llm, force=True)
        write_json(record, made_of)


def _facts(directory: Path) -> list[list[object]]:
    """Name, size and time of change of a directory's files."""
    found = [(path.name, path.stat()) for path in sorted(directory.iterdir()) if path.is_file()]
    return [[name, fact.st_size, fact.st_mtime_ns] for name, fact in found]


def new_model(
    variant: str = "",
    vision: tuple[Path, ...] = (),
    llm: Path | None = None,
    *,
    connector: str = "",
    template: str = "",
    name: str = "",
    max_length: int = 0,
    image_policy: str = "",
) -> NewModel:
    """The model that the flags ask for.

    Args:
        variant: name as in Table A1; empty for parts of one's own, and for the shipped nano variant without parts.
        vision, llm: directories of the parts; where only one is given without a variant, the other is the nano one.
        connector: in place of the variant's.
        template, name, image_policy: of parts of one's own alone.

    Raises:
        UsageError: unknown variant, or flags that don't go together.
        CheckpointError: a directory that can't be read, or parts that don't fit.
    """
    if not 0 <= max_length <= MAX_LENGTH:
        raise UsageError(f"--max-length {str(max_length)[:40]}", f"0 to {MAX_LENGTH:,} positions")
    if variant or not (vision or llm):
        for flag, given in (("--template", template), ("--name", name), ("--image-policy", image_policy)):
            if given:
                raise UsageError(
                    f"{flag} {given!r} with the variant {variant or DEFAULT_VARIANT}",
                    "it belongs to parts of one's own: --vision and --llm without --variant",
                )
        spec = model_spec(variant or DEFAULT_VARIANT, max_length)
        if connector:
            tokens = connector_tokens(connector, spec.feature_tokens)
            spec = dataclasses.replace(spec, connector=connector, visual_tokens=tokens)
        return NewModel(spec, vision, llm)
    nano = find_variant(DEFAULT_VARIANT)
    towers = tuple(backbone_directory(path, "", "--vision") for path in vision)
    towers = towers or (backbone_directory(None, VISION_BACKBONES[nano.vision].hub_id, "--vision"),)
    text = backbone_directory(llm, LLM_BACKBONES[nano.llm].hub_id, "--llm")
    spec = spec_of(
        towers, text, connector=connector, template=template, name=name, image_policy=image_policy,
        max_length=max_length,
    )  # fmt: skip
    return NewModel(spec, towers, text)
