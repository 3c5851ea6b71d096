"""What a source may lack, what is refused, and that the same import is done once."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import releases
import torch
from safetensors.torch import load_file, save_file

from tinyllava_edge import checkpoint
from tinyllava_edge.errors import CheckpointError, StorageError, UsageError
from tinyllava_edge.importer.run import import_checkpoint
from tinyllava_edge.importer.vocabulary import NEW_BIAS
from tinyllava_edge.weights import open_weights


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layout A, Llama + SigLIP."""
    return releases.write_factory(tmp_path_factory.mktemp("a") / "TinyLLaVA", releases.parts("llama", "siglip"))


@pytest.fixture
def copy(factory: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(factory, tmp_path / "copy"))


def configure(root: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    config = {**json.loads((root / "config.json").read_text()), **changes}
    (root / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def retensor(root: Path, drop: str = "", **added: torch.Tensor) -> None:
    """Write model.safetensors anew without the names that hold `drop`, and with others."""
    state = {k: v for k, v in load_file(root / "model.safetensors").items() if not drop or drop not in k}
    state |= {name.replace("__", "."): tensor for name, tensor in added.items()}
    save_file(state, root / "model.safetensors", metadata={"format": "pt"})


# once


def test_twice_is_once(copy: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    """The same bytes and options: nothing is written. Others, or a damaged result: refused, unless forced."""
    out = tmp_path / "out"
    first = import_checkpoint(copy, out, tokenizer=tokenizer_dir)
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    again = import_checkpoint(copy, out, tokenizer=tokenizer_dir)
    assert (first.status, again.status) == ("imported", "unchanged")
    assert (again.spec, again.layout, again.bytes, again.notes) == (first.spec, "factory", first.bytes, first.notes)
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(StorageError, match="other bytes or options"):
        import_checkpoint(copy, out, tokenizer=tokenizer_dir, template="phi")
    (out / "generation_config.json").unlink()
    with pytest.raises(StorageError):
        import_checkpoint(copy, out, tokenizer=tokenizer_dir)
    assert import_checkpoint(copy, out, tokenizer=tokenizer_dir, force=True).status == "imported"
    configure(copy, image_aspect_ratio="pad")
    with pytest.raises(StorageError):
        import_checkpoint(copy, out, tokenizer=tokenizer_dir)
    assert import_checkpoint(copy, out, tokenizer=tokenizer_dir, force=True).spec.image_policy == "pad"


def test_a_failed_import_leaves_nothing(copy: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    retensor(copy, drop="connector._connector.2.bias")
    with pytest.raises(CheckpointError):
        import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


# tensors


def test_leftover_and_missing_tensors_are_listed(copy: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    retensor(copy, drop="connector._connector.2.bias", connector___connector__4__weight=torch.ones(2, 2))
    with pytest.raises(CheckpointError, match=r"missing: model\.multi_modal_projector\.linear_2\.bias; left over: con"):
        import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir)
    retensor(copy, drop="layers.1.mlp.up_proj", surprise=torch.ones(3))
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir)
    assert "layers.1.mlp.up_proj.weight" in str(caught.value) and "surprise" in str(caught.value)


def test_wrong_shape_is_listed(copy: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    state = load_file(copy / "model.safetensors")
    state["language_model.model.norm.weight"] = torch.ones(255)
    save_file(state, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"wrong shape: model\.language_model\.norm\.weight \[255\] for \[256\]"):
        import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir)


def test_untied_head_may_not_be_missing(copy: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    retensor(copy, drop="lm_head")
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir)


@pytest.mark.parametrize("stored", ["both", "head", "differs"])
def test_tied_head_however_it_is_stored(stored: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    """Both names, the head alone, or a head that differs (upstream overwrites it): the embedding is what counts."""
    model = releases.parts("qwen2", "siglip")
    source = releases.write_factory(tmp_path / "source", model)
    table = model.llm.get_input_embeddings().weight.detach().clone()
    head = table + 1 if stored == "differs" else table
    drop = "embed_tokens" if stored == "head" else ""
    retensor(source, drop=drop, language_model__lm_head__weight=head.clone())
    result = import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)
    loaded = checkpoint.load(result.out).model
    assert torch.equal(loaded.lm_head.weight, table) and torch.equal(loaded.get_input_embeddings().weight, table)
    assert any("head" in note and ("differs" in note) == (stored == "differs") for note in result.notes)
    assert "lm_head.weight" not in open_weights(result.out).infos


def test_tied_table_that_grows(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Gemma has no spare row: one table grows, stored under either name."""
    model = releases.parts("gemma", "siglip")
    table = model.llm.get_input_embeddings().weight.detach()
    source = releases.write_factory(tmp_path / "source", model)
    retensor(source, drop="embed_tokens", language_model__lm_head__weight=table.clone())
    result = import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)
    assert any("from 520 to 576 rows" in note for note in result.notes)
    loaded = checkpoint.load(result.out).model
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.lm_head.weight[:520], table) and not loaded.lm_head.weight[520:].any()


def test_dead_parts_may_be_missing(copy: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    """No pooling head and no last norm: said, and the checkpoint is whole for stock Llava."""
    from transformers import LlavaForConditionalGeneration

    retensor(copy, drop="vision_model.head.")
    retensor(copy, drop="post_layernorm")
    result = import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir)
    assert any("pooling head" in note for note in result.notes) and any("last norm" in note for note in result.notes)
    _, info = LlavaForConditionalGeneration.from_pretrained(result.out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    checkpoint.load_vision(result.out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_are_kept(dtype: torch.dtype, copy: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    state = load_file(copy / "model.safetensors")
    save_file(
        {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}, copy / "model.safetensors"
    )
    out = import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir).out
    assert {info.dtype for info in open_weights(out).infos.values()} == {dtype}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_new_rows_of_a_biased_head_never_win(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Phi without spare rows: the head's new rows are zero, their bias is far below every logit."""
    parts = releases.parts("phi", "siglip")
    source = releases.write_factory(tmp_path / "source", parts)
    state = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        state[f"language_model.{name}"] = state[f"language_model.{name}"][:520].clone()
    save_file(state, source / "model.safetensors")
    configure(source, text_config={**parts.text, "vocab_size": 520})
    out = import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir).out
    weights = open_weights(out)
    assert weights.get("lm_head.bias")[520:].tolist() == [NEW_BIAS] * 56
    assert not weights.get("lm_head.weight")[520:].any()
    assert not weights.get("model.language_model.embed_tokens.weight")[520:].any()


# what a source lacks


def test_missing_pieces_name_their_flag(copy: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json") as caught:
        import_checkpoint(copy, tmp_path / "out")
    assert "--tokenizer DIR" in caught.value.hint
    model = releases.parts("llama", "siglip")
    configure(copy, vision_config=None)
    with pytest.raises(CheckpointError, match="tower") as caught:
        import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir)
    assert "--vision DIR" in caught.value.hint
    vision = releases.write_vision_dir(tmp_path / "vision", model)
    configure(copy, text_config=None)
    with pytest.raises(CheckpointError, match="text_config") as caught:
        import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir, vision=vision)
    assert "--llm DIR" in caught.value.hint
    releases.write_json(tmp_path / "llm/config.json", model.text)
    given = {"tokenizer": tokenizer_dir, "vision": vision, "llm": tmp_path / "llm"}
    assert import_checkpoint(copy, tmp_path / "out", **given).status == "imported"
    with pytest.raises(CheckpointError, match="nowhere"):
        import_checkpoint(copy, tmp_path / "o", tokenizer=tmp_path / "nowhere")


def test_tokenizer_beside_the_weights_is_found(copy: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, copy)
    out = import_checkpoint(copy, tmp_path / "out").out
    assert checkpoint.load_tokenizer(out).convert_tokens_to_ids("<image>") == 520


def test_legacy_tower_from_a_directory(tmp_path: Path, tokenizer_dir: Path) -> None:
    """A file without the tower: the flag is named, and the flag's weights, all layers there, are read at -2."""
    model = releases.parts("llama", "siglip")
    source = releases.write_legacy(tmp_path / "source", model, tower=False)
    with pytest.raises(CheckpointError, match="no vision tower") as caught:
        import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)
    assert "--vision DIR" in caught.value.hint and "somewhere/tower" in caught.value.hint
    vision = releases.write_vision_dir(tmp_path / "vision", model, weights=True)
    result = import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir, vision=vision)
    assert (result.spec.feature_layer, result.spec.select_strategy) == (-2, "full")
    loaded, _ = checkpoint.load_vision(result.out)
    for name, tensor in model.tower.state_dict().items():
        assert torch.equal(tensor, loaded.model.vision_tower.state_dict()[name]), name


