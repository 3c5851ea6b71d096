"""The faults that exports of these models are known to have, each written as such an export would write it.

A fault comes in two forms where it can: `said`, the bundle's spec carries it too, as when an exporter reads a field
wrongly; and `silent`, only the graph does. Either is blamed on its own stage, by numbers and not by the spec alone.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from safetensors.numpy import load_file, save_file

from tinyllava_edge.bundle import describe_file, read_bundle, write_manifest
from tinyllava_edge.checkpoint_spec import load_spec
from tinyllava_edge.errors import EngineError
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.export.compare import Check
from tinyllava_edge.export.verify import BuildReport, verify
from tinyllava_edge.export.verify_pictures import PHOTO_SIZES, photograph
from tinyllava_edge.spec import ModelSpec

VISION, LLM, PREPROCESS = "vision-fp32.onnx", "llm-f32.gguf", "preprocess.onnx"
Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One wide and one tall photograph: a square one hides what padding does."""
    root = tmp_path_factory.mktemp("pictures")
    paths = [root / f"photo-{width}x{height}.jpg" for width, height in PHOTO_SIZES]
    for path, size in zip(paths, PHOTO_SIZES, strict=True):
        path.write_bytes(photograph(*size))
    return paths


def export(checkpoint: Path, out: Path) -> Path:
    export_bundle(checkpoint, out, llm=("f32",), vision=("fp32",))
    return out


@pytest.fixture(scope="module")
def sound(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_checkpoint, tmp_path_factory.mktemp("sound") / "bundle")


@pytest.fixture(scope="module")
def sound_clip(tiny_checkpoint_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_checkpoint_clip, tmp_path_factory.mktemp("sound") / "clip")


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "bundle"))


def mislead(checkpoint: Path, out: Path, config: dict[str, Any], spec: dict[str, Any], tower: dict[str, Any]) -> Path:
    """The same weights with other words about them: what an exporter that reads them wrongly goes by."""
    shutil.copytree(checkpoint, out)
    value = json.loads((out / "config.json").read_text())
    value.update(config)
    value["vision_config"].update(tower)
    (out / "config.json").write_text(json.dumps(value))
    path = out / "model_spec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **spec}))
    return out


def hash_again(root: Path, spec: ModelSpec | None = None) -> Path:
    """A manifest that is true of the files as they are, as the export with that fault would have written it."""
    old = read_bundle(root)
    files = [describe_file(root, f.path, f.role, f.precision, f.tensor_types) for f in old.files]
    write_manifest(root, spec or old.spec, files, old.source, old.tool_versions)
    return root


def report(bundle: Path, checkpoint: Path, pictures: list[Path]) -> BuildReport:
    found = verify(bundle, checkpoint, pictures=pictures, n_threads=1)
    json.dumps(found.to_dict(), allow_nan=False)
    assert (read_bundle(bundle).verified_builds() == {}) is not found.passed
    return found.builds[0]


def assert_blamed(found: BuildReport, stage: str, given: str) -> Check:
    """The stage is the first to fail, and its check with that input is among those that fail."""
    text = "\n".join(check.line() for check in found.checks)
    assert not found.passed and found.first_divergence == stage, text
    check = next(check for check in found.checks if (check.stage, check.input) == (stage, given))
    assert check.gated and not check.passed, text
    return check


