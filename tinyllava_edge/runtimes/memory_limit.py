"""How much memory this process may take: control groups, resource limits, and what the machine has left.

Linux is read from /proc and /sys in full. Elsewhere the machine's total memory is all that is known without a further
package, and on Windows nothing is: no limit is then reported, rather than a guess.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESIDENT, ADDRESSES, PRIVATE = "resident", "addresses", "private"
_WORDS = {RESIDENT: "resident memory", ADDRESSES: "address space", PRIVATE: "private writable memory"}
_UNLIMITED = 1 << 62  # cgroup v1 writes the largest multiple of a page below 2^63 for "no limit"
_KIB = 1024


@dataclass(frozen=True)
class MemoryLimit:
    """What this process may take in all, what it holds today included."""

    bytes: int
    """most bytes that this process can hold; what others hold and can't give back is already subtracted"""
    source: str
    """which limit it is, in words, e.g. `cgroup /sys/fs/cgroup/app/memory.max (2.00 GiB)`"""
    counts: str = RESIDENT
    """what it counts: RESIDENT pages, ADDRESSES (mapped files and reservations included), or PRIVATE writable pages"""

    @property
    def words(self) -> str:
        """What it counts, for people."""
        return _WORDS[self.counts]


@dataclass(frozen=True)
class Held:
    """Bytes of this process today, as the kernel counts them."""

    resident: int = 0
    """resident set, pages of mapped files included (VmRSS)"""
    anonymous: int = 0
    """of that, pages that no file stands behind (RssAnon and RssShmem)"""
    addresses: int = 0
    """address space (VmSize)"""
    private: int = 0
    """private writable address space (VmData), which RLIMIT_DATA counts"""


def memory_limit() -> MemoryLimit | None:
    """The tightest limit on resident memory; None where nothing is known."""
    return min((limit for limit in memory_limits() if limit.counts == RESIDENT), key=lambda m: m.bytes, default=None)


def memory_limits(proc: Path = Path("/proc"), root: Path = Path("/")) -> tuple[MemoryLimit, ...]:
    """Every limit that binds this process.

    Args:
        proc: where procfs is mounted.
        root: the mount points that procfs names are looked up below this directory.
    """
    held = held_now(proc)
    return (*_control_groups(proc, root, held), *_resource_limits(), *_machine(proc, held))


def held_now(proc: Path = Path("/proc")) -> Held:
    """What this process holds; without procfs the largest resident set so far, else zeros."""
    status = _numbers(proc / "self" / "status")
    if not status:
        return Held(resident=_largest_resident())
    anonymous = status.get("RssAnon", 0) + status.get("RssShmem", 0)
    parts = (status.get("VmRSS", 0), anonymous, status.get("VmSize", 0), status.get("VmData", 0))
    return Held(*(_KIB * part for part in parts))


def give_back() -> bool:
    """Hand freed memory back to the system, which glibc keeps otherwise; False where the C library can't."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
    return trim is not None


@functools.cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # Windows has no CDLL(None); musl and macOS have no malloc_trim
        return None


def _largest_resident() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else _KIB * size  # macOS counts bytes


def _machine(proc: Path, held: Held) -> Iterator[MemoryLimit]:
    """Memory that new pages could get without swapping (MemAvailable), else the machine's total."""
    info = _numbers(proc / "meminfo")
    if "MemAvailable" in info:
        free = _KIB * info["MemAvailable"]
        yield MemoryLimit(free + held.resident, f"this machine's available memory ({size_words(free)})")
        return
    names = getattr(os, "sysconf_names", {})
    if {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(names):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if total > 0:
            yield MemoryLimit(total, f"this machine's memory ({size_words(total)})")


def _resource_limits() -> Iterator[MemoryLimit]:
    """RLIMIT_AS and RLIMIT_DATA; Linux has ignored RLIMIT_RSS since 2.4.30."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, counts in (("RLIMIT_AS", ADDRESSES), ("RLIMIT_DATA", PRIVATE)):
        soft = resource.getrlimit(getattr(resource, name))[0]
        if soft != resource.RLIM_INFINITY:
            yield MemoryLimit(
                soft, f"{name} ({size_words(soft)}; ulimit {'-v' if counts == ADDRESSES else '-d'})", counts
            )


def _control_groups(proc: Path, root: Path, held: Held) -> Iterator[MemoryLimit]:
    """Limits of the groups that this process is in, of v1 and v2, from its own group up to the mount's root.

    A group's page cache can be given back, so others are charged with what remains of its use without that and
    without this process's own pages.
    """
    for mount, group, version in _memory_groups(proc, root):
        names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
        for directory in [group, *group.parents][: len(group.relative_to(mount).parts) + 1]:
            for name in names:
                most = _number(directory / name)
                if most is None or most >= _UNLIMITED:
                    continue
                used = _number(directory / ("memory.current" if version == 2 else "memory.usage_in_bytes")) or 0
                others = max(0, used - _page_cache(directory, version) - held.anonymous)
                place = directory.relative_to(root) if root != Path("/") else directory
                yield MemoryLimit(max(0, most - others), f"cgroup {place / name} ({size_words(most)})")


def _page_cache(directory: Path, version: int) -> int:
    """Bytes of a group's file pages; with v1 those of the groups below it too, as its use is counted."""
    stat = _numbers(directory / "memory.stat")
    prefix = "" if version == 2 else "total_"
    return sum(stat.get(f"{prefix}{state}_file", 0) for state in ("active", "inactive"))


def _memory_groups(proc: Path, root: Path) -> Iterator[tuple[Path, Path, int]]:
    """(mount point, this process's group below it, version) of each hierarchy that accounts memory."""
    groups: dict[str, str] = {}  # controller → group; v2 has no controller's name
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, group = (line.split(":", 2) + ["", ""])[:3]
        groups.update({controller: group for controller in controllers.split(",")})
    for line in _lines(proc / "self" / "mountinfo"):
        front, _, back = line.partition(" - ")
        fields, kind = front.split(), back.split()
        if len(fields) < 5 or not kind or kind[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if kind[0] == "cgroup2" else 1
        controller = "" if version == 2 else "memory"
        if version == 1 and "memory" not in kind[-1].split(",") or controller not in groups:
            continue
        mount = root / _unescaped(fields[4]).lstrip("/")
        yield mount, mount / _below(groups[controller], _unescaped(fields[3])), version


def _below(group: str, mounted: str) -> str:
    """A group's path below a mount that may show only a part of the hierarchy, as in a container."""
    if mounted != "/" and (group + "/").startswith(mounted.rstrip("/") + "/"):
        group = group[len(mounted.rstrip("/")) :]
    parts = [part for part in group.split("/") if part]
    return "" if ".." in parts else "/".join(parts)  # outside of what this namespace may see


def _unescaped(path: str) -> str:
    return path.replace("\\040", " ").replace("\\134", "\\")


def _numbers(path: Path) -> Mapping[str, int]:
    """Lines of `name value` or `name: value kB`; others are left out."""
    found: dict[str, int] = {}
    for line in _lines(path):
        fields = line.replace(":", " ", 1).split()
        if len(fields) >= 2 and fields[1].isascii() and fields[1].isdigit():
            found[fields[0]] = int(fields[1])
    return found


def _number(path: Path) -> int | None:
    """The file's one number; None where it is missing or says `max`."""
    text = next(iter(_lines(path)), "").strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system, or a file that this process may not read
        return []


def size_words(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:.0f} MiB"
