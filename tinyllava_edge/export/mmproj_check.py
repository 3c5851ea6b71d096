"""Does stock llama.cpp make the model's image embeddings from an mmproj? Measured through its own mtmd.

Two things are told apart. The gate asks whether the file is right: mtmd must give what its own arithmetic gives in
torch, known defects included. The cosines against the model say what those defects cost, once for pictures that the
host brought to the model's size and once for pictures as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..checkpoint import image_processor
from ..errors import ExportError
from ..image import pad_to_square
from ..runtimes.base import Picture
from ..runtimes.fit import fit_picture
from ..runtimes.mmproj_header import MmprojHeader
from ..runtimes.mtmd import MtmdEncoder
from ..runtimes.picture import read_picture
from ..spec import ModelSpec
from .mmproj import MMPROJ_TYPES, embedding_scale
from .verify_pictures import photograph
from .vision import layers_used

Floats = npt.NDArray[np.float32]
# Lowest cosine of a picture's embeddings, all rows as one vector, to what mtmd should give. Worst of what was measured
# on a random SigLIP-so400m, a trained nano tower and random towers of two layers: f32 0.9999998, f16 0.9999996, bf16
# 0.99998, q8_0 0.9998. quick-GELU for tanh, the smallest fault, measures 0.99997 on the random towers of two layers and
# 0.9994 on the trained one.
LIMITS = {"f32": 0.99999, "f16": 0.99999, "bf16": 0.9999, "q8_0": 0.9995}
SIZE = 0.02  # how far `size` may be from one; Gemma's scale, the fault to look for, is a factor of its width's root
VISIBLE = 1e-3  # loss of cosine from which a host's own way of resizing is told of
SIZES = ((317, 211), (97, 240), (64, 64), (240, 240))  # width, height of the default pictures


@dataclass(frozen=True)
class PictureCosines:
    """One picture. A cosine is of all embeddings as one vector; 1 is equal."""

    name: str
    """what it is called in reports"""
    square: bool
    """whether it is as wide as high, so that no policy changes its shape"""
    expected: float
    """mtmd against its own arithmetic in torch: the gate"""
    host: float
    """mtmd against the model, the host having brought the picture to size"""
    host_lowest: float
    """the worst single embedding of the same"""
    raw: float
    """mtmd against the model, the picture as it came"""
    early: float | None
    """with the CLIP workaround: mtmd's rows against the model's next ones, which is what the workaround promises"""
    size: float = 1.0
    """norm of mtmd's embeddings over the norm that the file should give, which no cosine sees; 1 is equal"""


@dataclass(frozen=True)
class MmprojReport:
    """What an mmproj is worth in stock llama.cpp."""

    file: str
    """name of the mmproj"""
    engine: str
    """the llama-cpp-python that computed"""
    passed: bool
    """whether the file is right: every picture's `expected` or `host` reaches the limit, and its `size` is one"""
    exact: bool
    """whether stock hosts get the model's own embeddings from pictures of the model's size"""
    limit: float
    """lowest cosine allowed for this type"""
    tokens: int
    """image embeddings that mtmd makes of a picture"""
    tokens_model: int
    """image embeddings that the model was trained with"""
    pictures: tuple[PictureCosines, ...]
    """one per picture"""
    defects: tuple[str, ...]
    """what goes wrong in stock hosts, in words with the measured number; empty where nothing does"""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a terminal: the verdict, one line per picture, then the defects."""
        verdict = "passed" if self.passed else f"FAILED: below {self.limit:g}, or of another size"
        table = [f"{self.file}: {verdict}, {len(self.pictures)} pictures, llama-cpp-python {self.engine}"]
        table += [
            f"  {p.name:<22} file {p.expected:.6f}  model: resized by the host {p.host:.6f}, as it came {p.raw:.6f}"
            for p in self.pictures
        ]
        return table + [f"  beware: {defect}" for defect in self.defects]


def default_pictures() -> list[tuple[str, Picture]]:
    """Made-up photographs of awkward and of square sizes."""
    return [(f"photo-{w}x{h}.jpg", photograph(w, h)) for w, h in SIZES]


def check_mmproj(
    mmproj: Path,
    text_gguf: Path,
    model: Any,
    spec: ModelSpec,
    pictures: Sequence[tuple[str, Picture]] | None = None,
    *,
    n_threads: int = 1,
) -> MmprojReport:
    """Compare mtmd's image embeddings with the Hugging Face model's.

    Args:
        mmproj: the file under test.
        text_gguf: any text GGUF of the same model.
        model: TinyLlava, or anything with `model.vision_tower` and `model.multi_modal_projector`, in float32.
        spec: the checkpoint's spec.
        pictures: name and picture; made-up photographs by default.
        n_threads: CPU threads of mtmd.

    Raises:
        ExportError: no pictures.
        BundleError, EngineError: a file that mtmd can't open.
    """
    import llama_cpp
    from PIL import Image

    wanted = default_pictures() if pictures is None else list(pictures)
    if not wanted:
        raise ExportError(f"{mmproj}: no pictures to compare", "give at least one")
    rows: list[PictureCosines] = []
    processor, scale = image_processor(spec), np.float32(embedding_scale(spec))
    with MtmdEncoder(mmproj, text_gguf, n_threads=n_threads) as encoder:
        header = encoder.header
        for name, picture in wanted:
            rgb = read_picture(picture, spec)
            square = pad_to_square(rgb, spec.pad_color) if spec.image_policy == "pad" else rgb
            batch = processor(images=Image.fromarray(square), return_tensors="np")
            pixels = torch.from_numpy(batch["pixel_values"])  # (1, 3, s, s)
            theirs, expected = _embeds(model, spec, header, pixels)
            host, raw = (encoder.encode(x) / scale for x in (fit_picture(rgb, spec), rgb))
            cosine, lowest = _cosine(*_aligned(host, theirs, spec))
            rows.append(
                PictureCosines(
                    name,
                    rgb.shape[0] == rgb.shape[1],
                    _cosine(host, expected)[0],
                    cosine,
                    lowest,
                    _cosine(*_aligned(raw, theirs, spec))[0],
                    _cosine(host[:-1], theirs[-len(host) + 1 :])[0] if header.clip_workaround else None,
                    float(np.linalg.norm(host) / max(float(np.linalg.norm(expected)), 1e-30)),
                )
            )
    kinds = {int(number): name for name, (_, number) in MMPROJ_TYPES.items()}
    limit = LIMITS.get(kinds.get(header.file_type, ""), LIMITS["f16"])
    equal = min(row.host for row in rows) >= limit
    passed = all(max(row.expected, row.host) >= limit and abs(row.size - 1) <= SIZE for row in rows)
    return MmprojReport(
        mmproj.name,
        str(llama_cpp.__version__),
        passed,
        equal and header.patches == spec.visual_tokens,
        limit,
        header.patches,
        spec.visual_tokens,
        tuple(rows),
        tuple(_defects(rows, spec, header, limit)),
    )


def _embeds(model: Any, spec: ModelSpec, header: MmprojHeader, pixels: torch.Tensor) -> tuple[Floats, Floats]:
    """The model's embeddings (t, d), and what mtmd's arithmetic gives for the same file (n, d)."""
    tower, connector = model.model.vision_tower, model.model.multi_modal_projector
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[spec.feature_layer]  # (1, n, v)
        kept = hidden[:, 1:] if spec.select_strategy == "default" else hidden
        theirs: Floats = connector(kept)[0].numpy()
        stock = _stock_clip(tower, spec, header.clip_workaround, pixels) if header.has_class_token else hidden
        expected: Floats = connector(stock)[0].numpy()
    return theirs, expected


def _stock_clip(tower: Any, spec: ModelSpec, workaround: bool, pixels: torch.Tensor) -> torch.Tensor:
    """llama.cpp's features of a CLIP tower: class token last, positions as if it were first, the first row dropped."""
    tower = getattr(tower, "vision_model", tower)
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (1, n, v)
    positions = embeddings.position_embedding.weight.roll(-1, 0) if workaround else embeddings.position_embedding.weight
    hidden = torch.cat([patches, embeddings.class_embedding.expand(1, 1, -1)], dim=1) + positions
    hidden = tower.pre_layrnorm(hidden)
    for layer in tower.encoder.layers[: layers_used(spec, len(tower.encoder.layers))]:
        hidden = layer(hidden, attention_mask=None)
    return hidden[:, 1:]