def test_first_stablelm_configurations(tmp_path: Path, tokenizer_dir: Path) -> None:
    """StableLM's own first release says rope_pct and norm_eps."""
    model = releases.parts("stablelm", "siglip")
    source = releases.write_legacy(tmp_path / "source", model)
    configure(source, partial_rotary_factor=None, rope_pct=0.5, norm_eps=1e-3)
    vision = releases.write_vision_dir(tmp_path / "vision", model)
    out = import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir, vision=vision).out
    text = checkpoint.load_config(out).text_config
    assert (text.rope_parameters["partial_rotary_factor"], text.layer_norm_eps) == (0.5, 1e-3)
    assert text.rope_parameters["rope_theta"] == 9000.0


def test_generation_ends_where_model_and_template_end(copy: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    text = releases.parts("llama", "siglip").text
    configure(copy, text_config={**text, "eos_token_id": [7, 1 << 40]})
    out = import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir).out
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [7, 2]


def test_template_is_checked_against_the_tokenizer(copy: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(UsageError, match="unknown template"):
        import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir, template="vicuna")
    with pytest.raises(UsageError, match="training only"):
        import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir, template="pretrain")
    bare = shutil.copytree(tokenizer_dir, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_text((bare / name).read_text().replace("<eos>", "<eon>"))
    with pytest.raises(CheckpointError, match="<eos>") as caught:
        import_checkpoint(copy, tmp_path / "out", tokenizer=bare, template="gemma")
    assert "--template" in caught.value.hint


def test_image_numbers_come_from_the_processor(copy: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    """preprocessor_config.json beside the weights: its mean, its resize before the crop."""
    releases.write_json(
        copy / "preprocessor_config.json",
        {"do_center_crop": True, "crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 32}, "resample": 3}
        | {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]},
    )
    out = import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir).out
    spec = checkpoint.load_spec(out)
    assert (spec.image_policy, spec.crop_resize, spec.image_size) == ("crop", 32, 28)
    assert (spec.image_mean, spec.pad_color) == ((0.4, 0.5, 0.6), (102, 127, 153))
    processor = checkpoint.image_processor(spec)
    assert dict(processor.size) == {"shortest_edge": 32}
    releases.write_json(copy / "preprocessor_config.json", {"resample": 1})
    with pytest.raises(CheckpointError, match="resample 1 can't be followed"):
        import_checkpoint(copy, tmp_path / "other", tokenizer=tokenizer_dir)


# LoRA


@pytest.mark.parametrize(
    ("pickled", "options"),
    [
        (False, {"use_rslora": True}),
        (True, {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2}, "alpha_pattern": {"down_proj": 3}}),
    ],
)
def test_lora_options(pickled: bool, options: dict[str, Any], tmp_path: Path, tokenizer_dir: Path) -> None:
    """Rank-stabilised scaling, and ranks and alphas by layer: 1e-6 against PEFT's own merge."""
    source, merged = releases.write_lora(
        tmp_path / "source", releases.parts("llama", "siglip"), pickled=pickled, **options
    )
    if pickled:
        assert (source / "adapter_model.bin").is_file()
    result = import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)
    llm = checkpoint.llm_source(result.out)
    for name, tensor in releases.llm_state(merged).items():
        torch.testing.assert_close(llm.get(name)[: tensor.shape[0]], tensor, atol=1e-6, rtol=0)
    before = releases.llm_state(releases.parts("llama", "siglip"))["model.layers.0.self_attn.q_proj.weight"]
    assert (llm.get("model.layers.0.self_attn.q_proj.weight") - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
    ],
)
def test_what_is_not_plain_lora_is_named(change: dict[str, Any], tmp_path: Path, tokenizer_dir: Path) -> None:
    source, _ = releases.write_lora(tmp_path / "source", releases.parts("llama", "siglip"))
    path = source / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=next(iter(change))):
        import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)