def edit_onnx(path: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(path)
    change(model.graph)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def edit_gguf(path: Path, **changes: str) -> None:
    reader = gguf.GGUFReader(path)
    kind = gguf.GGUFValueType.STRING
    new = {f"tokenizer.{key}": MetadataDetails(kind, value) for key, value in changes.items()}
    writer = gguf.GGUFWriter(path.with_suffix(".new"), str(reader.fields["general.architecture"].contents()))
    copy_with_new_metadata(reader, writer, new, [])
    path.with_suffix(".new").rename(path)


def template_of(path: Path) -> str:
    return str(gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents())


# what an exporter reads wrongly: other words about the same weights

READ_WRONGLY: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name → checkpoint, stage, changes of config.json, of model_spec.json, of the tower's configuration
    "wrong_feature_layer": ("siglip", "image_features", {"vision_feature_layer": -1}, {"feature_layer": -1}, {}),
    "quick_gelu_for_tanh": ("siglip", "image_features", {}, {}, {"hidden_act": "quick_gelu"}),
    "erf_gelu_for_tanh": ("siglip", "image_features", {}, {}, {"hidden_act": "gelu"}),
    "dropped_first_token": (
        "siglip",
        "image_features",
        {"vision_feature_select_strategy": "default", "image_seq_length": 63},
        {"select_strategy": "default", "visual_tokens": 63},
        {},
    ),
    "undropped_first_token": (
        "clip",
        "image_features",
        {"vision_feature_select_strategy": "full", "image_seq_length": 65},
        {"select_strategy": "full", "visual_tokens": 65},
        {},
    ),
    "swapped_mean_and_std": ("clip", "pixels", {}, {}, {}),  # changes filled in from the spec
    "pad_instead_of_square": ("siglip", "pixels", {}, {"image_policy": "pad"}, {}),
}


@pytest.fixture(scope="module")
def misread(
    tiny_checkpoint: Path, tiny_checkpoint_clip: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Fault → the true checkpoint, and the bundle that the real exporter makes of the misread one."""
    made: dict[str, tuple[Path, Path]] = {}
    for name, (model, _, config, spec, tower) in READ_WRONGLY.items():
        root = tmp_path_factory.mktemp(name)
        true = {"siglip": tiny_checkpoint, "clip": tiny_checkpoint_clip}[model]
        if name == "swapped_mean_and_std":
            told = load_spec(true)
            spec = {"image_mean": told.image_std, "image_std": told.image_mean}
        wrong = mislead(true, root / "checkpoint", config, spec, tower)
        made[name] = (true, export(wrong, root / "bundle"))
    return made


@pytest.mark.parametrize("name", READ_WRONGLY)
def test_read_wrongly_and_said(
    name: str, misread: dict[str, tuple[Path, Path]], pictures: list[Path], tmp_path: Path
) -> None:
    """Spec and graph agree with each other and not with the checkpoint; the numbers show it too."""
    stage = READ_WRONGLY[name][1]
    true, wrong = misread[name]
    root = Path(shutil.copytree(wrong, tmp_path / "bundle"))
    found = report(root, true, pictures)
    check = assert_blamed(found, stage, {"pixels": "own", "image_features": "reference"}[stage])
    if "first_token" in name:
        assert "shape" in check.worst
    if READ_WRONGLY[name][3] or name == "swapped_mean_and_std":
        said = assert_blamed(found, stage, "spec")
        assert "the checkpoint says" in said.worst


@pytest.mark.parametrize("name", ["wrong_feature_layer", "swapped_mean_and_std", "pad_instead_of_square"])
def test_read_wrongly_and_silent(
    name: str, misread: dict[str, tuple[Path, Path]], pictures: list[Path], tmp_path: Path
) -> None:
    """The bundle's spec is the checkpoint's; only the graph is wrong."""
    stage = READ_WRONGLY[name][1]
    true, wrong = misread[name]
    root = hash_again(Path(shutil.copytree(wrong, tmp_path / "bundle")), load_spec(true))
    found = report(root, true, pictures)
    assert_blamed(found, stage, {"pixels": "own", "image_features": "reference"}[stage])
    assert all(check.passed for check in found.checks if check.input == "spec")


@pytest.mark.parametrize("name", ["dropped_first_token", "undropped_first_token"])
def test_a_graph_that_contradicts_its_own_spec_is_refused(
    name: str, misread: dict[str, tuple[Path, Path]], pictures: list[Path], tmp_path: Path
) -> None:
    true, wrong = misread[name]
    root = hash_again(Path(shutil.copytree(wrong, tmp_path / "bundle")), load_spec(true))
    with pytest.raises(EngineError, match=VISION):
        report(root, true, pictures[:1])


# what an exporter leaves in, or swaps, in a graph


def leave_the_post_norm_in(root: Path, checkpoint: Path) -> None:
    """The tower's own post-layernorm, with its own weights, between the last layer and the connector."""
    weights = load_file(checkpoint / "model.safetensors")
    norm = {
        kind: next(v for k, v in weights.items() if k.endswith(f"post_layernorm.{kind}")) for kind in ("weight", "bias")
    }

    def change(graph: onnx.GraphProto) -> None:
        made_by = next(node for node in graph.node if "image_features" in node.output)
        made_by.output[list(made_by.output).index("image_features")] = "before_norm"
        for kind, value in norm.items():
            graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), f"post.{kind}"))
        inputs = ["before_norm", "post.weight", "post.bias"]
        node = onnx.helper.make_node("LayerNormalization", inputs, ["image_features"], axis=-1, epsilon=1e-6)
        graph.node.insert(list(graph.node).index(made_by) + 1, node)

    edit_onnx(root / VISION, change)


