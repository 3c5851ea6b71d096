"""Energy of a block of code from the machine's own counters; where there is none, null and the reason. Never estimated.

| source | counter | what it counts |
|---|---|---|
| RAPL | /sys/class/powercap/intel-rapl*: µJ, wraps around | processor packages and, where listed, DRAM; all processes |
| hwmon | /sys/class/hwmon/*/energy*_input: µJ (ina228 and its like, amd_energy) | a board's or a socket's supply |
| battery | /sys/class/power_supply/*: energy_now (µWh), else charge × voltage | the whole device, while it discharges |
| NVML | total energy of a GPU: mJ | the whole card; for builds on `cuda` alone, and the cards that this process is on |

Power that can only be sampled (Jetson's INA3221: power*_input, curr*_input) is no counter and isn't used.

A counter that stood still during one answer and jumped during another counts in steps as large as an answer or larger.
The answers with a step would pass for typical, so such a series has no value at all (`whole_readings`); what was read
stays in the details, and its mean, steps and standstills alike, would be right in the long run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinyllava_edge.benchmarks import nvml
from tinyllava_edge.benchmarks.conditions import number, text
from tinyllava_edge.benchmarks.results import Sample

Between = Callable[[list[float], list[float]], list[float]]
_UWH = 3600e-6  # joules
STILL = "the counter did not move"
_TOTALS = ("VDD_IN", "VIN_SYS_5V0", "total")  # rails that feed all the others


@dataclass
class Reading:
    """What a measured block took; filled in when the block ends."""

    joules: float | None = None
    """energy; None where it can't be told"""
    source: str = ""
    """counters that were read, e.g. `rapl: package-0 + dram`"""
    reason: str = "not measured"
    """why `joules` is None; empty where it isn't"""
    stood_still: bool = False
    """whether it is None because a counter did not move, and for nothing else"""


@dataclass(frozen=True)
class Counter:
    """One way to read energy."""

    source: str
    """what is read"""
    read: Callable[[], list[float] | None]
    """each part now, in the same order each time; None where it can't be read at this moment"""
    between: Between
    """joules of each part between two readings"""
    coarse: str = ""
    """what to say where the counter didn't move"""

    def difference(self, before: list[float] | None, after: list[float] | None) -> tuple[float | None, str]:
        """Joules between two readings, or None and the reason."""
        if before is None or after is None or len(before) != len(after):
            return None, f"{self.source}: can't be read"
        parts = self.between(before, after)
        if min(parts) < 0:
            return None, f"{self.source}: the counter went back"
        total = sum(parts)
        if total == 0:
            return None, f"{self.source}: {STILL}{self.coarse}"
        return total, ""


class Meter:
    """Reads the counters before and after a block; nothing runs meanwhile.

    Args:
        counters: all are added up; each must give a number.
        reason: why there is no counter.
        close: called at the end.
    """

    def __init__(self, counters: Sequence[Counter], reason: str = "", close: Callable[[], None] | None = None) -> None:
        self._counters, self._close = tuple(counters), close
        self.source = "; ".join(counter.source for counter in self._counters)
        self.reason = "" if self._counters else reason

    @contextlib.contextmanager
    def measure(self) -> Iterator[Reading]:
        """Measure a block; the reading is complete once the block has ended."""
        reading = Reading(source=self.source, reason=self.reason)
        before = [counter.read() for counter in self._counters]
        yield reading
        if not self._counters:
            return
        after = [counter.read() for counter in reversed(self._counters)][::-1]  # the first one's interval is outermost
        parts = [c.difference(b, a) for c, b, a in zip(self._counters, before, after, strict=True)]
        reading.reason = "; ".join(reason for _, reason in parts if reason)
        reading.joules = None if reading.reason else sum(joules for joules, _ in parts if joules is not None)
        told = [reason for _, reason in parts if reason]
        reading.stood_still = bool(told) and all(STILL in reason for reason in told)

    def close(self) -> None:
        """Let go of the driver, where one was opened."""
        if self._close:
            self._close()
            self._close = None

    def __enter__(self) -> Meter:
        """The meter itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()


def open_meter(root: Path = Path("/"), *, gpu: bool = False, pid: int | None = None) -> Meter:
    """The best counters of this machine: RAPL, else a board's, else the battery's; with `gpu`, NVIDIA's beside it.

    Args:
        root: sysfs is looked for below it.
        gpu: whether the work runs on an NVIDIA GPU. Its counter then must be there: joules without the card that does
            the work would be none of the build's. The machine's own are added where they exist; `source` names them.
        pid: process whose GPUs are meant, this one by default; it must be on them already, with a model open.
    """
    counters, reasons = list[Counter](), list[str]()
    for find in (_rapl, _hwmon, _battery):
        counter, reason = find(root)
        if counter:
            counters.append(counter)
            break
        reasons.append(reason)
    if not gpu:
        return Meter(counters, "; ".join(reasons))
    library = nvml.load()
    counter, reason = _gpus(library, os.getpid() if pid is None else pid) if library else (None, "NVML: no GPU")
    if counter is None:
        if library:
            library.close()
        return Meter((), reason)
    return Meter([*counters, counter], "", library.close if library else None)


def whole_readings(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, with null energies for each build and stage whose counter stood still in one answer or more.

    What was read stays as `joules` in the detail, 0 for a standstill.
    """
    groups: dict[tuple[str, str, str, str], list[Sample]] = {}
    for sample in samples:
        if sample.kind == "energy":
            groups.setdefault(_series(sample), []).append(sample)
    reasons = {series: reason for series, found in groups.items() if (reason := _coarse(found))}

    def settled(sample: Sample) -> Sample:
        reason = reasons.get(_series(sample)) if sample.kind == "energy" else None
        if reason is None:
            return sample
        joules = 0.0 if sample.detail.get("stood_still") else sample.value
        return replace(sample, value=None, detail={**sample.detail, "reason": reason, "joules": joules})

    return list(map(settled, samples))


