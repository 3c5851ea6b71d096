"""The transformers.js layout: its files, its numbers, and transformers.js itself where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

pytest.importorskip("onnxruntime_genai", reason="the decoder's builder, extra [decoder], is not installed")

from tinyllava_edge import checkpoint
from tinyllava_edge.errors import BundleError, StorageError, UsageError
from tinyllava_edge.export import web
from tinyllava_edge.export.onnx_parts import save_parts
from tinyllava_edge.prompt import Turn, get_template
from tinyllava_edge.runtimes.base import IMAGE_PLACE
from tinyllava_edge.runtimes.decoder import Decoder
from tinyllava_edge.runtimes.reference import open_reference
from tinyllava_edge.runtimes.text import Vocabulary, conversation_ids
from tinyllava_edge.tokenizer_files import fast_tokenizer
from tinyllava_edge.tokenizer_sections import SectionTokenizer

from ..tiny_tokenizers import write_llama
from .decoder_models import make_checkpoint

MODULES = os.environ.get("TINYLLAVA_EDGE_NODE_MODULES", "")
QUESTION = "what color is the shape?"
# 728-token SigLIP in small: the first of 64 patches is dropped. CLIP drops its class token instead.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"which": "llama"},
    "phi": {"which": "phi"},
    "stablelm": {"which": "stablelm"},
    "dropped": {"which": "llama", "select_strategy": "default", "visual_tokens": 63, "compat": "factory"},
    "clip": {"which": "llama", "vision": "NanoC"},
    "parts": {"which": "phi"},  # weights outside the graphs, as in every model of real size
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Case → its checkpoint and its float32 layout, written once."""
    made: dict[str, tuple[Path, Path]] = {}
    root = tmp_path_factory.mktemp("web")

    def get(case: str) -> tuple[Path, Path]:
        if case not in made:
            source = make_checkpoint(root / case, **CASES[case])
            with pytest.MonkeyPatch.context() as patch:
                if case == "parts":
                    patch.setitem(save_parts.__kwdefaults__, "inline_bytes", 0)
                web.export_web(source, root / f"{case}-web", ["fp32"])
            assert (root / f"{case}-web/onnx/embed_tokens.onnx_data").exists() == (case == "parts")
            made[case] = source, root / f"{case}-web"
        return made[case]

    return get


