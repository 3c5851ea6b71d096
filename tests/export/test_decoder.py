"""The ONNX decoder against transformers, run by plain ONNX Runtime."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime_genai", reason="the decoder's builder, extra [decoder], is not installed")

from tinyllava_edge import checkpoint
from tinyllava_edge.errors import BundleError, DependencyError, EngineError, ExportError, UsageError
from tinyllava_edge.export import decoder as decoder_module
from tinyllava_edge.export.decoder import DECODER_PRECISIONS, export_decoder
from tinyllava_edge.export.embed_tokens import TABLES, export_embed_tokens
from tinyllava_edge.runtimes.decoder import Decoder

from .decoder_models import hugging_face, make_checkpoint, prompt
from .llm_models import MODELS

REFUSED = {"stablelm-parallel": "use_parallel_residual", "llama-linear-rope": "linear", "qwen2-yarn": "yarn"}
TOKENS = 16


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Name in MODELS → checkpoint, written once."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("decoders")

    def get(which: str) -> Path:
        if which not in made:
            made[which] = make_checkpoint(root / which, which)
        return made[which]

    return get


def open_decoder(root: Path, out: Path, precision: str = "fp32", table: str = "float32") -> Decoder:
    graph, *_ = export_decoder(root, out, precision)
    embed, *_ = export_embed_tokens(checkpoint.llm_source(root), out / "embed_tokens.onnx", table)
    return Decoder(embed, graph)


@pytest.mark.parametrize("which", [name for name in MODELS if name not in REFUSED])
def test_float32_equals_transformers(which: str, checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Logits of all 60 positions to 1e-4 where their spread is several units; 16 greedy tokens equal; text embeddings
    to 1e-6. The intermediate size of one model equals no other width, so that no matrix is taken for the head."""
    root = checkpoints(which)
    decoder, model = open_decoder(root, tmp_path), checkpoint.load(root).model
    embeds = prompt(model)
    logits, tokens = hugging_face(model, embeds, TOKENS)
    assert np.abs(logits).max() > 1 and len(set(tokens)) > 1
    assert np.abs(decoder.logits(embeds) - logits).max() < 1e-4
    assert decoder.generate(embeds, max_tokens=TOKENS) == tokens
    assert decoder.generate(embeds, max_tokens=TOKENS, stops={tokens[5]}) == tokens[: tokens.index(tokens[5])]
    rows = model.get_input_embeddings()(checkpoint.torch.arange(3, 50)).detach().numpy()
    assert np.abs(decoder.embed(range(3, 50)) - rows).max() < 1e-6


@pytest.mark.parametrize("which", REFUSED)
def test_variants_that_would_come_out_wrong(which: str, checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ExportError, match=REFUSED[which]):
        export_decoder(checkpoints(which), tmp_path)
    assert list(tmp_path.iterdir()) == []


