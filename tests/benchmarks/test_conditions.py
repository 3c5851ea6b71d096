"""The machine's state and description, on made-up trees and on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tinyllava_edge.benchmarks import conditions
from tinyllava_edge.benchmarks.environment import board, capture, cgroup_limits, cpu, environment_sample


def put(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


CORE = "sys/devices/system/cpu"


def test_a_board(tmp_path: Path) -> None:
    for n, (kind, temperature) in enumerate([("cpu-thermal", "61250"), ("cpu-thermal", "48000"), ("gpu", "")]):
        put(tmp_path / f"sys/class/thermal/thermal_zone{n}/type", f"{kind}\n")
        put(tmp_path / f"sys/class/thermal/thermal_zone{n}/temp", f"{temperature}\n")
    put(tmp_path / "sys/class/thermal/cooling_device0/type", "fan\n")
    for n, (mhz, governor) in enumerate([(1_500_000, "ondemand"), (600_000, "ondemand"), (2_400_000, "performance")]):
        put(tmp_path / f"{CORE}/cpu{n}/cpufreq/scaling_cur_freq", f"{mhz}\n")
        put(tmp_path / f"{CORE}/cpu{n}/cpufreq/scaling_governor", f"{governor}\n")
        put(tmp_path / f"{CORE}/cpu{n}/thermal_throttle/core_throttle_count", f"{n}\n")
        put(tmp_path / f"{CORE}/cpu{n}/thermal_throttle/package_throttle_count", "4\n")
    put(tmp_path / f"{CORE}/cpufreq/policy0/scaling_cur_freq", "1\n")
    put(tmp_path / "proc/loadavg", "0.31 0.28 0.20 1/215 77\n")
    assert conditions.read(tmp_path) == {
        "temperature_c": {"cpu-thermal": 61.25, "cpu-thermal (thermal_zone1)": 48.0},
        "cpu_mhz": {"cpu0": 1500.0, "cpu1": 600.0, "cpu2": 2400.0},
        "governor": "ondemand, performance",
        "throttle_counts": {"core": 3, "package": 12},
        "load_average": [0.31, 0.28, 0.2],
        "gpu": None,
    }


def test_nothing_readable_is_null(tmp_path: Path) -> None:
    assert set(conditions.read(tmp_path).values()) == {None}
    put(tmp_path / "proc/loadavg", "nan inf x\n")
    put(tmp_path / "proc/cpuinfo", "cpu MHz\t\t: 1.2.3\ncpu MHz : 2445.408\n")
    (tmp_path / "sys/class/thermal/thermal_zone0/temp").mkdir(parents=True)
    found = conditions.read(tmp_path)
    assert found["load_average"] is None and found["temperature_c"] is None
    assert found["cpu_mhz"] == {"cpu1": 2445.408}


def test_throttled() -> None:
    cool, hot = {"throttle_counts": {"core": 3}}, {"throttle_counts": {"core": 5}}
    assert conditions.throttled(cool, hot) is True and conditions.throttled(cool, cool) is False
    assert conditions.throttled({"throttle_counts": None}, hot) is None


def test_an_idle_gpu_says_nothing_about_the_run() -> None:
    """Its state is read before and after, when nothing runs: only that it was slowed means something."""
    idle, slow = {"gpu": [{"slowed_by": []}]}, {"gpu": [{"slowed_by": ["heat"]}]}
    cool = {"throttle_counts": {"core": 3}}
    assert conditions.throttled({}, slow) is True and conditions.throttled(idle, idle) is None
    assert conditions.throttled({**cool, **idle}, {**cool, **idle}) is None  # the processor wasn't, but the GPU?
    assert conditions.throttled({**cool, **idle}, {"throttle_counts": {"core": 4}}) is True


def test_this_machine_s_state_is_json() -> None:
    found = conditions.read()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["load_average"] is None or len(found["load_average"]) == 3


ARM = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes crc32 asimdhp cpuid asimddp i8mm bf16 sve
CPU implementer\t: 0x41
CPU part\t: 0xd0b
processor\t: 1
CPU implementer\t: 0x41
CPU part\t: 0xd05
"""


