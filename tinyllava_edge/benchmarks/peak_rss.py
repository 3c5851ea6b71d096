"""What the kernel counts of a process's memory, and which processes are its children."""

from __future__ import annotations

import sys
from pathlib import Path


def status(pid: int | str = "self") -> dict[str, int]:
    """A process's counts in bytes: VmHWM (largest resident set), VmRSS, and its RssAnon, RssFile and RssShmem.

    Off Linux only this process's VmHWM is known (getrusage). Empty for a process that has ended.
    """
    path = Path(f"/proc/{pid}/status")
    if pid == "self" and not path.is_file():
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"VmHWM": peak if sys.platform == "darwin" else peak * 1024}
    # not getrusage: on Linux its maximum survives exec, so a child would start with the parent's
    try:
        lines = (line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines())
    except OSError:
        return {}
    wanted = ("VmHWM:", "VmRSS:", "RssAnon:", "RssFile:", "RssShmem:")
    return {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in lines if parts and parts[0] in wanted}


def descendants(pid: int, proc: Path = Path("/proc")) -> list[int]:
    """Living children of a process, their children, and so on; empty where there is no procfs."""
    children: dict[int, list[int]] = {}
    for path in proc.glob("[0-9]*/stat"):
        try:  # the name in parentheses may hold anything, also parentheses
            parent = int(path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found, left = list[int](), [pid]
    while left:
        own = children.get(left.pop(), [])
        found += own
        left += own
    return found
