"""llama.cpp's own multimodal road: hostile headers stop in Python; a stock host answers as our runtime does."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from PIL import Image

from tinyllava_edge import checkpoint
from tinyllava_edge.bundle import Bundle, describe_file, read_bundle
from tinyllava_edge.errors import BundleError, EngineError, ImageError
from tinyllava_edge.export.mmproj import export_mmproj, mmproj_name
from tinyllava_edge.image import pad_to_square
from tinyllava_edge.runtimes.edge import open_edge
from tinyllava_edge.runtimes.fit import fit_picture
from tinyllava_edge.runtimes.mmproj_header import read_mmproj_header
from tinyllava_edge.runtimes.mtmd import MtmdEncoder, open_mtmd
from tinyllava_edge.spec import ModelSpec

from ..export.decoder_models import make_checkpoint
from .conftest import Pair, export, picture

QUESTION = "what color is the shape?"


def with_mmproj(pair: Pair, float_type: str = "f16") -> Bundle:
    """The pair's bundle with an mmproj in it."""
    loaded = checkpoint.load(pair.checkpoint)
    opened = read_bundle(pair.bundle)
    name = mmproj_name("tiny", float_type)
    kinds = export_mmproj(loaded.model, loaded.spec, pair.bundle / name, float_type)
    file = describe_file(pair.bundle, name, "mmproj", float_type, kinds)
    return replace(opened, files=(*opened.files, file))


@pytest.fixture(scope="module")
def bundle(siglip: Pair) -> Bundle:
    return with_mmproj(siglip)


@pytest.fixture(scope="module")
def mmproj(bundle: Bundle) -> Path:
    return bundle.root / mmproj_name("tiny", "f16")


@pytest.fixture(scope="module")
def text(siglip: Pair) -> Path:
    return siglip.bundle / "llm-f16.gguf"


@pytest.fixture(scope="module")
def encoder(mmproj: Path, text: Path) -> Iterator[MtmdEncoder]:
    with MtmdEncoder(mmproj, text) as opened:
        yield opened


def test_encode(encoder: MtmdEncoder) -> None:
    """Shape and type; the same picture gives the same numbers; any size and memory order is taken."""
    first = encoder.encode(picture(1, 90, 41))
    assert first.shape == (64, 256)
    assert first.dtype == np.float32
    assert np.array_equal(first, encoder.encode(picture(1, 90, 41)))
    assert np.array_equal(first, encoder.encode(np.asfortranarray(picture(1, 90, 41))))
    assert not np.array_equal(first, encoder.encode(picture(1, 90, 41)[::-1]))
    for height, width in ((1, 1), (1, 700), (700, 1), (64, 64), (65, 64)):
        assert encoder.encode(picture(2, height, width)).shape == (64, 256)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((2, 4000, 3), np.uint8),
    ],
)
def test_pictures_that_are_refused(encoder: MtmdEncoder, bad: Any) -> None:
    with pytest.raises(ImageError):
        encoder.encode(bad)


def test_closed(mmproj: Path, text: Path) -> None:
    opened = MtmdEncoder(mmproj, text)
    opened.close()
    opened.close()
    with pytest.raises(EngineError, match="closed"):
        opened.encode(picture())


def test_another_model(encoder: MtmdEncoder, mmproj: Path, text: Path, tmp_path: Path) -> None:
    """Widths that differ are named before native code sees them."""
    other = change(text, tmp_path, "llama.embedding_length", 512)
    with pytest.raises(EngineError, match="width 256"):
        MtmdEncoder(mmproj, other)


def change(source: Path, root: Path, key: str, value: Any) -> Path:
    """A copy of a GGUF with another number, or another first item of an array."""
    path = root / source.name
    path.write_bytes(source.read_bytes())
    part = gguf.GGUFReader(path, "r+").fields[key]
    part.parts[part.data[0]][0] = value
    return path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clip.vision.image_size", 0),
        ("clip.vision.image_size", 128),  # more patches than positions
        ("clip.vision.patch_size", 0),
        ("clip.vision.patch_size", 65),
        ("clip.vision.embedding_length", 0),
        ("clip.vision.embedding_length", 256),
        ("clip.vision.feed_forward_length", 192),
        ("clip.vision.block_count", 0),
        ("clip.vision.block_count", 3),
        ("clip.vision.attention.head_count", 0),
        ("clip.vision.attention.head_count", 5),
        ("clip.vision.attention.layer_norm_epsilon", float("nan")),
        ("clip.vision.feature_layer", 0),
        ("clip.vision.feature_layer", 9),
        ("clip.vision.image_mean", float("inf")),
        ("clip.vision.image_grid_pinpoints", 64),
        ("clip.has_vision_encoder", 0),
    ],
)
def test_headers_that_contradict_themselves(mmproj: Path, text: Path, tmp_path: Path, key: str, value: Any) -> None:
    """Numbers on which mtmd would end the process, or compute nonsense, stop in Python."""
    path = change(mmproj, tmp_path, key, value)
    with pytest.raises(BundleError) as caught:
        MtmdEncoder(path, text)
    assert str(path) in caught.value.message