def test_a_lost_adapter_is_named(tmp_path: Path, tokenizer_dir: Path) -> None:
    """The base alone is a whole model, without the fine-tuning."""
    source, _ = releases.write_lora(tmp_path / "source", releases.parts("llama", "siglip"))
    (source / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="base of a LoRA adapter"):
        import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)


def test_damaged_adapter(tmp_path: Path, tokenizer_dir: Path) -> None:
    source, _ = releases.write_lora(tmp_path / "source", releases.parts("llama", "siglip"))
    path = source / "adapter_model.safetensors"
    state = load_file(path)
    first = next(iter(state))

    def refused(changed: dict[str, torch.Tensor], words: str) -> None:
        save_file(changed, path)
        with pytest.raises(CheckpointError, match=words):
            import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)

    refused({name: tensor for name, tensor in state.items() if name != first}, "other half")
    refused({**state, first: torch.ones(3, 7)}, "don't fit")
    refused({**state, first.replace("layers.0", "layers.7"): state[first].clone()}, "hasn't")
    refused({**state, "base_model.model.language_model.x": state[first].clone()}, "no LoRA matrix")
    refused({**state, first: state[first] * float("nan")}, "NaN")


# refused by name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["LlavaQwenForCausalLM"]}, "LlavaQwenForCausalLM"),
        ({"connector_type": "qformer"}, "qformer"),
        ({"connector_type": "mof_mlp"}, "mof_mlp"),
        (
            {"vision_model_name_or_path2": "facebook/dinov2-large"},
            "dinov2-large' with connector 'mlp2x_gelu'",
        ),
        ({"text_config": {"model_type": "openelm"}}, "openelm"),
        ({"vision_config": {"model_type": "vit"}}, "vit"),
        ({"image_aspect_ratio": "anyres"}, "anyres"),
        ({"vision_feature_select_strategy": "cls"}, "cls"),
        ({"vision_feature_layer": [-2, -5]}, "-2, -5"),
        ({"vision_feature_layer": -9}, "-9"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"text_config": "llama"}, "text_config"),
        ({"text_config": {"model_type": "llama", "hidden_size": "256"}}, "hidden_size"),
        ({"text_config": {"model_type": "llama", "num_hidden_layers": 1 << 40}}, "num_hidden_layers"),
        ({"text_config": {"model_type": "llama", "rms_norm_eps": [1]}}, "rms_norm_eps|llama configuration"),
        ({"text_config": {"model_type": "llama", "hidden_size": 100, "num_attention_heads": 7}}, "config"),
        ({"vision_config": {"model_type": "siglip_vision_model", "patch_size": 0}}, "patch_size"),
        ({"tokenizer_model_max_length": "long"}, "tokenizer_model_max_length"),
        ({"tokenizer_model_max_length": -1}, "tokenizer_model_max_length"),
    ],
)
def test_refused_by_name(change: dict[str, Any], words: str, copy: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    configure(copy, **change)
    with pytest.raises(CheckpointError, match=words) as caught:
        import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_source_is_never_replaced(factory: Path, tokenizer_dir: Path) -> None:
    for out in (factory, factory.parent):
        with pytest.raises(UsageError, match="holds the source"):
            import_checkpoint(factory, out, tokenizer=tokenizer_dir, force=True)


def test_our_own_checkpoint_and_no_model_at_all(tmp_path: Path, factory: Path, tokenizer_dir: Path) -> None:
    out = import_checkpoint(factory, tmp_path / "out", tokenizer=tokenizer_dir).out
    with pytest.raises(CheckpointError, match="already"):
        import_checkpoint(out, tmp_path / "again")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        import_checkpoint(tmp_path / "empty", tmp_path / "again")
    with pytest.raises(CheckpointError, match="no such directory"):
        import_checkpoint(tmp_path / "nowhere", tmp_path / "again")


# hostile files


class Evil:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_pickles(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Code in a pickle never runs; a truncated file, a list and a non-tensor are one error each."""
    source = releases.write_components(tmp_path / "source", releases.parts("llama", "siglip"))
    path = source / "language_model/pytorch_model.bin"
    whole = path.read_bytes()

    def refused(words: str) -> None:
        with pytest.raises(CheckpointError, match=words) as caught:
            import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    path.write_bytes(pickle.dumps({"x": Evil(tmp_path / "ran")}))
    refused("weights-only")
    torch.save({"x": Evil(tmp_path / "ran")}, path)
    refused("weights-only")
    assert not (tmp_path / "ran").exists()
    path.write_bytes(whole[: len(whole) // 2])
    refused("weights-only")
    torch.save([torch.ones(1)], path)
    refused("list")
    torch.save({"x": 3}, path)
    refused("no tensor")
    torch.save(torch.load(tmp_path / "source/connector/pytorch_model.bin"), path)  # sound, but another part's
    with pytest.raises(CheckpointError, match="missing"):
        import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)


def test_old_torch_files_load(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Torch's format before 1.6, which can't be mapped into memory."""
    model = releases.parts("llama", "siglip")
    source = releases.write_components(tmp_path / "source", model)
    torch.save(
        releases.llm_state(model), source / "language_model/pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    assert import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir).layout == "components"


def test_sharded_torch_files(tmp_path: Path, tokenizer_dir: Path) -> None:
    """An index of torch files; one that points outside is refused."""
    model = releases.parts("llama", "siglip")
    source = releases.write_components(tmp_path / "source", model)
    folder, state = source / "language_model", releases.llm_state(model)
    (folder / "pytorch_model.bin").unlink()
    names = list(state)
    halves = {"pytorch_model-1.bin": names[:5], "pytorch_model-2.bin": names[5:]}
    for file, part in halves.items():
        torch.save({name: state[name] for name in part}, folder / file)
    placed = {name: file for file, part in halves.items() for name in part}
    releases.write_json(folder / "pytorch_model.bin.index.json", {"weight_map": placed})
    assert import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir).status == "imported"
    releases.write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {**placed, "x": "../../evil.bin"}})
    with pytest.raises(CheckpointError, match="leaves the directory"):
        import_checkpoint(source, tmp_path / "other", tokenizer=tokenizer_dir)
    releases.write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {**placed, "x": "pytorch_model-1.bin"}})
    with pytest.raises(CheckpointError, match="lists x"):
        import_checkpoint(source, tmp_path / "other", tokenizer=tokenizer_dir)


