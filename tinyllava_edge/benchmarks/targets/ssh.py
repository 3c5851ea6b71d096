"""Measure on another machine over ssh: files by hash, our code in an environment of its own, raw samples back.

The run there is detached and known by the hash of what it measures. So a lost connection, or a client that was stopped,
costs nothing: the same command finds the run and brings its results.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.results import Sample, read_results
from tinyllava_edge.benchmarks.targets import Progress
from tinyllava_edge.benchmarks.targets.address import Address, parse_address
from tinyllava_edge.benchmarks.targets.connection import Connection, shown
from tinyllava_edge.benchmarks.targets.job import encode
from tinyllava_edge.benchmarks.targets.package import Package, pack, requirements
from tinyllava_edge.benchmarks.targets.sync import ENVIRONMENT_BYTES, Blob, idle_s, upload
from tinyllava_edge.bundle import MANIFEST, STAMP, Build, Bundle, read_bundle
from tinyllava_edge.errors import DataError, EngineError, UsageError
from tinyllava_edge.files import sha256_file

_PROBE_S = 90  # seconds for an answer that needs no work there; a loaded phone takes ten
_RUN = re.compile(r"[0-9a-f]{16}-[0-9]{1,6}")  # as device.py names runs
_KINDS = ("environment", "bundle", "latency", "memory", "energy", "condition", "ceiling", "size", "command")


@dataclass(frozen=True)
class SshOptions:
    """How to reach and use the machine; not part of what is measured."""

    ssh_options: Sequence[str] = ()
    """`Name=value` as in ssh_config"""
    remote_python: str = ""
    """interpreter there that has the dependencies already; empty: a virtual environment is made"""
    pip_options: Sequence[str] = ()
    """further options of `pip install` there, e.g. `--no-index --find-links=/wheels`"""


def run(target: str, bundle: Path, options: Mapping[str, Any], progress: Progress = None) -> list[Sample]:
    """Measure on the machine that `target` names; see `targets.run`."""
    address = parse_address(target)
    names = {field.name for field in fields(SshOptions)}
    how = SshOptions(**{key: value for key, value in options.items() if key in names and value})
    rest = {key: value for key, value in options.items() if key not in names}
    allow = bool(rest.pop("allow_unverified", False))
    _check_arguments(bundle, rest)
    opened = read_bundle(bundle)
    chosen = [opened.build(name) for name in rest.get("builds") or opened.builds()]
    for build in chosen:
        opened.require_verified(build, allow)
    say = progress or (lambda line: None)
    python = how.remote_python or "python3"
    connection = Connection(address, how.ssh_options, python, say)
    machine = connection.ask("probe", _PROBE_S, given=bool(how.remote_python)).value
    about = (shown(machine[key]) for key in ("system", "machine", "version"))
    say("{}: {} {}, Python {}".format(address.place, *about))
    for build in chosen:
        opened.check(build)
    code = pack()
    needs = [] if how.remote_python else requirements()
    encoded, inputs = encode(rest)
    layout = _layout(opened, chosen)
    job = {
        "options": encoded,
        "code": code.sha256,
        "requirements": needs,
        "python": machine["python"],
        "given": bool(how.remote_python),
        "pip_options": list(how.pip_options),
        "environment_id": _digest([needs, machine["python"], machine["version"], list(how.pip_options)]),
    }
    bundle_id = _digest(sorted([path, blob.sha256] for path, blob in layout.items()))
    identity = _digest([bundle_id, job])
    name, ended = _started(connection, identity, layout, inputs, code, job, bundle_id)
    if not ended:
        _sleep(connection, name, making=not how.remote_python)
    samples = _collect(connection, name, opened, chosen)
    connection.ask("delivered", _PROBE_S, run=name)
    facts = {"directory": machine["root"], "code_sha256": code.sha256, "run": name, "python": machine["python"]}
    return [_ours(sample, address, facts) for sample in samples]


def _started(
    connection: Connection,
    identity: str,
    layout: Mapping[str, Blob],
    inputs: Mapping[str, Path],
    code: Package,
    job: Mapping[str, Any],
    bundle_id: str,
) -> tuple[str, bool]:
    """The run's name and whether it is over: one that is there, else a new one, for which the files are sent."""
    say, place = connection.say, connection.address.place
    found = connection.ask("look", _PROBE_S, id=identity).value
    if found["state"] in ("running", "done"):
        name = _run_name(place, found["run"])
        say(f"{place}: picking up run {name}, which {'goes on' if found['state'] == 'running' else 'has ended'}")
        return name, found["state"] == "done"
    if found["busy"]:
        run, pid, since = (shown(found["busy"].get(key)) for key in ("run", "pid", "since"))
        raise EngineError(
            f"{place}: another run is measuring ({run}, process {pid}, since {since})",
            "wait for it: two at once would slow each other down",
        )
    blobs = [
        *layout.values(),
        *(Blob(key[:64], path.stat().st_size, path, path.name) for key, path in inputs.items()),
        Blob(code.sha256, len(code.content), code.content, "our code"),
    ]
    upload(connection, blobs, 0 if job["given"] else ENVIRONMENT_BYTES, say)
    begun = connection.ask(
        "start",
        idle_s(blobs),  # where links can't be made, files are copied
        id=identity,
        bundle_id=bundle_id,
        bundle=[[path, blob.sha256] for path, blob in layout.items()],
        inputs=[[key, key[:64]] for key in inputs],
        job=job,
        python=job["python"],
        source=connection.source,
    ).value
    name = _run_name(place, begun["run"])
    say(f"{place}: run {name} has begun; its log is {connection.address.directory}/runs/{name}/log")
    return name, begun["state"] == "done"


