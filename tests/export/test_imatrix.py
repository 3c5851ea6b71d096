"""Importance matrices: collected values against activations computed by hand, the file format, hostile files."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from tinyllava_edge import checkpoint
from tinyllava_edge.data.llava_json import Row
from tinyllava_edge.errors import DataError, ExportError, UsageError
from tinyllava_edge.export import calibrate, imatrix, llm, quantize
from tinyllava_edge.export.gguf_header import matrices, read_header
from tinyllava_edge.prompt import Turn

from .llm_models import MODELS
from .test_llm import random_checkpoint

ROWS = 3


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def data() -> calibrate.CalibrationData:
    return calibrate.calibration_rows(limit=ROWS)


@pytest.fixture(scope="module")
def collected(loaded: checkpoint.Checkpoint, data: calibrate.CalibrationData) -> imatrix.Imatrix:
    return calibrate.collect(loaded, data)


def inputs_of_first_layer(
    loaded: checkpoint.Checkpoint, row: Row, images: Path, with_picture: bool
) -> dict[str, npt.NDArray[np.float64]]:
    """Inputs (n, columns) of layer 0's matrices, by Llama's formulas in float64 from the weights and the picture's
    embeddings: nothing of the collector, no hook, and no Hugging Face decoder."""
    from tinyllava_edge.runtimes.reference import ReferenceRuntime

    reference = ReferenceRuntime(loaded, 512, 0.0)
    question, answer = row.turns[0].question.replace("<image>", "").strip(), row.turns[0].answer or ""
    template = "{} USER: {}{} ASSISTANT: {}"
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    system += "detailed, and polite answers to the user's questions."
    before, after = (
        template.format(system, "<image>\n" if with_picture else "", question, answer).split(
            "<image>" if with_picture else "\0"
        )
        if with_picture
        else (template.format(system, "", question, answer), "")
    )
    weights = {k: v.detach().double().numpy() for k, v in loaded.model.model.language_model.named_parameters()}

    def embed(text: str) -> npt.NDArray[np.float64]:
        return weights["embed_tokens.weight"][loaded.tokenizer(text, add_special_tokens=False).input_ids]

    bos, eos = (weights["embed_tokens.weight"][[k]] for k in (1, 2))
    parts = [bos, embed(before)]
    if with_picture:
        parts.append(reference.probe(images / str(row.image), question, max_tokens=1).image_embeds.astype(np.float64))
        parts.append(embed(after))
    x = np.concatenate([*parts, eos])
    config, n = loaded.model.config.text_config, len(x)

    def norm(values: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        scale = np.sqrt((values**2).mean(-1, keepdims=True) + config.rms_norm_eps)
        return values / scale * weights[f"layers.0.{name}.weight"]

    def heads(values: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        return (values @ weights[f"layers.0.self_attn.{name}.weight"].T).reshape(n, -1, config.head_dim)

    half = config.head_dim // 2
    angle = np.arange(n)[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rotate(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        a, b = values[..., :half], values[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    h = norm(x, "input_layernorm")
    q, k, v = rotate(heads(h, "q_proj")), rotate(heads(h, "k_proj")), heads(h, "v_proj")
    k, v = (np.repeat(part, q.shape[1] // k.shape[1], axis=1) for part in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / config.head_dim**0.5
    scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v).reshape(n, -1)
    y = x + mixed @ weights["layers.0.self_attn.o_proj.weight"].T
    m = norm(y, "post_attention_layernorm")
    gate, up = (m @ weights[f"layers.0.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
    inputs = {"attn_output": mixed, "ffn_down": gate / (1 + np.exp(-gate)) * up}
    inputs |= dict.fromkeys(("attn_q", "attn_k", "attn_v"), h) | dict.fromkeys(("ffn_gate", "ffn_up"), m)
    return {f"blk.0.{name}.weight": value for name, value in inputs.items()}


@pytest.mark.parametrize("text_only", [False, True])
def test_sums_of_squares_by_hand(
    text_only: bool, loaded: checkpoint.Checkpoint, data: calibrate.CalibrationData
) -> None:
    """Every matrix of the first layer: equal to 1e-4 relative, counts exactly; with the picture's 64 embeddings among
    the positions or without them."""
    found = calibrate.collect(loaded, data, text_only=text_only)
    by_row = [inputs_of_first_layer(loaded, row, data.images, not text_only) for row in data.rows]
    for name in by_row[0]:
        wanted = sum((rows[name] ** 2).sum(0) for rows in by_row)
        np.testing.assert_allclose(found.sums[name], wanted, rtol=1e-4, err_msg=name)
        assert found.counts[name] == sum(len(rows[name]) for rows in by_row)
    expected = 0.0 if text_only else 64 * ROWS / found.positions
    assert found.image_share == pytest.approx(expected)


def test_every_matrix_but_head_and_embedding(
    collected: imatrix.Imatrix, loaded: checkpoint.Checkpoint, tmp_path: Path
) -> None:
    """Names and widths are those of the GGUF; layers that share an input have equal entries."""
    llm.export_llm(loaded, tmp_path / "llm.gguf")
    widths = {name: tensor.shape[0] for name, tensor in matrices(read_header(tmp_path / "llm.gguf")).items()}
    assert set(widths) - set(collected.sums) == set(imatrix.UNCOVERED)
    assert {name: len(values) for name, values in collected.sums.items()}.items() <= widths.items()
    for layer in range(2):
        q, k, v, gate, up, down = (
            collected.sums[f"blk.{layer}.{name}.weight"]
            for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "ffn_down")
        )
        assert (q == k).all() and (q == v).all() and (gate == up).all() and len(down) != len(up)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3-tied", "gemma", "phi", "stablelm-parallel"])
def test_every_architecture(name: str, tiny_checkpoint: Path, data: calibrate.CalibrationData, tmp_path: Path) -> None:
    """Collected, it fits the exported GGUF, and a type that needs an entry for every matrix can be written."""
    model = random_checkpoint(tiny_checkpoint, MODELS[name])
    found = calibrate.collect(model, replace(data, rows=data.rows[:1]))
    llm.export_llm(model, tmp_path / "llm.gguf")
    types = quantize.quantize_gguf(tmp_path / "llm.gguf", tmp_path / "out.gguf", "q2_k_s", imatrix=found, n_threads=1)
    assert types["q2_k"] >= 7 and "f16" not in types


def test_hooks_are_gone_and_nothing_is_trained(collected: imatrix.Imatrix, loaded: checkpoint.Checkpoint) -> None:
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_an_activation_that_is_not_finite(
    loaded: checkpoint.Checkpoint, data: calibrate.CalibrationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = loaded.model.model.language_model.layers[0].mlp.up_proj.weight
    before = weight[0, 0].item()
    try:
        with torch.no_grad():
            weight[0, 0] = torch.inf
        with pytest.raises(ExportError, match="ffn_down.weight' is not finite"):
            calibrate.collect(loaded, replace(data, rows=data.rows[:1]))
    finally:
        with torch.no_grad():
            weight[0, 0] = before


def test_saved_and_loaded(collected: imatrix.Imatrix, tmp_path: Path) -> None:
    path = tmp_path / "calib.gguf"
    saved = imatrix.save_imatrix(collected, path)
    again = imatrix.load_imatrix(path)
    assert saved.sha256 == again.sha256 and len(saved.sha256) == 64
    assert again.counts == collected.counts and again.datasets == ("easy-vqa train",) and again.samples == ROWS
    assert again.checkpoint_sha256 == collected.checkpoint_sha256
    assert again.image_share == pytest.approx(collected.image_share)
    for name, values in collected.sums.items():
        np.testing.assert_array_equal(again.sums[name], values)


def test_the_file_is_llama_cpps(collected: imatrix.Imatrix, tmp_path: Path) -> None:
    """Keys, names, types and shapes that llama.cpp's loader (common/imatrix-loader.cpp) asks for."""
    imatrix.save_imatrix(collected, tmp_path / "calib.gguf")
    reader = gguf.GGUFReader(tmp_path / "calib.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["easy-vqa train"]
    assert reader.fields["imatrix.chunk_count"].contents() == -(-collected.positions // 512)
    assert reader.fields["imatrix.chunk_size"].contents() == 512
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * len(collected.sums)
    for name, values in collected.sums.items():
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        assert sums.tensor_type == counts.tensor_type == gguf.GGMLQuantizationType.F32
        assert list(sums.shape) == [len(values), 1] and list(counts.shape) == [1, 1]


def test_rows_are_spread_and_fixed(tmp_path: Path) -> None:
    first, second = calibrate.calibration_rows(limit=10), calibrate.calibration_rows(limit=10)
    assert first == second and len({row.image for row in first.rows}) == 10
    assert all((first.images / str(row.image)).is_file() for row in first.rows)
    with pytest.raises(UsageError, match="needs the directory of its pictures"):
        calibrate.calibration_rows(tmp_path / "rows.json")
    with pytest.raises(UsageError, match="0 calibration rows"):
        calibrate.calibration_rows(limit=0)
    with pytest.raises(DataError, match=r"rows\.json: no such file"):
        calibrate.calibration_rows(tmp_path / "rows.json", tmp_path)


def test_rows_of_a_file(loaded: checkpoint.Checkpoint, tmp_path: Path) -> None:
    """Text-only rows and several turns are taken as they are."""
    (tmp_path / "rows.json").write_text(
        '[{"id": 1, "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"},'
        '{"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]}]'
    )
    data = calibrate.calibration_rows(tmp_path / "rows.json", tmp_path)
    assert data.rows[0].turns == (Turn("what?", "red"), Turn("sure?", "yes")) and data.name == "rows.json"
    found = calibrate.collect(loaded, data)
    assert found.image_share == 0 and found.positions > 20


def test_a_row_of_several_pictures(loaded: checkpoint.Checkpoint, data: calibrate.CalibrationData) -> None:
    """Each of them takes its place in the prompt."""
    names = tuple(str(row.image) for row in data.rows[:2])
    without = replace(data, rows=(replace(data.rows[0], images=(), turns=(Turn("what?", "red"),)),))
    both = replace(data, rows=(replace(data.rows[0], images=names, turns=(Turn("what?", "red", 2),)),))
    found, text = calibrate.collect(loaded, both), calibrate.collect(loaded, without)
    assert found.image_share == 2 * loaded.spec.visual_tokens / found.positions
    assert found.positions > 2 * loaded.spec.visual_tokens + 20 and text.image_share == 0
    assert calibrate.without_picture(both.rows[0]) == without.rows[0]


def test_another_models_matrix(collected: imatrix.Imatrix, loaded: checkpoint.Checkpoint, tmp_path: Path) -> None:
    llm.export_llm(loaded, tmp_path / "llm.gguf")
    name = "blk.1.ffn_down.weight"
    narrow = replace(collected, sums={**collected.sums, name: collected.sums[name][:-1]})
    fewer = replace(collected, sums={key: value for key, value in collected.sums.items() if key != name})
    for bad, message in ((narrow, f"{name} has 511 channels for 512"), (fewer, f"{name} is missing")):
        with pytest.raises(ExportError, match=f"belongs to another model.*{message}"):
            quantize.quantize_gguf(tmp_path / "llm.gguf", tmp_path / "out.gguf", "q4_0", imatrix=bad)
    assert not (tmp_path / "out.gguf").exists()


def test_a_channel_that_was_never_used_keeps_its_weights(
    collected: imatrix.Imatrix, loaded: checkpoint.Checkpoint, tmp_path: Path
) -> None:
    """llama.cpp writes zeros for a block whose channels all have importance 0; ours stay within 4 bits' rounding."""
    llm.export_llm(loaded, tmp_path / "llm.gguf")
    sums = {name: values.copy() for name, values in collected.sums.items()}
    for values in sums.values():
        values[:128] = 0
    quantize.quantize_gguf(
        tmp_path / "llm.gguf", tmp_path / "out.gguf", "q4_k_m", imatrix=replace(collected, sums=sums)
    )
    before = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "llm.gguf").tensors}
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        if tensor.name in sums:
            got = gguf.quants.dequantize(tensor.data, tensor.tensor_type)[:, :128]
            wanted = before[tensor.name][:, :128].astype(np.float32)
            assert np.abs(got - wanted).mean() < 0.12 * np.abs(wanted).mean(), tensor.name


