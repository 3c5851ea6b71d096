"""The model that lmms-eval loads: on its interface in small, and under lmms-eval itself where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tinyllava_edge.errors import BundleError, ImageError, UnverifiedError, UsageError

NAME = "tinyllava_edge.lmms_eval_plugin"
BUILD = "fp32+f16"
QUESTION = "what color is the shape?\nAnswer the question using a single word or phrase."


@dataclass
class Counts:
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class Result:
    text: str
    token_counts: Counts | None = None


@dataclass
class Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


@dataclass
class Request:
    args: tuple[Any, ...] = field(default=())


class Base:
    """What lmms_eval.api.model.lmms gives its models."""

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def clean(self) -> None:
        pass


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, on a stand-in where lmms-eval isn't installed."""
    if importlib.util.find_spec("lmms_eval") is None:
        parts: dict[str, dict[str, Any]] = {
            "lmms_eval": {},
            "lmms_eval.api": {},
            "lmms_eval.api.instance": {"GenerationResult": Result, "TokenCounts": Counts, "Instance": Request},
            "lmms_eval.api.model": {"lmms": Base},
            "lmms_eval.models": {},
            "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
        }
        for name, values in parts.items():
            module = types.ModuleType(name)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, name, module)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


@pytest.fixture
def model(plugin: Any, tiny_bundle: Path) -> Iterator[Any]:
    opened = plugin.TinyLlavaEdge(bundle=str(tiny_bundle), build=BUILD, n_threads=1)
    yield opened
    opened.clean()


