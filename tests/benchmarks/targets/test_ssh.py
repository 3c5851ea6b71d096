"""The whole road over a real sshd: copied once, measured there, brought back; and what can go wrong on it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tinyllava_edge.benchmarks import targets
from tinyllava_edge.benchmarks.results import Sample, read_results, write_results
from tinyllava_edge.benchmarks.targets.package import pack, requirements
from tinyllava_edge.errors import (
    DataError,
    DependencyError,
    EngineError,
    StorageError,
    TinyLlavaEdgeError,
    UnverifiedError,
    UsageError,
)

from .conftest import Device, children, eventually, program

LONG = {"repetitions": 1, "min_time_s": 5.0}  # seconds, long enough to be disturbed


def measure(device: Device, place: Path, bundle: Path, **options: Any) -> list[Sample]:
    return targets.run(device.url(place), bundle, device.options(**options), device.say)


@pytest.fixture(scope="session")
def _measured(_sshd: Device, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("measured") / "device"
    measure(_sshd, place, tiny_bundle)
    return place


@pytest.fixture
def measured(_measured: Path, place: Path) -> Path:
    """A directory on the device where the short measurement was made and brought home."""
    shutil.copytree(_measured, place)
    return place


def runs(place: Path) -> list[Path]:
    return sorted(place.glob("runs/*"))


def values(samples: list[Sample]) -> list[float | None]:
    return [sample.value for sample in samples if sample.stage == "ttft_ms"]


def state(place: Path) -> str:
    """Of the newest run; empty before it has said anything."""
    try:
        return str(json.loads((runs(place)[-1] / "status.json").read_text())["state"])
    except (IndexError, FileNotFoundError):
        return ""


class Client(threading.Thread):
    """A client beside the test."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(daemon=True)
        self.args, self.options = args, options
        self.samples: list[Sample] = []
        self.error: TinyLlavaEdgeError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.samples = measure(*self.args, **self.options)
        except TinyLlavaEdgeError as error:
            self.error = error

    def finish(self) -> list[Sample]:
        self.join(120)
        assert not self.is_alive() and self.error is None, self.error
        return self.samples


def test_measures_there_and_copies_once(device: Device, place: Path, tiny_bundle: Path) -> None:
    """First run: everything is sent. Second run: nothing is, and it is a new measurement."""
    samples = measure(device, place, tiny_bundle)
    latency = values(samples)
    assert len(latency) == 2 and all(v and v > 0 for v in latency)
    assert {s.target for s in samples} == {device.url(place)} and "%20" in device.url(place)
    environment = next(s for s in samples if s.kind == "environment")
    assert environment.detail["ssh"]["run"] == runs(place)[0].name
    assert {s.environment_id for s in samples if s.kind == "latency"} == {environment.environment_id}
    for blob in place.glob("blobs/*"):
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    linked = next(place.glob("bundles/*/*.gguf"))
    assert linked.stat().st_nlink == 2, "the bundle is made of links"
    assert not list(place.glob("bundles/*/*q8_0*")), "a build that was not asked for was sent"
    times = {blob: blob.stat().st_mtime_ns for blob in place.glob("blobs/*")}
    assert any("sending" in line for line in device.lines)
    device.lines.clear()
    again = measure(device, place, tiny_bundle)
    assert not any("sending" in line for line in device.lines), device.lines
    assert {blob: blob.stat().st_mtime_ns for blob in place.glob("blobs/*")} == times
    assert values(again) != latency
    assert [path.name.rpartition("-")[2] for path in runs(place)] == ["1", "2"]


