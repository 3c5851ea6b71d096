"""A model by directory or by Hub id: the only place that fetches anything, and only when an id was typed."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# Configurations, tokenizers and weights; never code.
WANTED = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")


def local_model(given: str) -> Path:
    """The directory of a model.

    Args:
        given: a directory, or a Hub id such as `bczhou/TinyLLaVA-3.1B`, which is downloaded into huggingface_hub's
            cache; HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are respected.

    Raises:
        CheckpointError: there is no such directory, or the Hub doesn't give the model.
    """
    path = Path(given)
    if given and path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(given):
        raise CheckpointError(f"{given}: no such directory", "name a directory, or a Hub id as ORGANISATION/NAME")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(given, allow_patterns=list(WANTED)))
    except Exception as error:  # the Hub's client, its HTTP library and the disk each raise their own
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{given}: no such directory, and the Hub doesn't give it ({type(error).__name__}: {reason})",
            "check the id, the network and HF_TOKEN, or download it elsewhere and name the directory",
        ) from error
