"""Every error that a user can meet, in one tree.

TinyLlavaEdgeError          exit code 1; str() is one line, `hint` is the next step
├── UsageError              exit code 2: the command line or the arguments are off
├── DependencyError         an optional package is missing; the hint is the pip line
├── DataError               a data set, a row or an answers file
├── ImageError              a picture that is missing, truncated, hostile or too large
├── CheckpointError         a checkpoint that is missing, incomplete or inconsistent
├── ExportError             a graph or GGUF that could not be written or came out wrong
├── BundleError             a bundle that is missing files, was changed, or is not ours
│   └── UnverifiedError     a build that carries no `verified` stamp
├── EngineError             ONNX Runtime or llama.cpp refused
│   ├── ContextError        the prompt does not fit in n_ctx
│   ├── MemoryLimitError    a build needs more memory than this process may have
│   ├── QueueFullError      too many requests wait for one engine
│   └── CancelledError      somebody cancelled the request
├── VerifyError             a bundle that diverges from its checkpoint
└── StorageError            the disk is full or a target may not be overwritten
"""

from __future__ import annotations


class TinyLlavaEdgeError(Exception):
    """Base class: `message` names the file and the value, `hint` says what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(TinyLlavaEdgeError):
    """The arguments are off."""

    exit_code = 2


class DependencyError(TinyLlavaEdgeError):
    """An optional package is missing."""


class DataError(TinyLlavaEdgeError):
    """A data set, a row or an answers file can't be used."""


class ImageError(TinyLlavaEdgeError):
    """A picture can't be used."""


class CheckpointError(TinyLlavaEdgeError):
    """A checkpoint can't be used."""


class ExportError(TinyLlavaEdgeError):
    """A device file could not be written or came out wrong."""


class BundleError(TinyLlavaEdgeError):
    """A bundle can't be used."""


class UnverifiedError(BundleError):
    """A build that carries no `verified` stamp."""


class EngineError(TinyLlavaEdgeError):
    """ONNX Runtime or llama.cpp refused."""


class ContextError(EngineError):
    """The prompt does not fit in the context."""


class MemoryLimitError(EngineError):
    """A build needs more memory than this process may have."""


class QueueFullError(EngineError):
    """Too many requests wait for one engine."""


class CancelledError(EngineError):
    """The request was cancelled."""


class VerifyError(TinyLlavaEdgeError):
    """A bundle diverges from its checkpoint."""


class StorageError(TinyLlavaEdgeError):
    """The disk is full, or a target may not be overwritten."""
