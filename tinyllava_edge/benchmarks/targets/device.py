"""What the other machine does for us. It runs there by that machine's plain Python alone, before anything is installed.

The client sends this file over ssh's stdin with every request, so no version of it can be stale. A request is a line of
JSON, then bytes; the answer is a line that begins with the request's nonce, then bytes. What a login shell prints
besides is skipped. Nothing but this module's text is ever part of a command line, so paths need no quoting.

    DIR/blobs/<sha256>     every file, by content; `.part` while it is on its way
    DIR/bundles/<id>/      a bundle made of links to blobs
    DIR/env-<id>/          virtual environment with what our package needs; kept when only our code changes
    DIR/code-<id>/         our package, unpacked
    DIR/runs/<id>-<n>/     job.json, status.json, results.jsonl, log, error.json
    DIR/lock               held (flock) by the run that measures, shared by uploads; a dead process holds nothing

Kept to what Python 3.7 reads, so that an old one is told by name and not by a syntax error.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

OLDEST = (3, 11)
IDLE_S = 60  # seconds without a byte after which an upload's connection counts as cut
LOCK_S = 90  # seconds to wait for a lock that only uploads hold; longer than IDLE_S
MODULES = ("numpy", "PIL", "onnxruntime", "llama_cpp", "jinja2")  # what measuring imports
_CHUNK = 1 << 20
_LOG_TAIL = 6000  # bytes of the log that go into an error
_SHA = re.compile(r"[0-9a-f]{64}")
_RUN = re.compile(r"[0-9a-f]{16}-[0-9]{1,6}")


class Refusal(Exception):
    """Something to tell the client: `kind` picks its error class."""

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.hint = hint


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """What this machine is, and whether it can do the work. Makes nothing."""
    root = _root(request)
    python = _python(given=bool(request["given"]))
    if request["given"]:
        find = "import importlib.util as u, sys; print([m for m in sys.argv[1:] if u.find_spec(m) is None])"
        done = subprocess.run([python, "-c", find, *MODULES], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        if done.returncode or done.stdout.strip() != b"[]":
            missing = done.stdout.decode("utf-8", "replace").strip()[:200]
            raise Refusal("dependency", f"{python} lacks {missing}", "install them there, or leave out --remote-python")
    elif python == sys.executable and importlib.util.find_spec("ensurepip") is None:
        raise Refusal("dependency", f"{python} can't make virtual environments", "sudo apt install python3-venv")
    return {
        "root": root,
        "python": python,
        "version": platform.python_version(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
    }


def look(request: dict[str, Any]) -> dict[str, Any]:
    """The newest run of an id and its state, and which run measures now."""
    root = _root(request)
    name = _newest(root, request["id"])
    return {"run": name, "state": _state(root, name) if name else None, "busy": _busy(root)}


def state(request: dict[str, Any]) -> dict[str, Any]:
    """Which blobs are here and whole (by hash), and how far the others came. A damaged one is thrown away."""
    root = _make_root(request)
    found = []
    with _shared(root):
        for digest, size in request["blobs"]:
            path, damaged = _blob(root, digest), False
            if os.path.isfile(path):
                damaged = os.path.getsize(path) != size or _sha256(path) != digest
                if damaged:
                    os.unlink(path)
            part = path + ".part"
            have = os.path.isfile(path)
            found.append({"have": have, "damaged": damaged, "part": _size(part) if not have else 0})
    return {"blobs": found, "free": shutil.disk_usage(root).free}


def put(request: dict[str, Any]) -> dict[str, Any]:
    """Take one blob's bytes from `offset` on; whole and of the right hash, or a part to go on from."""
    root, size = _make_root(request), int(request["bytes"])
    path = _blob(root, request["sha256"])
    with _shared(root), open(path + ".part", "ab") as handle:
        _lock(handle, fcntl.LOCK_EX, wait=True)
        if os.path.isfile(path):
            return {"have": True}
        if _size(path + ".part") > size:
            handle.truncate(0)
        there = _size(path + ".part")
        if there != request["offset"]:
            return {"have": False, "part": there}
        missing = size - there
        stdin: Any = sys.stdin.buffer
        while missing:
            signal.alarm(IDLE_S)
            chunk = stdin.read1(min(_CHUNK, missing))
            if not chunk:
                return {"have": False, "part": size - missing}
            handle.write(chunk)
            missing -= len(chunk)
        signal.alarm(0)
        handle.flush()
        os.fsync(handle.fileno())
        if _sha256(path + ".part") != request["sha256"]:
            os.unlink(path + ".part")
            return {"have": False, "part": 0, "damaged": True}
        os.replace(path + ".part", path)
    return {"have": True}


