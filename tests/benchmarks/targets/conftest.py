"""A real sshd on loopback with its own host key, its own login keys and a high port."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {home}/host_key
AuthorizedKeysFile {home}/authorized_keys
PidFile {home}/sshd.pid
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
MaxStartups 100
"""


def children(pid: int) -> list[int]:
    """Processes below another one, nearest first."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        mine = parents.get(queue.pop(0), [])
        found += mine
        queue += mine
    return found


def program(pid: int) -> str:
    """Name of a process's program; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def eventually(found: Callable[[], Any], seconds: float = 60) -> Any:
    """What `found` returns as soon as it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.02)
    raise AssertionError(f"nothing in {seconds} s")


@dataclass
class Device:
    """The machine on the other side, which is this one."""

    home: Path
    """keys, configuration, log"""
    port: int
    """where sshd listens"""
    process: subprocess.Popen[bytes]
    """sshd"""
    key: str = "login_key"
    """which login key is used"""
    lines: list[str] = field(default_factory=list)
    """what the client said"""

    def url(self, directory: Path) -> str:
        """Address of a directory."""
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}{quote(str(directory))}"

    @property
    def ssh_options(self) -> list[str]:
        """What a user would have in ssh_config."""
        return [
            f"UserKnownHostsFile={self.home / 'known_hosts'}",
            "GlobalKnownHostsFile=/dev/null",
            f"IdentityFile={self.home / self.key}",
            "IdentitiesOnly=yes",
        ]

    def options(self, **more: Any) -> dict[str, Any]:
        """A short measurement."""
        short = {"builds": ["fp32+f32"], "repetitions": 2, "max_tokens": 2, "memory": False, "allow_unverified": True}
        return {**short, "ssh_options": self.ssh_options, "remote_python": sys.executable, **more}

    def say(self, line: str) -> None:
        """A progress callback."""
        self.lines.append(line)

    def kill_sessions(self) -> int:
        """Kill sshd's processes of single connections, as a cut line would end them."""
        sessions = [pid for pid in children(self.process.pid) if program(pid).startswith("sshd")]
        for pid in sessions:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(sessions)

    def authorize(self, key: str, command: str = "") -> None:
        """Make a login key; with a command, sshd runs that whatever is asked for."""
        _make_key(self.home / key)
        options = 'command="' + command.replace('"', '\\"') + '" ' if command else ""
        public = (self.home / f"{key}.pub").read_text()
        with (self.home / "authorized_keys").open("a") as handle:
            handle.write(options + public)


def _make_key(path: Path) -> None:
    path.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


@pytest.fixture(scope="session")
def _sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    if SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("needs sshd, ssh and ssh-keygen (apt-get install openssh-server)")
    home = tmp_path_factory.mktemp("sshd")
    _make_key(home / "host_key")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (home / "sshd_config").write_text(CONFIG.format(port=port, home=home))
    public = (home / "host_key.pub").read_text().rsplit(" ", 1)[0]
    (home / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's privilege separation wants it
    command = [SSHD, "-D", "-f", str(home / "sshd_config"), "-E", str(home / "log")]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    device = Device(home, port, process)
    device.authorize("login_key")

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    try:
        eventually(listens, 20)
        yield device
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def device(_sshd: Device) -> Device:
    """The sshd, and a client that has said nothing yet."""
    return Device(_sshd.home, _sshd.port, _sshd.process)


@pytest.fixture
def forced(device: Device) -> Iterator[Any]:
    """Give the next login a command of sshd's choosing."""
    kept = (device.home / "authorized_keys").read_text()

    def force(command: str) -> None:
        device.key = "forced"
        (device.home / "authorized_keys").write_text(kept)
        device.authorize("forced", command)

    yield force
    (device.home / "authorized_keys").write_text(kept)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory on the device whose name a careless shell would trip over; what still runs there is ended."""
    directory = tmp_path / 'it\'s a "dir" $HOME;é'
    yield directory
    with contextlib.suppress(OSError, ValueError):
        note = json.loads((directory / "lock").read_text())
        if str(directory) in str(Path(f"/proc/{note['pid']}/cwd").readlink()):
            os.killpg(note["pid"], signal.SIGKILL)