def read_as_bgr(root: Path, _: Path) -> None:
    """Channels the other way round, as OpenCV gives them."""

    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for place, name in enumerate(node.input):
                if name == "image":
                    node.input[place] = "bgr"
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 1, 0]), "channels"))
        graph.node.insert(0, onnx.helper.make_node("Gather", ["image", "channels"], ["bgr"], axis=3))

    edit_onnx(root / PREPROCESS, change)


def damage_the_vision_file(root: Path, _: Path) -> None:
    """A page of 4 KiB inside one matrix of the tower came back as zeros."""
    path = root / VISION
    matrices = [t for t in onnx.load(path).graph.initializer if len(t.dims) == 2 and len(t.raw_data) > 1 << 16]
    data = bytearray(path.read_bytes())
    start = data.find(matrices[-3].raw_data) + 8192
    assert start > 8192
    data[start : start + 4096] = bytes(4096)
    path.write_bytes(data)


def damage_the_llm(root: Path, _: Path) -> None:
    """Likewise, in a matrix of the decoder."""
    path = root / LLM
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
    data = bytearray(path.read_bytes())
    start = int(tensor.data_offset) + 8192
    data[start : start + 4096] = bytes(4096)
    path.write_bytes(data)


# prompts: the GGUF's template is what other hosts go by


def end_with_a_space(root: Path, _: Path) -> None:
    """`ASSISTANT: `: with that space these models repeat themselves."""
    text = template_of(root / LLM)
    assert "' ASSISTANT:'" in text
    edit_gguf(root / LLM, chat_template=text.replace("' ASSISTANT:'", "' ASSISTANT: '"))


def spell_the_bos_out(root: Path, _: Path) -> None:
    """The template spells the token and add_bos_token is true: hosts that render no BOS of their own have it twice."""
    text = template_of(root / LLM)
    assert "{{ bos_token }}" in text
    edit_gguf(root / LLM, chat_template=text.replace("{{ bos_token }}", "{{ '<s>' }}"))


def know_one_marker_only(root: Path, _: Path) -> None:
    """llama-server draws its own; left where it stands, no newline follows the picture."""
    text = template_of(root / LLM)
    assert 'OPEN = "<__media"' in text
    edit_gguf(root / LLM, chat_template=text.replace('OPEN = "<__media"', 'OPEN = "<__media__>"'))


