"""Our GGUF against the one that llama.cpp's own converter makes of the same files.

The converter comes from llama-cpp-python's source distribution. TINYLLAVA_EDGE_LLAMA_CPP names it, unpacked or as
.tar.gz; otherwise pip's download cache is searched. Without it these tests are skipped.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from tinyllava_edge.export import llm
from tinyllava_edge.spec import DEFAULT_VARIANT, ModelSpec, model_spec
from tinyllava_edge.weights import TensorInfo, Weights, open_weights

from ..conftest import make_tokenizer
from .llm_models import MODELS, randomise

VARIABLE = "TINYLLAVA_EDGE_LLAMA_CPP"
NAME = "llama_cpp_python-0.3.36"
VENDOR = "vendor/llama.cpp"
# Converter's class per model_type; the file type that each model is compared in: every type with every architecture.
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "phi": "PhiForCausalLM",
    "stablelm": "StableLmForCausalLM",
}
KINDS = (("float32", "f32"), ("bfloat16", "f16"), ("float16", "bf16"))
CASES = [
    (name, *kind)
    for number, name in enumerate(MODELS)
    for kind in (KINDS if name in CLASSES else [KINDS[number % len(KINDS)]])
]

CONVERT = """
import json, pathlib, sys
import gguf, conversion
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # the test's own tokenizer has no known fingerprint
for job in json.loads(sys.stdin.read()):
    chosen = conversion.get_model_class(job["class"])
    if job["class"] == "GemmaForCausalLM":  # whose tokenizers are SentencePiece
        chosen.set_vocab = TextModel._set_vocab_gpt2
    chosen(pathlib.Path(job["model"]), gguf.LlamaFileType(job["file_type"]), pathlib.Path(job["out"])).write()
"""


@dataclass(frozen=True)
class Source:
    """A stand-alone Hugging Face directory as export_llm reads it."""

    config: Any
    tokenizer: Any
    spec: ModelSpec
    weights: Weights

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self.weights.infos

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.weights.rows(name, start, stop)


def find_source(room: Path) -> Path:
    """Directory that holds `conversion` and `gguf-py`; the test is skipped where there is none."""
    given = os.environ.get(VARIABLE)
    archives = [Path(given)] if given else cached_archives()
    for path in archives:
        for root in (path, path / VENDOR, path / NAME / VENDOR):
            if (root / "conversion").is_dir():
                return root
        if path.is_file():
            with tarfile.open(path) as archive:
                wanted = tuple(f"{NAME}/{VENDOR}/{part}/" for part in ("conversion", "gguf-py"))
                chosen = [member for member in archive if member.name.startswith(wanted)]
                archive.extractall(room, chosen, filter="data")
            return room / NAME / VENDOR
    pytest.skip(f"no llama.cpp converter: {VARIABLE} doesn't name {NAME}.tar.gz and pip's cache lacks it")


def cached_archives() -> list[Path]:
    """Source distributions of llama-cpp-python among what pip has downloaded."""
    done = subprocess.run([sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=False)
    place = Path(done.stdout.strip())
    if done.returncode or not place.is_dir():
        return []
    large = [p for p in place.rglob("*.body") if p.stat().st_size > 10 << 20]
    return [path for path in large if is_archive(path)]


def is_archive(path: Path) -> bool:
    try:
        with tarfile.open(path) as archive:
            first = archive.next()
            return first is not None and first.name.split("/")[0] == NAME
    except (tarfile.TarError, OSError, EOFError):
        return False


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model as a Hugging Face directory, and its GGUF by llama.cpp's converter, all in one process."""
    from transformers import AutoConfig, AutoModelForCausalLM

    room = tmp_path_factory.mktemp("oracle")
    source = find_source(room / "source")
    tokenizer, jobs = make_tokenizer(), []
    for name, text in MODELS.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(text)))
        randomise(model, text["model_type"])
        for stored in ("float32", "bfloat16", "float16"):
            model.to(getattr(torch, stored)).save_pretrained(room / name / stored)
            tokenizer.save_pretrained(room / name / stored)
            model.float()
    for name, stored, kind in CASES:
        jobs.append(
            {
                "class": CLASSES[MODELS[name]["model_type"]],
                "model": str(room / name / stored),
                "file_type": int(llm.FLOAT_TYPES[kind].file_type),
                "out": str(room / f"{name}-{kind}.gguf"),
            }
        )
    paths = os.pathsep.join([str(source), str(source / "gguf-py")])
    done = subprocess.run(
        [sys.executable, "-c", CONVERT],
        input=json.dumps(jobs),
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return room


@pytest.mark.parametrize(("name", "stored", "kind"), CASES)
def test_same_as_the_converter(name: str, stored: str, kind: str, converted: Path, tmp_path: Path) -> None:
    """Tensors: same names, shapes, types and bytes, in the same order. Keys: same values, tokenizer included.

    Differences, all of them: general.name, size_label and the like; our chat template; keys that the converter leaves
    to llama.cpp's default, see compare_keys; and Gemma's norms from float16 files, where the converter adds the one in
    float16 and we in float32, as Hugging Face does.
    """
    from transformers import AutoConfig

    root = converted / name / stored
    source = Source(AutoConfig.from_pretrained(root), make_tokenizer(), model_spec(DEFAULT_VARIANT), open_weights(root))
    llm.export_llm(source, tmp_path / "llm.gguf", kind)
    theirs, ours = gguf.GGUFReader(converted / f"{name}-{kind}.gguf"), gguf.GGUFReader(tmp_path / "llm.gguf")
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (mine.tensor_type, mine.shape.tolist()) == (other.tensor_type, other.shape.tolist()), mine.name
        if not (name == "gemma" and stored == "float16" and mine.name.endswith("_norm.weight")):
            assert mine.data.tobytes() == other.data.tobytes(), mine.name
    compare_keys(values(ours), values(theirs))


def values(reader: gguf.GGUFReader) -> dict[str, Any]:
    kept = ("general.architecture", "general.type", "general.file_type", "general.quantization_version")
    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and (not key.startswith("general.") or key in kept)
        if key != "tokenizer.chat_template"
    }


def compare_keys(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """What the converter writes must be equal; what we write beyond it must be llama.cpp's default."""
    assert {key: ours.get(key) for key in theirs} == theirs
    architecture = ours["general.architecture"]
    width, heads = (ours[f"{architecture}.{key}"] for key in ("embedding_length", "attention.head_count"))
    defaults = {
        f"{architecture}.vocab_size": len(ours["tokenizer.ggml.tokens"]),
        f"{architecture}.rope.freq_base": 10000.0,
        f"{architecture}.rope.dimension_count": ours.get(f"{architecture}.attention.key_length", width // heads),
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert {key: value for key, value in ours.items() if key not in theirs}.items() <= defaults.items()
