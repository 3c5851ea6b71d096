"""Energy counters on made-up sysfs trees, and whatever this machine has."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from tinyllava_edge.benchmarks import energy, nvml
from tinyllava_edge.benchmarks.energy import open_meter, whole_readings
from tinyllava_edge.benchmarks.results import Sample


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
    """GPUs, called as the real library is called; processes 41 and 42 are on the last one."""

    def __init__(self, energy: bool = True, gpus: int = 1) -> None:
        self.mj, self.has_energy, self.closed, self.gpus = 1000, energy, False, gpus

    def __getattr__(self, name: str) -> object:
        if name not in ("nvmlInit_v2", "nvmlShutdown", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2",
                        "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetMemoryInfo",
                        "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetTemperature"):  # fmt: skip
            raise AttributeError(name)
        return lambda *arguments: self.call(name, [getattr(a, "_obj", a) for a in arguments])

    def call(self, name: str, arguments: list[object]) -> int:
        last = arguments[-1] if arguments else None
        if name == "nvmlDeviceGetCount_v2":
            last.value = self.gpus  # type: ignore[union-attr]
        elif name == "nvmlDeviceGetHandleByIndex_v2":
            last.value = 7 + arguments[0].value  # type: ignore[union-attr, attr-defined]
        elif name == "nvmlDeviceGetTotalEnergyConsumption":
            if not self.has_energy:
                return 3
            last.value = self.mj * (arguments[0].value - 6)  # type: ignore[union-attr, attr-defined]
        elif name == "nvmlDeviceGetMemoryInfo":
            last.used = 5 << 30  # type: ignore[union-attr]
        elif name == "nvmlDeviceGetComputeRunningProcesses_v3":
            if arguments[0].value != 6 + self.gpus:  # type: ignore[attr-defined]
                arguments[1].value = 0  # type: ignore[attr-defined]
                return 0
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
    assert open_meter(tmp_path / "empty", gpu=True).reason == "NVML: GPU 0 has no energy counter"


def test_a_gpu_build_has_no_joules_without_its_gpu_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's counter alone would pass for the energy of an answer that a GPU made."""
    rapl(tmp_path, "intel-rapl:0", "package-0", 0)
    for library, reason in ((nvml.Nvml(FakeLibrary(energy=False)), "GPU 0 has no energy counter"), (None, "no GPU")):
        monkeypatch.setattr(nvml, "load", lambda found=library: found)
        with open_meter(tmp_path, gpu=True) as meter, meter.measure() as reading:
            pass
        assert reading.joules is None and reading.reason == f"NVML: {reason}" and reading.source == ""
    assert open_meter(tmp_path).source == "rapl: package-0"  # a build on the processor is not charged for a GPU


def test_only_the_gpus_that_the_process_is_on_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary(gpus=3)
    monkeypatch.setattr(nvml, "load", lambda: nvml.Nvml(library))
    with open_meter(tmp_path, gpu=True, pid=42) as meter, meter.measure() as reading:
        library.mj += 1000  # the third GPU counts three times as fast
    assert reading.source == "nvml: GPU 2" and reading.joules == pytest.approx(3.0)
    assert open_meter(tmp_path, gpu=True, pid=1).reason == "NVML: can't tell which of 3 GPUs this process is on"


def test_a_coarse_battery_gives_no_typical_energy(tmp_path: Path) -> None:
    """Steps of 36 J, answers of 0.5 J: the two of 200 answers that saw a step are not typical ones of 36 J."""
    own = battery(tmp_path, energy_now=40_000_000)
    meter, samples, taken = open_meter(tmp_path), [], 0.0
    for number in range(200):
        with meter.measure() as reading:
            taken += 0.5
            put(own, energy_now=40_000_000 - int(taken // 36) * 10_000)
        told = {"source": reading.source, "reason": reading.reason, "stood_still": reading.stood_still}
        samples.append(Sample("energy", "edge", "b", "answer", reading.joules, "J", number, "e", detail=told))
    seen = [s.value for s in samples if s.value is not None]
    assert seen == [pytest.approx(36.0)] * 2
    settled = whole_readings(samples)
    assert {s.value for s in settled} == {None}
    assert "battery: BAT0 (energy): too coarse, the counter did not move in 198 of 200" in settled[0].detail["reason"]
    assert sum(s.detail["joules"] for s in settled) / 200 == pytest.approx(0.5, rel=0.4)  # nothing is dropped
    assert energy.values(samples) == ([], settled[0].detail["reason"])  # files that were written before
    fine = [s for s in samples if s.value is not None]
    assert whole_readings(fine) == fine and energy.values(fine) == (seen, "")


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
