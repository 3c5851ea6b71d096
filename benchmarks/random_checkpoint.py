"""A checkpoint of a real architecture with random float16 weights, for measuring what size alone costs.

    python benchmarks/random_checkpoint.py TinyLLaVA-base-Sig-Phi OUT
    python benchmarks/random_checkpoint.py --language-model CHECKPOINT OUT

The first writes a checkpoint, tensor by tensor: memory holds one tensor. The second writes a checkpoint's language
model as a stand-alone Hugging Face directory, which llama.cpp's converter reads.

Weights are scaled as in a trained model: matrices 0.02, those that write into the residual stream less, norms about 1.
The head answers each token with the next one: a random head would leave all answers to rounding.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tinyllava_edge.checkpoint import llm_source, processor_config, quiet
from tinyllava_edge.checkpoint_spec import SPEC_FILE
from tinyllava_edge.files import new_directory, write_json
from tinyllava_edge.importer.lazy import Lazy, lazy
from tinyllava_edge.importer.shards import write_shards
from tinyllava_edge.model import build_config, build_model
from tinyllava_edge.prompt import IMAGE_MARKER, get_template
from tinyllava_edge.spec import LLM_BACKBONES, VISION_BACKBONES, model_spec, variant
from tinyllava_edge.tensor_names import on_disk

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
RESIDUAL = ("o_proj", "down_proj", "dense", "fc2", "out_proj")  # matrices whose output is added to the stream
HEAD_SCALE = 0.01  # of the embedding's rows: the right logit is about 20, the others below 3
TOKENIZER_SIZE = {"Phi": 50_295, "SLM": 100_289}  # tokens; the embedding has more rows
ROWS = 64  # the embedding is grown to a multiple of this


def write_checkpoint(name: str, out: Path, seed: int = 0, say: Callable[[str], None] = print) -> None:
    """Write the checkpoint of a variant."""
    chosen, spec = variant(name), model_spec(name)
    vision, text = VISION_BACKBONES[chosen.vision].config, dict(LLM_BACKBONES[chosen.llm].config)
    end = get_template(spec.template).end_of_turn
    tokenizer = make_tokenizer(TOKENIZER_SIZE.get(chosen.llm, text["vocab_size"]), text, end)
    image = int(tokenizer.convert_tokens_to_ids(IMAGE_MARKER))
    if len(tokenizer) > text["vocab_size"]:
        text["vocab_size"] = -(-len(tokenizer) // ROWS) * ROWS
    config = build_config(spec, vision, text, image)
    with torch.device("meta"):
        shapes = {key: tuple(t.shape) for key, t in build_model(spec, vision, text, image).state_dict().items()}
    draw = _Draw(seed, shapes, int(text["num_hidden_layers"]))
    with new_directory(out) as temporary:
        tensors = [(on_disk(key, spec.vision_family), draw.lazy(key)) for key in shapes]
        total = write_shards(temporary, tensors, progress=say)
        config.dtype = torch.float16
        with quiet():
            config.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        write_json(temporary / "preprocessor_config.json", processor_config(spec))
        write_json(temporary / SPEC_FILE, spec.to_dict())
    say(f"{out}: {total / 1e9:.2f} GB")


def write_language_model(checkpoint: Path, out: Path, say: Callable[[str], None] = print) -> None:
    """Write a checkpoint's language model by itself, in the type that it has."""
    source = llm_source(checkpoint)
    names = {"llama": "LlamaForCausalLM", "phi": "PhiForCausalLM", "stablelm": "StableLmForCausalLM"}
    with new_directory(out) as temporary:
        write_shards(temporary, list(lazy(source).items()), progress=say)
        source.config.architectures = [names[source.config.model_type]]
        with quiet():
            source.config.save_pretrained(temporary)
            source.tokenizer.save_pretrained(temporary)
        path = temporary / "config.json"  # the converter wants the older spelling too
        config = json.loads(path.read_text(encoding="utf-8"))
        rope = config.get("rope_parameters") or {}
        write_json(path, {**config, **{key: value for key, value in rope.items() if key != "rope_type"}})


class _Draw:
    """Random tensors by name: the same name gives the same values."""

    def __init__(self, seed: int, shapes: Mapping[str, tuple[int, ...]], layers: int) -> None:
        self._seed, self._shapes, self._layers = seed, shapes, layers

    def lazy(self, name: str) -> Lazy:
        return Lazy(name, Path("random"), self._shapes[name], torch.float16, lambda: self.draw(name))

    def draw(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if name == HEAD:  # row i is token i - 1: after token t the best is t + 1
            rows = self.draw(EMBEDDING)
            return rows.roll(1, 0) * HEAD_SCALE
        generator = torch.Generator().manual_seed(self._seed + zlib.crc32(name.encode()))
        value = torch.empty(shape, dtype=torch.float16)
        for part in value.view(-1).split(1 << 24):  # float16 is drawn in float32, a part at a time
            part.copy_(torch.randn(part.shape, generator=generator))
        spread, centre = self._scale(name, len(shape))
        return value.mul_(spread).add_(centre)

    def _scale(self, name: str, rank: int) -> tuple[float, float]:
        if name == EMBEDDING:
            return 1.0, 0.0
        if rank > 1:
            part = name.split(".")[-2]
            return (0.02 / (2 * self._layers) ** 0.5 if part in RESIDUAL else 0.02), 0.0
        return 0.02, 1.0 if "norm" in name and name.endswith("weight") else 0.0


def make_tokenizer(size: int, text: Mapping[str, Any], end: str) -> Any:
    """Byte-level BPE of `size` tokens, `<image>` after them; merges are all short words of the alphabet's letters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {int(text["bos_token_id"]): "<s>", int(text["eos_token_id"]): end}
    space, letters = "Ġ", "etaoinshrdlucmfwypvbgkjqxz"
    pairs = [(a, b) for a, b in product(letters, letters)] + [(space, a) for a in letters]
    words = [a + b for a, b in pairs]
    longer = [(a, b) for a, b in product(words, letters)]
    longest = [(a, b) for a, b in product(words, words) if not b.startswith(space)]
    vocab: dict[str, int] = {}
    merges: list[tuple[str, str]] = []
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    places = (place for place in range(size) if place not in special)
    for token in bytes_:
        vocab[token] = next(places)
    for a, b in (*pairs, *longer, *longest):
        place = next(places, None)
        if place is None:
            break
        if a + b not in vocab:
            vocab[a + b] = place
            merges.append((a, b))
    raw = Tokenizer(models.BPE(vocab={**vocab, **{t: i for i, t in special.items()}}, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in dict.fromkeys(special.values())])
    bos = special[int(text["bos_token_id"])]
    if len(special) > 1:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, int(text["bos_token_id"]))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=end, unk_token=end)
    tokenizer.add_tokens([IMAGE_MARKER], special_tokens=True)
    return tokenizer


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "--language-model":
        write_language_model(Path(sys.argv[2]), Path(sys.argv[3]), lambda line: print(line, file=sys.stderr))
    elif len(sys.argv) == 3:
        write_checkpoint(sys.argv[1], Path(sys.argv[2]), say=lambda line: print(line, file=sys.stderr))
    else:
        sys.exit("usage: random_checkpoint.py VARIANT OUT | --language-model CHECKPOINT OUT")
