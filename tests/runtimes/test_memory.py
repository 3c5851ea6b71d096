"""Estimates against what the kernel counts, and refusals in words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tinyllava_edge.bundle import Bundle, read_bundle
from tinyllava_edge.errors import MemoryLimitError
from tinyllava_edge.runtimes.memory import MemorySettings, estimate, preflight
from tinyllava_edge.runtimes.memory_limit import ADDRESSES, PRIVATE, RESIDENT, MemoryLimit, held_now

MIB = 1 << 20
CHILD = """
    import json, sys
    from pathlib import Path
    from tinyllava_edge.bundle import read_bundle
    from tinyllava_edge.errors import MemoryLimitError
    from tinyllava_edge.runtimes.memory import MemorySettings, estimate, preflight
    from tinyllava_edge.runtimes.edge import open_edge
    import numpy as np

    bundle, asked = read_bundle(sys.argv[1]), json.loads(sys.argv[2])
    build, n_ctx = bundle.build("int8+q4_k_m"), asked["n_ctx"]
    settings = MemorySettings(n_ctx, flash_attention=True, picture_pixels=asked["side"] ** 2, lazy=asked["lazy"])
    if "join" in asked:
        Path(asked["join"]).write_text("0")
    if "addresses" in asked:
        import resource
        from tinyllava_edge.runtimes.memory_limit import held_now
        estimate(bundle, build, settings)  # the engines' libraries take addresses of their own
        most = held_now().addresses + asked["addresses"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        expected = preflight(bundle, build, settings)
    except MemoryLimitError as error:
        print(json.dumps({"refused": str(error), "hint": error.hint}))
        sys.exit(0)
    side = asked["side"]
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    with open_edge(bundle, build.name, n_ctx=n_ctx, n_threads=1, flash_attention=True, lazy=asked["lazy"]) as runtime:
        runtime.answer(image, "what?", max_tokens=2)
        status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({**expected.to_dict(), "peak": 1024 * int(peak.split()[1])}))
