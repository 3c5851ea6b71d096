"""What libraries raise when a process of a run dies, as one line with the next step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import MemoryLimitError, TinyLlavaEdgeError

AGAIN = "run the same command again to go on from the newest state"
# What gloo and NCCL say of a peer that is gone.
GONE = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "socket timeout")


@contextlib.contextmanager
def explained(stage: str, work: Path) -> Iterator[None]:
    """Name the dead process instead of showing a library's traceback.

    Raises:
        TinyLlavaEdgeError: a process that reads the data died, or another process of the run is gone.
        MemoryLimitError: the device's memory is full.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryLimitError(
            f"stage {stage}: the device's memory is full; states are kept in {work}",
            "lower micro_batch (the batch stays as it is), or divide with --engine zero2, zero3 or fsdp",
        ) from error
    except torch.distributed.DistError as error:
        raise _peer(stage, work, error) from error
    except RuntimeError as error:
        text = str(error)
        if "DataLoader worker" in text:
            raise TinyLlavaEdgeError(
                f"stage {stage}: a process that reads the data ended ({_line(text)}); states are kept in {work}",
                f"{AGAIN}; if memory was short, with fewer --workers",
            ) from error
        if torch.distributed.is_initialized() and any(sign in text.lower() for sign in GONE):
            raise _peer(stage, work, error) from error
        raise


def _peer(stage: str, work: Path, error: Exception) -> TinyLlavaEdgeError:
    return TinyLlavaEdgeError(
        f"stage {stage}: another process of this run is gone ({_line(str(error))}); states are kept in {work}", AGAIN
    )


def _line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")[:200]
