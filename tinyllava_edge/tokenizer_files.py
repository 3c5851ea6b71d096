"""A language model's tokenizer files → one fast tokenizer with the ids of the slow tokenizer that upstream trains with.

Upstream (TinyLLaVA Factory, transformers 4.40, `use_fast=False`) reads `tokenizer.model`, or `vocab.json` and
`merges.txt`, with the slow class that tokenizer_config.json names. This reads the same files by the same rules and
gives a tokenizer that can be saved as tokenizer.json; where a tokenizer.json beside them splits text otherwise, the
slow files win, unless `source` says `json`. A chat template is dropped: these models are trained with other prompts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import CheckpointError, UsageError
from .sentencepiece_file import (
    BYTE,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    SentencePieceFile,
    read_sentencepiece,
)
from .tokenizer_sections import ALWAYS, FIRST, NEVER
from .tokenizer_settings import (
    BYTE_LEVEL,
    MAX_BYTES,
    RESTORE,
    SLOW_CLASSES,
    Settings,
    SlowClass,
    is_markup,
    read_object,
    read_settings,
)


def fast_tokenizer(
    directory: Path, *, source: str = "slow", tokenizer_class: str | None = None, legacy: bool | None = None
) -> Any:
    """Read a tokenizer offline and without remote code.

    Args:
        directory: holds tokenizer.model, vocab.json and merges.txt, or tokenizer.json, and the settings beside them.
        source: `slow` takes the slow class's files where they are there, and tokenizer.json elsewhere; `json` takes
            tokenizer.json alone, as a model needs that was trained with a fast tokenizer.
        tokenizer_class: key of SLOW_CLASSES, in place of the one in tokenizer_config.json.
        legacy: Llama's prefix space, in place of `legacy` in tokenizer_config.json: True adds it after every special
            token, False where a chunk starts only.

    Returns:
        `PreTrainedTokenizerFast`. Its `init_kwargs["legacy"]` says which of Llama's kinds it is (see
        `tokenizer_sections.space_prefix`).

    Raises:
        CheckpointError: a file that is missing, damaged, or of a kind that has no exact form here; it is named.
        UsageError: an unknown `source` or `tokenizer_class`.
    """
    directory = Path(directory)
    if source not in ("slow", "json"):
        raise UsageError(f"tokenizer source {source!r}", "known: slow, json")
    if tokenizer_class is not None and tokenizer_class not in SLOW_CLASSES:
        raise UsageError(f"tokenizer class {tokenizer_class!r}", f"known: {', '.join(SLOW_CLASSES)}")
    settings = read_settings(directory)
    if legacy is not None:
        settings = replace(settings, legacy=legacy)
    name = tokenizer_class or settings.tokenizer_class or ""
    slow = SLOW_CLASSES.get(name)
    if source == "slow" and slow is not None and all((directory / file).is_file() for file in slow.files):
        read = _byte_level if slow.files == BYTE_LEVEL else _sentencepiece
        return read(directory, settings, slow)
    if (directory / "tokenizer.json").is_file():
        from .tokenizer_json import from_json

        return from_json(directory / "tokenizer.json", settings, slow)
    if slow is None and any((directory / file).is_file() for file in ("tokenizer.model", "vocab.json")):
        raise CheckpointError(
            f"{settings.path}: tokenizer_class is {name!r}, not one of {', '.join(SLOW_CLASSES)}",
            "copy tokenizer_config.json of the language model's release next to the tokenizer's files",
        )
    wanted = " and ".join(slow.files) if slow and source == "slow" else "tokenizer.json"
    raise CheckpointError(
        f"{directory}: no {wanted} here", "give a local directory with the language model's tokenizer"
    )


# Factory's change after loading: (token to set, token to copy). Its key `qwen2` takes Qwen2 and Qwen2.5; Qwen3, which
# it does not have, follows.
_FACTORY = {
    "llama": ("pad_token", "unk_token"),
    "phi": ("pad_token", "unk_token"),
    "gemma": ("pad_token", "unk_token"),
    "qwen2": ("unk_token", "pad_token"),
    "qwen3": ("unk_token", "pad_token"),
    "stablelm": None,
}


def factory_special_tokens(tokenizer: Any, model_type: str) -> None:
    """Set the special tokens that Factory sets after loading, in place.

    Args:
        tokenizer: from `fast_tokenizer`.
        model_type: the language model's, as in its config.json.

    Raises:
        CheckpointError: the token that is to be copied does not exist.
        UsageError: an unknown `model_type`.
    """
    if model_type not in _FACTORY:
        raise UsageError(f"language model type {model_type!r}", f"known: {', '.join(_FACTORY)}")
    change = _FACTORY[model_type]
    if change is None:
        return
    target, origin = change
    if getattr(tokenizer, origin) is None:
        raise CheckpointError(f"the tokenizer has no {origin}, which its {target} is", "restore tokenizer_config.json")
    setattr(tokenizer, target, getattr(tokenizer, origin))


def complete_special_tokens(tokenizer: Any, end_of_turn: str) -> None:
    """Give a tokenizer the special tokens that training and the runtimes need where it has none, in place.

    Told by the tokenizer's own tokens, not by a model's name: text ends with `end_of_turn` where there is no other end,
    and padding, which no loss counts, is the unknown token or else the end.
    """
    if tokenizer.eos_token is None:
        tokenizer.eos_token = end_of_turn
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


# tokenizer.model


def _sentencepiece(directory: Path, settings: Settings, slow: SlowClass) -> Any:
    """Llama's and Gemma's: BPE over the whole section, spaces as U+2581, bytes for what has no piece."""
    from tokenizers import Tokenizer, models

    file = read_sentencepiece(directory / "tokenizer.model")
    vocab = {piece.text: index for index, piece in enumerate(file.pieces)}
    unknown = next(piece.text for piece in file.pieces if piece.kind == UNKNOWN)
    fallback = sum(piece.kind == BYTE for piece in file.pieces) == 256
    raw = Tokenizer(models.BPE(vocab, merges_of(file.pieces), unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    prefix = _prefix(settings, file, slow)
    dress(raw, prefix != NEVER)
    defined = [piece.text for piece in file.pieces if piece.kind == USER_DEFINED]
    return finish(raw, settings, slow, {} if prefix == NEVER else {"legacy": prefix == ALWAYS}, defined)


def _prefix(settings: Settings, file: SentencePieceFile, slow: SlowClass) -> str:
    """The slow class's space: what the model's file says, or for Llama's new kind `add_prefix_space`."""
    if slow is SLOW_CLASSES["LlamaTokenizer"] and settings.legacy is False:
        return NEVER if settings.add_prefix_space is False else FIRST
    return ALWAYS if file.dummy_prefix else NEVER


