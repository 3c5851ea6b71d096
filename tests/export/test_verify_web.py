"""verify on what browsers run: sound web files pass and are stamped; each seeded fault is found at its own stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime_genai", reason="the decoder's builder, extra [decoder], is not installed")

from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.summary import _verify_record
from tinyllava_edge.bundle import MANIFEST, Bundle, describe_file, read_bundle, write_manifest
from tinyllava_edge.commands import describe_bundle
from tinyllava_edge.errors import BundleError, UsageError, VerifyError
from tinyllava_edge.export import tolerances
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.export.chat_template import chat_template
from tinyllava_edge.export.requantize import quantize_bundle
from tinyllava_edge.export.verify import VerifyReport, verify
from tinyllava_edge.export.verify_pictures import default_cases
from tinyllava_edge.export.web import WEB_PRECISIONS
from tinyllava_edge.export.web_graphs import WebGraphs, _Text, _tokenizer
from tinyllava_edge.prompt import Turn, get_template
from tinyllava_edge.publish import write_hf_layout
from tinyllava_edge.runtimes.reference import open_reference
from tinyllava_edge.runtimes.text import Vocabulary, conversation_ids, prompt_ids
from tinyllava_edge.tokenizer_files import fast_tokenizer
from tinyllava_edge.tokenizer_sections import FIRST, SectionTokenizer, token_bytes

from .. import tiny_tokenizers as tiny

EDGE, WEB = "fp32+f32", "web-fp32"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("pictures")
    paths = []
    for case in [*default_cases(2)]:
        path = root / case.name
        path.write_bytes(case.picture if isinstance(case.picture, bytes) else Path(str(case.picture)).read_bytes())
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def sound(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sound") / "bundle"
    export_bundle(tiny_checkpoint, out, llm=("f32",), vision=("fp32",), web=("fp32", "q4"))
    return out


@pytest.fixture(scope="module")
def report(sound: Path, tiny_checkpoint: Path, pictures: list[Path]) -> VerifyReport:
    return verify(sound, tiny_checkpoint, pictures=pictures, n_threads=1)


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "bundle", ignore=shutil.ignore_patterns("verified.json")))


def rewrite(root: Path) -> Bundle:
    """Make the manifest true again, as an export with that fault would have left it."""
    old = read_bundle(root)
    files = [describe_file(root, f.path, f.role, f.precision, f.tensor_types) for f in old.files]
    write_manifest(root, old.spec, files, old.source, old.tool_versions)
    return read_bundle(root)


def test_all_builds_are_verified_unless_some_are_named(report: VerifyReport, sound: Path) -> None:
    """The web builds come after the others; what passes is stamped under its own name."""
    assert [build.build for build in report.builds] == [EDGE, WEB, "web-q4"]
    opened = read_bundle(sound)
    assert {build.build for build in report.builds if build.passed} == set(opened.verified_builds())
    assert opened.is_verified(opened.web_builds()[WEB]) and opened.is_verified(opened.build(EDGE))
    lines = {line.build: (line.runtime, line.target) for line in report.samples()}
    assert lines[WEB] == ("web", "cpu") and lines[EDGE] == ("edge", "cpu")  # no browser took part
    measured = Sample("accuracy", "web", WEB, target="browser")
    assert _verify_record([*report.samples(), measured], WEB)["build"] == WEB
    assert describe_bundle(opened)["web_builds"][WEB] == {"bytes": opened.web_builds()[WEB].bytes, "verified": True}


def test_float32_is_far_inside_its_limits(report: VerifyReport) -> None:
    """So that these can't be met by accident."""
    numbers = {(check.stage, check.input): check for check in report.builds[1].checks}
    alone, logits = numbers["image_embeds", "reference"], numbers["first_logits", "reference"]
    assert alone.relative is not None and alone.relative < 2e-6
    assert logits.max_abs is not None and logits.max_abs < 0.002
    assert numbers["prompt_ids", "own"].equal == 1 == numbers["answer", "own"].share
    assert report.builds[1].passed and report.builds[1].samples == 4


def test_four_bits_are_seen(report: VerifyReport) -> None:
    """On random weights 4 bits change the answers, and verify says so rather than stamp them."""
    numbers = {(check.stage, check.input): check for check in report.builds[2].checks}
    logits = numbers["first_logits", "reference"]
    assert logits.relative is not None and 0.1 < logits.relative < 1 and not report.builds[2].passed
    assert numbers["prompt_ids", "own"].passed and numbers["pixels", "own"].passed


def edit(path: Path, name: Callable[[str], bool], change: Callable[[np.ndarray], None]) -> None:
    """Change one initializer of a graph, the first whose name fits."""
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if name(tensor.name))
    values = onnx.numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)


def zero_a_column(values: np.ndarray) -> None:
    values[..., 7] = 0


