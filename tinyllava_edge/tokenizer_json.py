"""`tokenizer.json` of a release → the form that is saved here, with the ids of the slow tokenizer it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .sentencepiece_file import SPACE
from .tokenizer_files import dress, finish
from .tokenizer_sections import ALWAYS, FIRST, NEVER, is_byte_piece
from .tokenizer_settings import RESTORE, Settings, SlowClass, is_markup, read_object


def from_json(path: Path, settings: Settings, slow: SlowClass | None) -> Any:
    """Read tokenizer.json, byte-level or SentencePiece-like.

    A SentencePiece-like one gets the space of its slow class instead of its own: `Metaspace` with scheme `first`
    leaves it out after a picture that stands in the text, and where a text starts with a space.

    Raises:
        CheckpointError: a damaged file; a model that is not BPE; a SentencePiece-like one with other steps.
    """
    from tokenizers import Tokenizer

    given = read_object(path)
    model = given.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else None
        raise CheckpointError(f"{path}: model {kind!r} is not BPE", "use the language model's own tokenizer")
    for token in given.get("added_tokens") or ():
        if isinstance(token, dict) and is_markup(str(token.get("content"))):
            token["special"], token["normalized"] = True, False
    try:
        raw = Tokenizer.from_str(json.dumps(given))
    except Exception as error:  # the Rust side raises bare Exception
        raise CheckpointError(f"{path}: not a tokenizer ({str(error)[:200]})", RESTORE) from error
    raw.no_padding()
    raw.no_truncation()
    if sum(is_byte_piece(text) for text in model["vocab"]) != 256:
        return finish(raw, settings, slow, {}, [])
    prefix = _prefix(path, given, settings)
    dress(raw, prefix != NEVER)
    defined = [t.content for t in raw.get_added_tokens_decoder().values() if t.normalized and not t.special]
    return finish(raw, settings, slow, {} if prefix == NEVER else {"legacy": prefix == ALWAYS}, defined)


def _prefix(path: Path, given: dict[str, Any], settings: Settings) -> str:
    """Where the space goes: by the file's own steps, and `legacy` where tokenizer_config.json tells."""
    normaliser, pre = given.get("normalizer") or {}, given.get("pre_tokenizer") or {}
    steps = [*(normaliser.get("normalizers") or [normaliser]), pre]
    known = {"Prepend": ALWAYS, "Replace": NEVER, "Split": NEVER}
    found = NEVER
    for step in steps:
        kind = step.get("type")
        if kind == "Metaspace" and step.get("replacement") == SPACE and not step.get("split"):
            found = {"always": ALWAYS, "first": FIRST, "never": NEVER}[step.get("prepend_scheme", "always")]
        elif kind in known and (kind == "Prepend" or step["pattern"] == {"String": " "}):
            found = found if kind != "Prepend" else ALWAYS
        elif kind is not None:
            raise CheckpointError(
                f"{path}: a SentencePiece-like tokenizer with {kind}", "give the release's tokenizer.model instead"
            )
    if found == NEVER or settings.legacy is None:
        return found
    return ALWAYS if settings.legacy else FIRST
