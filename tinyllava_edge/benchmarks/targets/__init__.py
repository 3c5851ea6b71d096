"""Where a bundle is measured when it is not this machine: `ssh://user@host[:port]/dir`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.errors import UsageError

Progress = Callable[[str], None] | None


def is_remote(target: str) -> bool:
    """Whether `run` is for this target."""
    return target.partition("://")[0] in _schemes() and "://" in target


def run(target: str, bundle: Path, options: Mapping[str, Any], progress: Progress = None) -> list[Sample]:
    """Measure a bundle on another machine with the code that measures here.

    Args:
        target: `ssh://user@host[:port]/dir`; `/~/dir` lies below the user's home.
        bundle: directory on this machine.
        options: keyword arguments of `latency.bench`; a Path among them is a file that is copied over. Besides:
            `allow_unverified` (False: every build must carry a `verified` stamp), and the fields of `ssh.SshOptions`.
        progress: receives a line per step.

    Returns:
        The raw samples, `target` set to the address.

    Raises:
        UsageError: an address or option that can't be used.
        UnverifiedError: a build without a stamp.
        EngineError: the machine can't be reached, is measuring already, or its run failed.
        StorageError: its disk is too small.
        DependencyError: it, or this machine, lacks a program.
        DataError: what came back are not our results.
    """
    schemes = _schemes()
    scheme = target.partition("://")[0]
    if scheme not in schemes or "://" not in target:
        raise UsageError(
            f"target {target[:80]!r}", f"known: {', '.join(f'{name}://user@host/dir' for name in schemes)}"
        )
    return schemes[scheme](target, bundle, options, progress)


def _schemes() -> dict[str, Callable[[str, Path, Mapping[str, Any], Progress], list[Sample]]]:
    from tinyllava_edge.benchmarks.targets import ssh

    return {"ssh": ssh.run}
