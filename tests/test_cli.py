"""The command line: instant help, exit codes, one-line errors, JSON on stdout."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PROGRAM = [sys.executable, "-m", "tinyllava_edge.cli"]


def call(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1"}
    return subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, timeout=120, env=environment, **options
    )


def processor_seconds() -> float:
    """What finished child processes have used; other programs on the machine don't count."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_imports_nothing_heavy() -> None:
    """`--help` must not load what takes seconds; the best of five takes under 0.4 s of processor time."""
    heavy = ["torch", "transformers", "onnx", "onnxruntime", "llama_cpp", "numpy", "PIL", "matplotlib", "plotly"]
    code = (
        "import sys\nfrom tinyllava_edge.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        f"print([m for m in {heavy} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip().endswith("[]"), done.stderr
    assert "demo" in done.stdout
    best = 9.0
    for _ in range(5):
        start = processor_seconds()
        assert call("--help").returncode == 0
        best = min(best, processor_seconds() - start)
    assert best < 0.4


def test_every_command_explains_itself() -> None:
    text = call("--help").stdout
    commands = [line.split()[0] for line in text.split("Commands:")[1].splitlines() if line.strip()]
    assert set(commands) >= {"demo", "train", "export", "verify", "run", "eval", "bench", "report", "info"}
    for command in commands:
        shown = call(command, "--help")
        assert shown.returncode == 0 and "Usage:" in shown.stdout


def test_variants_as_json_and_as_table() -> None:
    rows = json.loads(call("info", "--variants", "--json").stdout)
    named = {row["variant"]: row for row in rows}
    share = named["TinyLLaVA-share-Sig-Phi"]
    assert share["size_paper"] == 3.1 and share["parameters"] == 3_217_417_280
    assert share["parameters_exported"] == 3_186_937_120
    assert (share["resolution"], share["visual_tokens"], share["recipe"]) == (384, 729, "share")
    assert sum(row["size_paper"] is not None for row in rows) == 12
    table = call("info", "--variants").stdout
    assert "TinyLLaVA-base-C-TL" in table and "1.410 B" in table


def test_info_names_what_is_installed() -> None:
    value = json.loads(call("info", "--json").stdout)
    assert value["installed"]["device"]["onnxruntime"] and value["problems"] == []


def test_doctor_says_when_both_onnxruntimes_are_installed() -> None:
    from tinyllava_edge.info import problems

    both = problems({"onnxruntime": "1", "onnxruntime-gpu": "1", "llama-cpp-python": "1"})
    assert len(both) == 1 and "both installed" in both[0] and "pip uninstall" in both[0]
    neither = problems({"onnxruntime": None, "onnxruntime-gpu": None, "llama-cpp-python": None})
    assert len(neither) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run"], 2, "Missing argument"),
        (["run", "nowhere", "what?"], 1, "no bundle.json"),
        (["info", "nowhere"], 2, "neither a bundle"),
        (["info", "--variants", "x"], 2, "takes no path"),
        (["export", "nowhere", "-o", "out"], 1, "no such directory"),
        (["export", "nowhere", "-o", "out", "--profile", "phone-arm64"], 1, "no such directory"),
        (["export", "nowhere", "-o", "out", "--profile", "phone"], 2, "unknown profile 'phone'"),
        (["export", "nowhere", "-o", "out", "--profile", "mine.toml"], 2, "mine.toml: can't be read"),
        (["export", "nowhere", "-o", "out", "--llm", ""], 2, "--llm names no type"),
        (["report", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["report", "nowhere.jsonl", "-o", "report.md"], 2, "no HTML"),
        (["train", "-o", "x", "--data", "d", "--images", "i", "--variant", "typo"], 2, "typo"),
        (["eval", "nowhere", "--build", "int8+f16"], 2, "no bundle"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_errors_are_short_and_have_codes(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = call(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_export_teaches_its_profiles_and_shows_its_defaults() -> None:
    from tinyllava_edge.export.profiles import PRESETS

    text = "".join(call("export", "--help").stdout.split())  # names are broken at the margin
    assert all(name in text for name in PRESETS)
    assert "[default:(f16,q8_0,q4_k_m)]" in text and "[default:(fp32,int8)]" in text


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom tinyllava_edge import cli\n"
        "sys.argv = ['tinyllava-edge', 'export', 'x', '-o', 'y']\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == [
        "error: this command needs the package torch",
        "hint: pip install 'tinyllava-edge[train]'",
    ]


def test_cli_reference_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, REPOSITORY / "docs" / "cli_reference.py", "--check"], timeout=60)
    assert done.returncode == 0


def test_ctrl_c_that_a_library_turns_into_another_error() -> None:
    """A `finally` that stumbles over the interrupt hides it; what the user did is still what is said."""
    code = (
        "import os, signal\n"
        "from tinyllava_edge.cli_frame import guarded\n"
        "from tinyllava_edge.errors import CheckpointError\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def library():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        saved = 1\n"
        "    finally:\n"
        "        print(saved)\n"
        "def command():\n"
        "    try:\n"
        "        library()\n"
        "    except Exception as error:\n"
        "        raise CheckpointError('no model can be built', 'restore the file') from error\n"
        "guarded(command)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: interrupted"), done.stderr
    assert "CheckpointError" not in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_nothing_that_is_said_is_obeyed_by_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Another machine, a file's name or its content may hold escapes."""
    from tinyllava_edge.cli_frame import explain, talk

    odd = "\x1b]0;owned\x07\x1b[31m \x9b2J \u202e \udce9 é"
    explain(f"a{odd}\nb", f"the log:\n{odd}")
    talk(odd)
    plain = "\\x1b]0;owned\\x07\\x1b[31m \\x9b2J \\u202e \\udce9 é"
    assert capsys.readouterr().err == f"error: a{plain} b\nhint: the log:\n{plain}\n{plain}\n"
