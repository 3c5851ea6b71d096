"""Tokenizer with an `<image>` token of its own, and embedding tables that have a row for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..prompt import IMAGE_MARKER, get_template
from ..tensor_names import HEAD, TEXT
from .layouts import COMPAT, Source
from .lazy import Tensors

EMBEDDING, HEAD_WEIGHT, HEAD_BIAS = f"{TEXT}embed_tokens.weight", f"{HEAD}weight", f"{HEAD}bias"
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
MULTIPLE = 64  # rows are padded to it, as in Hugging Face's Llava files
# Logit that a biased head gives to its new rows: never the largest, and finite in float16.
NEW_BIAS = -1e4


def load_tokenizer(source: Source, given: Path | None, llm_family: str, template: str) -> Any:
    """The fast tokenizer of a directory. Raises CheckpointError that names the flag where there is none.

    Factory and legacy models are trained with slow tokenizers, Hugging Face's Llava with the fast one in its file.
    """
    from ..tokenizer_files import factory_special_tokens, fast_tokenizer

    root = given or source.root
    if not any((root / name).is_file() for name in FILES):
        raise CheckpointError(
            f"{root}: no {', '.join(FILES[:-1])} or {FILES[-1]}",
            "name a directory with the language model's tokenizer: --tokenizer DIR",
        )
    # the 2.0 B model was trained while StableLM-2 had a tokenizer of its own, whose splitting is in the fast file only
    own = source.layout == "legacy" and llm_family == "stablelm"
    fast = (source.layout == "llava" or own) and (root / "tokenizer.json").is_file()
    tokenizer = fast_tokenizer(root, source="json" if fast else "slow")
    if COMPAT[source.layout] == "factory":
        factory_special_tokens(tokenizer, llm_family)
    end = get_template(template).end_of_turn
    if end not in tokenizer.get_vocab():
        raise CheckpointError(
            f"{root}: the tokenizer has no {end!r}, which ends a turn in template {template}",
            "choose another with --template, or the model's own tokenizer with --tokenizer",
        )
    return tokenizer


def image_token(source: Source, tokenizer: Any) -> int:
    """Id of `<image>`: the one that a Llava configuration names, else the tokenizer's, else a new one behind the last.

    Raises:
        CheckpointError: configuration and tokenizer disagree.
    """
    if source.layout == "llava":
        told = source.config.get("image_token_index", source.config.get("image_token_id", 32000))
        if type(told) is not int or tokenizer.convert_tokens_to_ids(IMAGE_MARKER) != told:
            raise CheckpointError(
                f"{source.root}: image_token_index is {str(told)[:40]}, the tokenizer gives {IMAGE_MARKER} "
                f"{tokenizer.convert_tokens_to_ids(IMAGE_MARKER)}",
                "name the model's own tokenizer with --tokenizer",
            )
        return told
    tokenizer.add_tokens([IMAGE_MARKER], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_MARKER))


def grow(root: Path, tensors: Tensors, tokenizer: Any) -> tuple[Tensors, int, int]:
    """Tables with a row for every token; rows before and after.

    New rows are zero, so a new token's logit is 0 until it is trained; a head with a bias gives NEW_BIAS instead. Spare
    rows that the source has anyway (Phi-2: 51,200 for 50,295 tokens) are used as they are.

    Raises:
        CheckpointError: no embedding among the tensors.
    """
    if EMBEDDING not in tensors:
        raise CheckpointError(f"{root}: missing: {EMBEDDING}", "copy the whole checkpoint again")
    old = tensors[EMBEDDING].shape[0]
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed <= old:
        return tensors, old, old
    rows = -(-needed // MULTIPLE) * MULTIPLE
    grown = dict(tensors)
    for name, fill in ((EMBEDDING, 0.0), (HEAD_WEIGHT, 0.0), (HEAD_BIAS, NEW_BIAS)):
        if name in tensors and tensors[name].shape[:1] == (old,):
            tensor = tensors[name]
            grown[name] = tensor.with_change(_extend(rows - old, fill), (rows, *tensor.shape[1:]))
    return grown, old, rows


def tie(tensors: Tensors, tied: bool) -> tuple[Tensors, list[str]]:
    """A tied model keeps the embedding alone, whichever name its file has; the head follows it on loading."""
    if not tied or HEAD_WEIGHT not in tensors:
        return tensors, []
    kept = dict(tensors)
    head = kept.pop(HEAD_WEIGHT)
    if EMBEDDING not in kept:
        return {**kept, EMBEDDING: head}, ["tied embedding was stored as the head"]
    same = kept[EMBEDDING].shape == head.shape and torch.equal(kept[EMBEDDING].read(), head.read())
    kind = "" if same else " and differs: upstream overwrites it with the embedding"
    return kept, [f"tied head was stored too{kind}; left out"]


def generation(text: Mapping[str, Any], tokenizer: Any, template: str) -> dict[str, Any]:
    """generation_config.json: the ids that begin, end and pad; decoding settings are the runtime's."""
    own = text.get("eos_token_id")
    ends = [
        *(own if isinstance(own, list) else [own]),
        tokenizer.convert_tokens_to_ids(get_template(template).end_of_turn),
    ]
    rows = int(text["vocab_size"])
    known = [end for end in dict.fromkeys(ends) if type(end) is int and 0 <= end < rows]
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": known[0] if len(known) == 1 else known}
    pad = tokenizer.pad_token_id
    return {key: value for key, value in {**ids, "pad_token_id": pad}.items() if value not in (None, [])}


def _extend(count: int, fill: float) -> Any:
    def change(table: torch.Tensor) -> torch.Tensor:
        return torch.cat((table, table.new_full((count, *table.shape[1:]), fill)))

    return change
