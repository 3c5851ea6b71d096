"""Answers held to a grammar or a JSON schema, by llguidance: a bit per token says what may come next.

llama.cpp's own grammar sampler is not used: a short hostile grammar fills the memory or ends the process. llguidance
counts its work, turns what is too much into an error, and was made for servers that take grammars from strangers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DependencyError, UsageError

Floats = npt.NDArray[np.float32]
MAX_TEXT = 64 << 10  # characters of a grammar or schema
MAX_SYMBOLS = 100_000  # of llguidance's productions
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_HINT = "see llama.cpp's grammars/README.md for GBNF; of JSON Schema, references to other documents are not followed"


class Vocabulary:
    """llguidance's form of a GGUF's vocabulary; built once per model.

    Args:
        vocab: llama.cpp's pointer.
        stops: ids that end an answer.

    Raises:
        DependencyError: llguidance isn't installed.
    """

    def __init__(self, vocab: Any, stops: Collection[int]) -> None:
        _llguidance()
        from llguidance.llamacpp import lltokenizer_from_vocab

        self.tokens = lltokenizer_from_vocab(vocab, eos_token=sorted(stops))


class Constraint:
    """One answer's place in a grammar.

    Args:
        vocabulary: the model's.
        grammar: what `from_gbnf` or `from_json_schema` gave.

    Raises:
        UsageError: llguidance can't take the grammar, or finds it too large.
    """

    def __init__(self, vocabulary: Vocabulary, grammar: str) -> None:
        llguidance = _llguidance()
        limits = llguidance.LLParserLimits(max_grammar_size=MAX_SYMBOLS)
        self._matcher = llguidance.LLMatcher(vocabulary.tokens, grammar, limits=limits, log_level=0)
        self._check()
        self._mask = np.zeros((vocabulary.tokens.vocab_size + 31) // 32, np.int32)

    def pick(self, logits: Floats, choose: Callable[[Floats], int]) -> int:
        """`choose` among the tokens (vocab,) that may come next, and go on from there.

        Raises:
            UsageError: nothing may come next, or the grammar has too many readings of this answer.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: len(logits)]
        token = choose(np.where(allowed, logits[: len(allowed)], np.float32(-np.inf))) if allowed.any() else -1
        if token < 0 or not allowed[token] or not self._matcher.consume_token(token):
            raise UsageError("no token of the vocabulary continues the answer as the grammar wants", "widen it")
        return token

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"grammar: {' '.join(self._matcher.get_error().split())[:300]}", _HINT)


def from_gbnf(text: str) -> str:
    """GBNF, llama.cpp's grammar notation → what Constraint takes. Raises UsageError."""
    _llguidance()
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if len(text) > MAX_TEXT:
        raise UsageError(f"grammar of {len(text):,} characters, limit {MAX_TEXT:,}", "write a smaller grammar")
    try:
        lark = gbnf_to_lark(text)
    except Exception as error:  # it raises bare Exceptions, and RecursionError on deep nesting
        raise UsageError(f"grammar: {' '.join(str(error).split())[:300]}", _HINT) from error
    return _answer({"lark_grammar": lark})


def from_json_schema(schema: Mapping[str, Any]) -> str:
    """A JSON schema → what Constraint takes; `{}` is any JSON value. Raises UsageError."""
    try:
        text = json.dumps(dict(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"JSON schema: {error}", "pass plain JSON values, not nested too deeply") from error
    if len(text) > MAX_TEXT:
        raise UsageError(f"JSON schema of {len(text):,} characters, limit {MAX_TEXT:,}", "write a smaller schema")
    return _answer({"json_schema": {**json.loads(text), "x-guidance": _SPACING}})


def _answer(inner: Mapping[str, Any]) -> str:
    """One space may stand in front, as most templates' answers have it; the text is stripped of it."""
    return json.dumps({"grammars": [{"lark_grammar": 'start: " "? @inner'}, {"name": "inner", **inner}]})


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise DependencyError("llguidance is not installed", "pip install 'tinyllava-edge[grammar]'") from error
    return llguidance
