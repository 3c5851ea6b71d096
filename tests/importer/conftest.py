"""A tokenizer directory for every test here: 520 tokens, the end-of-turn tokens of all templates among them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # releases.py, which every test here writes its sources with

import releases  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json and its settings, without `<image>`."""
    out = tmp_path_factory.mktemp("tokenizer")
    releases.make_tokenizer().save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def image_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with `<image>` as token 520, as a Hugging Face Llava has."""
    out = tmp_path_factory.mktemp("image_tokenizer")
    tokenizer = releases.make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture
def logits() -> Callable[[Any, torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """Logits of a Llava model for ids with one picture at a place."""

    def run(model: Any, ids: torch.Tensor, pixels: torch.Tensor, at: int, tokens: int) -> torch.Tensor:
        slots = torch.full((1, tokens), model.config.image_token_id)
        with torch.no_grad():
            return model(input_ids=torch.cat((ids[:, :at], slots, ids[:, at:]), dim=1), pixel_values=pixels).logits

    return run