def shift_the_mean(root: Path, _: Path) -> None:
    edit(root / "preprocess.onnx", lambda name: name == "mean", lambda values: np.multiply(values, 0.9, out=values))


def damage_the_connector(root: Path, _: Path) -> None:
    path = root / "web/onnx/vision_encoder.onnx"
    graph = onnx.load(path).graph
    made_by = {output: node for node in graph.node for output in node.output}
    product = made_by[next(name for name in made_by["image_features"].input if name in made_by)]
    edit(path, lambda name: name == product.input[1], zero_a_column)


def forget_a_merge(root: Path, _: Path) -> None:
    """The first merges of the tokenizer are lost, as by a writer that skips a header line too many."""
    path = root / "web/tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    value["model"]["merges"] = value["model"]["merges"][40:]
    path.write_text(json.dumps(value), encoding="utf-8")


def damage_the_decoder(root: Path, _: Path) -> None:
    path = root / "web/onnx/decoder_model_merged.onnx"
    edit(path, lambda name: "layers.0" in name and "o_proj" in name and "weight" in name.lower(), zero_a_column)


def damage_the_table(root: Path, _: Path) -> None:
    edit(root / "web/onnx/embed_tokens.onnx", lambda name: name == "embed_tokens.weight", zero_a_column)


def end_too_early(root: Path, checkpoint: Path) -> None:
    """An end token that is a word."""
    runtime = open_reference(checkpoint)
    case = default_cases(2)[0]
    word = runtime.probe(case.picture, "What is in the image?", max_tokens=4).answer.token_ids[1]
    runtime.close()
    path = root / "web/generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [word]}))


def narrow_the_embeddings(root: Path, _: Path) -> None:
    """The vision graph of another language model: everything runs but for the last width."""
    path = root / "web/onnx/vision_encoder.onnx"
    model = onnx.load(path)
    (output,) = model.graph.output
    for node in model.graph.node:
        for place, name in enumerate(node.output):
            if name == output.name:
                node.output[place] = "wide"
    for name, value in (("start", 0), ("stop", 128), ("axis", 2)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value]), name))
    model.graph.node.append(onnx.helper.make_node("Slice", ["wide", "start", "stop", "axis"], [output.name]))
    output.type.tensor_type.shape.dim[2].dim_value = 128
    onnx.save(model, path)


def resize_to_another_size(root: Path, _: Path) -> None:
    path = root / "preprocess.onnx"
    edit(path, lambda name: name == "size", lambda values: np.copyto(values, 48))
    model = onnx.load(path)
    for dim in model.graph.output[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = 48
    onnx.save(model, path)


def narrow_the_words(root: Path, _: Path) -> None:
    """The embedding table of another language model."""
    path = root / "web/onnx/embed_tokens.onnx"
    model = onnx.load(path)
    (table,) = model.graph.initializer
    table.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(table)[:, :128].copy(), table.name))
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 128
    onnx.save(model, path)


FAULTS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "preprocessing": ("pixels", shift_the_mean),
    "connector": ("image_embeds", damage_the_connector),
    "tokenizer": ("prompt_ids", forget_a_merge),
    "decoder": ("first_logits", damage_the_decoder),
    "embedding table": ("first_logits", damage_the_table),
    "end token": ("answer", end_too_early),
    "vision graph of another width": ("image_embeds", narrow_the_embeddings),
    "preprocessing to another size": ("pixels", resize_to_another_size),
    "embedding table of another width": ("first_logits", narrow_the_words),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_at_its_stage(fault: str, bundle: Path, tiny_checkpoint: Path, pictures: list[Path]) -> None:
    """And costs the web build's stamp only."""
    stage, damage = FAULTS[fault]
    damage(bundle, tiny_checkpoint)
    opened = rewrite(bundle)
    opened.stamp({EDGE: {"passed": True}, WEB: {"passed": True}})
    found = verify(bundle, tiny_checkpoint, builds=[WEB], pictures=pictures, n_threads=1)
    assert not found.passed and found.builds[0].first_divergence == stage, "\n".join(found.lines())
    assert set(opened.verified_builds()) == {EDGE}
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_graph_that_stops_costs_no_other_report(bundle: Path, tiny_checkpoint: Path, pictures: list[Path]) -> None:
    """What the other builds gave is told and stamped, and the reason stands in the report."""
    narrow_the_embeddings(bundle, tiny_checkpoint)
    opened = rewrite(bundle)
    found = verify(bundle, tiny_checkpoint, builds=[WEB, EDGE], pictures=pictures[:1], n_threads=1)
    assert [(build.build, build.first_divergence) for build in found.builds] == [(WEB, "image_embeds"), (EDGE, None)]
    assert set(opened.verified_builds()) == {EDGE}
    assert any("(64, 128), (64, 256) expected" in line for line in found.lines())