def give_the_bos_twice(root: Path, _: Path) -> None:
    """Two in a row: no host takes both off."""
    text = template_of(root / LLM)
    edit_gguf(root / LLM, chat_template=text.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"))


FAULTS: dict[str, tuple[str, str, Callable[[Path, Path], None]]] = {
    "post_norm_left_in": ("image_features", "reference", leave_the_post_norm_in),
    "bgr": ("pixels", "own", read_as_bgr),
    "wrong_template_space": ("prompt_ids", "template", end_with_a_space),
    "marker_of_llama_server": ("prompt_ids", "template", know_one_marker_only),
    "bos_twice": ("prompt_ids", "template", give_the_bos_twice),
    "bos_twice_in_some_hosts": ("prompt_ids", "template", spell_the_bos_out),
    "one_corrupted_block_of_the_tower": ("image_features", "reference", damage_the_vision_file),
    "one_corrupted_block_of_the_llm": ("first_logits", "reference", damage_the_llm),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str, bundle: Path, tiny_checkpoint: Path, pictures: list[Path]) -> None:
    stage, given, seed = FAULTS[name]
    seed(bundle, tiny_checkpoint)
    assert_blamed(report(hash_again(bundle), tiny_checkpoint, pictures), stage, given)


def test_bos_where_the_checkpoint_has_none(
    bundle: Path, tiny_checkpoint: Path, pictures: list[Path], tmp_path: Path
) -> None:
    """add_bos_token true in the GGUF of a model whose tokenizer adds none (as Phi's): our own prompt has it too."""
    plain = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    value = json.loads((plain / "tokenizer.json").read_text())
    (plain / "tokenizer.json").write_text(json.dumps({**value, "post_processor": None}))
    found = report(bundle, plain, pictures[:1])
    assert_blamed(found, "prompt_ids", "own")
    assert_blamed(found, "prompt_ids", "template")


def test_untied_head(bundle: Path, tiny_checkpoint: Path, pictures: list[Path], tmp_path: Path) -> None:
    """A tied model whose GGUF holds an output.weight of its own: what a random head becomes that was never re-tied."""
    tied = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    weights = load_file(tied / "model.safetensors")
    head = next(key for key in weights if key.endswith("lm_head.weight"))
    del weights[head]
    save_file(weights, tied / "model.safetensors", metadata={"format": "pt"})
    value = json.loads((tied / "config.json").read_text())
    value["tie_word_embeddings"] = value["text_config"]["tie_word_embeddings"] = True
    (tied / "config.json").write_text(json.dumps(value))
    right = export(tied, tmp_path / "right")
    assert "output.weight" not in {t.name for t in gguf.GGUFReader(right / LLM).tensors}
    assert report(right, tied, pictures[:1]).passed
    assert "output.weight" in {t.name for t in gguf.GGUFReader(bundle / LLM).tensors}  # the untied model's
    assert_blamed(report(bundle, tied, pictures), "first_logits", "reference")


def test_the_sound_bundles_pass(
    sound: Path, sound_clip: Path, tiny_checkpoint: Path, tiny_checkpoint_clip: Path, pictures: list[Path]
) -> None:
    """Five times inside the float32 limits, which lie six times below what the subtlest fault does."""
    for bundle, checkpoint in ((sound, tiny_checkpoint), (sound_clip, tiny_checkpoint_clip)):
        found = report(bundle, checkpoint, pictures)
        assert found.passed, [check.line() for check in found.checks]
        for check in found.checks:
            if check.relative is not None and check.stage.startswith("image") and check.input == "reference":
                assert check.relative < check.tolerance.relative / 5, check.line()


def test_nan_in_a_tower_is_named(bundle: Path, tiny_checkpoint: Path, pictures: list[Path]) -> None:
    """Not an error from the decoder: the stage that made them is named."""

    def change(graph: onnx.GraphProto) -> None:
        tensor = next(t for t in graph.initializer if len(t.dims) == 2 and t.data_type == onnx.TensorProto.FLOAT)
        value = onnx.numpy_helper.to_array(tensor).copy()
        value[0, 0] = np.nan
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))

    edit_onnx(bundle / VISION, change)
    found = report(hash_again(bundle), tiny_checkpoint, pictures)
    assert "not finite" in assert_blamed(found, "image_features", "reference").worst


def test_a_flipped_bit_in_a_quantised_block(tiny_checkpoint: Path, pictures: list[Path], tmp_path: Path) -> None:
    """The high exponent bit of one q8_0 block's scale: 32 weights 2**16 times too large."""
    root = tmp_path / "bundle"
    export_bundle(tiny_checkpoint, root, llm=("q8_0",), vision=("fp32",))
    path = root / "llm-q8_0.gguf"
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
    data = bytearray(path.read_bytes())
    place = int(tensor.data_offset) + 34 * 100
    (scale,) = struct.unpack_from("<H", data, place)
    struct.pack_into("<H", data, place, scale ^ 0x4000)
    path.write_bytes(data)
    assert_blamed(report(hash_again(root), tiny_checkpoint, pictures), "first_logits", "reference")


def test_every_field_of_the_spec_has_a_stage() -> None:
    from tinyllava_edge.export.verify_spec import SPOILS, STAGES

    assert set(SPOILS) == {field.name for field in dataclasses.fields(ModelSpec)}
    assert set(SPOILS.values()) - {None} <= set(STAGES)
