"""Limits from made-up trees of procfs and control groups, and from this machine."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tinyllava_edge.runtimes.memory_limit import (
    RESIDENT,
    MemoryLimit,
    give_back,
    held_now,
    memory_limit,
    memory_limits,
)

MIB = 1 << 20
STATUS = "Name:\tpython\nVmSize:\t 9000 kB\nVmData:\t 800 kB\nVmRSS:\t 300 kB\nRssAnon:\t 90 kB\nRssShmem:\t 10 kB\n"


class Tree:
    """A made-up /proc and /sys below one directory."""

    def __init__(self, root: Path) -> None:
        self.root, self.proc = root, root / "proc"
        self.write("proc/self/status", STATUS)
        self.write("proc/meminfo", "MemTotal:  4000 kB\nMemAvailable:  2000 kB\n")

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def mounted(self, group: str, mount: str) -> None:
        self.write("proc/self/cgroup", group)
        self.write("proc/self/mountinfo", mount)

    def v2(self, directory: str, most: str, current: int, file: int = 0, high: str = "max") -> None:
        self.write(f"{directory}/memory.max", most + "\n")
        self.write(f"{directory}/memory.high", high + "\n")
        self.write(f"{directory}/memory.current", f"{current}\n")
        self.write(f"{directory}/memory.stat", f"anon 7\nactive_file {file // 2}\ninactive_file {file - file // 2}\n")

    def limits(self) -> dict[str, MemoryLimit]:
        return {limit.source: limit for limit in memory_limits(self.proc, self.root)}

    def cgroups(self) -> dict[str, int]:
        return {source: limit.bytes for source, limit in self.limits().items() if source.startswith("cgroup")}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_every_level_of_nested_groups_counts(tree: Tree) -> None:
    """v2: a group's own limit, its parents', and what others hold there; page cache and our own pages don't count."""
    tree.mounted("0::/app/worker\n", "31 1 0:9 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    own = 100 * 1024  # RssAnon + RssShmem
    tree.v2("sys/fs/cgroup/app/worker", "max", own + 500, file=500)
    tree.v2("sys/fs/cgroup/app", str(8 * MIB), own + 3 * MIB + 600, file=600, high=str(7 * MIB))
    assert tree.cgroups() == {
        "cgroup sys/fs/cgroup/app/memory.max (8 MiB)": 5 * MIB,
        "cgroup sys/fs/cgroup/app/memory.high (7 MiB)": 4 * MIB,
    }


def test_version_1_and_its_number_for_no_limit(tree: Tree) -> None:
    mount = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    tree.mounted("9:name=systemd:/x\n4:cpu,memory:/a/b\n0::/\n", mount)
    for group, most in (("a/b", 9223372036854771712), ("a", 6 * MIB), ("", 9223372036854771712)):
        tree.write(f"sys/fs/cgroup/memory/{group}/memory.limit_in_bytes", f"{most}\n")
        tree.write(f"sys/fs/cgroup/memory/{group}/memory.usage_in_bytes", f"{2 * MIB}\n")
        stat = f"inactive_file 0\ntotal_inactive_file {MIB}\ntotal_active_file 0\n"
        tree.write(f"sys/fs/cgroup/memory/{group}/memory.stat", stat)
    left = 6 * MIB - (2 * MIB - MIB - 100 * 1024)
    assert tree.cgroups() == {"cgroup sys/fs/cgroup/memory/a/memory.limit_in_bytes (6 MiB)": left}


@pytest.mark.parametrize("group", ["/docker/abc", "/docker/abc/inner", "/../other"])
def test_a_container_sees_a_part_of_the_hierarchy(tree: Tree, group: str) -> None:
    """The mount shows the container's own group; a path outside of it can't be followed and ends at the mount."""
    tree.mounted(f"0::{group}\n", "31 1 0:9 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    tree.v2("sys/fs/cgroup", str(5 * MIB), 0)
    assert tree.cgroups() == {"cgroup sys/fs/cgroup/memory.max (5 MiB)": 5 * MIB}


def test_available_memory_and_what_this_process_holds_already(tree: Tree) -> None:
    (limit,) = (found for source, found in tree.limits().items() if "machine" in source)
    assert (limit.bytes, limit.counts) == ((2000 + 300) * 1024, RESIDENT)
    held = held_now(tree.proc)
    assert (held.resident, held.anonymous, held.addresses, held.private) == (307200, 102400, 9216000, 819200)


def test_without_procfs_there_is_still_the_machine(tmp_path: Path) -> None:
    """As on macOS: the total is known, and the largest resident set so far."""
    found = [limit for limit in memory_limits(tmp_path, tmp_path) if limit.counts == RESIDENT]
    assert [limit.bytes for limit in found] == [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    assert held_now(tmp_path).resident > 10 * MIB


def test_a_hostile_tree_gives_no_limit(tree: Tree) -> None:
    tree.mounted("\n::\nx\n0::/a\n", "\n - \n31 1 - cgroup2\n31 1 0:9 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    tree.v2("sys/fs/cgroup/a", "-5", 0, high="many")
    assert tree.cgroups() == {}


def test_this_machine() -> None:
    limit = memory_limit()
    assert limit is not None
    assert 0 < limit.bytes < 1 << 50


def test_freed_memory_goes_back() -> None:
    """glibc keeps small blocks that were freed below one that wasn't."""
    if not give_back():
        pytest.skip("this C library has no malloc_trim")
    blocks = [np.ones(8 << 10, np.uint8) for _ in range(8192)]  # 64 MiB
    last, full = blocks[-1], held_now().resident
    del blocks
    give_back()
    assert full - held_now().resident > 48 * MIB
    assert last.sum() == 8 << 10
