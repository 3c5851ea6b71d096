"""Energy counters on made-up sysfs trees, and whatever this machine has."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from tinyllava_edge.benchmarks import energy, nvml
from tinyllava_edge.benchmarks.energy import open_meter


def put(root: Path, **files: object) -> Path:
    """Write files below a directory; `__` is a dot in a name."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).write_text(f"{content}\n", encoding="utf-8")
    return root


def rapl(root: Path, zone: str, name: str, uj: int, most: int = 262_143_328_850) -> Path:
    return put(root / "sys/class/powercap" / zone, name=name, energy_uj=uj, max_energy_range_uj=most)


def battery(root: Path, name: str = "BAT0", **files: object) -> Path:
    return put(root / "sys/class/power_supply" / name, **{"type": "Battery", "status": "Discharging", **files})


def test_packages_and_dram_count_and_their_parts_do_not(tmp_path: Path) -> None:
    package = rapl(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    core = rapl(tmp_path, "intel-rapl:0:0", "core", 0)
    dram = rapl(tmp_path, "intel-rapl:0:1", "dram", 50)
    rapl(tmp_path, "intel-rapl:1", "psys", 0)
    mmio = rapl(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    meter = open_meter(tmp_path)
    with meter.measure() as reading:
        assert reading.joules is None
        put(package, energy_uj=3_500_000)
        put(core, energy_uj=2_000_000)
        put(mmio, energy_uj=9_000_000)
        put(dram, energy_uj=250_050)
    assert reading.joules == pytest.approx(2.75) and reading.reason == ""
    assert reading.source == "rapl: package-0 + dram"


def test_a_counter_that_wraps_around(tmp_path: Path) -> None:
    zone = rapl(tmp_path, "intel-rapl:0", "package-0", 999_000, most=1_000_000)
    with open_meter(tmp_path).measure() as reading:
        put(zone, energy_uj=500)
    assert reading.joules == pytest.approx(0.0015)


def test_an_unreadable_counter_gives_a_reason_and_no_number(tmp_path: Path) -> None:
    zone = rapl(tmp_path, "intel-rapl:0", "package-0", 5)
    (zone / "energy_uj").unlink()
    (zone / "energy_uj").mkdir()  # can't be read, even by root
    meter = open_meter(tmp_path)
    assert meter.source == "" and "energy_uj can't be read" in meter.reason and "battery: none" in meter.reason
    with meter.measure() as reading:
        pass
    assert reading.joules is None and reading.reason == meter.reason


@pytest.mark.parametrize("content", ["", "abc", "12 34", "9" * 40, "\ufffd"])
def test_garbage_is_not_a_number(tmp_path: Path, content: str) -> None:
    rapl(tmp_path, "intel-rapl:0", "package-0", 5)
    put(tmp_path / "sys/class/powercap/intel-rapl:0", energy_uj=content)
    assert open_meter(tmp_path).source == ""


def test_a_counter_that_goes_away_or_stands_still(tmp_path: Path) -> None:
    zone = rapl(tmp_path, "intel-rapl:0", "package-0", 5)
    meter = open_meter(tmp_path)
    with meter.measure() as reading:
        pass
    assert reading.joules is None and "did not move" in reading.reason
    with meter.measure() as reading:
        (zone / "energy_uj").unlink()
    assert reading.joules is None and "can't be read" in reading.reason


def test_jetsons_power_monitor_is_not_a_counter(tmp_path: Path) -> None:
    put(tmp_path / "sys/class/hwmon/hwmon3", name="ina3221", in1_input=5000, curr1_input=800, in1_label="VDD_IN")
    meter = open_meter(tmp_path)
    assert meter.source == "" and "momentary power and no energy counter" in meter.reason
    (tmp_path / "old/sys/bus/i2c/drivers/ina3221x").mkdir(parents=True)
    assert "momentary power" in open_meter(tmp_path / "old").reason


def test_a_boards_energy_counter(tmp_path: Path) -> None:
    chip = put(tmp_path / "sys/class/hwmon/hwmon1", name="ina228", energy1_input=10_000_000)
    with open_meter(tmp_path).measure() as reading:
        put(chip, energy1_input=10_250_000)
    assert reading.joules == pytest.approx(0.25) and reading.source == "hwmon ina228: energy1_input"
    put(tmp_path / "sys/class/hwmon/hwmon2", name="ina228", energy1_input=7)
    assert "none of them a total" in open_meter(tmp_path).reason
    put(chip, energy1_label="VDD_IN")
    assert open_meter(tmp_path).source == "hwmon ina228: VDD_IN"
    put(tmp_path / "gpu/sys/class/hwmon/hwmon0", name="i915", energy1_input=7)
    assert open_meter(tmp_path / "gpu").source == ""


def test_a_battery_counts_only_while_it_discharges(tmp_path: Path) -> None:
    put(tmp_path / "sys/class/power_supply/AC", type="Mains", online=0)
    put(tmp_path / "sys/class/power_supply/mouse", type="Battery", scope="Device", status="Discharging", energy_now=5)
    own = battery(tmp_path, energy_now=40_000_000)
    meter = open_meter(tmp_path)
    assert meter.source == "battery: BAT0 (energy)"
    with meter.measure() as reading:
        put(own, energy_now=39_999_000)
    assert reading.joules == pytest.approx(3.6)
    with meter.measure() as reading:
        pass
    assert reading.joules is None and "too coarse" in reading.reason
    with meter.measure() as reading:
        put(own, energy_now=39_990_000, status="Charging")
    assert reading.joules is None
    assert "charging, not discharging" in open_meter(tmp_path).reason


def test_charge_times_the_mean_voltage(tmp_path: Path) -> None:
    """A sagging voltage changes what is left by far more than what was taken; only the charge's difference counts."""
    own = battery(tmp_path, "battery", charge_counter=3_000_000, voltage_now=4_000_000)
    with open_meter(tmp_path).measure() as reading:
        put(own, charge_counter=2_999_000, voltage_now=3_900_000)
    assert reading.joules == pytest.approx(1e-3 * 3600 * 3.95)
    assert reading.source == "battery: battery (charge × voltage)"
    (own / "voltage_now").unlink()
    assert "neither energy_now nor charge and voltage" in open_meter(tmp_path).reason


class FakeLibrary:
    """One GPU, called as the real library is called."""

    def __init__(self, energy: bool = True) -> None:
        self.mj, self.has_energy, self.closed = 1000, energy, False

    def __getattr__(self, name: str) -> object:
        if name not in ("nvmlInit_v2", "nvmlShutdown", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2",
                        "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetMemoryInfo",
                        "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetTemperature"):  # fmt: skip
            raise AttributeError(name)
        return lambda *arguments: self.call(name, [getattr(a, "_obj", a) for a in arguments])

    def call(self, name: str, arguments: list[object]) -> int:
        last = arguments[-1] if arguments else None
        if name == "nvmlDeviceGetCount_v2":
            last.value = 1  # type: ignore[union-attr]
        elif name == "nvmlDeviceGetHandleByIndex_v2":
            last.value = 7  # type: ignore[union-attr]
        elif name == "nvmlDeviceGetTotalEnergyConsumption":
            if not self.has_energy:
                return 3
            last.value = self.mj  # type: ignore[union-attr]
        elif name == "nvmlDeviceGetMemoryInfo":
            last.used = 5 << 30  # type: ignore[union-attr]
        elif name == "nvmlDeviceGetComputeRunningProcesses_v3":
            arguments[1].value = 2  # type: ignore[attr-defined]
            for place, (pid, used) in enumerate([(41, 1 << 20), (42, 3 << 20)]):
                last[place].pid, last[place].used = pid, used  # type: ignore[index]
        elif name == "nvmlDeviceGetTemperature":
            assert isinstance(arguments[1], ctypes.c_uint)
            last.value = 61  # type: ignore[union-attr]
        elif name == "nvmlShutdown":
            self.closed = True
        return 0


def test_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary()
    monkeypatch.setattr(nvml, "load", lambda: nvml.Nvml(library))
    zone = rapl(tmp_path, "intel-rapl:0", "package-0", 0)
    with open_meter(tmp_path, gpu=True) as meter:
        with meter.measure() as reading:
            library.mj += 4500
            put(zone, energy_uj=1_000_000)
        assert reading.joules == pytest.approx(5.5) and reading.source == "rapl: package-0; nvml: GPU 0"
    assert library.closed
    found = nvml.Nvml(library)
    assert found.process_bytes(42) == 3 << 20 and found.process_bytes(1) is None
    assert found.used_bytes(0) == 5 << 30
    state = found.state(0)
    assert state["temperature_c"] == 61 and state["clock_mhz"] is None and state["slowed_by"] is None
    library.has_energy = False
    assert "NVML: no GPU with an energy counter" in open_meter(tmp_path / "empty", gpu=True).reason


def test_this_machine(tmp_path: Path) -> None:
    """A source with joules, or a reason with none; nothing else."""
    with open_meter() as meter, meter.measure() as reading:
        sum(k * k for k in range(300_000))
    assert (reading.joules is None) == bool(reading.reason)
    assert reading.joules is None or (0 < reading.joules < 1e5 and reading.source)
    assert energy.open_meter(tmp_path).source == ""


def test_the_block_s_own_error_comes_through(tmp_path: Path) -> None:
    rapl(tmp_path, "intel-rapl:0", "package-0", 5)
    with pytest.raises(ZeroDivisionError), open_meter(tmp_path).measure():
        raise ZeroDivisionError
