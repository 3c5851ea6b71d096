"""A released model from its own layout to an answer, by the commands that a user would type."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tinyllava_edge.bundle import read_bundle

sys.path.append(str(Path(__file__).parent / "importer"))
import releases

PROGRAM = [sys.executable, "-m", "tinyllava_edge.cli"]


def call(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "gradient.png"
    Image.linear_gradient("L").resize((90, 50)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Factory release of Phi × SigLIP, whose head has a bias, imported by the command line."""
    root = tmp_path_factory.mktemp("released")
    releases.write_factory(root / "TinyLLaVA-tiny", releases.parts("phi", "siglip"))
    releases.make_tokenizer().save_pretrained(root / "tokenizer")
    out = root / "checkpoint"
    done = call("import", root / "TinyLLaVA-tiny", "-o", out, "--tokenizer", root / "tokenizer", "--json")
    value = json.loads(done.stdout)
    assert (value["status"], value["layout"]) == ("imported", "factory")
    assert value["model"]["select_strategy"] == "default" and value["model"]["name"] == "TinyLLaVA-tiny"
    again = call("import", root / "TinyLLaVA-tiny", "-o", out, "--tokenizer", root / "tokenizer")
    assert "unchanged" in again.stderr
    return out


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, picture: Path) -> Path:
    """Exported without --verify's default pictures, then verified on one."""
    out = checkpoint.with_name("bundle")
    call("export", checkpoint, "-o", out, "--llm", "f16", "--vision", "fp32,fp16", "--no-verify")
    done = call("verify", out, "--against", checkpoint, "--image", picture, "--json")
    assert json.loads(done.stdout)["passed"] is True
    return out


def test_import_says_what_is_missing(tmp_path: Path) -> None:
    releases.write_factory(tmp_path / "source", releases.parts("phi", "siglip"))
    done = call("import", tmp_path / "source", "-o", tmp_path / "out", code=1)
    assert "--tokenizer" in done.stderr and not (tmp_path / "out").exists()


def test_answer(bundle: Path, picture: Path) -> None:
    done = call("run", bundle, "--image", picture, "-n", "3", "--json", "--build", "fp32+f16", "what color?")
    value: dict[str, Any] = json.loads(done.stdout)
    assert value["verified"] is True and value["n_image_tokens"] == 15  # 16 patches, the first one dropped


def test_importance_matrix_and_more_types(bundle: Path, checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    """The matrix is collected over a picture, a type that needs it is added, and the old build keeps its stamp."""
    rows = [
        {
            "id": "1",
            "image": picture.name,
            "conversations": [
                {"from": "human", "value": "<image>\nwhat color is the shape?"},
                {"from": "gpt", "value": "red"},
            ],
        }
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = ("--data", tmp_path / "rows.json", "--images", picture.parent)
    call("imatrix", checkpoint, "-o", tmp_path / "imatrix.gguf", *data)
    call("quantize", bundle, "--llm", "iq2_xs", "-o", tmp_path / "more", code=2)  # needs a matrix
    more = ("--imatrix", tmp_path / "imatrix.gguf", "--tensor-types", "attn_output=q8_0")
    done = call("quantize", bundle, "--llm", "iq2_xs,q8_0", *more, "-o", tmp_path / "more", "--json")
    builds = json.loads(done.stdout)["builds"]
    assert builds["fp32+f16"]["verified"] and not builds["fp32+iq2_xs"]["verified"]
    source = read_bundle(tmp_path / "more").source
    assert source["iq2_xs.overrides"] == "attn_output=q8_0" and len(source["iq2_xs.imatrix_sha256"]) == 64


def test_published_directory(bundle: Path, tmp_path: Path) -> None:
    """The card is written; nothing is uploaded without a yes."""
    call("publish", bundle, "-o", tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\n") and "fp32+f16" in card
    done = subprocess.run(
        [*PROGRAM, "publish", str(bundle), "-o", str(tmp_path / "again"), "--push", "nobody/nothing"],
        capture_output=True,
        text=True,
        input="n\n",
        timeout=60,
    )
    assert done.returncode == 0 and "nothing was uploaded" in done.stderr