def _run_name(place: str, name: Any) -> str:
    if not isinstance(name, str) or not _RUN.fullmatch(name):
        raise EngineError(f"{place}: names a run {shown(name)[:80]!r}", "another program answers there")
    return name


def _sleep(connection: Connection, name: str, making: bool) -> None:
    """Until the run is over. Nothing is asked meanwhile: one request stays open, and the kernel wakes it."""
    try:
        if making:
            connection.ask("wait", run=name, lock="prepare.lock")
            connection.say(f"{connection.address.place}: the environment is ready; measuring")
        connection.ask("wait", run=name, lock="lock")
    except KeyboardInterrupt:
        connection.say(f"{connection.address.place}: run {name} goes on there; the same command brings its results")
        raise


def _collect(connection: Connection, name: str, bundle: Bundle, builds: Sequence[Build]) -> list[Sample]:
    """Bring a run's samples home and check them."""
    place = connection.address.place
    reply = connection.ask("fetch", _PROBE_S, run=name)
    state, status = reply.value.get("state"), reply.value.get("status") or {}
    where = f"{place}: run {name}"
    if state not in ("done", "delivered"):
        _raise_failure(where, reply.value)
    if hashlib.sha256(reply.payload).hexdigest() != status.get("sha256"):
        raise DataError(
            f"{where}: results.jsonl was changed after it was written", "remove the run there, measure again"
        )
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / "results.jsonl"
        local.write_bytes(reply.payload)
        try:
            samples = read_results([local])
        except DataError as error:
            raise DataError(error.message.replace(str(local), f"{where}, results.jsonl"), error.hint) from error
    _check_samples(where, samples, bundle, builds)
    return samples


def _check_samples(where: str, samples: Sequence[Sample], bundle: Bundle, builds: Sequence[Build]) -> None:
    """Raise DataError unless these are samples of this bundle's builds."""
    names = {build.name for build in builds} | {""}
    for number, sample in enumerate(samples, 1):
        texts = (sample.runtime, sample.build, sample.stage, sample.unit, sample.environment_id, sample.target)
        if not all(text.isprintable() for text in texts):
            raise DataError(f"{where}, results.jsonl:{number}: unprintable text", "remove the run there")
        if sample.kind not in _KINDS or sample.build not in names:
            raise DataError(
                f"{where}, results.jsonl:{number}: nobody asked for {sample.kind!r} of build {sample.build[:40]!r}",
                "remove the run there and measure again",
            )
        if sample.kind == "bundle" and sample.detail.get("sha256") != bundle.sha256:
            raise DataError(f"{where}, results.jsonl:{number}: another bundle was measured", "measure again")
    if not any(sample.kind == "latency" for sample in samples):
        raise DataError(f"{where}: nothing was measured", "remove the run there and measure again")


def _raise_failure(where: str, reply: Mapping[str, Any]) -> None:
    failure, status = reply.get("failure"), reply.get("status") or {}
    tail = "\n".join(str(reply.get("log", "")).splitlines()[-20:])
    log = f"the end of its log:\n{_clean(tail)}"
    if isinstance(failure, dict) and isinstance(failure.get("message"), str):
        message = f"{where}: {_clean(failure['message'])}"
        if failure.get("kind") == "UsageError":
            raise UsageError(message, _clean(str(failure.get("hint", ""))))
        raise EngineError(message, _clean(str(failure.get("hint", ""))) or log)
    if reply.get("state") == "lost":
        raise EngineError(f"{where} was killed, or the machine went down; run the command again", log)
    raise EngineError(f"{where} failed ({shown(status.get('step'))}: {shown(status.get('reason'))})", log)


def _ours(sample: Sample, address: Address, about: Mapping[str, str]) -> Sample:
    """A sample of there as a line of here: its target is the address; a device other than the CPU stays readable."""
    from tinyllava_edge.benchmarks.environment import git_commit

    target = address.url if sample.target == "cpu" else f"{address.url}#{sample.target}"
    detail = dict(sample.detail)
    if sample.kind == "environment":
        detail = {**detail, "git_commit": detail.get("git_commit") or git_commit(), "ssh": dict(about)}
    return replace(sample, target=target, detail=detail)


def _layout(bundle: Bundle, builds: Sequence[Build]) -> dict[str, Blob]:
    """The files that these builds open, by their path in the bundle, the manifest and the stamp among them."""
    entries = [entry for build in builds for file in build.files for entry in file.entries]
    layout = {entry.path: Blob(entry.sha256, entry.bytes, bundle.path(entry), entry.path) for entry in entries}
    for name in (MANIFEST, STAMP):
        path = bundle.root / name
        if path.is_file():
            layout[name] = Blob(sha256_file(path), path.stat().st_size, path, name)
    return layout


def _check_arguments(bundle: Path, options: Mapping[str, Any]) -> None:
    """Raise UsageError here for what `bench` would not take there."""
    from tinyllava_edge.benchmarks.latency import bench

    try:
        inspect.signature(bench).bind(bundle, **options)
    except TypeError as error:
        raise UsageError(f"bench: {error}", "see `tinyllava-edge bench --help`") from error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _clean(text: str) -> str:
    """Printable text; a log may hold terminal controls."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
