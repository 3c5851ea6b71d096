"""Memory and loading in processes of their own, with the real runtime, /proc and page cache."""

from __future__ import annotations

import json
import mmap
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinyllava_edge.benchmarks import memory_process
from tinyllava_edge.benchmarks.memory_process import measure
from tinyllava_edge.benchmarks.page_cache import cached_share, drop_cached
from tinyllava_edge.benchmarks.peak_rss import descendants, status
from tinyllava_edge.benchmarks.results import Sample, read_results, write_results
from tinyllava_edge.errors import EngineError

BUILD = "fp32+q8_0"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's /proc and page cache")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("picture") / "red.png"
    Image.new("RGB", (80, 60), (200, 20, 20)).save(path)
    return path


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, picture: Path) -> tuple[list[Sample], float, float]:
    """Samples, seconds, and this process's processor seconds meanwhile; it holds 600 MB that must not show."""
    ballast = bytearray(600 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    clock, own = time.perf_counter(), time.process_time()
    found = measure(tiny_bundle, BUILD, picture, "what?", "e1", 1, max_tokens=2, loads=2)
    seconds, used = time.perf_counter() - clock, time.process_time() - own
    assert ballast[4096] == ord("x")
    return found, seconds, used


def test_every_figure_is_there_and_fits_together(measured: tuple[list[Sample], float, float], tmp_path: Path) -> None:
    samples = measured[0]
    found = {s.stage: s for s in samples}
    value = {stage: float(s.value or 0) for stage, s in found.items()}
    assert set(found) == {"peak_rss", "after_load", "anon", "file", "load_warm_ms", "load_cold_ms"}
    assert 20e6 < value["after_load"] <= value["peak_rss"] < 550 << 20
    assert value["anon"] + value["file"] <= value["peak_rss"] and min(value["anon"], value["file"]) > 1e6
    assert value["after_load"] <= found["peak_rss"].detail["at_load"] <= value["peak_rss"]
    assert found["peak_rss"].detail["children"] == 0
    assert {s.kind for s in samples} == {"memory", "latency"} and value["load_warm_ms"] > 0
    assert {(s.environment_id, s.target, s.build, s.runtime) for s in samples} == {("e1", "cpu", BUILD, "edge")}
    write_results(tmp_path / "r.jsonl", samples)
    assert read_results([tmp_path / "r.jsonl"]) == samples


def test_a_cold_load_is_cold_or_says_why_not(measured: tuple[list[Sample], float, float]) -> None:
    for cold in [s for s in measured[0] if s.stage == "load_cold_ms"]:
        if cold.value is None:
            assert cold.detail["reason"]
        else:
            assert cold.value > 0 and cold.detail["cached_percent"] <= 1 and cold.detail["first_ttft_ms"] > 0


def test_loading_is_measured_several_times_and_memory_once(measured: tuple[list[Sample], float, float]) -> None:
    for stage, numbers in (("load_warm_ms", [0, 1]), ("load_cold_ms", [0, 1]), ("peak_rss", [0])):
        assert [s.sample for s in measured[0] if s.stage == stage] == numbers


@pytest.mark.parametrize(("seconds", "times"), [(0.0, 5), (0.4 * memory_process.LOADING_S, 3), (60.0, 1)])
def test_loads_are_bounded_by_time(seconds: float, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair of processes that takes long isn't repeated as often; the first pair always runs."""
    now = [0.0]

    def answer(given: dict[str, object], build: str) -> dict[str, object]:
        now[0] += seconds / 2
        return {"memory": {"peak_rss": 1}, "detail": {}, "load_ms": 2.0, "first_ttft_ms": 3.0}

    monkeypatch.setattr(memory_process, "_child", answer)
    monkeypatch.setattr(memory_process.time, "monotonic", lambda: now[0])
    found = measure(Path("b"), BUILD, Path("x.png"), "?")
    assert [s.stage for s in found].count("load_warm_ms") == times == [s.stage for s in found].count("load_cold_ms")
    assert [s.stage for s in found].count("peak_rss") == 1


def test_the_parent_sleeps(measured: tuple[list[Sample], float, float]) -> None:
    _, seconds, used = measured
    assert used < 0.05 * seconds + 0.05


def test_a_failing_child_is_reported(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"fp32\+q8_0: the memory measurement failed: .*no such file"):
        measure(tiny_bundle, BUILD, tmp_path / "none.png", "what?")


@pytest.mark.parametrize("said", ["", "words", "[1]", '{"memory": {}}', "5"])
def test_odd_output_is_reported(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, stdout=said, stderr="last words\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    with pytest.raises(EngineError, match="measurement failed: last words"):
        measure(Path("b"), BUILD, Path("x.png"), "?")


def test_a_hanging_child_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("x", 600)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(EngineError, match="no answer within 600 s"):
        measure(Path("b"), BUILD, Path("x.png"), "?")


def test_usage() -> None:
    done = subprocess.run([sys.executable, "-m", memory_process.__name__], capture_output=True, text=True)
    assert done.returncode == 1 and "usage:" in done.stderr


@linux
def test_the_split_of_a_process(tmp_path: Path) -> None:
    """40 MB of its own and 24 MB of a mapped file show up as such."""
    (tmp_path / "file").write_bytes(os.urandom(24 << 20))
    code = """
import json, mmap, sys
from tinyllava_edge.benchmarks.peak_rss import status
before = status()
own = bytearray(40 << 20); own[::4096] = b"x" * len(own[::4096])
handle = open(sys.argv[1], "rb")
data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
total = sum(data[::4096])
after = status()
print(json.dumps({key: after[key] - before[key] for key in after}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, text=True, check=True
    )
    found = {key: value / (1 << 20) for key, value in json.loads(done.stdout).items()}
    assert 39 < found["RssAnon"] < 45 and 23 < found["RssFile"] < 27
    assert found["VmRSS"] == pytest.approx(found["RssAnon"] + found["RssFile"] + found["RssShmem"], abs=0.1)


@linux
def test_children_are_found_and_counted() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(30)'])"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        for _ in range(200):
            if own := descendants(parent.pid):
                break
            time.sleep(0.05)
        found = descendants(os.getpid())  # earlier tests may have left processes of their own
        assert parent.pid in found and len(own) == 1 and set(own) < set(found)
        grandchild = own[0]
        assert status(grandchild)["VmHWM"] > 1 << 20
        memory, detail = memory_process._counts(status())
        assert detail["peak_rss"]["children"] == len(found)
        assert memory["peak_rss"] and memory["peak_rss"] >= status()["VmHWM"] + status(parent.pid)["VmHWM"]
        os.kill(grandchild, 9)
    finally:
        parent.kill()
        parent.wait()
    assert status(parent.pid) == {} and parent.pid not in descendants(os.getpid())


def test_odd_process_names(tmp_path: Path) -> None:
    for pid, line in {"7": "7 (a) b (c) S 1 0 0", "8": "8 () S 7 0", "9": "garbage", "10": "10 (x) R 8 1"}.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "stat").write_text(line)
    (tmp_path / "11").mkdir()
    assert descendants(1, tmp_path) == [7, 8, 10] and descendants(9, tmp_path) == []


@linux
def test_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3_000_001))
    assert cached_share(path) == 1.0
    (tmp_path / "empty").touch()
    assert cached_share(tmp_path / "empty") == 0.0 and drop_cached(tmp_path / "empty")
    assert drop_cached(path)
    gone = cached_share(path) == 0.0
    with path.open("rb") as handle:
        handle.read(mmap.PAGESIZE)
    share = cached_share(path)
    assert share is not None and 0 < share <= 1 and (not gone or share < 1 or path.stat().st_size < 8 << 20)
    with pytest.raises(OSError):
        drop_cached(tmp_path / "none")


def test_largest_ended_child_is_bytes() -> None:
    subprocess.run([sys.executable, "-c", "x = bytearray(50 << 20)"], check=True)
    assert memory_process._ended_children() > 50 << 20
    assert memory_process._ended_children() >= resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