def _aligned(ours: Floats, theirs: Floats, spec: ModelSpec) -> tuple[Floats, Floats]:
    """The rows that stand for the same patch, where one side has a token more."""
    if len(ours) > len(theirs):
        return ours[1:], theirs
    return ours, theirs[len(theirs) - len(ours) :]


def _cosine(ours: Floats, theirs: Floats) -> tuple[float, float]:
    """Cosine of all rows as one vector, and of the worst row."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    product = (a * b).sum(-1)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    whole = float(product.sum() / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))
    return whole, float((product / np.maximum(norms, 1e-30)).min())


def _defects(rows: Sequence[PictureCosines], spec: ModelSpec, header: MmprojHeader, limit: float) -> list[str]:
    """What a user of a stock host must know."""
    side = spec.image_size
    host = min(row.host for row in rows)
    found = []
    if header.has_class_token and host < limit:
        text = (
            "llama.cpp gives a CLIP tower's patches their neighbours' positions, drops the first patch and passes the "
            f"class token on instead: cosine {host:.4f} to the model (1 is equal)"
        )
        if header.clip_workaround:
            early = min(row.early or 0.0 for row in rows)
            text += (
                "; the position embeddings in this file are turned by one row to make up for it, so every patch but "
                f"the first comes out right, one place early (cosine {early:.6f} there). On a llama.cpp that mends "
                "this the file would do harm"
            )
        found.append(text)
    elif header.clip_workaround:
        found.append("this llama.cpp has no defect with CLIP towers any more: export without the workaround")
    if header.patches > spec.visual_tokens:
        found.append(
            f"stock hosts pass on {header.patches} image embeddings, the model was trained with {spec.visual_tokens}: "
            f"the first patch is one too many (the others: cosine {host:.6f})"
        )
    if header.patches < spec.visual_tokens:
        found.append(
            f"stock hosts pass on {header.patches} image embeddings, the model was trained with {spec.visual_tokens}: "
            "the class token is missing"
        )
    changed = [row for row in rows if row.raw < row.host - VISIBLE]
    if changed:
        worst = min(changed, key=lambda row: row.raw)
        hosts = "stretch with a bicubic filter" if header.warps else "keep the aspect and pad with (122, 116, 104)"
        policy = {"warp": "stretches", "crop": "crops", "pad": "pads"}[spec.image_policy]
        found.append(
            f"stock hosts {hosts}, the model {policy} with a {spec.resample} filter"
            + (f" and {spec.pad_color}" if spec.image_policy == "pad" else "")
            + f": cosine {worst.raw:.4f} ({worst.name}). Bring pictures to {side} x {side} first"
        )
    return found
