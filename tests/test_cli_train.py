"""`train` and `merge` from the command line: parts of one's own, numbers changed, data in other forms, adapters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.cli import app
from tinyllava_edge.errors import UsageError
from tinyllava_edge.train.new_model import new_model
from tinyllava_edge.train_commands import Source, parse_bad

NANO = Path(checkpoints.__file__).parent / "nano"


def call(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinyllava_edge", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of `messages` with two pictures and of captions in a folder."""
    root = tmp_path_factory.mktemp("data")
    (root / "shots").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for k in range(4):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root / "shots" / f"{k}.png")
        (root / "shots" / f"{k}.txt").write_text(f"a picture of noise, number {k}")
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "are they equal?"}]
        talk = [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]
        rows.append({"messages": talk, "images": [f"{k}.png", f"{(k + 1) % 4}.png"]})
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "both.toml").write_text(
        '[[sets]]\ndata = "pairs.jsonl"\nimages = "shots"\n[[sets]]\ndata = "shots"\nweight = 0.5\n'
    )
    return root


def test_adapters_from_the_command_line(data: Path, tmp_path: Path) -> None:
    """Parts of one's own → adapters → trained further → merged by hand: the same file."""
    first = call(
        "train", "--vision", NANO / "siglip", "--llm", NANO / "llm", "--connector", "avgpool-16", "--name", "mine",
        "--recipe", "lora-nano", "--set", "batch_size=4", "--set", "epochs=1", "--set", "lora_rank=4",
        "--data", data / "both.toml", "--max-bad-rows", "0", "--samples", "1", "-o", "one", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    record = json.loads(first.stdout)
    assert record["rows"] == 8 and record["recipe"]["lora_rank"] == 4 and record["bad_rows"] == 0
    spec = checkpoints.load_spec(tmp_path / "one")
    assert (spec.name, spec.connector, spec.visual_tokens) == ("mine", "avgpool-16", 16)
    again = call(
        "train", "--checkpoint", "one.init", "--adapter", "one.adapter", "--recipe", "lora-nano",
        "--set", "lora_rank=4", "--set", "batch_size=4", "--set", "epochs=1",
        "--data", data / "both.toml", "-o", "two", cwd=tmp_path,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    merged = call("merge", "one.init", "two.adapter", "-o", "merged", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    by_hand, by_train = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "two"))
    assert all((by_hand[name] == by_train[name]).all() for name in by_train)
    shown = call("report", "--training", "one.train.json", "--training", "two.train.json", "-o", "t.html", cwd=tmp_path)
    assert shown.returncode == 0 and "two" in (tmp_path / "t.html").read_text(), shown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "epoch=3"), "unknown key 'epoch'"),
        (("--set", "epochs"), "--set 'epochs'"),
        (("--set", "llm=everything"), "llm = 'everything'"),
        (("--max-bad-rows", "1.5"), "--max-bad-rows '1.5'"),
        (("--adapter", "a"), "belongs to a checkpoint"),
        (("--checkpoint", "c", "--connector", "linear"), "one of the two"),
        (("--variant", "TinyLLaVA-base-C-TL", "--template", "phi"), "belongs to parts of one's own"),
        (("--cache-size", "much"), "--cache-size 'much'"),
        (("--engine", "zero9"), "zero9"),
        (("--track", "csv"), "csv"),
        (("--feature-type", "int4"), "'int4'"),
        (("--set", f"learning_rate=1{'0' * 400}"), "learning_rate"),
        (("--set", f"seed={'[' * 5000}"), "seed"),
        (("--set", "batch_size=2147483647"), "batch_size"),
        (("--max-length", "9" * 30), "--max-length"),
        (("--images", "out"), "is read, and out will be written"),
    ],
)
def test_wrong_flags_are_said_before_anything_is_made(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        app(["train", "-o", "out", "--data", "d.json", *arguments], standalone_mode=False)
    said = f"{error.value.message}\n{error.value.hint}"
    assert message in said and error.value.hint and len(said) < 400
    assert not list(tmp_path.iterdir())


def test_numbers_and_shares_of_bad_rows() -> None:
    assert (parse_bad("0"), parse_bad("12"), parse_bad("1%"), parse_bad("2.5 %")) == (0, 12, 0.01, 0.025)
    for wrong in ("", "-1", "100%", "x", "nan%", "1e3"):
        with pytest.raises(UsageError, match="--max-bad-rows"):
            parse_bad(wrong)


def test_changes_reach_the_named_stage_alone() -> None:
    source = Source(None, None, "", (), None, "base-nano", "finetune", ("epochs=3", "precision=fp32"))
    pretrain, finetune = source.recipe_of(("finetune",)).stages
    assert (finetune.epochs, finetune.precision) == (3.0, "fp32") and pretrain.epochs == 2.0


def test_a_variant_with_another_connector() -> None:
    made = new_model("TinyLLaVA-base-Sig-Phi", connector="ldpv2-196", max_length=3072)
    assert (made.spec.visual_tokens, made.spec.max_length) == (196, 3072)
    model = made.without_weights()
    assert next(model.parameters()).device.type == "meta" and model.config.connector == "ldpv2-196"
    with pytest.raises(UsageError, match="not part of this package"):
        made.write(Path("nowhere"))
