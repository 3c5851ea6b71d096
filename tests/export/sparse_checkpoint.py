"""A checkpoint of full size whose weights are a hole in the file: for everything that reads shapes alone."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch

from tinyllava_edge import checkpoint
from tinyllava_edge.checkpoint_spec import SPEC_FILE
from tinyllava_edge.files import write_json
from tinyllava_edge.model import build_config, build_model
from tinyllava_edge.prompt import IMAGE_MARKER, get_template
from tinyllava_edge.spec import LLM_BACKBONES, VISION_BACKBONES, model_spec, variant
from tinyllava_edge.tensor_names import on_disk
from tinyllava_edge.weights import SINGLE

from ..conftest import make_tokenizer


def sparse_checkpoint(out: Path, name: str) -> Path:
    """Write a variant's checkpoint; its tokenizer is a small one, and the embedding's other rows have no token."""
    chosen, spec = variant(name), model_spec(name)
    vision, text = VISION_BACKBONES[chosen.vision].config, dict(LLM_BACKBONES[chosen.llm].config)
    tokenizer = make_tokenizer()
    end = get_template(spec.template).end_of_turn
    tokenizer.add_tokens([end, IMAGE_MARKER], special_tokens=True)
    image = int(tokenizer.convert_tokens_to_ids(IMAGE_MARKER))
    with torch.device("meta"):
        model = build_model(spec, vision, text, image)
    header, place = {}, 0
    for key, tensor in model.state_dict().items():
        size = 2 * math.prod(tensor.shape)
        header[on_disk(key, spec.vision_family)] = {
            "dtype": "F16",
            "shape": list(tensor.shape),
            "data_offsets": [place, place + size],
        }
        place += size
    out.mkdir(parents=True)
    front = json.dumps(header).encode()
    with (out / SINGLE).open("wb") as file:
        file.write(len(front).to_bytes(8, "little") + front)
    os.truncate(out / SINGLE, 8 + len(front) + place)
    with checkpoint.quiet():
        build_config(spec, vision, text, image).save_pretrained(out)
        tokenizer.save_pretrained(out)
    write_json(out / "preprocessor_config.json", checkpoint.processor_config(spec))
    write_json(out / SPEC_FILE, spec.to_dict())
    return out