# files

GOOD = ("blk.0.attn_q.weight", np.ones((1, 8), np.float32), np.array([[4]], np.float32))


def write(path: Path, *entries: tuple[str, Any], kind: str = "imatrix") -> None:
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type(kind)
    for name, values in entries:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pair(sums: Any = GOOD[1], counts: Any = GOOD[2], name: str = GOOD[0]) -> list[tuple[str, Any]]:
    return [(f"{name}.in_sum2", np.asarray(sums)), (f"{name}.counts", np.asarray(counts))]


def values(*numbers: float) -> npt.NDArray[np.float32]:
    return np.array([numbers], np.float32)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no half": (lambda p: write(p, pair()[0]), "no half of a pair"),
    "other tensors": (lambda p: write(p, ("blk.0.attn_q.weight", values(1))), "no half of a pair"),
    "nothing": (lambda p: write(p), "holds no entry"),
    "a model": (lambda p: write(p, *pair(), kind="model"), "general.type is 'model'"),
    "NaN": (lambda p: write(p, *pair(values(1, np.nan))), "not finite"),
    "infinity": (lambda p: write(p, *pair(values(1, np.inf))), "not finite"),
    "negative": (lambda p: write(p, *pair(values(1, -1))), "below zero"),
    "zero": (lambda p: write(p, *pair(values(0, 0))), "all zero"),
    "overflow": (lambda p: write(p, *pair(values(1, 3e38))), "beyond 1e"),
    "never seen": (lambda p: write(p, *pair(counts=values(0))), "expected one count"),
    "count NaN": (lambda p: write(p, *pair(counts=values(np.nan))), "expected one count"),
    "experts": (lambda p: write(p, *pair(np.ones((2, 8), np.float32), np.ones((2, 1), np.float32))), "of shape"),
    "float16": (lambda p: write(p, *pair(GOOD[1].astype(np.float16))), "is f16"),
    "old form": (lambda p: p.write_bytes(struct.pack("<ii", 1, 5) + b"blk.0" + bytes(60)), "it starts with"),
    "empty": (lambda p: p.write_bytes(b""), "not a sound GGUF"),
    "counts": (lambda p: p.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 50, 1 << 50)), "metadata entries"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, tmp_path: Path) -> None:
    """One error with the file's name. Importance near float32's end would end the process inside llama.cpp."""
    path = tmp_path / "bad.gguf"
    make, message = HOSTILE[name]
    make(path)
    with pytest.raises(ExportError, match=rf"bad\.gguf.*{message}") as caught:
        imatrix.load_imatrix(path)
    assert "\n" not in caught.value.message and caught.value.hint


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such importance matrix"):
        imatrix.load_imatrix(tmp_path / "absent.gguf")


def test_random_damage(tmp_path: Path) -> None:
    """Bytes changed at random: a matrix comes out, or one error; never another exception."""
    path = tmp_path / "good.gguf"
    write(path, *pair(), *pair(name="blk.0.attn_k.weight"))
    good, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(400):
        data = bytearray(good)
        for place in rng.integers(0, len(data), rng.integers(1, 6)):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data)
        try:
            imatrix.load_imatrix(path)
        except ExportError:
            refused += 1
    assert 100 < refused < 400