def values(found: Sequence[Sample]) -> tuple[list[float], str]:
    """One build's energies of one stage in joules, and why there are none; older files are held to the same rule."""
    coarse = _coarse(found)
    known = [] if coarse else [float(sample.value) for sample in found if sample.value is not None]
    told = next((str(sample.detail["reason"]) for sample in found if sample.detail.get("reason")), "")
    return known, "" if known else coarse or told


def _series(sample: Sample) -> tuple[str, str, str, str]:
    return sample.environment_id, sample.target, sample.build, sample.stage


def _coarse(found: Sequence[Sample]) -> str:
    """Why a series has no typical value; empty where no reading stood still."""
    still = sum(sample.value is None and STILL in str(sample.detail.get("reason", "")) for sample in found)
    source = next((str(sample.detail["source"]) for sample in found if sample.detail.get("source")), "the counter")
    return f"{source}: too coarse, {STILL} in {still} of {len(found)} answers" if still else ""


def _rapl(root: Path) -> tuple[Counter | None, str]:
    """Packages and their DRAM. Cores and uncore are part of a package; psys holds packages, so it is left out."""
    base = root / "sys/class/powercap"
    zones = [path for path in _listed(base, "intel-rapl*:*") if not path.name.startswith("intel-rapl-mmio")]
    if not zones:
        return None, "RAPL: not there"
    wanted = [(zone, text(zone / "name") or "") for zone in zones]
    wanted = [(zone, name) for zone, name in wanted if name.startswith("package") or name == "dram"]
    if not wanted:
        return None, "RAPL: lists no package"
    refused = next((zone for zone, _ in wanted if number(zone / "energy_uj") is None), None)
    if refused:
        return None, f"RAPL: {refused / 'energy_uj'} can't be read (it needs root since Linux 5.10)"
    ranges = [number(zone / "max_energy_range_uj") for zone, _ in wanted]
    if any(size is None or size <= 0 for size in ranges):
        return None, "RAPL: a counter's range (max_energy_range_uj) can't be read"
    files = [zone / "energy_uj" for zone, _ in wanted]
    limits = [size or 0 for size in ranges]

    def between(before: list[float], after: list[float]) -> list[float]:
        steps = zip(before, after, limits, strict=True)
        return [((last - first) if last >= first else last - first + limit) * 1e-6 for first, last, limit in steps]

    return Counter(f"rapl: {' + '.join(name for _, name in wanted)}", lambda: _numbers(files), between), ""