def picture() -> Any:
    """A photograph-like ramp with noise, 90 wide and 70 high."""
    ramp = np.add.outer(np.linspace(0, 200, 70), np.linspace(0, 50, 90))[..., None] * np.array([1, 0.7, 0.4])
    return np.clip(ramp + np.random.default_rng(0).normal(0, 5, ramp.shape), 0, 255).astype(np.uint8)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_files(tmp_path: Path, cases) -> None:  # type: ignore[no-untyped-def]
    """Names, suffixes and defaults that transformers.js looks for; nothing else is left behind."""
    root, _ = cases("phi")
    steps: list[str] = []
    written = web.export_web(root, tmp_path / "web", ["q4", "fp32", "q4"], progress=steps.append)
    stems = ("vision_encoder", "embed_tokens", "decoder_model_merged")
    graphs = {f"onnx/{stem}{suffix}.onnx" for stem in stems for suffix in ("", "_q4")}
    texts = {"config", "generation_config", "preprocessor_config", "processor_config", "tokenizer_config", "tokenizer"}
    found = {path.relative_to(tmp_path / "web").as_posix() for path in (tmp_path / "web").rglob("*") if path.is_file()}
    assert found == graphs | {f"{name}.json" for name in texts}
    assert {path.relative_to(tmp_path / "web").as_posix() for path in written} == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["web"] and any("q4" in step for step in steps)
    config = read(tmp_path / "web/config.json")
    assert config["model_type"] == "llava" and config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["model_type"] == "phi" and config["text_config"]["num_hidden_layers"] == 2
    assert config["transformers.js_config"]["dtype"] == "q4"
    assert set(config["transformers.js_config"]["use_external_data_format"].values()) == {0}
    tokenizer = checkpoint.load_tokenizer(root)
    assert config["image_token_index"] == tokenizer.convert_tokens_to_ids("<image>")
    ends = [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    assert read(tmp_path / "web/generation_config.json")["eos_token_id"] == ends
    with pytest.raises(StorageError, match="exists already"):
        web.export_web(root, tmp_path / "web", ["q4"])


@pytest.mark.parametrize("names", [[], ["int4"]])
def test_wrong_precisions(names: list[str], tmp_path: Path) -> None:
    """Said before any work, in transformers.js's own words for precisions."""
    with pytest.raises(UsageError, match="precision"):
        web.export_web(tmp_path / "no-checkpoint", tmp_path / "web", names)


@pytest.mark.parametrize(("case", "tokens", "added"), [("llama", 64, 0), ("dropped", 63, -1), ("clip", 64, 0)])
def test_image_tokens(case: str, tokens: int, added: int, cases) -> None:  # type: ignore[no-untyped-def]
    """LlavaProcessor's count, floor(h / p) · floor(w / p) + added, is the model's own, in JavaScript and in Python."""
    root, out = cases(case)
    spec = checkpoint.load_spec(root)
    settings = read(out / "processor_config.json")
    assert settings["num_additional_image_tokens"] == added == web.image_tokens_added(spec)
    assert (spec.image_size // settings["patch_size"]) ** 2 + added == spec.visual_tokens == tokens
    from transformers import LlavaProcessor

    processor = LlavaProcessor(
        checkpoint.image_processor(spec),
        checkpoint.load_tokenizer(root),
        **{key: value for key, value in settings.items() if key != "processor_class"},
    )
    found = processor(images=Image.fromarray(picture()), text="USER: <image>\nhi", return_tensors="np")
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert int((found["input_ids"] == image).sum()) == tokens


@pytest.mark.parametrize("case", ["llama", "phi", "stablelm", "parts"])
def test_three_graphs_give_the_models_answer(case: str, cases) -> None:  # type: ignore[no-untyped-def]
    """All three in plain ONNX Runtime: 16 greedy tokens equal transformers'; image embeddings to 1e-4."""
    root, out = cases(case)
    reference = open_reference(root)
    probe = reference.probe(picture(), QUESTION, max_tokens=16)
    session = ort.InferenceSession(out / "onnx/vision_encoder.onnx")
    assert [node.name for node in session.get_outputs()] == ["image_features"]
    (embeds,) = session.run(None, {"pixel_values": probe.pixel_values[None]})
    assert np.abs(embeds[0] - probe.image_embeds).max() < 1e-4
    decoder = Decoder(out / "onnx/embed_tokens.onnx", out / "onnx/decoder_model_merged.onnx")
    place = probe.prompt_ids.index(IMAGE_PLACE)
    ids = probe.prompt_ids
    prompt = np.concatenate([decoder.embed(ids[:place]), embeds[0], decoder.embed(ids[place + 1 :])])
    stops = read(out / "generation_config.json")["eos_token_id"]
    assert decoder.generate(prompt, max_tokens=16, stops=stops) == list(probe.answer.token_ids)


def test_spaces_where_a_chunk_starts_only(tmp_path: Path) -> None:
    """Llama's newer tokenizer: the template holds the spaces, tokenizer.json adds none, and the ids are training's.

    A second turn tells: behind its end-of-turn mark the checkpoint's own tokenizer.json would add a space.
    """
    root = make_checkpoint(tmp_path / "checkpoint", "llama")
    given = fast_tokenizer(write_llama(tmp_path / "tokenizer", legacy=False))
    given.add_tokens(["<image>"], special_tokens=True)
    checkpoint.save_tokenizer(given, root)
    web.export_web(root, tmp_path / "web", ["q4"])
    turns, plain = [Turn("<image>\nwhat color is it?", "red"), Turn("USER is it?")], SectionTokenizer(given)
    image, end = (int(given.convert_tokens_to_ids(text)) for text in ("<image>", "</s>"))
    vocabulary = Vocabulary(plain.start, int(given.bos_token_id), end, end, plain.rest)
    ids = conversation_ids(turns, get_template("llama"), vocabulary, has_image=True)
    wanted = [image if id_ == IMAGE_PLACE else id_ for id_ in ids]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is it?"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "text", "text": "USER is it?"}]},
    ]
    found = PreTrainedTokenizerFast.from_pretrained(tmp_path / "web")
    text = found.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert found(text)["input_ids"] == wanted and text.startswith(" ")
    assert given(text.removeprefix(" ").replace("<image> ", "<image>"))["input_ids"] != wanted
    assert found.decode(given("red")["input_ids"], skip_special_tokens=True) == "red"
    assert "legacy" not in read(tmp_path / "web/tokenizer_config.json")


def test_padded_pictures_are_announced(tmp_path: Path) -> None:
    """transformers.js can't pad to a square: the export says so, and config.json holds what a program must do."""
    root = make_checkpoint(tmp_path / "checkpoint", "llama", image_policy="pad", pad_color=(127, 127, 127))
    steps: list[str] = []
    web.export_web(root, tmp_path / "web", ["q4"], progress=steps.append)
    assert any("pad" in step for step in steps)
    assert read(tmp_path / "web/config.json")["tinyllava_edge"] == {"image_policy": "pad", "pad_color": [127] * 3}


def test_weights_in_parts(cases, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Large weights go to NAME.onnx_data, NAME.onnx_data_1, …; the graph computes the same bits, and a graph that
    points elsewhere is refused."""
    _, out = cases("llama")
    embed, whole = out / "onnx/embed_tokens.onnx", out / "onnx/decoder_model_merged.onnx"
    split = tmp_path / "decoder_model_merged.onnx"
    parts = save_parts(ir.load(whole), split, inline_bytes=0, part_bytes=2_000_000)
    assert [part.name for part in parts][:2] == [f"{split.name}_data", f"{split.name}_data_1"] and len(parts) < 6
    assert split.stat().st_size < 100_000 and max(part.stat().st_size for part in parts[:-1]) <= 2_000_000
    rows = np.random.default_rng(0).normal(0, 1, (9, 256)).astype(np.float32)
    assert (Decoder(embed, split).logits(rows) == Decoder(embed, whole).logits(rows)).all()
    again = tmp_path / "again.onnx"
    assert save_parts(ir.load(split), again) == []
    assert (Decoder(embed, again).logits(rows) == Decoder(embed, whole).logits(rows)).all()
    model = onnx.load(split, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../secret"
    onnx.save(model, split)
    with pytest.raises(BundleError, match="secret"):
        Decoder(embed, split)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.skipif(
    not Path(MODULES, "@huggingface/transformers").is_dir(),
    reason="TINYLLAVA_EDGE_NODE_MODULES names no node_modules folder with @huggingface/transformers",
)
@pytest.mark.parametrize("case", CASES)
def test_transformers_js(case: str, cases, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Prompt ids and 16 greedy tokens of transformers.js equal ours, fed the same pixel values.

    Its own resampling isn't Pillow's: its pixels are only asked to be the same picture, 4/255 apart on average.
    """
    root, out = cases(case)
    reference = open_reference(root)
    spec, side = reference.spec, reference.spec.image_size
    probe = reference.probe(picture(), QUESTION, max_tokens=16)
    (tmp_path / "image").write_bytes(picture().tobytes())
    (tmp_path / "pixels").write_bytes(probe.pixel_values.astype("<f4").tobytes())
    request = {
        "model": str(out),
        "dtype": None,
        "max_new_tokens": 16,
        "question": QUESTION,
        "image": {"file": str(tmp_path / "image"), "width": 90, "height": 70},
        "pixel_values": {"file": str(tmp_path / "pixels"), "side": side},
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("transformers_js.mjs")
    ran = subprocess.run(
        ["node", script, MODULES, tmp_path / "request.json"], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    image = reference.model.config.image_token_id
    wanted = [i for id_ in probe.prompt_ids for i in ([image] * spec.visual_tokens if id_ == IMAGE_PLACE else [id_])]
    assert found["ids"] == wanted
    assert found["tokens"][: len(probe.answer.token_ids)] == list(probe.answer.token_ids)
    mean, std = np.array(spec.image_mean), np.array(spec.image_std)
    both = [
        np.reshape(p, (3, side, side)).transpose(1, 2, 0) * std + mean for p in (found["pixels"], probe.pixel_values)
    ]
    assert np.abs(both[0] - both[1]).mean() < 4 / 255
