"""The scripts that compare answers, without a build for arm64: what they count, what they refuse, what is published."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.errors import EngineError

from .conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results"
SCRIPT = ROOT / "benchmarks" / "stock_agreement.py"


def guide(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_edge_answers() -> None:
    """docs/arm64.md's table and the record's shares are counted from its answers."""
    found = json.loads((RESULTS / "arm64-nano.json").read_text(encoding="utf-8"))
    rows_of_the_guide = 0
    for core, builds in found["cores"].items():
        assert set(builds) == set(found["answers"])
        for build, shares in builds.items():
            rows = found["answers"][build]
            equal = sum(row["here"] == row[core] for row in rows)
            right, ours = (sum(row[side] == row["expected"] for row in rows) for side in (core, "here"))
            assert len({row["id"] for row in rows}) == len(rows) == found["questions"] == 200
            counted = (equal / 200, right / 200, ours / 200)
            assert (shares["equal"], shares["right_there"], shares["right_here"]) == pytest.approx(counted)
            assert f"| `{core}` | {build} | {equal} of 200 | {right} | {ours} |" in guide("arm64")
            rows_of_the_guide += 1
    assert guide("arm64").count(" of 200 | ") == rows_of_the_guide == 4
    assert len(found["bundle_sha256"]) == 64


def test_stock_answers() -> None:
    """The same for docs/native.md's table; every record of such answers stands in it."""
    records = sorted(RESULTS.glob("stock-arm64-*.json"))
    bundles = set()
    for path in records:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows, core = found["answers"], found["QEMU_CPU"] or "max"
        assert len({row["id"] for row in rows}) == len(rows) == found["questions"]
        pairs = {"equal": ("answer", "edge"), "equal_mtmd": ("answer", "mtmd"), "edge_equals_mtmd": ("edge", "mtmd")}
        pairs.update(right=("answer", "expected"), edge_right=("edge", "expected"))
        counted = {name: sum(row[one] == row[other] for row in rows) for name, (one, other) in pairs.items()}
        assert {name: found[name] for name in counted} == pytest.approx(
            {name: count / len(rows) for name, count in counted.items()}
        )
        figures = " | ".join(str(counted[name]) for name in ("equal", "equal_mtmd", "right"))
        assert f"| {found['llm']} | {core} | {len(rows)} | {figures} | `benchmarks/results/{path.name}` |" in guide(
            "native"
        )
        bundles.add(found["bundle_sha256"])
    assert guide("native").count("`benchmarks/results/stock-arm64-") == len(records) == 3
    assert len(bundles) == 1, "one bundle for all rows"


def test_equal_is_letter_by_letter(scripts: Any) -> None:
    rows = [{"answer": "Yes", "edge": "yes", "expected": "yes"}, {"answer": "no", "edge": "no", "expected": "no"}]
    assert scripts.stock_agreement.share(rows, "answer", "edge") == 0.5
    assert scripts.stock_agreement.right(rows, "answer") == 1


def test_other_questions_are_an_error(scripts: Any) -> None:
    """Fewer answers on one side, other ids, none: one error that counts both sides."""
    records = [AnswerRecord(f"test-{number}", "0.png", "is it blue?", "no", "no") for number in range(3)]
    agreement = scripts.arm64_agreement.agreement
    assert agreement(records, records)["equal"] == 1
    for here, there in ((records, records[:2]), (records[:2], records[1:]), ([], [])):
        with pytest.raises(EngineError, match=f"{len(here)} answers here, {len(there)} there"):
            agreement(here, there)


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)


def test_a_server_for_another_machine_is_refused(tmp_path: Path) -> None:
    """Before the export: the checkpoint that is named isn't there, and isn't looked for."""
    program = bytearray(Path(sys.executable).resolve().read_bytes())
    if program[:4] != b"\x7fELF":
        pytest.skip("programs of this system are not ELF files: run this on Linux")
    program[18] = 62 if program[18] == 183 else 183
    server = tmp_path / "llama-server"
    server.write_bytes(program)
    server.chmod(0o755)
    done = ask("checkpoint", "--server", str(server))
    assert done.returncode == 2 and f"error: {server}: built for another machine" in done.stderr
    assert "--runner" in done.stderr and "Traceback" not in done.stderr
    done = ask("checkpoint", "--server", str(server), "--runner", "no-such-qemu -L x")
    assert done.returncode == 2 and done.stderr.startswith("error: no-such-qemu: no such program")


def test_a_server_that_can_not_be_started(scripts: Any, tmp_path: Path) -> None:
    server = tmp_path / "llama-server"
    server.write_text("no program")
    with pytest.raises(EngineError, match="can't be started"):
        scripts.stock_server.StockServer(server, tmp_path, tmp_path)