def patched(source: Path, root: Path, find: bytes, replace_by: bytes) -> Path:
    data = source.read_bytes()
    assert data.count(find) == 1 and len(find) == len(replace_by)
    path = root / "patched.gguf"
    path.write_bytes(data.replace(find, replace_by))
    return path


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"GGUF",
        lambda data: b"XGUF" + data[4:],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:8] + b"\xff" * 8 + data[16:],  # tensors
        lambda data: data[:16] + b"\xff" * 8 + data[24:],  # entries
        lambda data: data.replace(b"v.blk.1.ffn_down.bias", b"v.blk.1.ffn_down.bxxs"),
        lambda data: data.replace(b"v.blk.1.ln1.weight", b"v.blk.0.ln1.weight"),  # there twice
        lambda data: data.replace(b"mm.2.bias", b"mm.3.bias"),
        lambda data: data.replace(b"clip.projector_type", b"clip.projector_typo"),
        lambda data: data.replace(b"v.position_embd.weight", b"v.post_ln.weightweight"),
    ],
)
def test_damaged_files(mmproj: Path, text: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "mmproj.gguf"
    path.write_bytes(damage(mmproj.read_bytes()))
    with pytest.raises(BundleError):
        MtmdEncoder(path, text)


def test_sizes_of_a_matrix(mmproj: Path, tmp_path: Path) -> None:
    """A matrix that fits its neighbours no more, and one of four billion columns."""
    name = b"mm.0.weight"
    data = mmproj.read_bytes()
    start = data.index(name) + len(name) + 4
    for sizes in ((192, 255), (96, 512), (1 << 32, 1 << 32), (0, 256)):
        path = tmp_path / "mmproj.gguf"
        changed = b"".join(size.to_bytes(8, "little") for size in sizes)
        path.write_bytes(data[:start] + changed + data[start + 16 :])
        with pytest.raises(BundleError):
            read_mmproj_header(path)


def test_text_gguf_in_its_place(text: Path) -> None:
    with pytest.raises(BundleError, match=r"general\.architecture"):
        read_mmproj_header(text)


@pytest.mark.parametrize("policy", ["warp", "crop", "pad"])
@pytest.mark.parametrize("size", [(64, 64), (91, 40), (40, 91), (200, 333), (1, 30), (63, 64)])
def test_fit_is_what_the_processor_does(siglip: Pair, policy: str, size: tuple[int, int]) -> None:
    """Exactly: both are Pillow."""
    family = "clip" if policy == "crop" else "siglip"
    spec = replace(read_bundle(siglip.bundle).spec, image_policy=policy, vision_family=family)
    rgb = picture(3, *size)
    square = pad_to_square(rgb, spec.pad_color) if policy == "pad" else rgb
    wanted = np.asarray(checkpoint.image_processor(spec)(images=Image.fromarray(square))["pixel_values"])[0]
    found = fit_picture(rgb, spec)
    assert found.shape == (64, 64, 3)
    assert np.abs(normalised(found, spec) - wanted).max() < 1e-5


def normalised(image: Any, spec: ModelSpec) -> Any:
    return ((image / 255 - np.array(spec.image_mean)) / np.array(spec.image_std)).transpose(2, 0, 1)


def test_runtime(bundle: Bundle) -> None:
    """A SigLIP model answers the same through mtmd as through ONNX, for pictures of any shape, resized or not.

    Greedy ids of 8 tokens, f16 weights on both sides.
    """
    with open_edge(bundle, "fp32+f16", allow_unverified=True, n_threads=1) as edge:
        wanted = [edge.answer(picture(k, 50 + 40 * k, 120), QUESTION, max_tokens=8) for k in range(3)]
    for host_resize in (True, False):
        with open_mtmd(bundle, "fp32+f16", host_resize=host_resize) as runtime:
            assert runtime.name == "mtmd"
            assert runtime.build == "mmproj_f16+f16"
            found = [runtime.answer(picture(k, 50 + 40 * k, 120), QUESTION, max_tokens=8) for k in range(3)]
            many = runtime.answer_many(picture(0, 50, 120), [QUESTION, "how many?"], max_tokens=8)
            probe = runtime.probe(picture(0, 50, 120), QUESTION, max_tokens=2)
        assert [a.token_ids for a in found] == [a.token_ids for a in wanted]
        assert many[0].token_ids == wanted[0].token_ids
        assert probe.image_embeds.shape == (64, 256)


def test_gemma(tmp_path: Path) -> None:
    """Its mmproj holds embeddings for llama.cpp's scaling graph, our decoder scales by itself: only one may."""
    pair = export(make_checkpoint(tmp_path / "checkpoint", "gemma"), tmp_path / "bundle")
    rgb = picture(4, 64, 64)
    with open_edge(pair.bundle, "fp32+f32", allow_unverified=True, n_threads=1) as edge:
        wanted = edge.probe(rgb, QUESTION, max_tokens=4)
    with open_mtmd(with_mmproj(pair, "f32"), "fp32+f32") as runtime:
        found = runtime.probe(rgb, QUESTION, max_tokens=4)
    for ours, theirs in ((found.image_embeds, wanted.image_embeds), (found.first_logits, wanted.first_logits)):
        assert np.linalg.norm(ours - theirs) < 0.01 * np.linalg.norm(theirs)


def test_runtime_counts_what_mtmd_makes(factory: Pair) -> None:
    """A model taught with 63 patches gets 64 from a stock host; the runtime says so instead of stopping."""
    with open_mtmd(with_mmproj(factory), "fp32+f16") as runtime:
        answer = runtime.answer(picture(), QUESTION, max_tokens=2)
    assert answer.n_image_tokens == 64


def test_bundle_without(siglip: Pair, bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="no mmproj"):
        open_mtmd(read_bundle(siglip.bundle))
    changed = replace(bundle.files[-1], sha256="0" * 64)
    with pytest.raises(BundleError, match="SHA-256"):
        open_mtmd(replace(bundle, files=(*bundle.files[:-1], changed)))


def test_stock_host(bundle: Bundle, mmproj: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-cpp-python's generic handler, as its server runs it, with a picture neither square nor of the model's size.

    The ids that it decodes are our prompt's, and its greedy answer of 12 tokens is our runtime's.
    """
    import llama_cpp
    from llama_cpp.llama_chat_format import MTMDChatHandler

    rgb = picture(5, 70, 131)
    with open_edge(bundle, "fp32+f16", allow_unverified=True, n_threads=1) as edge:
        wanted = edge.probe(rgb, QUESTION, max_tokens=12)
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    handler = MTMDChatHandler(str(mmproj), verbose=False, use_gpu=False)
    host = llama_cpp.Llama(
        str(text), chat_handler=handler, n_ctx=512, n_threads=1, n_gpu_layers=0, verbose=False, flash_attn=False
    )
    seen: list[list[int]] = []
    decode = host.eval
    monkeypatch.setattr(host, "eval", lambda tokens: (seen.append(list(tokens)), decode(tokens))[1])
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    try:
        said = host.create_chat_completion([{"role": "user", "content": content}], temperature=0, max_tokens=12)  # type: ignore[list-item]
    finally:
        host.close()
    place = wanted.prompt_ids.index(-200)
    assert seen[:2] == [list(wanted.prompt_ids[:place]), list(wanted.prompt_ids[place + 1 :])]
    assert said["choices"][0]["message"]["content"].strip() == wanted.answer.text  # type: ignore[index, union-attr]


def test_without_torch(mmproj: Path, text: Path) -> None:
    """The encoder runs where torch, transformers and gguf can't be imported."""
    code = f"""
import sys
for name in ("torch", "transformers", "gguf", "onnx"):
    sys.modules[name] = None
import numpy as np
from tinyllava_edge.runtimes.mtmd import MtmdEncoder
with MtmdEncoder({str(mmproj)!r}, {str(text)!r}) as encoder:
    print(encoder.encode(np.zeros((64, 64, 3), np.uint8)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "(64, 256)\n", done.stderr
    assert done.stderr == ""  # mtmd's log is not for the screen


def test_random_damage(mmproj: Path, tmp_path: Path) -> None:
    """300 changed bytes in the header: each is either refused with our own error, or read."""
    data = mmproj.read_bytes()
    end = data.index(b"mm.2.bias") + 60
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(data[: 2 * end])
        changed[rng.integers(4, end)] = rng.integers(0, 256)
        path = tmp_path / "mmproj.gguf"
        path.write_bytes(bytes(changed) + data[2 * end :])
        try:
            read_mmproj_header(path)
        except BundleError:
            refused += 1
    assert refused > 200
