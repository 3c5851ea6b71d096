"""Whether a language model computes what Llava and packed rows need, told by running it on a few tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..checkpoint import line
from ..errors import CheckpointError

# Two turns behind one prefix of four tokens, as a pack lays them out: the second turn's positions start again at 4.
_IDS, _POSITIONS, _PREFIX, _TURN = (3, 1, 4, 1, 5, 9, 2, 6), (0, 1, 2, 3, 4, 5, 4, 5), 4, 2
_HINT = "choose another language model; Llama's, Phi's, Qwen's and their kin do"
TOLERANCE = 1e-3  # float32, of the largest logit


def check_forward(llm: Any, path: Path) -> None:
    """Raise CheckpointError unless a causal language model can be Llava's and take packed rows.

    Its logits must be its head on its decoder's output, from embeddings alone: what a model does besides (Gemma 2 caps
    its logits, Granite scales them, others look tokens up again in later layers) would be lost without a word. And a
    turn in a pack must see the prefix and itself only, at its own positions: models with other attention or with
    distances by place (ALiBi, state spaces) would learn from the wrong text.

    Args:
        llm: a causal language model of transformers in float32.
        path: its directory, for messages.
    """
    kind, rows = llm.config.model_type, llm.config.vocab_size
    ids = torch.tensor([_IDS]) % rows
    alone = torch.cat((ids[:, :_PREFIX], ids[:, _PREFIX + _TURN :]), dim=1)
    try:
        with torch.no_grad():
            plain = llm.eval()(input_ids=alone).logits  # (1, 6, vocabulary)
            again = _logits(llm, alone, torch.ones_like(alone, dtype=torch.bool), torch.arange(6)[None])
            packed = _logits(llm, ids, _mask(), torch.tensor([_POSITIONS]))
    except Exception as error:  # a model that takes no embeddings, masks or positions says so in its own way
        raise CheckpointError(f"{path}: {kind} can't run on embeddings ({line(error)})", _HINT) from error
    limit = TOLERANCE * float(plain.abs().max())
    if again.shape != plain.shape or not float((again - plain).abs().max()) <= limit:
        raise CheckpointError(f"{path}: {kind} computes more than its head on its decoder's output", _HINT)
    if not float((packed[:, -_TURN:] - plain[:, -_TURN:]).abs().max()) <= limit:
        raise CheckpointError(f"{path}: {kind} doesn't keep to the positions and the mask of packed rows", _HINT)


def _logits(llm: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits (1, n, vocabulary) by the way that training takes: embeddings, decoder, head."""
    decoder, head = llm.get_decoder(), llm.get_output_embeddings()
    embeds = llm.get_input_embeddings()(ids)
    out = decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
    return torch.nn.functional.linear(out.last_hidden_state, head.weight, head.bias)


def _mask() -> torch.Tensor:
    """Who sees whom in the pack, bool (1, 1, 8, 8)."""
    seen = torch.ones(len(_IDS), len(_IDS), dtype=torch.bool).tril()
    seen[_PREFIX + _TURN :, _PREFIX : _PREFIX + _TURN] = False
    return seen[None, None]