def _hwmon(root: Path) -> tuple[Counter | None, str]:
    """A board's energy counter: the rail that feeds the others, or all sockets, or the only one that there is."""
    counters, sampled = list[tuple[str, str, Path]](), False
    for chip in _listed(root / "sys/class/hwmon", "hwmon*"):
        name = text(chip / "name") or ""
        if not name.startswith("ina") and name != "amd_energy":
            continue
        energies = _listed(chip, "energy*_input")
        sampled = sampled or not energies
        for file in energies:
            label = text(chip / file.name.replace("_input", "_label")) or ""
            if number(file) is not None:
                counters.append((name, label, file))
    sampled = sampled or bool(_listed(root / "sys/bus/i2c/drivers", "ina3221*"))
    chosen = [c for c in counters if c[1] in _TOTALS] or [c for c in counters if c[1].startswith("Esocket")]
    if not chosen and len(counters) == 1:
        chosen = counters
    if not chosen:
        if counters:
            return None, "hwmon: several energy counters, none of them a total"
        if sampled:
            return None, "hwmon: the power monitor (INA) gives momentary power and no energy counter"
        return None, "hwmon: no energy counter"
    files = [file for _, _, file in chosen]
    source = f"hwmon {chosen[0][0]}: {' + '.join(label or file.name for _, label, file in chosen)}"
    return Counter(source, lambda: _numbers(files), _difference(1e-6)), ""


def _battery(root: Path) -> tuple[Counter | None, str]:
    """The device's batteries, while they discharge."""
    supplies = _listed(root / "sys/class/power_supply", "*")
    batteries = [s for s in supplies if text(s / "type") == "Battery" and text(s / "scope") != "Device"]
    if not batteries:
        return None, "battery: none"
    for battery in batteries:
        if status := _at_rest(battery):
            return None, f"battery: {battery.name} is {status}, not discharging"
    for kind, files, between in _GAUGES:
        found = [[battery / file for file in files] for battery in batteries]
        if all(number(file) is not None for parts in found for file in parts):
            return _discharge(batteries, kind, [file for parts in found for file in parts], between), ""
    return None, "battery: neither energy_now nor charge and voltage can be read"


def _discharge(batteries: Sequence[Path], kind: str, files: Sequence[Path], between: Between) -> Counter:
    source = f"battery: {' + '.join(battery.name for battery in batteries)} ({kind})"

    def read() -> list[float] | None:
        return None if any(map(_at_rest, batteries)) else _numbers(files)

    return Counter(source, read, between, "; its steps are too coarse for so short a time")


def _at_rest(battery: Path) -> str:
    """The battery's status unless it discharges."""
    status = text(battery / "status") or "of unknown status"
    return "" if status == "Discharging" else status.lower()


def _drained(before: list[float], after: list[float]) -> list[float]:
    """µWh left → joules taken."""
    return [(first - last) * _UWH for first, last in zip(before, after, strict=True)]


def _charge_drained(before: list[float], after: list[float]) -> list[float]:
    """µAh left and µV of each battery → joules taken, at the mean of the two voltages."""
    pairs = zip(before[::2], after[::2], before[1::2], after[1::2], strict=True)
    return [(first - last) * (start + end) / 2 * 1e-6 * _UWH for first, last, start, end in pairs]


_GAUGES: tuple[tuple[str, tuple[str, ...], Between], ...] = (
    ("energy", ("energy_now",), _drained),
    ("charge × voltage", ("charge_now", "voltage_now"), _charge_drained),
    ("charge × voltage", ("charge_counter", "voltage_now"), _charge_drained),
)


def _gpus(library: nvml.Nvml, pid: int) -> tuple[Counter | None, str]:
    """The counters of the GPUs that a process is on."""
    numbers = library.gpus_of(pid)
    if not numbers and len(library) == 1:
        numbers = [0]  # in a container the driver knows the process by another number
    if not numbers:
        return None, f"NVML: can't tell which of {len(library)} GPUs this process is on"
    silent = [index for index in numbers if library.energy_mj(index) is None]
    if silent:
        return None, f"NVML: GPU {' + '.join(map(str, silent))} has no energy counter"

    def read() -> list[float] | None:
        return _whole([library.energy_mj(index) for index in numbers])

    return Counter(f"nvml: GPU {' + '.join(map(str, numbers))}", read, _difference(1e-3)), ""


def _difference(unit: float) -> Between:
    """Later minus earlier, times the unit in joules."""
    return lambda before, after: [(last - first) * unit for first, last in zip(before, after, strict=True)]


def _numbers(files: Sequence[Path]) -> list[float] | None:
    return _whole([number(file) for file in files])


def _whole(found: Sequence[int | None]) -> list[float] | None:
    """The numbers, unless one is missing."""
    return None if None in found else [float(value) for value in found if value is not None]


def _listed(directory: Path, pattern: str) -> list[Path]:
    try:
        return sorted(directory.glob(pattern))
    except OSError:
        return []