def merges_of(pieces: tuple[Piece, ...]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first: SentencePiece's order as a list of merges."""
    ids = {piece.text: index for index, piece in enumerate(pieces) if piece.kind == NORMAL}
    merges: list[tuple[str, str]] = []
    for piece in sorted((p for p in pieces if p.kind == NORMAL and len(p.text) > 1), key=lambda p: -p.score):
        halves = ((piece.text[:k], piece.text[k:]) for k in range(1, len(piece.text)))
        merges += sorted(
            (pair for pair in halves if pair[0] in ids and pair[1] in ids), key=lambda p: (ids[p[0]], ids[p[1]])
        )
    return merges


def dress(raw: Any, prefix: bool) -> None:
    """Give a SentencePiece-like tokenizer its normaliser and decoder, with or without a space in front."""
    from tokenizers import decoders, normalizers

    spaces = normalizers.Replace(" ", SPACE)
    raw.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    raw.pre_tokenizer = None
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)


# vocab.json and merges.txt


def _byte_level(directory: Path, settings: Settings, slow: SlowClass) -> Any:
    """GPT-2's, CodeGen's (Phi-2) and Qwen2's: bytes as letters, text split by a pattern before merging."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if settings.add_prefix_space:
        raise CheckpointError(f"{settings.path}: add_prefix_space is on, which has no GGUF form", "turn it off")
    vocab = _vocab(directory / "vocab.json")
    raw = Tokenizer(models.BPE(vocab, _merges(directory / "merges.txt", vocab)))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not slow.pattern)
    raw.pre_tokenizer = level
    if slow.pattern:
        split = pre_tokenizers.Split(Regex(slow.pattern), behavior="isolated", invert=False)
        raw.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if slow.nfc:
        raw.normalizer = normalizers.NFC()
    raw.decoder = decoders.ByteLevel()
    return finish(raw, settings, slow, {}, [])


def _vocab(path: Path) -> dict[str, int]:
    vocab = read_object(path)
    for text, index in vocab.items():
        if not text or not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < 1 << 24:
            raise CheckpointError(f"{path}: {text[:60]!r} has id {index!r}", RESTORE)
    if not vocab or len(set(vocab.values())) < len(vocab):
        raise CheckpointError(f"{path}: {'two tokens share an id' if vocab else 'empty'}", RESTORE)
    return vocab


def _merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, more than a tokenizer takes", RESTORE)
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: can't be read ({error})", RESTORE) from error
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        halves = line.rstrip("\r").split(" ")
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        if len(halves) != 2 or any(text not in vocab for text in (*halves, "".join(halves))):
            raise CheckpointError(f"{path}: line {number}: {line[:60]!r} joins no two tokens of vocab.json", RESTORE)
        merges.append((halves[0], halves[1]))
    return merges


# what all have in common


def finish(raw: Any, settings: Settings, slow: SlowClass | None, kept: dict[str, Any], defined: list[str]) -> Any:
    """Add the special and added tokens with the ids they must have, the marks at the ends, and transformers' face.

    Args:
        raw: `tokenizers.Tokenizer` with its vocabulary.
        settings: from `read_settings`.
        slow: class whose defaults fill the gaps; none where tokenizer.json alone decides.
        kept: further entries of tokenizer_config.json.
        defined: pieces that are taken out of text first, whatever stands around them.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    special = (slow.special if slow else {}) | settings.special
    named = {*special.values(), *settings.more}
    raw.add_tokens([AddedToken(text, normalized=True, special=False) for text in defined if text not in named])
    for index, (text, is_special) in sorted(settings.added.items()):
        if is_special or text in named or is_markup(text):
            raw.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        elif text not in defined:
            raw.add_tokens([AddedToken(text, normalized=False, special=False)])
        if raw.token_to_id(text) != index:
            raise CheckpointError(
                f"{settings.path}: token {text!r} has id {index}, but would get {raw.token_to_id(text)}",
                "restore the tokenizer's files: they belong to different releases",
            )
    for text in sorted(named):
        if raw.token_to_id(text) is None:
            raise CheckpointError(f"{settings.path}: special token {text!r} is not in the vocabulary", RESTORE)
    raw.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in sorted(named)])
    ends = _ends(settings, slow, special)
    if ends is not None:
        raw.post_processor = _post_processor(raw, *ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        **special,
        **({"additional_special_tokens": list(settings.more)} if settings.more else {}),
        **({"model_max_length": settings.max_length} if settings.max_length else {}),
        **kept,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def _ends(settings: Settings, slow: SlowClass | None, special: dict[str, str]) -> tuple[str, str] | None:
    """Tokens around every text; None keeps what tokenizer.json does."""
    if slow is None and settings.add_bos is None and settings.add_eos is None:
        return None
    add_bos = settings.add_bos if settings.add_bos is not None else slow is not None and slow.add_bos
    for wanted, key in ((add_bos, "bos_token"), (settings.add_eos, "eos_token")):
        if wanted and key not in special:
            raise CheckpointError(f"{settings.path}: every text gets a {key}, but there is none", RESTORE)
    return special["bos_token"] if add_bos else "", special["eos_token"] if settings.add_eos else ""


def _post_processor(raw: Any, bos: str, eos: str) -> Any:
    from tokenizers import processors

    ends = {text: raw.token_to_id(text) for text in (bos, eos) if text}
    single = [part for part in (bos, "$A", eos) if part]
    pair = [*single, *(part for part in (bos, "$B:1", eos) if part)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(ends.items()))
