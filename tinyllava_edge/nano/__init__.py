"""The nano backbones: two vision towers and a language model, a few megabytes each, in Hugging Face layout.

Made by `train/nano/`; each directory's README.md says how, and what it can't do.
"""

from __future__ import annotations

from pathlib import Path

NANO_DIR = Path(__file__).parent
SIGLIP_DIR = NANO_DIR / "siglip"
CLIP_DIR = NANO_DIR / "clip"
LLM_DIR = NANO_DIR / "llm"