def test_arm(tmp_path: Path) -> None:
    put(tmp_path / "proc/cpuinfo", ARM)
    put(tmp_path / "proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    found = cpu(tmp_path)
    assert found["model"] == "ARM implementer 0x41 part 0xd0b + 0xd05"
    assert found["flags"] == ["asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve"] and found["governor"] is None
    assert board(tmp_path) == "Raspberry Pi 5 Model B Rev 1.0"
    put(tmp_path / "proc/cpuinfo", ARM + "Hardware\t: Qualcomm Technologies, Inc SM8550\n")
    assert cpu(tmp_path)["model"].startswith("Qualcomm Technologies, Inc SM8550, ARM implementer")


def test_x86(tmp_path: Path) -> None:
    put(tmp_path / "proc/cpuinfo", "model\t: 1\nmodel name\t: Example CPU\nflags\t: fpu avx2 amx_int8 fma\n")
    put(tmp_path / "sys/class/dmi/id/sys_vendor", "ACME\n")
    put(tmp_path / "sys/class/dmi/id/product_name", "Box 3\n")
    assert cpu(tmp_path)["model"] == "Example CPU" and cpu(tmp_path)["flags"] == ["fma", "avx2", "amx_int8"]
    assert board(tmp_path) == "ACME Box 3" and board(tmp_path / "none") is None


def test_control_groups_v2(tmp_path: Path) -> None:
    put(tmp_path / "proc/self/cgroup", "0::/app/worker\n")
    base = tmp_path / "sys/fs/cgroup"
    put(base / "cpu.max", "max 100000\n")
    put(base / "app/cpu.max", "150000 100000\n")
    put(base / "app/worker/cpu.max", "400000 100000\n")
    put(base / "app/memory.max", "2147483648\n")
    put(base / "app/worker/memory.max", "max\n")
    assert cgroup_limits(tmp_path) == {"cpu": "150000 100000", "memory": "2147483648"}


def test_control_groups_of_a_container(tmp_path: Path) -> None:
    """Its own group is the mount's root, though procfs may name a path that isn't there."""
    put(tmp_path / "proc/self/cgroup", "0::/docker/abc\n")
    put(tmp_path / "sys/fs/cgroup/cpu.max", "50000 100000\n")
    put(tmp_path / "sys/fs/cgroup/memory.max", "1000\n")
    assert cgroup_limits(tmp_path) == {"cpu": "50000 100000", "memory": "1000"}


def test_control_groups_v1(tmp_path: Path) -> None:
    put(tmp_path / "proc/self/cgroup", "4:memory:/box\n3:cpu,cpuacct:/box\n1:name=systemd:/\n0::/../../escape\n")
    base = tmp_path / "sys/fs/cgroup"
    put(base / "cpu,cpuacct/box/cpu.cfs_quota_us", "75000\n")
    put(base / "cpu,cpuacct/box/cpu.cfs_period_us", "100000\n")
    put(base / "cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    put(base / "cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    put(base / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    put(base / "memory/box/memory.limit_in_bytes", "536870912\n")
    assert cgroup_limits(tmp_path) == {"cpu": "75000 100000", "memory": "536870912"}


def test_no_control_groups(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path) == {"cpu": None, "memory": None}
    put(tmp_path / "proc/self/cgroup", "garbage\n\n0\n::\n")
    assert cgroup_limits(tmp_path) == {"cpu": None, "memory": None}


def test_identity_ignores_the_minute_and_nothing_else() -> None:
    machine = capture()
    later = {**machine, "time": "2030-01-01T00:00:00Z", "load_average": [9, 9, 9]}
    other = {**machine, "libraries": {**machine["libraries"], "numpy": "0.1"}}
    identity = environment_sample(machine).environment_id
    assert environment_sample(later).environment_id == identity != environment_sample(other).environment_id
    assert environment_sample(machine, "cuda").target == "cuda" and environment_sample(machine).target == "cpu"
    assert cpu()["cores"] == os.cpu_count() and cpu()["model"]
    assert {"numpy", "onnxruntime", "llama-cpp-python"} <= set(machine["libraries"])


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="no procfs")
def test_memory_of_this_machine() -> None:
    kib = int(Path("/proc/meminfo").read_text().split()[1])
    assert capture()["memory_bytes"] == pytest.approx(kib * 1024, rel=0.01)