# Most difference of a logit as a part of the largest one: about twice what was measured on these random models, whose
# spread exaggerates rounding.
LIMITS = {"fp16": 0.02, "q8": 0.2, "q4": 0.7, "q4f16": 0.7}


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("which", ["llama", "phi", "qwen3"])
def test_smaller_precisions(which: str, precision: str, checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """They run on a CPU, are really smaller, and stay near: LIMITS; embeddings and logits are float32 in all."""
    root = checkpoints(which)
    decoder, model = open_decoder(root, tmp_path, precision), checkpoint.load(root).model
    embeds = prompt(model)
    logits, _ = hugging_face(model, embeds, 0)
    found = decoder.logits(embeds)
    error = np.abs(found - logits).max() / np.abs(logits).max()
    assert found.dtype == np.float32 and 1e-5 < error < LIMITS[precision]
    assert len(decoder.generate(embeds, max_tokens=4)) == 4
    (path,) = tmp_path.glob("decoder_model_merged*")
    assert path.name == f"decoder_model_merged{DECODER_PRECISIONS[precision].suffix}.onnx"
    share = {"fp16": 0.55, "q8": 0.35, "q4": 0.33, "q4f16": 0.33}[precision]
    parameters = sum(p.numel() for p in model.model.language_model.parameters())
    assert path.stat().st_size < share * 4 * parameters


def test_shapes_for_javascript(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """transformers.js makes the empty cache from the graph's shapes: heads and head size are numbers."""
    graph = onnx.load(export_decoder(checkpoints("llama"), tmp_path, "q4")[0]).graph
    shapes = {
        value.name: [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    assert shapes["inputs_embeds"] == ["batch_size", "sequence_length", 256]
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 64]
    assert shapes["present.0.key"] == ["batch_size", 2, "total_sequence_length", 64]
    assert shapes["logits"] == ["batch_size", "sequence_length", 1088] and "position_ids" not in shapes


def test_head_is_not_guessed(tmp_path: Path) -> None:
    """An intermediate size equal to the vocabulary's doesn't make a matrix the head: logits to 1e-4."""
    root = make_checkpoint(tmp_path / "checkpoint", "llama", text={"intermediate_size": 1088})
    decoder, model = open_decoder(root, tmp_path / "out"), checkpoint.load(root).model
    embeds = prompt(model)
    assert np.abs(decoder.logits(embeds) - hugging_face(model, embeds, 0)[0]).max() < 1e-4


def test_longer_than_the_backbone(tmp_path: Path) -> None:
    """Positions beyond max_position_embeddings, up to the checkpoint's own length, as transformers: logits to 1e-4."""
    root = make_checkpoint(tmp_path / "checkpoint", "phi", text={"max_position_embeddings": 32}, max_length=64)
    decoder, model = open_decoder(root, tmp_path / "out"), checkpoint.load(root).model
    embeds = prompt(model)
    assert np.abs(decoder.logits(embeds) - hugging_face(model, embeds, 0)[0]).max() < 1e-4


def test_half_precision_checkpoint(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A checkpoint stored in float16 gives a float32 graph of the same numbers: logits to 1e-4."""
    loaded = checkpoint.load(checkpoints("llama"))
    checkpoint.save(loaded.model.half(), loaded.tokenizer, loaded.spec, tmp_path / "half")
    decoder, model = open_decoder(tmp_path / "half", tmp_path / "out"), checkpoint.load(tmp_path / "half").model
    embeds = prompt(model)
    assert np.abs(decoder.logits(embeds) - hugging_face(model, embeds, 0)[0]).max() < 1e-4


@pytest.mark.parametrize("table", TABLES)
def test_embed_tokens(table: str, checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Gemma's table, whose rows are scaled: exact, to float16's rounding, and to half a 4-bit step."""
    root = checkpoints("gemma")
    model = checkpoint.load(root).model
    graph, *_ = export_decoder(root, tmp_path, "fp32")
    embed, *_ = export_embed_tokens(checkpoint.llm_source(root), tmp_path / "e.onnx", table)
    rows = model.get_input_embeddings()(checkpoint.torch.arange(1088)).detach().numpy()
    found = Decoder(embed, graph).embed(range(1088))
    steps = np.abs(rows.reshape(-1, 32)).max(-1) / 8
    limit = {"float32": 0.0, "float16": np.abs(rows).max() / 2048, "int4": 1.001 * steps.max()}[table]
    assert np.abs(found - rows).max() <= limit
    if table == "int4":  # within half a step, or a whole one at the end that has no code
        assert (np.abs(found - rows).reshape(-1, 32).max(-1) <= 1.001 * steps).all()
        assert embed.stat().st_size < rows.nbytes / 6


def test_wrong_names(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match="int3"):
        export_decoder(checkpoints("llama"), tmp_path, "int3")
    with pytest.raises(UsageError, match="int3"):
        export_embed_tokens(checkpoint.llm_source(checkpoints("llama")), tmp_path / "e.onnx", "int3")


def test_unknown_language_model(checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.delitem(decoder_module.BUILDERS, "qwen2")
    with pytest.raises(ExportError, match="qwen2"):
        export_decoder(checkpoints("qwen2"), tmp_path)


def test_builder_missing(checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "onnxruntime_genai.models", None)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(DependencyError) as caught:
        export_decoder(checkpoints("llama"), tmp_path)
    assert "tinyllava-edge[decoder]" in caught.value.hint


def test_quiet_and_offline(
    checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    """Nothing on stdout or stderr, no socket, and sys.path as before."""

    def refuse(*_args: object, **_kw: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = list(sys.path)
    export_decoder(checkpoints("llama"), tmp_path, "q4")
    assert capfd.readouterr() == ("", "") and sys.path == before


def test_not_a_decoder(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    graph, *_ = export_decoder(checkpoints("llama"), tmp_path)
    embed, *_ = export_embed_tokens(checkpoint.llm_source(checkpoints("llama")), tmp_path / "e.onnx")
    with pytest.raises(EngineError, match="not a decoder"):
        Decoder(embed, embed)
    graph.write_bytes(graph.read_bytes()[:-1000])
    with pytest.raises((BundleError, EngineError)):
        Decoder(embed, graph)


def test_runtime_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, onnx=None, onnx_ir=None)\n"
        "import tinyllava_edge.runtimes.decoder"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
