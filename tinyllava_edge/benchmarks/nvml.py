"""NVIDIA's management library through ctypes: energy counter, memory of a process, temperature, clocks, throttling.

The library comes with the driver, so no package is needed. Every function gives nothing where there is no driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

_LIBRARIES = ("libnvidia-ml.so.1", "nvml.dll")
_NOT_AVAILABLE = (1 << 64) - 1  # memory of a process under a driver that doesn't tell
# nvmlClocksEventReasons: software power cap, hardware slowdown, software and hardware thermal, power brake
_SLOWED = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat (hardware)", 0x80: "power brake"}
_GPU_TEMPERATURE, _SM_CLOCK = 0, 1
_MAX_PROCESSES = 1024


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class _Process(ctypes.Structure):  # nvmlProcessInfo_v2_t
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


class Nvml:
    """An open library. Functions give None where the driver refuses.

    Args:
        library: the loaded library; tests pass their own.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        count = ctypes.c_uint()
        if self._call("nvmlInit_v2"):
            raise OSError("nvmlInit failed")
        self._devices: list[ctypes.c_void_p] = []
        if not self._call("nvmlDeviceGetCount_v2", ctypes.byref(count)):
            for index in range(count.value):
                device = ctypes.c_void_p()
                if not self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device)):
                    self._devices.append(device)

    def __len__(self) -> int:
        """Number of GPUs."""
        return len(self._devices)

    def energy_mj(self, index: int) -> int | None:
        """Millijoules since the driver was loaded (Volta and newer)."""
        return self._value("nvmlDeviceGetTotalEnergyConsumption", index, ctypes.c_ulonglong)

    def used_bytes(self, index: int) -> int | None:
        """Bytes that all processes together hold on a GPU."""
        found = _Memory()
        if self._call("nvmlDeviceGetMemoryInfo", self._devices[index], ctypes.byref(found)):
            return None
        return int(found.used)

    def process_bytes(self, pid: int) -> int | None:
        """Bytes that one process holds on all GPUs; None where it isn't listed, as in a container with its own pids."""
        held = [entry.used for device in self._devices for entry in self._processes(device) if entry.pid == pid]
        known = [int(used) for used in held if used != _NOT_AVAILABLE]
        return sum(known) if known else None

    def gpus_of(self, pid: int) -> list[int]:
        """Numbers of the GPUs that a process computes on; none where it isn't listed."""
        listed = [[entry.pid for entry in self._processes(device)] for device in self._devices]
        return [index for index, pids in enumerate(listed) if pid in pids]

    def state(self, index: int) -> dict[str, Any]:
        """Name, temperature in °C, clock in MHz, and what slows the GPU down at this moment."""
        name = ctypes.create_string_buffer(96)
        named = not self._call("nvmlDeviceGetName", self._devices[index], name, ctypes.c_uint(96))
        reasons = self._value("nvmlDeviceGetCurrentClocksThrottleReasons", index, ctypes.c_ulonglong)
        return {
            "name": name.value.decode("utf-8", "replace") if named else None,
            "temperature_c": self._value("nvmlDeviceGetTemperature", index, ctypes.c_uint, _GPU_TEMPERATURE),
            "clock_mhz": self._value("nvmlDeviceGetClockInfo", index, ctypes.c_uint, _SM_CLOCK),
            "slowed_by": None if reasons is None else [word for bit, word in _SLOWED.items() if reasons & bit],
        }

    def close(self) -> None:
        """Let go of the driver."""
        self._call("nvmlShutdown")

    def _processes(self, device: ctypes.c_void_p) -> list[_Process]:
        """The processes that compute on a GPU."""
        count, found = ctypes.c_uint(_MAX_PROCESSES), (_Process * _MAX_PROCESSES)()
        if self._call("nvmlDeviceGetComputeRunningProcesses_v3", device, ctypes.byref(count), found):
            return []
        return list(found[: min(count.value, _MAX_PROCESSES)])

    def _value(self, function: str, index: int, kind: Any, *arguments: int) -> int | None:
        found = kind()
        given = [ctypes.c_uint(argument) for argument in arguments]
        return None if self._call(function, self._devices[index], *given, ctypes.byref(found)) else int(found.value)

    def _call(self, function: str, *arguments: Any) -> int:
        """The function's status, 0 for success; -1 where the library has none of this name."""
        try:
            return int(getattr(self._library, function)(*arguments))
        except AttributeError:
            return -1


@contextlib.contextmanager
def session() -> Iterator[Nvml | None]:
    """The library, closed at the end; None where there is no driver or no GPU."""
    found = load()
    try:
        yield found
    finally:
        if found:
            found.close()


def load() -> Nvml | None:
    """The library, opened; None where there is no driver or no GPU. The caller closes it."""
    for name in _LIBRARIES[os.name == "nt" :][:1]:
        try:
            found = Nvml(ctypes.CDLL(name))
        except OSError:
            continue
        if len(found):
            return found
        found.close()
    return None


def states() -> list[dict[str, Any]]:
    """`Nvml.state` of each GPU; empty where there is none."""
    with session() as found:
        return [found.state(index) for index in range(len(found))] if found else []