def test_hostile_safetensors(copy: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    """A lying header, a truncated file, NaN, quantised integers: one error each that names the file and the tensor."""
    path = copy / "model.safetensors"
    whole = path.read_bytes()

    def refused(words: str) -> None:
        with pytest.raises(CheckpointError, match=words) as caught:
            import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir)
        assert str(path) in str(caught.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]

    path.write_bytes((1 << 60).to_bytes(8, "little") + whole[8:])
    refused("not a sound safetensors file")
    path.write_bytes(whole[: len(whole) // 2])
    refused("not a sound safetensors file")
    path.write_bytes(whole.replace(b'"shape":[256]', b'"shape":[999]', 1))
    refused("not a sound safetensors file")
    path.write_bytes(whole)
    state = load_file(path)
    state["language_model.model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, path)
    refused(r"tensor language_model\.model\.layers\.1\.mlp\.up_proj\.weight holds NaN")
    state["language_model.model.layers.1.mlp.up_proj.weight"] = torch.ones(384, 256, dtype=torch.int8)
    save_file(state, path)
    refused(r"up_proj\.weight is int8")
    path.write_bytes(whole)
    (copy / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        import_checkpoint(copy, tmp_path / "out", tokenizer=tokenizer_dir)


def test_not_into_the_source_and_not_from_a_bundle(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = releases.write_factory(tmp_path / "source", releases.parts("gemma", "siglip"))
    with pytest.raises(UsageError, match="lies in the source"):
        import_checkpoint(source, source / "inside", tokenizer=tokenizer_dir)
    (source / "bundle.json").write_text("{}")
    with pytest.raises(CheckpointError, match="an exported bundle"):
        import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)