"""


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return read_bundle(tiny_bundle)


def child(bundle: Bundle, n_ctx: int = 2048, side: int = 64, lazy: bool = False, **asked: Any) -> dict[str, Any]:
    """What a fresh process printed; it must not die."""
    options = json.dumps({"n_ctx": n_ctx, "side": side, "lazy": lazy, **asked})
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(bundle.root), options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs procfs")
def test_a_real_peak(bundle: Bundle) -> None:
    """Of a small model Python is most of it; a large context then adds its KV cache, which is looked at by itself."""
    small, large = child(bundle, lazy=True), child(bundle, n_ctx=1 << 17, lazy=True)
    assert large["kv_cache"] > 100 * MIB
    assert small["total"] == pytest.approx(small["peak"], rel=0.15)
    assert large["peak"] - small["peak"] == pytest.approx(large["kv_cache"] - small["kv_cache"], rel=0.15)


def made_up(size: int, counts: str = RESIDENT) -> list[MemoryLimit]:
    return [MemoryLimit(1 << 40, "a limit that holds"), MemoryLimit(size, "the device's limit (9 MiB)", counts)]


def test_a_refusal_names_the_numbers_and_what_fits(bundle: Bundle) -> None:
    build = bundle.build("fp32+f16")
    settings = MemorySettings(1 << 16)
    preflight(bundle, build, settings, made_up(1 << 50))  # gives back what earlier tests left in this process
    needed = estimate(bundle, build, settings)
    assert preflight(bundle, build, settings, made_up(2 * needed.total)).kv_cache == needed.kv_cache
    limit = made_up(needed.required - needed.kv_cache // 2)  # this process itself holds far more than the build takes
    with pytest.raises(MemoryLimitError) as refusal:
        preflight(bundle, build, settings, limit)
    text = str(refusal.value)
    assert "\n" not in text + refusal.value.hint
    assert "build fp32+f16 needs" in text
    assert "n_ctx=65536, the device's limit (9 MiB) leaves" in text
    assert f"KV cache {needed.kv_cache // MIB} MiB" in text
    n_ctx = int(refusal.value.hint.split("n_ctx=")[1].split(" ")[0])
    assert preflight(bundle, build, MemorySettings(n_ctx), limit)
    advised = estimate(bundle, build, MemorySettings(n_ctx)).required
    assert 0.95 * limit[-1].bytes < advised < limit[-1].bytes  # about the largest that fits


def test_the_largest_build_that_fits_is_named(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.root, tmp_path / "large")
    large = read_bundle(tmp_path / "large")
    path = large.path(large.build("fp32+f16").llm)
    os.truncate(path, path.stat().st_size + 256 * MIB)  # beside Python, a tiny model's builds are all of one size
    needs = {name: estimate(large, build).required for name, build in large.builds().items()}
    limit = made_up(needs["fp32+f16"] - 100 * MIB)
    for name in ("fp32+f16", "int8+f16"):
        with pytest.raises(MemoryLimitError) as refusal:
            preflight(large, large.build(name), None, limit)
        assert "build fp32+q4_k_m fits" in refusal.value.hint
    assert preflight(large, large.build("fp32+q4_k_m"), None, limit)
    with pytest.raises(MemoryLimitError) as refusal:
        preflight(large, large.build("fp32+f16"), None, made_up(10 * MIB))
    assert "no build of this bundle fits; the smallest, " in refusal.value.hint


@pytest.mark.parametrize("counts", [ADDRESSES, PRIVATE])
def test_other_limits_count_other_bytes(bundle: Bundle, counts: str) -> None:
    """A process has reserved far more addresses than it holds pages: a limit on them is met earlier."""
    build = bundle.build("int8+q4_k_m")
    held = held_now()
    already = held.addresses if counts == ADDRESSES else held.private
    with pytest.raises(MemoryLimitError, match="address space" if counts == ADDRESSES else "private writable"):
        preflight(bundle, build, None, made_up(already, counts))
    assert preflight(bundle, build, None, made_up(already + (1 << 30), counts))


def test_only_pages_read_once_are_left_out(bundle: Bundle) -> None:
    found = estimate(bundle, bundle.build("int8+q4_k_m"))
    assert found.total - found.required == found.repacked
    plain = estimate(bundle, bundle.build("int8+f16"))
    assert plain.total == plain.required
    assert plain.to_dict()["total"] == plain.total


def test_a_real_limit_on_addresses_is_a_refusal(bundle: Bundle) -> None:
    pytest.importorskip("resource", reason="this system has no resource limits")
    found = child(bundle, n_ctx=1 << 19, addresses=256 * MIB)
    assert "RLIMIT_AS" in found["refused"]
    assert "n_ctx=" in found["hint"]


@pytest.fixture
def group() -> Iterator[tuple[Path, str]]:
    """A control group with 256 MiB, and the name of its limit's file."""
    for parent, name in (
        (Path("/sys/fs/cgroup"), "memory.max"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    ):
        made = parent / f"tinyllava-edge-test-{os.getpid()}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            if (made / name).exists():
                (made / name).write_text(str(256 * MIB))
                yield made, name
                return
        except OSError:
            continue
        finally:
            made.rmdir()
    pytest.skip("no control group can be made here")


def test_a_real_control_group_is_a_refusal(bundle: Bundle, group: tuple[Path, str]) -> None:
    made, name = group
    found = child(bundle, n_ctx=1 << 19, join=str(made / "cgroup.procs"))
    assert name in found["refused"]
    assert "(256 MiB) leaves" in found["refused"]
    n_ctx = int(found["hint"].split("n_ctx=")[1].split(" ")[0])
    fits = child(bundle, n_ctx=n_ctx, join=str(made / "cgroup.procs"))  # and what the hint says does run there
    assert fits["peak"] > 0