def test_equals_a_local_run_in_all_but_the_numbers(
    device: Device, place: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """The same code measured: same lines, same builds, same hashes; and they can be written and read."""
    from tinyllava_edge.benchmarks.latency import bench

    def kinds(samples: list[Sample]) -> list[tuple[str, str, str, int]]:
        return [(s.kind, s.build, s.stage, s.sample) for s in samples]

    there = measure(device, place, tiny_bundle)
    here = bench(tiny_bundle, ["fp32+f32"], repetitions=2, max_tokens=2, memory=False)
    assert kinds(there) == kinds(here)
    bundles = [next(s.detail for s in samples if s.kind == "bundle") for samples in (there, here)]
    assert bundles[0]["sha256"] == bundles[1]["sha256"] and len(bundles[0]["files"]) == len(bundles[1]["files"])
    for file, same in zip(bundles[0]["files"], bundles[1]["files"], strict=True):
        if file["precision"] == "q8_0":  # not sent, so its tensors can't be listed there
            file, same = ({key: value for key, value in f.items() if key != "tensors"} for f in (file, same))
        assert file == same
    write_results(tmp_path / "results.jsonl", there)
    assert read_results([tmp_path / "results.jsonl"]) == there


def test_picture_and_home_directory(device: Device, tiny_bundle: Path, tmp_path: Path) -> None:
    """A picture of here is measured with there; `/~/` is the login's home."""
    from PIL import Image

    picture = tmp_path / "-a b'c.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    name = f"tinyllava-test-{os.getpid()}"
    home = Path.home() / name
    try:
        url = f"ssh://127.0.0.1:{device.port}/~/{name}"
        samples = targets.run(url, tiny_bundle, device.options(picture=picture), device.say)
        assert {s.target for s in samples} == {url}
        assert next(home.glob("runs/*/inputs/*")).read_bytes() == picture.read_bytes()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def test_connection_cut_while_measuring(device: Device, place: Path, tiny_bundle: Path) -> None:
    """sshd's session process is killed, then the ssh client: the run goes on and the client finds it again."""
    client = Client(device, place, tiny_bundle, **LONG)
    eventually(lambda: state(place) == "measuring")
    assert eventually(device.kill_sessions)
    eventually(lambda: any("connection lost" in line for line in device.lines))
    mine = eventually(lambda: [pid for pid in children(os.getpid()) if program(pid) == "ssh"])
    for pid in mine:
        os.kill(pid, signal.SIGKILL)
    assert values(client.finish()) == values(read_results([runs(place)[0] / "results.jsonl"]))
    assert sum("connection lost" in line for line in device.lines) >= 2
    assert len(runs(place)) == 1


def test_client_killed_and_started_again(device: Device, place: Path, tiny_bundle: Path) -> None:
    """A dead client costs nothing: the next one with the same arguments gets the same run, once."""
    options = device.options(**LONG)
    code = "import json, sys; from pathlib import Path; from tinyllava_edge.benchmarks import targets\n"
    code += "targets.run(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), print)"
    words = [sys.executable, "-c", code, device.url(place), str(tiny_bundle), json.dumps(options)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as first:
        eventually(lambda: state(place) == "measuring")
        for pid in [first.pid, *children(first.pid)]:
            os.kill(pid, signal.SIGKILL)
    pack.cache_clear()  # both processes read the package when they begin
    samples = measure(device, place, tiny_bundle, **LONG)
    assert any("picking up run" in line for line in device.lines)
    assert values(samples) and len(runs(place)) == 1
    assert not any("sending" in line for line in device.lines)


def test_finished_but_not_brought_home(device: Device, measured: Path, tiny_bundle: Path) -> None:
    (runs(measured)[0] / "delivered").unlink()  # as if the client had died just before
    before = read_results([runs(measured)[0] / "results.jsonl"])
    assert values(measure(device, measured, tiny_bundle)) == values(before) != []
    assert any("has ended" in line for line in device.lines) and len(runs(measured)) == 1


def test_two_clients(device: Device, place: Path, tiny_bundle: Path) -> None:
    """The same question shares a run; another one is refused while it lasts, and goes afterwards."""
    first = Client(device, place, tiny_bundle, **LONG)
    eventually(lambda: state(place) == "measuring")
    second = Client(device, place, tiny_bundle, **LONG)
    with pytest.raises(EngineError, match=r"another run is measuring \([0-9a-f]{16}-1, process \d+, since 20"):
        measure(device, place, tiny_bundle)
    assert first.finish() == second.finish() and len(runs(place)) == 1
    assert measure(device, place, tiny_bundle)


def test_killed_run_leaves_no_lock(device: Device, place: Path, tiny_bundle: Path) -> None:
    """The lock file of a run that was killed names a dead process and stops nobody."""
    client = Client(device, place, tiny_bundle, **LONG)
    eventually(lambda: state(place) == "measuring")
    note = json.loads((place / "lock").read_text())
    for pid in [note["pid"], *children(note["pid"])]:
        os.kill(pid, signal.SIGKILL)
    client.join(60)
    assert isinstance(client.error, EngineError) and "was killed" in client.error.message
    assert (place / "lock").read_text() == json.dumps(note)
    assert measure(device, place, tiny_bundle)


def test_damaged_blob_is_mended(device: Device, measured: Path, tiny_bundle: Path) -> None:
    blob = max(measured.glob("blobs/*"), key=lambda path: path.stat().st_size)
    content = blob.read_bytes()
    with blob.open("r+b") as handle:
        handle.seek(len(content) // 2)
        handle.write(bytes([content[len(content) // 2] ^ 1]))
    assert measure(device, measured, tiny_bundle)
    assert any("damaged there" in line for line in device.lines)
    assert sum("sending" in line for line in device.lines) == 1
    assert blob.read_bytes() == content
    assert next(measured.glob("bundles/*/*f32.gguf")).samefile(blob)


def test_upload_cut_and_resumed(device: Device, place: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """A proxy cuts the first big upload; the second connection goes on where it was, a third is not needed."""
    gguf = next(tiny_bundle.glob("*f32.gguf"))
    proxy = tmp_path / "proxy.py"
    proxy.write_text(PROXY)
    command = f"{sys.executable} {proxy} 127.0.0.1 {device.port} {gguf.stat().st_size // 2} {tmp_path / 'cut'}"
    options = [*device.ssh_options, f"ProxyCommand={command}"]
    assert measure(device, place, tiny_bundle, ssh_options=options)
    assert (tmp_path / "cut").exists()
    assert any(f"{gguf.name}: connection lost" in line for line in device.lines), device.lines
    assert any(f"{gguf.name}: sending" in line and "going on at" in line for line in device.lines), device.lines


def test_wrong_part_is_sent_again(device: Device, place: Path, tiny_bundle: Path) -> None:
    """What an earlier cut left is wrong: the hash says so after the upload, and the file is sent whole."""
    gguf = next(tiny_bundle.glob("*f32.gguf"))
    place.joinpath("blobs").mkdir(parents=True)
    (place / "blobs" / f"{hashlib.sha256(gguf.read_bytes()).hexdigest()}.part").write_bytes(b"x" * 1000)
    assert measure(device, place, tiny_bundle)
    about = [line.partition(": ")[2] for line in device.lines if line.startswith(gguf.name)]
    assert [line.split()[0] for line in about] == ["sending", "its", "sending"], about


PROXY = """
import os, socket, sys, threading
host, port, limit, mark = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
line = socket.create_connection((host, port))
def back():
    while chunk := line.recv(65536):
        os.write(1, chunk)
    os._exit(0)
threading.Thread(target=back, daemon=True).start()
sent = 0
while chunk := os.read(0, 65536):
    line.sendall(chunk)
    sent += len(chunk)
    if sent > limit and not os.path.exists(mark):
        open(mark, "w").close()
        os._exit(1)
"""


def test_new_host_and_changed_host(device: Device, place: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """Neither is talked to; the message says what to type."""
    known = tmp_path / "known"
    options = [f"UserKnownHostsFile={known}", *device.ssh_options[1:]]
    with pytest.raises(EngineError, match="its host key is not known") as caught:
        measure(device, place, tiny_bundle, ssh_options=options)
    assert f"-p {device.port}" in caught.value.hint and f"UserKnownHostsFile={known}" in caught.value.hint
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    public = (tmp_path / "other.pub").read_text().rsplit(" ", 1)[0]
    known.write_text(f"[127.0.0.1]:{device.port} {public}\n")
    with pytest.raises(EngineError, match="is another one") as caught:
        measure(device, place, tiny_bundle, ssh_options=options)
    assert f"ssh-keygen -R '[127.0.0.1]:{device.port}'" in caught.value.hint
    assert not place.exists()


@pytest.mark.parametrize(
    "option",
    [
        "StrictHostKeyChecking=no",
        "stricthostkeychecking=accept-new",
        "NoHostAuthenticationForLocalhost=yes",
        "KnownHostsCommand=/bin/echo %H %t %K",
        "BatchMode=no",
        "-oX",
    ],
)
def test_host_keys_cant_be_switched_off(device: Device, place: Path, tiny_bundle: Path, option: str) -> None:
    with pytest.raises(UsageError, match="--ssh-option"):
        measure(device, place, tiny_bundle, ssh_options=[*device.ssh_options, option])


def test_no_login_and_no_host(device: Device, place: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(device.home / "stranger")], check=False)
    device.key = "stranger"
    with pytest.raises(EngineError, match="Permission denied") as caught:
        measure(device, place, tiny_bundle)
    assert "ssh-copy-id" in caught.value.hint
    with pytest.raises(EngineError, match="refused") as caught:
        targets.run("ssh://127.0.0.1:1/x/y", tiny_bundle, device.options(), device.say)
    assert "sshd runs" in caught.value.hint


@pytest.mark.parametrize(
    "command,says",
    [
        ("echo This account is not available.", "answered something else"),
        ("head -c 100000 /dev/urandom", "answered something else"),
        ("yes", "prints without end"),
        ("exit 3", "exit code 3"),
        ("kill -9 $$", "ssh ended with|closed|255|137"),
        (f"{sys.executable} -c 'import sys; i = sys.stdin.buffer; n = int(i.readline()); i.read(n); import json;"
         "q = json.loads(i.readline()); print(); print(q[chr(110)+\"once\"], json.dumps({\"bytes\": 0, \"root\": 7}))'",
         "answers probe without root"),
    ],
)  # fmt: skip
def test_garbage(
    device: Device,
    place: Path,
    tiny_bundle: Path,
    forced: Any,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    says: str,
) -> None:
    from tinyllava_edge.benchmarks.targets import connection

    monkeypatch.setattr(connection, "_MAX_REPLY", 1 << 20)
    forced(command)
    with pytest.raises(EngineError, match=says) as caught:
        measure(device, place, tiny_bundle)
    assert caught.value.message.isprintable()


def test_talkative_login_and_missing_python(device: Device, place: Path, tiny_bundle: Path, forced: Any) -> None:
    forced('echo "Welcome to Board 1.0!"; echo oops >&2; eval "$SSH_ORIGINAL_COMMAND"')
    assert measure(device, place, tiny_bundle)
    with pytest.raises(DependencyError, match="nowhere") as caught:
        measure(device, place, tiny_bundle, remote_python="/nowhere/it's python")
    assert "3.11" in caught.value.hint
    with pytest.raises(UsageError, match="--remote-python"):
        measure(device, place, tiny_bundle, remote_python="-c")


def test_python_without_the_dependencies(device: Device, place: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    with pytest.raises(DependencyError, match="onnxruntime"):
        measure(device, place, tiny_bundle, remote_python=str(tmp_path / "bare/bin/python"))
    assert not place.exists()


def test_full_disk(device: Device, tiny_bundle: Path, tmp_path: Path) -> None:
    """Too little room is said with numbers before anything is sent."""
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "none", str(small)], capture_output=True)
    if mount.returncode:
        pytest.skip("can't mount a small disk here")
    try:
        with pytest.raises(StorageError, match=r"[\d,]{9,} bytes needed in .*, 4,194,304 free|[\d,]+ free"):
            measure(device, small / "dir", tiny_bundle)
        assert not list(small.glob("dir/blobs/*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_disk_that_fills_up_meanwhile(
    device: Device, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyllava_edge.benchmarks.targets import sync

    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "none", str(small)], capture_output=True)
    if mount.returncode:
        pytest.skip("can't mount a small disk here")
    monkeypatch.setattr(sync, "SPARE_BYTES", -(1 << 40))  # the check before is passed, as if somebody else wrote
    try:
        with pytest.raises(StorageError, match="No space left"):
            measure(device, small / "dir", tiny_bundle)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_directory_of_everybody(device: Device, tiny_bundle: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(UsageError, match="written by everybody"):
        measure(device, shared, tiny_bundle)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a directory"):
        measure(device, tmp_path / "file", tiny_bundle)


def results_of(place: Path, text: bytes) -> None:
    """Put other results where a run's are, its status made to fit; the next client finds them undelivered."""
    run = runs(place)[-1]
    (run / "results.jsonl").write_bytes(text)
    status = json.loads((run / "status.json").read_text())
    status |= {"sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)}
    (run / "status.json").write_text(json.dumps(status))
    (run / "delivered").unlink(missing_ok=True)


def test_results_that_are_not_ours(device: Device, measured: Path, tiny_bundle: Path) -> None:
    place = measured
    good = (runs(place)[0] / "results.jsonl").read_bytes()
    other = good.replace(b'"build": "fp32+f32"', b'"build": "fp32+q2_k"')
    foreign = b'{"schema": 1, "kind": "accuracy", "runtime": "", "build": "", "stage": "pope/f1", "value": 99, "unit":'
    foreign += b' "%", "sample": 0, "environment_id": "", "target": "cpu", "detail": {}}\n'
    cases = {
        b"not json\n" + good: r"results.jsonl:1: not valid JSON",
        good + b'{"schema": 1, "kind": "latency"}\n': r"results.jsonl:\d+: keys differ",
        other: "nobody asked for",
        good + foreign: "nobody asked for 'accuracy'",
        b"": "nothing was measured",
    }
    for text, says in cases.items():
        results_of(place, text)
        with pytest.raises(DataError, match=says) as caught:
            measure(device, place, tiny_bundle)
        assert "127.0.0.1" in caught.value.message
    results_of(place, good)
    (runs(place)[0] / "results.jsonl").write_bytes(good[:-9] + b"9" + good[-8:])
    with pytest.raises(DataError, match="was changed after it was written"):
        measure(device, place, tiny_bundle)
    results_of(place, good)
    assert measure(device, place, tiny_bundle)


def test_failure_there_comes_home_with_its_log(device: Device, place: Path, tiny_bundle: Path) -> None:
    """An error of ours keeps its words and its class; a crash shows the end of the log."""
    with pytest.raises(UsageError, match="run .*-1: 0 repetitions|repetitions") as caught:
        measure(device, place, tiny_bundle, repetitions=0)
    assert caught.value.hint
    with pytest.raises((EngineError, UsageError)) as other:
        measure(device, place, tiny_bundle, max_tokens="many")
    assert "TypeError" in other.value.hint or "max_tokens" in other.value.message or "Error" in other.value.hint


def test_refused_before_anything_is_sent(device: Device, place: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UnverifiedError):
        measure(device, place, tiny_bundle, allow_unverified=False)
    with pytest.raises(UsageError, match="no build"):
        measure(device, place, tiny_bundle, builds=["fp32+q1"])
    with pytest.raises(UsageError, match="unexpected keyword"):
        measure(device, place, tiny_bundle, colour="red")
    with pytest.raises(UsageError, match="not a file"):
        measure(device, place, tiny_bundle, picture=tmp_path / "none.png")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bundle, broken)
    with next(broken.glob("*f32.gguf")).open("ab") as handle:
        handle.write(b"x")
    with pytest.raises(TinyLlavaEdgeError, match="bytes"):
        measure(device, place, broken)
    assert not place.exists()


def stub_wheels(folder: Path) -> None:
    """A wheel for each dependency, newest that the range admits, empty; one brings in this interpreter's packages."""
    import numpy

    folder.mkdir()
    for line in requirements():
        name, lower = re.match(r"([A-Za-z0-9-]+).*>=([0-9.]+)", line).groups()  # type: ignore[union-attr]
        stem = f"{name.replace('-', '_')}-{lower}"
        files = {f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {lower}\n"}
        files[f"{stem}.dist-info/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        if name == "numpy":
            files["outer.pth"] = f"{Path(numpy.__file__).parents[1]}\n"
        files[f"{stem}.dist-info/RECORD"] = "".join(f"{file},,\n" for file in files)
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
            for file, text in files.items():
                archive.writestr(file, text)


def test_environment_of_its_own(device: Device, place: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """The road of a fresh board: venv, then pip for our dependencies, here from a folder of stand-ins. A pip that fails
    is told in pip's words and leaves nothing that counts as ready."""
    wheels = tmp_path / "wheels"
    offline = {"remote_python": "", "pip_options": ["--no-index", f"--find-links={wheels}"]}
    with pytest.raises(EngineError, match="environment: python -m pip install: exit code 1") as caught:
        measure(device, place, tiny_bundle, **offline)
    assert "No matching distribution found for" in caught.value.hint
    assert not list(place.glob("env-*/.ready"))
    stub_wheels(wheels)
    samples = measure(device, place, tiny_bundle, **offline)
    assert values(samples)
    environment = next(place.glob("env-*"))
    log = (runs(place)[1] / "log").read_text()
    assert f" -m venv {environment}" in log
    assert f"+ {environment}/bin/python -m pip install --no-input" in log and " llama-cpp-python<0.4,>=0.3.36" in log
    detail = next(s for s in samples if s.kind == "environment").detail
    assert detail["ssh"]["code_sha256"] in {blob.name for blob in place.glob("blobs/*")}
    assert measure(device, place, tiny_bundle, **offline)
    assert "-m venv" not in (runs(place)[2] / "log").read_text(), "the environment was made twice"