def start(request: dict[str, Any]) -> dict[str, Any]:
    """Start a run that outlives the connection, or name the one of the same id that is there already."""
    root, job = _make_root(request), request["job"]
    with open(os.path.join(root, "start.lock"), "a") as gate:
        _lock(gate, fcntl.LOCK_EX, wait=True)
        name = _newest(root, request["id"])
        if name and _state(root, name) in ("running", "done"):
            return {"run": name, "state": _state(root, name)}
        device = os.open(os.path.join(root, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
        if not _lock(device, fcntl.LOCK_EX):
            if _busy(root):
                raise _measuring(root)
            _lock(device, fcntl.LOCK_EX, wait=True)  # only an upload holds it, perhaps one whose line was cut
        bundle = _link_all(root, os.path.join(root, "bundles", _plain(request["bundle_id"])), request["bundle"])
        number = int(name.rpartition("-")[2]) + 1 if name else 1
        run = os.path.join(root, "runs", f"{_plain(request['id'])}-{number}")
        os.makedirs(run, mode=0o700)
        _link_all(root, os.path.join(run, "inputs"), request["inputs"])
        _write(os.path.join(run, "job.json"), {**job, "bundle": bundle, "root": root})
        with open(os.path.join(run, "device.py"), "w", encoding="utf-8") as handle:
            handle.write(request["source"])
        locks = [os.open(os.path.join(run, name), os.O_RDWR | os.O_CREAT, 0o600) for name in ("lock", "prepare.lock")]
        for lock in locks:
            _lock(lock, fcntl.LOCK_EX, wait=True)
        _write(os.path.join(run, "status.json"), {"state": "preparing", "started": _now()})
        with open(os.path.join(run, "log"), "ab") as log:
            process = subprocess.Popen(
                [request["python"], "-I", "device.py", "supervise", *map(str, (*locks, device))],
                cwd=run,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(*locks, device),  # the locks live as long as one of the run's processes does
            )
        os.ftruncate(device, 0)
        os.pwrite(device, json.dumps({"run": os.path.basename(run), "pid": process.pid, "since": _now()}).encode(), 0)
    return {"run": os.path.basename(run), "state": "running"}


def wait(request: dict[str, Any]) -> dict[str, Any]:
    """Sleep in the kernel until a run's environment is ready, or until it is over. Ends with the connection."""
    root, name = _root(request), _plain(request["run"])
    threading.Thread(target=_end_with_the_connection, daemon=True).start()
    with open(os.path.join(root, "runs", name, _plain(request["lock"])), "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
    return {"state": _state(root, name)}


def fetch(request: dict[str, Any]) -> dict[str, Any]:
    """A finished run's status, the end of its log, and its results."""
    root, name = _root(request), _plain(request["run"])
    run = os.path.join(root, "runs", name)
    reply = {"state": _state(root, name), "status": _read(os.path.join(run, "status.json"))}
    reply["failure"] = _read(os.path.join(run, "error.json"))
    with contextlib.suppress(OSError), open(os.path.join(run, "log"), "rb") as handle:
        handle.seek(max(0, _size(handle.name) - _LOG_TAIL))
        reply["log"] = handle.read().decode("utf-8", "replace")
    if reply["state"] in ("done", "delivered"):
        reply["payload"] = os.path.join(run, "results.jsonl")
    return reply


def delivered(request: dict[str, Any]) -> dict[str, Any]:
    """Remember that a run's results were brought home: the same command then measures anew."""
    run = os.path.join(_root(request), "runs", _plain(request["run"]))
    open(os.path.join(run, "delivered"), "a").close()
    return {}


OPERATIONS = {
    "probe": probe,
    "look": look,
    "state": state,
    "put": put,
    "start": start,
    "wait": wait,
    "fetch": fetch,
    "delivered": delivered,
}


def supervise(locks: tuple[int, ...]) -> None:
    """The detached process: environment, then the measuring code; it sleeps while that works."""
    _, prepare, device = locks
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    job = _read("job.json")
    status = {**_read("status.json"), "pid": os.getpid()}
    _write("status.json", status)
    try:
        python, variables = _environment(job)
    except (OSError, Refusal, zipfile.BadZipFile) as error:
        _write("status.json", {**status, "state": "failed", "step": "environment", "reason": str(error)[:500]})
        return
    _write("status.json", {**status, "state": "measuring"})
    os.close(prepare)
    code = subprocess.call(
        [python, "-m", "tinyllava_edge.benchmarks.targets.remote", os.getcwd()],
        stdin=subprocess.DEVNULL,
        env=variables,
        pass_fds=(device, locks[0]),
    )
    status["ended"] = _now()
    if code == 0 and os.path.isfile("results.jsonl"):
        found = {"sha256": _sha256("results.jsonl"), "bytes": os.path.getsize("results.jsonl")}
        _write("status.json", {**status, "state": "done", **found})
    else:
        _write("status.json", {**status, "state": "failed", "step": "measuring", "reason": f"exit code {code}"})


def _environment(job: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The interpreter that measures, and its variables: our code stands on PYTHONPATH, what it needs is installed."""
    root, digest = job["root"], job["code"]
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")}
    code = os.path.join(root, "code-" + digest[:16])
    shutil.rmtree(code, ignore_errors=True)  # unpacked anew each time, so it is what the hash says
    with zipfile.ZipFile(_blob(root, digest)) as archive:
        archive.extractall(code)
    if job["given"]:
        return job["python"], {**variables, "PYTHONPATH": code}
    place = os.path.join(root, "env-" + _plain(job["environment_id"]))
    python = os.path.join(place, "bin", "python")
    ready = os.path.join(place, ".ready")
    if not os.path.isfile(ready):
        shutil.rmtree(place, ignore_errors=True)
        _say_and_run([job["python"], "-m", "venv", place], variables)
        pip = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *job["pip_options"]]
        _say_and_run([*pip, *job["requirements"]], variables)
        open(ready, "a").close()
    return python, {**variables, "PYTHONPATH": code}


def _say_and_run(command: list[str], variables: dict[str, str]) -> None:
    print("+ " + " ".join(command), flush=True)
    code = subprocess.call(command, env=variables, stdin=subprocess.DEVNULL)
    if code:
        raise Refusal("engine", f"{os.path.basename(command[0])} {' '.join(command[1:4])}: exit code {code}")


def _python(given: bool) -> str:
    """The interpreter to work with: this one, or a newer one by name where this one is too old."""
    if sys.version_info >= OLDEST:
        return sys.executable
    newer = [] if given else [shutil.which(f"python3.{minor}") for minor in range(20, OLDEST[1] - 1, -1)]
    for path in newer:
        if path:
            return path
    wanted = ".".join(map(str, OLDEST))
    found = platform.python_version()
    raise Refusal(
        "dependency",
        f"{sys.executable} is Python {found}, {wanted} or newer is needed",
        f"install python{wanted} there, or name one with --remote-python",
    )


def _root(request: dict[str, Any]) -> str:
    given = str(request["dir"])
    root = os.path.expanduser(given) if given.startswith("~/") else given
    if not os.path.isabs(root):
        raise Refusal("usage", f"{given}: the home directory is unknown", "name an absolute directory")
    if os.path.lexists(root) and not os.path.isdir(root):
        raise Refusal("usage", f"{root} is not a directory", "name another one")
    if os.path.isdir(root) and os.stat(root).st_mode & 0o002:
        raise Refusal(
            "usage", f"{root} may be written by everybody", "name a directory of your own; it is made for you"
        )
    return root


def _make_root(request: dict[str, Any]) -> str:
    root = _root(request)
    for name in ("blobs", "bundles", "runs"):
        os.makedirs(os.path.join(root, name), mode=0o700, exist_ok=True)
    return root


def _blob(root: str, digest: str) -> str:
    if not _SHA.fullmatch(digest):
        raise Refusal("usage", f"{digest[:80]!r} is not a SHA-256")
    return os.path.join(root, "blobs", digest)


def _plain(name: str) -> str:
    """A name that is one path component."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,120}", name):
        raise Refusal("usage", f"{name[:80]!r} is not a plain name")
    return name


def _newest(root: str, identity: str) -> str | None:
    runs = os.path.join(root, "runs")
    names = os.listdir(runs) if os.path.isdir(runs) else []
    mine = [name for name in names if _RUN.fullmatch(name) and name.startswith(_plain(identity) + "-")]
    return max(mine, key=lambda name: int(name.rpartition("-")[2]), default=None)


def _state(root: str, name: str) -> str:
    """running, done, delivered, failed, or lost: killed, or the machine went down."""
    run = os.path.join(root, "runs", name)
    if not os.path.isfile(os.path.join(run, "lock")):
        return "lost"
    with open(os.path.join(run, "lock"), "rb") as handle:
        if not _lock(handle, fcntl.LOCK_SH):
            return "running"
    if os.path.isfile(os.path.join(run, "delivered")):
        return "delivered"
    state = (_read(os.path.join(run, "status.json")) or {}).get("state")
    return str(state) if state in ("done", "failed") else "lost"


def _busy(root: str) -> dict[str, Any] | None:
    """Which run measures now. A lock file whose process is gone says nothing."""
    note = _read(os.path.join(root, "lock"))
    if not note or not _RUN.fullmatch(str(note.get("run"))):
        return None
    return note if _state(root, note["run"]) == "running" else None


def _measuring(root: str) -> Refusal:
    note = _busy(root) or {}
    return Refusal(
        "engine",
        f"{root}: another run is measuring ({note.get('run')}, process {note.get('pid')}, since {note.get('since')})",
        "wait for it: two at once would slow each other down",
    )


@contextlib.contextmanager
def _shared(root: str) -> Iterator[None]:
    """Keep measurements away while disk and processor are busy with files, and the other way round."""
    with open(os.path.join(root, "lock"), "a") as handle:
        if not _lock(handle, fcntl.LOCK_SH):
            if _busy(root):
                raise _measuring(root)
            _lock(handle, fcntl.LOCK_SH, wait=True)  # a run begins or ends at this moment
        yield


def _lock(handle: Any, kind: int, wait: bool = False) -> bool:
    try:
        if wait:
            signal.alarm(LOCK_S)
            fcntl.flock(handle, kind)
            signal.alarm(0)
        else:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise Refusal(
            "storage", f"this file system has no locks ({error})", "name a directory on another one"
        ) from error
    return True


def _link_all(root: str, place: str, entries: list[list[str]]) -> str:
    """Make `place` hold exactly these files, as hard links to blobs, or copies where links can't be made."""
    temporary = place + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary, mode=0o700)
    for relative, digest in entries:
        parts = relative.split("/")
        if os.path.isabs(relative) or ".." in parts or "\0" in relative or "" in parts:
            raise Refusal("usage", f"{relative[:80]!r} leaves the directory")
        if not os.path.isfile(_blob(root, digest)):
            raise Refusal("storage", f"{relative}: its bytes are not here any more", "run the command again")
        target = os.path.join(temporary, *parts)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            os.link(_blob(root, digest), target)
        except OSError:
            shutil.copyfile(_blob(root, digest), target)
    shutil.rmtree(place, ignore_errors=True)
    os.rename(temporary, place)
    return place


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for chunk in iter(lambda: handle.read(_CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _write(path: str, value: Any) -> None:
    with open(path + ".tmp", "w", encoding="utf-8") as handle:
        json.dump(value, handle)
    os.replace(path + ".tmp", path)


def _read(path: str) -> Any:
    try:
        with open(path, "rb") as handle:
            return json.loads(handle.read().decode("utf-8"))
    except (OSError, ValueError):
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _end_with_the_connection() -> None:
    if not sys.stdin.buffer.read(1):
        os._exit(0)


def _answer(request: dict[str, Any], out: BinaryIO) -> None:
    try:
        reply = OPERATIONS[request["op"]](request)
    except Refusal as error:
        reply = {"error": error.kind, "message": str(error), "hint": error.hint}
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space there" if full else "name a directory there that you may write to"
        reply = {"error": "storage", "message": f"{error.filename or request['dir']}: {error.strerror}", "hint": hint}
    payload = reply.pop("payload", None)
    size = os.path.getsize(payload) if payload else 0
    out.write(f"\n{request['nonce']} {json.dumps({**reply, 'bytes': size})}\n".encode())
    if payload:
        with open(payload, "rb") as handle:
            shutil.copyfileobj(handle, out, _CHUNK)
    out.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["supervise"]:
        supervise(tuple(map(int, sys.argv[2:5])))
    else:
        _answer(json.loads(sys.stdin.buffer.readline()), sys.stdout.buffer)
        sys.stdout.flush()
        os._exit(0)  # not held up by bytes that nobody will read
