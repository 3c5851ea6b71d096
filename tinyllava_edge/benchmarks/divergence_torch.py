"""The reference's passes for the divergence: the tower, the greedy answer with its logits, teacher forcing.

Legend: t image embeddings, h width, n answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinyllava_edge.runtimes.base import IMAGE_PLACE
from tinyllava_edge.runtimes.text import check_max_tokens, count_positions

if TYPE_CHECKING:
    from tinyllava_edge.runtimes.reference import ReferenceRuntime

Floats = npt.NDArray[np.float32]


def image_embeds(runtime: ReferenceRuntime, pixels: Floats) -> Floats:
    """Pixels (3, s, s) → image embeddings (t, h) by the reference's tower and connector."""
    import torch

    with torch.inference_mode():
        features = runtime.model.tower_features(torch.from_numpy(pixels)[None])  # (1, p, v)
        found: Floats = runtime.model.model.multi_modal_projector(features)[0].numpy()
    return found


def greedy(
    runtime: ReferenceRuntime, prompt: Sequence[int], embeds: Floats, max_tokens: int
) -> tuple[tuple[int, ...], Floats]:
    """The reference's greedy answer, token by token with its cache, as `ReferenceRuntime.answer` gives it.

    Args:
        runtime: the reference.
        prompt: ids with one IMAGE_PLACE.
        embeds: image embeddings (t, h).
        max_tokens: most tokens; the end token counts where it comes within them.

    Returns:
        The n tokens, the end token included where the answer ended, and the logits (n, vocab) each was chosen from.
    """
    import torch

    check_max_tokens(max_tokens)
    limit = min(max_tokens, runtime.n_ctx - count_positions(prompt, runtime.spec, runtime.n_ctx) + 1)
    tokens: list[int] = []
    logits: list[Floats] = []
    with torch.inference_mode():
        rows, cache = _rows(runtime, prompt, embeds), None
        while True:
            out = runtime.model.model.language_model(inputs_embeds=rows, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(runtime.model.lm_head(out.last_hidden_state[0, -1]).numpy())
            tokens.append(int(logits[-1].argmax()))
            if tokens[-1] in runtime.stops or len(tokens) == limit:
                return tuple(tokens), np.stack(logits)
            rows = runtime.model.get_input_embeddings()(torch.tensor([tokens[-1:]]))


def forced(runtime: ReferenceRuntime, prompt: Sequence[int], embeds: Floats, answer: Sequence[int]) -> Floats:
    """Logits (n, vocab) before each of an answer's n tokens, prompt and answer fed in one pass (teacher forcing)."""
    import torch

    with torch.inference_mode():
        rows = _rows(runtime, [*prompt, *answer[:-1]], embeds)
        out = runtime.model.model.language_model(inputs_embeds=rows, use_cache=False)
        found: Floats = runtime.model.lm_head(out.last_hidden_state[0, -len(answer) :]).numpy()
    return found


def _rows(runtime: ReferenceRuntime, ids: Sequence[int], embeds: Floats) -> Any:
    """Ids with one IMAGE_PLACE → (1, positions, h), the picture's embeddings as they are (Gemma scales tokens only)."""
    import torch

    place, slot = list(ids).index(IMAGE_PLACE), runtime.model.config.image_token_id
    expanded = [*ids[:place], *[slot] * len(embeds), *ids[place + 1 :]]
    rows = runtime.model.get_input_embeddings()(torch.tensor([expanded]))
    rows[0, place : place + len(embeds)] = torch.from_numpy(embeds)
    return rows
