"""Greedy decoding with the ONNX decoder and plain ONNX Runtime: no llama.cpp, no torch.

Legend: n positions, h width of the language model, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from .providers import CPU
from .text import take
from .vision import one_line, open_session

Floats = npt.NDArray[np.float32]
_PAST, _PRESENT = "past_key_values.", "present."


class Decoder:
    """`embed_tokens*.onnx` and `decoder_model_merged*.onnx` of one export.

    Args:
        embed_tokens: path of the embedding graph.
        decoder: path of the decoder.
        n_threads: threads of one operator.
        providers: ONNX Runtime execution providers of the decoder.

    Raises:
        BundleError: a file is missing or damaged, or refers to weights outside its directory.
        EngineError: ONNX Runtime can't open a graph, or it isn't such a graph.
        DependencyError: onnxruntime isn't installed.
    """

    def __init__(
        self, embed_tokens: Path, decoder: Path, *, n_threads: int = 1, providers: Sequence[str] = (CPU,)
    ) -> None:
        self._embed = open_session(embed_tokens, n_threads, (CPU,), _parts(embed_tokens))
        self._decoder = open_session(decoder, n_threads, providers, _parts(decoder))
        self._paths = (embed_tokens, decoder)
        inputs = {node.name: node for node in self._decoder.get_inputs()}
        caches = [name for name in inputs if name.startswith(_PAST)]
        outputs = [node.name for node in self._decoder.get_outputs()]
        expected = {"logits", *(_PRESENT + name.removeprefix(_PAST) for name in caches)}
        if set(inputs) - set(caches) != {"inputs_embeds", "attention_mask"} or not caches or set(outputs) != expected:
            raise EngineError(f"{decoder}: not a decoder that takes inputs_embeds", "export it again")
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self._empty: dict[str, Any] = {}
        for name in caches:
            _, heads, _, side = inputs[name].shape
            if inputs[name].type not in kinds or not isinstance(heads, int) or not isinstance(side, int):
                raise EngineError(f"{decoder}: {name} is {inputs[name].type} {inputs[name].shape}", "export it again")
            self._empty[name] = np.zeros((1, heads, 0, side), kinds[inputs[name].type])
        self._outputs = outputs

    def embed(self, ids: Sequence[int]) -> Floats:
        """Token ids → embeddings (n, h)."""
        (rows,) = self._run(0, ["inputs_embeds"], {"input_ids": np.array([ids], np.int64)})
        found: Floats = rows[0]
        return found

    def logits(self, embeds: Floats) -> Floats:
        """Logits (n, v) of every position of a sequence (n, h)."""
        found: Floats = self._step(embeds, self._empty, 0)[0]
        return found

    def generate(self, embeds: Floats, *, max_tokens: int, stops: Collection[int] = ()) -> list[int]:
        """Greedy tokens after a prompt (n, h); ends before a token of `stops`. Ties go to the lowest id."""
        return self.answer(embeds, max_tokens=max_tokens, stops=stops)[1]

    def answer(self, embeds: Floats, *, max_tokens: int, stops: Collection[int] = ()) -> tuple[Floats, list[int]]:
        """Logits (v,) after a prompt (n, h), and the greedy tokens that `generate` gives."""
        ids: list[int] = []
        rows, cache = self._step(embeds, self._empty, 0)
        first: Floats = rows[-1]
        length = len(embeds)
        while not take(ids, int(rows[-1].argmax()), max_tokens, stops):
            rows, cache = self._step(self.embed(ids[-1:]), cache, length)
            length += 1
        return first, ids

    def _step(self, embeds: Floats, cache: dict[str, Any], past: int) -> tuple[Floats, dict[str, Any]]:
        given = {
            "inputs_embeds": np.ascontiguousarray(embeds[None], np.float32),
            "attention_mask": np.ones((1, past + len(embeds)), np.int64),
        }
        found = dict(zip(self._outputs, self._run(1, self._outputs, {**given, **cache}), strict=True))
        rows: Floats = found.pop("logits")[0]
        return rows, {_PAST + name.removeprefix(_PRESENT): value for name, value in found.items()}

    def _run(self, which: int, names: Sequence[str], inputs: dict[str, Any]) -> list[Any]:
        session = (self._embed, self._decoder)[which]
        try:
            return list(session.run(list(names), inputs))
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise EngineError(
                f"{self._paths[which]}: ONNX Runtime stopped ({one_line(error)})", "export it again"
            ) from error


def _parts(path: Path) -> list[str]:
    """Files beside a graph that may hold its weights: `NAME.onnx_data`, `NAME.onnx_data_1`, …"""
    return [part.name for part in path.parent.glob("*") if part.name.startswith(f"{path.name}_data")]