def test_refused(bundle: Path, tiny_checkpoint: Path, pictures: list[Path]) -> None:
    """Unknown names list both kinds; a changed file, a tokenizer that is none, and a precision without limits."""
    with pytest.raises(UsageError, match="no build 'web-q8'") as unknown:
        verify(bundle, tiny_checkpoint, builds=["web-q8"], pictures=pictures[:1])
    assert unknown.value.hint == f"it holds: {EDGE}, {WEB}, web-q4"
    (bundle / "web/tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: .* bytes"):
        verify(bundle, tiny_checkpoint, builds=[WEB], pictures=pictures[:1])
    opened = rewrite(bundle)
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a tokenizer"):
        WebGraphs(opened, opened.web_builds()[WEB], 1)
    (bundle / "web/generation_config.json").write_text('{"eos_token_id": "x"}')
    shutil.copy(tiny_checkpoint / "tokenizer.json", bundle / "web/tokenizer.json")
    opened = rewrite(bundle)
    with pytest.raises(BundleError, match="names no end token"):
        WebGraphs(opened, opened.web_builds()[WEB], 1)
    manifest = bundle / MANIFEST
    manifest.write_text(manifest.read_text().replace('"precision": "q4"', '"precision": "q5"'))
    with pytest.raises(VerifyError, match="q5"):
        verify(bundle, tiny_checkpoint, builds=["web-q5"], pictures=pictures[:1])


def test_every_web_precision_has_limits() -> None:
    for name, precision in WEB_PRECISIONS.items():
        road = tolerances.whole_road(precision.vision, f"web-{name}")
        assert road.reason and 0 < (tolerances.answers(precision.vision, f"web-{name}").share or 0) <= 1
    assert tolerances.answers("fp32", "web-fp32").share == 1.0


def test_stamps_of_web_builds_stay_where_their_files_do(report: VerifyReport, sound: Path, tmp_path: Path) -> None:
    """A new LLM type changes no web file; the card for the Hub shows web builds and their parity."""
    made = quantize_bundle(sound, ["q8_0"], out=tmp_path / "more")
    assert made.is_verified(made.web_builds()[WEB]) and made.is_verified(made.build(EDGE))
    assert "fp32+q8_0" not in made.verified_builds()
    card = (write_hf_layout(sound, tmp_path / "hub") / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith(f"| {WEB} |"))
    assert row.endswith("| yes |") and f"| {WEB} | first_logits |" in card and "is a browser's" in card


KINDS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "llama, old": ("llama", "</s>", lambda out: tiny.write_llama(out, legacy=None)),
    "llama, new": ("llama", "</s>", lambda out: tiny.write_llama(out, legacy=False)),
    "gemma": ("gemma", "<eos>", tiny.write_gemma),
    "phi": ("phi", tiny.END, tiny.write_phi),
    "qwen2": ("qwen2_instruct", "<|im_end|>", tiny.write_qwen2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_ids_of_every_tokenizer(kind: str, tmp_path: Path) -> None:
    """From the web files alone: ids of odd questions and the bytes of every token equal the checkpoint tokenizer's.

    tests/runtimes/test_web_app.py holds the page's own code to the same ids.
    """
    name, ending, write = KINDS[kind]
    given = fast_tokenizer(write(tmp_path / "release"))
    given.add_tokens(["<image>"], special_tokens=True)
    sections, template = SectionTokenizer(given), get_template(name)
    end = int(given.convert_tokens_to_ids(ending))
    start = given.bos_token_id if given("")["input_ids"] else None
    vocabulary = Vocabulary(sections.start, start, end, end, sections.rest)
    first = sections.prefix == FIRST
    layout = tmp_path / "web"
    layout.mkdir()
    raw = sections.bare.to_str() if first else given.backend_tokenizer.to_str()
    (layout / "tokenizer.json").write_text(raw, encoding="utf-8")
    settings = {"chat_template": chat_template(template, "", first_space=first)}
    (layout / "tokenizer_config.json").write_text(json.dumps(settings))
    bos, ours, spelled = _tokenizer(_text(layout / "tokenizer.json"), _text(layout / "tokenizer_config.json"))
    questions = [text for text in tiny.random_texts(300) if text.replace("<image>", "").strip()]
    for question in [*questions, "</s><s><image> <|im_end|>", "<eos><bos>", "<|fim_pad|> <tool_call>x"]:
        wanted = conversation_ids([Turn(question)], template, vocabulary, has_image=True)
        assert (*bos, *prompt_ids(question, template, ours, has_image=True)) == wanted, ascii(question)
    of = token_bytes(given)
    assert all(spelled(index) == of(index) for index in range(len(given)))


def _text(path: Path) -> Any:
    text = object.__new__(_Text)
    text.path = path
    return text
