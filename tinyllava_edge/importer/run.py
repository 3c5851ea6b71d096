"""`tinyllava-edge import`: a released model → a checkpoint that everything else runs from, offline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import checkpoint as checkpoints
from ..checkpoint_spec import SPEC_FILE, load_spec, read_json
from ..errors import CheckpointError, StorageError, UsageError
from ..files import new_directory, write_json
from ..image_numbers import PREPROCESSOR, find_processor
from ..model import build_model
from ..prompt import get_template
from ..spec import ModelSpec
from ..tensor_names import on_disk
from .configs import text_config, vision_config
from .describe import describe
from .gemma import scale_pictures
from .layouts import open_source
from .record import FILE, fingerprint, is_unchanged, write_record
from .shards import SHARD_BYTES, write_shards
from .tower import dead_parts, with_tower
from .vocabulary import EMBEDDING, HEAD_WEIGHT, generation, grow, image_token, load_tokenizer, tie

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ImportResult:
    """What an import did."""

    status: str
    """`imported`, or `unchanged` where the same import was there already"""
    out: Path
    """directory of the checkpoint"""
    layout: str
    """layout of the source, a key of layouts.COMPAT"""
    spec: ModelSpec
    """how the model must be fed"""
    bytes: int
    """size of the weights"""
    notes: tuple[str, ...]
    """what was decided or left out on the way, one sentence each"""


def import_checkpoint(
    source: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    vision: Path | None = None,
    vision2: Path | None = None,
    llm: Path | None = None,
    template: str | None = None,
    name: str | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> ImportResult:
    """Import a released model in any layout of `layouts`; tensors keep their type and are streamed.

    Args:
        source: directory of the model.
        out: checkpoint directory to write, whole or not at all.
        tokenizer: directory with tokenizer files, where the source has none.
        vision: Hugging Face directory of the tower: its configuration, and its weights where the source has none.
        vision2: Hugging Face directory of a mixture's second tower: its configuration alone is read.
        llm: Hugging Face directory of the language model: its configuration alone is read.
        template: key of prompt.TEMPLATES; by default the one that upstream pairs with the language model.
        name: label of the model; by default the source directory's name.
        force: replace `out`.
        shard_bytes: largest size of one weights file.
        progress: told each step.

    Raises:
        CheckpointError: no known layout, a part that can't be imported, or tensors that are missing, left over, of
            another shape or not finite; names the file, and the flag that helps.
        UsageError: unknown template, or `out` would replace the source.
        StorageError: `out` exists and isn't this very import, or the disk is full.
    """
    label = name or source.resolve().name
    given = {"tokenizer": tokenizer, "vision": vision, "vision2": vision2, "llm": llm}
    _check_arguments(source, out, given, template)
    wanted = fingerprint(source, given, {"template": template, "name": label, "shard_bytes": shard_bytes}, progress)
    if out.exists() and not force:
        if is_unchanged(out, wanted):
            return _unchanged(out)
        raise StorageError(
            f"{out} exists already, from other bytes or options",
            "name another place with -o, or replace it with --force",
        )
    opened, notes = with_tower(open_source(source), vision)
    text = text_config(opened, llm)
    tower = vision_config(opened, vision, vision2)
    processor = next((path for root in (source, vision) if root and (path := find_processor(root))), None)
    spec, tower = describe(opened, text, tower, processor=processor, template=template, name=label)
    tensors, scale_notes = scale_pictures(opened, text, opened.tensors)
    tensors, tower, told = dead_parts(tensors, tower)
    fast = load_tokenizer(opened, tokenizer, spec.llm_family, spec.template)
    image_id = image_token(opened, fast)
    if opened.config.get("tie_word_embeddings") is True and HEAD_WEIGHT not in tensors:
        text = {**text, "tie_word_embeddings": True}  # Llava's own configuration may say it alone
    tensors, tied_notes = tie(tensors, bool(text.get("tie_word_embeddings")))
    tensors, stored, rows = grow(source, tensors, fast)
    if rows != stored:
        notes.append(f"embedding grown from {stored} to {rows} rows for <image>")
    notes += [*scale_notes, *told, *tied_notes, *opened.notes]
    if template is None and spec.llm_family == "qwen2":
        notes.append("template qwen2_base assumed: the weights don't tell; --template qwen2_instruct is the other")
    if processor is None:
        notes.append(f"no {PREPROCESSOR}: {spec.vision_family}'s usual numbers taken; --vision DIR gives others")
    if stored == text["vocab_size"]:  # else the shapes below tell of it
        text = {**text, "vocab_size": rows}
    with checkpoints.building(source), torch.device("meta"):
        model = build_model(spec, tower, text, image_id, opened.options)
    expected = checkpoints.shapes(model)
    hint = "name the language model's or the tower's own configuration with --llm or --vision"
    checkpoints.check_tensors(source, {key: tensor.shape for key, tensor in tensors.items()}, expected, hint)
    with new_directory(out, force=force, ours="config.json") as temporary:
        model.config.dtype = tensors[EMBEDDING].dtype
        model.config.save_pretrained(temporary)
        ordered = [(on_disk(key, spec.vision_family), tensors[key]) for key in expected]
        size = write_shards(temporary, ordered, limit=shard_bytes, progress=progress)
        checkpoints.save_tokenizer(fast, temporary)
        write_json(temporary / PREPROCESSOR, checkpoints.processor_config(spec))
        write_json(temporary / "generation_config.json", generation(text, fast, spec.template))
        write_json(temporary / SPEC_FILE, spec.to_dict())
        write_record(temporary, wanted, {"layout": opened.layout, "bytes": size, "notes": notes})
    return ImportResult("imported", out, opened.layout, spec, size, tuple(notes))


def _check_arguments(source: Path, out: Path, given: Mapping[str, Path | None], template: str | None) -> None:
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such directory", "name a directory with a downloaded model")
    if template is not None and get_template(template).caption_only:
        raise UsageError(f"template {template!r} is for training only", "choose the template of the fine-tuning stage")
    if source.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{out} holds the source {source}", "name another place with -o")
    if out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out} lies in the source {source}", "name another place with -o")
    for flag, path in given.items():
        if path is not None and not path.is_dir():
            raise CheckpointError(f"{path}: no such directory", f"give --{flag} a local directory")


def _unchanged(out: Path) -> ImportResult:
    found = read_json(out / FILE)
    notes = tuple(str(note) for note in found.get("notes", ()))
    return ImportResult("unchanged", out, str(found.get("layout")), load_spec(out), int(found.get("bytes", 0)), notes)
