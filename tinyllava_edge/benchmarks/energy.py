"""Energy of a block of code from the machine's own counters; where there is none, null and the reason. Never estimated.

| source | counter | what it counts |
|---|---|---|
| RAPL | /sys/class/powercap/intel-rapl*: µJ, wraps around | processor packages and, where listed, DRAM; all processes |
| hwmon | /sys/class/hwmon/*/energy*_input: µJ (ina228 and its like, amd_energy) | a board's or a socket's supply |
| battery | /sys/class/power_supply/*: energy_now (µWh), else charge × voltage | the whole device, while it discharges |
| NVML | total energy of each GPU: mJ | the whole card; asked for where a build runs on it |

Power that can only be sampled (Jetson's INA3221: power*_input, curr*_input) is no counter and isn't used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllava_edge.benchmarks import nvml
from tinyllava_edge.benchmarks.conditions import number, text

Between = Callable[[list[float], list[float]], list[float]]
_UWH = 3600e-6  # joules
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
            return None, f"{self.source}: the counter did not move{self.coarse}"
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


def open_meter(root: Path = Path("/"), *, gpu: bool = False) -> Meter:
    """The best counters of this machine: RAPL, else a board's, else the battery's; with `gpu`, NVIDIA's beside it.

    Args:
        root: sysfs is looked for below it.
        gpu: whether the work runs on an NVIDIA GPU. Only the counters that exist are added, and `source` names them.
    """
    counters, reasons = list[Counter](), list[str]()
    for find in (_rapl, _hwmon, _battery):
        counter, reason = find(root)
        if counter:
            counters.append(counter)
            break
        reasons.append(reason)
    library = nvml.load() if gpu else None
    if gpu:
        counter = _gpus(library) if library else None
        if counter:
            counters.append(counter)
        else:
            reasons.append("NVML: no GPU with an energy counter")
    return Meter(counters, "; ".join(reasons), library.close if library else None)


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


def _gpus(library: nvml.Nvml) -> Counter | None:
    numbers = [index for index in range(len(library)) if library.energy_mj(index) is not None]
    if not numbers:
        return None

    def read() -> list[float] | None:
        return _whole([library.energy_mj(index) for index in numbers])

    return Counter(f"nvml: GPU {' + '.join(map(str, numbers))}", read, _difference(1e-3))


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
