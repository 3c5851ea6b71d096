"""`optimum-cli export tinyllava-edge`, run as its users run it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("optimum.commands.optimum_cli", reason="optimum, extra [optimum], is not installed")

import tinyllava_edge
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.errors import UsageError
from tinyllava_edge.export import options
from tinyllava_edge.export.options import ExportOptions, read_options
from tinyllava_edge.files import sha256_file

REPOSITORY = Path(tinyllava_edge.__file__).parents[1]


def optimum_cli(*arguments: str | Path, cwd: Path, installed: bool = False) -> subprocess.CompletedProcess[str]:
    """Run optimum-cli; unless `installed`, the working tree's namespace comes first."""
    env = dict(os.environ) if installed else {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    code = "from optimum.commands.optimum_cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help(tmp_path: Path) -> None:
    """Every option is there with its help, and the command is listed under `export`."""
    ran = optimum_cli("export", "tinyllava-edge", "--help", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    text = " ".join(ran.stdout.split())
    for name in options.FIELDS:
        assert options.flag(name) in text and options.help_text(name)[:30] in text
    assert "--model CKPT" in text
    assert "tinyllava-edge" in optimum_cli("export", "--help", cwd=tmp_path).stdout


def test_installed(tmp_path: Path) -> None:
    """The installed distribution registers it, and optimum's own modules are still optimum's."""
    ran = optimum_cli("export", "tinyllava-edge", "--help", cwd=tmp_path, installed=True)
    assert ran.returncode == 0 and "--model CKPT" in ran.stdout, ran.stderr or "install the package again"
    code = "import optimum.version, optimum.exporters.tasks; print(optimum.version.__version__)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.strip()[0].isdigit()


def test_same_result_as_our_own_command(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The same files, byte for byte, verified; stdout is the one JSON document."""
    asked = ("--llm", "f16", "--vision", "fp32", "--json")
    ran = optimum_cli("export", "tinyllava-edge", "-m", tiny_checkpoint, *asked, tmp_path / "theirs", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["builds"]["fp32+f16"]["verified"] is True
    ours = [sys.executable, "-m", "tinyllava_edge.cli", "export", tiny_checkpoint, "-o", tmp_path / "ours", *asked]
    subprocess.run([*ours, "--no-verify"], cwd=tmp_path, capture_output=True, check=True)
    bundles = [read_bundle(tmp_path / name) for name in ("theirs", "ours")]
    hashes = [{file.path: sha256_file(bundle.path(file)) for file in bundle.files} for bundle in bundles]
    assert hashes[0] == hashes[1] and len(hashes[0]) >= 3


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--llm", "q9", "--model"], 2, "unknown LLM type 'q9'"),
        (["--profile", "phone", "--model"], 2, "unknown profile 'phone'"),
        (["--max-shard-size", "big", "--model"], 2, "'big' is no size"),
        (["--tensor-types", "ffn_down", "--model"], 2, "PATTERN=TYPE"),
        (["--model"], 1, "no such directory"),
    ],
)
def test_errors(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    """One line, its hint, our exit codes, no traceback."""
    ran = optimum_cli("export", "tinyllava-edge", *arguments, tmp_path / "no", tmp_path / "out", cwd=tmp_path)
    assert ran.returncode == code and "Traceback" not in ran.stderr and ran.stdout == ""
    lines = ran.stderr.strip().splitlines()
    assert lines[-2].startswith("error: ") and words in lines[-2] and lines[-1].startswith("hint: ")
    assert not (tmp_path / "out").exists()


def test_options_from_flags() -> None:
    """Every flag reaches its field; nothing given is the dataclass's own default."""
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    assert read_options(vars(parser.parse_args([]))) == ExportOptions()
    typed = "--profile phone-arm64 --llm q4_0, --vision w4,w8 --mmproj f16 --web q4 --mobile ort --static"
    typed += " --max-shard-size 2G --imatrix i.gguf --force"
    more = ["--tensor-types", "a=q6_k,b=c=f16", "--clip-workaround", "--no-verify"]
    given = read_options(vars(parser.parse_args([*typed.split(), *more])))
    assert given == ExportOptions(
        profile="phone-arm64",
        llm=("q4_0",),
        vision=("w4", "w8"),
        mmproj=("f16",),
        web=("q4",),
        mobile=("ort",),
        static=True,
        max_shard_size=2_000_000_000,
        imatrix=Path("i.gguf"),
        clip_workaround=True,
        tensor_types=(("a", "q6_k"), ("b=c", "f16")),
        force=True,
        verify=False,
    )


def test_options_from_values() -> None:
    assert read_options({"llm": "f16", "web": None, "verify": False}) == ExportOptions(llm=("f16",), verify=False)
    with pytest.raises(UsageError, match="unknown export option 'lm'"):
        read_options({"lm": "f16"})