def picture(seed: int, size: tuple[int, int] = (40, 60)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def ask(model: Any, *docs: tuple[str, Any], **settings: Any) -> list[Any]:
    """What lmms-eval asks: (question, visuals) per document."""
    model.task_dict = {"ours": {"test": [{"visuals": visuals} for _, visuals in docs]}}
    kwargs = {"until": ["\n\n"], "max_new_tokens": 6, "temperature": 0, "top_p": 0, "num_beams": 1, "do_sample": False}
    requests = [
        Request((text, {**kwargs, **settings}, lambda doc: doc["visuals"], number, "ours", "test"))
        for number, (text, _) in enumerate(docs)
    ]
    return list(model.generate_until(requests))


def test_the_manifest_names_the_class(plugin: Any) -> None:
    found = plugin.manifest()
    assert found.model_id == "tinyllava_edge"
    assert found.simple_class_path == f"{NAME}.TinyLlavaEdge"
    assert plugin.TinyLlavaEdge.is_simple is True


def test_the_package_does_not_need_lmms_eval() -> None:
    """Whoever has no lmms-eval never meets its imports."""
    code = (
        "import sys, importlib.abc\n"
        "class Wall(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert name.partition('.')[0] != 'lmms_eval', name\n"
        "sys.meta_path.insert(0, Wall())\n"
        "import tinyllava_edge.cli, tinyllava_edge.benchmarks.lmms_logs, tinyllava_edge.runtimes.engine\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_answers_equal_the_engine_s(model: Any, tiny_bundle: Path) -> None:
    from tinyllava_edge import open_bundle

    first, second = picture(0), picture(1)
    given = ask(
        model,
        (QUESTION, [first]),
        (f"<image>\n{QUESTION}", [first]),
        ("is it <image> or <image> ?", [first, second]),
        ("is it red? ", []),
        ("is it red? ", None),
        ("is it red? ", [None]),
    )
    pictures = [np.asarray(image) for image in (first, second)]
    with open_bundle(tiny_bundle, BUILD, n_threads=1) as engine:
        expected = [
            engine.generate(QUESTION, image=pictures[0], max_tokens=6),
            engine.generate(QUESTION, image=pictures[0], max_tokens=6),
            engine.generate("is it  or  ?", image=pictures, max_tokens=6),
            *(3 * [engine.generate("is it red? ", max_tokens=6)]),
        ]
    assert [answer.text for answer in given] == [answer.text for answer in expected]
    assert len({answer.text for answer in given}) == 3  # else the comparison above could not fail
    assert given[2].token_counts.input_tokens == expected[2].n_prompt_tokens > given[0].token_counts.input_tokens
    assert given[0].token_counts.output_tokens == len(expected[0].token_ids)


def test_questions_on_one_picture_share_the_vision_graph(model: Any) -> None:
    ask(model, *[(f"question {n}?", [picture(5)]) for n in range(4)])
    assert model._open().stats()["caches"]["images"]["misses"] == 1


def test_an_answer_ends_before_the_stop_string(model: Any) -> None:
    (whole,) = ask(model, (QUESTION, [picture(0)]), max_new_tokens=12)
    stop = whole.text[len(whole.text) // 2 :][:3]
    (cut,) = ask(model, (QUESTION, [picture(0)]), max_new_tokens=12, until=stop)
    assert cut.text == whole.text[: whole.text.find(stop)].strip()


def test_draws_are_repeatable_and_differ_between_repetitions(model: Any) -> None:
    docs = 4 * [(QUESTION, [picture(0)])]
    settings: Mapping[str, Any] = {"temperature": 5.0, "do_sample": True, "top_p": None, "max_new_tokens": 8}
    once, again = ask(model, *docs, **settings), ask(model, *docs, **settings)
    assert [answer.text for answer in once] == [answer.text for answer in again]
    assert len({answer.text for answer in once}) == 4


def test_an_error_names_the_document(model: Any, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"no picture")
    with pytest.raises(ImageError) as caught:
        ask(model, (QUESTION, [picture(0)]), (QUESTION, [str(tmp_path / "clip.mp4")]))
    assert caught.value.__notes__[0].startswith("task ours, doc_id 1; ")
    with pytest.raises(UsageError, match="a dict is no picture"):
        ask(model, (QUESTION, [{"array": [0.0], "sampling_rate": 16000}]))


def test_the_engine_is_freed_and_opened_again(model: Any) -> None:
    (before,) = ask(model, (QUESTION, [picture(0)]))
    model.clean()
    model.clean()
    assert model._engine is None
    assert ask(model, (QUESTION, [picture(0)]))[0].text == before.text


@pytest.mark.parametrize("method", ["loglikelihood", "generate_until_multi_round"])
def test_what_it_can_not_do(model: Any, method: str) -> None:
    with pytest.raises(NotImplementedError, match="generate_until"):
        getattr(model, method)([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bundle": ""}, "bundle=DIRECTORY"),
        ({"pretrained": "x"}, "unknown model_args: pretrained"),
        ({"batch_size": 4}, "batch_size=4"),
        ({"batch_size": "auto"}, "batch_size=auto"),
        ({"allow_unverified": "yes"}, "allow_unverified=true"),
        ({"n_ctx": "2k"}, "n_ctx=2k"),
        ({"n_threads": 1.5}, "n_threads=1.5"),
        ({"n_ctx": 0}, "n_ctx=0"),
        ({"device": "cuda:0"}, "unknown device"),
    ],
)
def test_wrong_model_args(plugin: Any, tiny_bundle: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plugin.TinyLlavaEdge(**{"bundle": str(tiny_bundle), **changes})


def test_what_open_bundle_refuses_keeps_its_hint(plugin: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        plugin.TinyLlavaEdge(bundle=str(tmp_path))
    assert caught.value.__notes__[0].startswith("hint: ")
    import shutil

    bare = shutil.copytree(tiny_bundle, tmp_path / "bare")
    (bare / "verified.json").unlink()
    with pytest.raises(UnverifiedError):
        plugin.TinyLlavaEdge(bundle=str(bare), build=BUILD)
    plugin.TinyLlavaEdge(bundle=str(bare), build=BUILD, allow_unverified=True, batch_size="1").clean()


def test_ranks_and_cores(plugin: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    model = plugin.TinyLlavaEdge(bundle=str(tiny_bundle), build=BUILD)
    model.clean()
    assert (model.rank, model.world_size) == (1, 2)
    assert model._settings["n_threads"] == max(1, len(os.sched_getaffinity(0)) // 2)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"max_tokens": 1024, "stop": ()}),
        ({"max_new_tokens": 16, "until": "\n\n", "use_cache": True}, {"max_tokens": 16, "stop": ("\n\n",)}),
        ({"until": None, "temperature": 0, "top_p": 0}, {"max_tokens": 1024, "stop": ()}),
        ({"until": ["", "ASSISTANT:"], "num_beams": 1, "top_p": 1.0}, {"max_tokens": 1024, "stop": ("ASSISTANT:",)}),
        ({"temperature": 0.7, "do_sample": False}, {"max_tokens": 1024, "stop": ()}),
        (
            {"temperature": 0.7, "do_sample": True, "top_k": 1, "num_beams": None, "repetition_penalty": 1.0},
            {"max_tokens": 1024, "stop": (), "temperature": 0.7, "top_p": 1.0, "top_k": 1, "seed": 3},
        ),
        (
            {"temperature": 1, "top_p": 0.9, "seed": 0},
            {"max_tokens": 1024, "stop": (), "temperature": 1.0, "top_p": 0.9, "top_k": 0, "seed": 0},
        ),
    ],
)
def test_generation_settings(plugin: Any, settings: dict[str, Any], options: dict[str, Any]) -> None:
    before = json.dumps(settings)
    assert plugin.generation_options(settings, 3) == options
    assert json.dumps(settings) == before  # lmms-eval logs them afterwards


@pytest.mark.parametrize("settings", [{"num_beams": 5}, {"repetition_penalty": 1.2}, {"until": 3}, {"until": [3]}])
def test_settings_that_would_move_the_answers_are_refused(plugin: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        plugin.generation_options(settings, 0)


def test_a_setting_that_is_not_used_is_named_once(plugin: Any, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        plugin.generation_options({"image_aspect_ratio": "original"}, 0)
    assert [record.getMessage() for record in caplog.records] == [
        "generation setting image_aspect_ratio='original' is not used"
    ]


@pytest.mark.parametrize(
    ("context", "n", "text"),
    [
        (" What?\n", 1, "What?"),
        (" What?\n", 0, " What?\n"),
        ("<image>\nWhat?", 0, "What?"),
        ("<image> <image>\nWhat is in <image 1>?", 2, "What is in <image 1>?"),
    ],
)
def test_markers(plugin: Any, context: str, n: int, text: str) -> None:
    assert plugin.without_markers(context, n * [b""]) == text


def test_pictures_are_upright_rgb(plugin: Any, tmp_path: Path) -> None:
    turned = Image.new("L", (30, 20), 255)
    turned.putpixel((0, 0), 0)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    found = plugin.as_picture(Image.open(tmp_path / "turned.png"))
    assert (found.shape, found.dtype) == ((30, 20, 3), np.uint8)
    assert found[0, 19].tolist() == [0, 0, 0]
    assert plugin.as_picture("a.png") == "a.png"


TASK = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/data.json
task: ours
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: 6
  do_sample: false
metric_list:
  - metric: ours_accuracy
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(path).convert("RGB") for path in doc["paths"]]


def process_results(doc, results):
    return {"ours_accuracy": float(results[0].strip().lower() == doc["answer"])}
"""


def test_lmms_eval_itself(tiny_bundle: Path, tmp_path: Path) -> None:
    """The command as users type it, on three pictures; then its log is read."""
    pytest.importorskip("lmms_eval")
    from tinyllava_edge.benchmarks.lmms_logs import read_lmms_samples

    docs = []
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
        docs.append({"question": f"question {number}?", "answer": "red", "paths": [str(tmp_path / f"{number}.png")]})
    docs.append({"question": "both?", "answer": "no", "paths": [str(tmp_path / "0.png"), str(tmp_path / "1.png")]})
    docs.append({"question": "is it red?", "answer": "yes", "paths": []})
    task = tmp_path / "task"
    task.mkdir()
    (tmp_path / "data.json").write_text(json.dumps(docs))
    (task / "ours.yaml").write_text(TASK.format(folder=tmp_path))
    (task / "utils.py").write_text(UTILS)
    command = [sys.executable, "-m", "lmms_eval", "--model", "tinyllava_edge", "--tasks", "ours", "--log_samples"]
    command += ["--model_args", f"bundle={tiny_bundle},build={BUILD}", "--include_path", str(task)]
    command += ["--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    subprocess.run(command, check=True, env={**os.environ, **offline}, timeout=600)
    (log,) = (tmp_path / "out").rglob("*_samples_ours.jsonl")
    records = read_lmms_samples(log)
    assert [record.question for record in records] == [doc["question"] for doc in docs]
    assert [record.expected for record in records] == [doc["answer"] for doc in docs]
    assert all(record.given and record.score == 0.0 for record in records)
    assert records[0].facts == {"metric": "ours_accuracy"}
