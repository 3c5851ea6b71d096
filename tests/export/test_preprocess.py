"""The preprocessing graph against the Hugging Face processors on Pillow, on noise: the hardest picture for a resize."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from PIL import Image

from tinyllava_edge import checkpoint, image
from tinyllava_edge.errors import ExportError
from tinyllava_edge.export import preprocess
from tinyllava_edge.spec import ModelSpec, model_spec

SIZES = [
    *[(64, 64), (63, 63), (100, 64), (64, 100), (63, 65), (65, 63), (129, 64), (1, 1), (2, 2)],  # near the target
    *[(333, 77), (77, 333), (200, 40), (40, 200), (200, 65), (30, 40), (480, 640), (641, 479)],  # up and down
    *[(1, 37), (37, 1), (1, 300), (300, 1), (500, 3), (3, 500), (900, 2)],  # one pixel thin, extreme aspects
]


def noise(height: int, width: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(height * 1009 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def run(spec: ModelSpec, pictures: list[npt.NDArray[np.uint8]]) -> list[npt.NDArray[np.float32]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(preprocess.preprocess_graph(spec).SerializeToString(), options)
    return [session.run(None, {"image": picture[None]})[0] for picture in pictures]


@pytest.mark.parametrize("side", [64, 63])
@pytest.mark.parametrize("variant", ["TinyLLaVA-base-NanoSig-Nano", "TinyLLaVA-base-NanoC-Nano"])
@pytest.mark.parametrize("policy", ["warp", "crop", "pad"])
def test_equals_the_processor(policy: str, variant: str, side: int) -> None:
    """>= 99.9 % of values within one level of 255, >= 98 % equal; the wrong order of passes gives 70 %."""
    spec = dataclasses.replace(model_spec(variant), image_policy=policy, image_size=side, pad_color=(122, 116, 104))
    processor = checkpoint.image_processor(spec)
    pictures = [noise(*size) for size in SIZES]
    std = np.array(spec.image_std).reshape(1, 3, 1, 1)
    for picture, got in zip(pictures, run(spec, pictures), strict=True):
        fed = image.pad_to_square(picture, spec.pad_color) if policy == "pad" else picture
        wanted = processor(images=fed, input_data_format="channels_last", return_tensors="np")["pixel_values"]
        assert got.dtype == np.float32 and got.shape == (1, 3, side, side), picture.shape
        levels = np.abs(got - wanted) * std * 255
        assert (levels < 1.01).mean() >= 0.999, picture.shape
        assert (levels < 0.01).mean() >= 0.98, picture.shape


def hf_processor(policy: str, filter_: str, side: int, resize: int) -> Any:
    """The Hugging Face class whose behaviour a policy is: SigLIP's, or CLIP's with DINOv2's sizes."""
    from transformers import BitImageProcessorPil, SiglipImageProcessorPil

    numbers = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "resample": {"bicubic": 3}.get(filter_, 2)}
    if policy == "crop":
        crop = {"height": side, "width": side}
        return BitImageProcessorPil(size={"shortest_edge": resize or side}, crop_size=crop, **numbers)
    return SiglipImageProcessorPil(size={"height": side, "width": side}, **numbers)


def changed(policy: str, filter_: str = "bicubic", side: int = 64, resize: int = 0) -> ModelSpec:
    return dataclasses.replace(
        model_spec("TinyLLaVA-base-NanoC-Nano"),
        image_policy=policy,
        resample=filter_,
        crop_resize=resize,
        image_size=side,
        image_mean=(0.4, 0.5, 0.6),
        image_std=(0.2, 0.3, 0.25),
    )


@pytest.mark.parametrize(
    ("policy", "filter_", "side", "resize"),
    [
        ("crop", "bicubic", 64, 73),  # DINOv2's 224 of 256
        ("crop", "bicubic", 63, 64),
        ("warp", "bilinear", 64, 0),  # SigLIP 2's processors
        ("warp", "bilinear", 63, 0),
        ("crop", "bilinear", 64, 0),
        ("pad", "bilinear", 64, 0),
    ],
)
def test_other_sizes_and_filters(policy: str, filter_: str, side: int, resize: int) -> None:
    """>= 99.9 % of values within one level of 255 on noise, >= 95 % equal."""
    spec, processor = changed(policy, filter_, side, resize), hf_processor(policy, filter_, side, resize)
    pictures = [noise(*size) for size in SIZES]
    std = np.array(spec.image_std).reshape(1, 3, 1, 1)
    for picture, got in zip(pictures, run(spec, pictures), strict=True):
        fed = image.pad_to_square(picture, spec.pad_color) if policy == "pad" else picture
        wanted = processor(images=fed, input_data_format="channels_last", return_tensors="np")["pixel_values"]
        levels = np.abs(got - wanted) * std * 255
        assert (levels < 1.01).mean() >= 0.999, picture.shape
        assert (levels < 0.01).mean() >= 0.95, picture.shape


def drawn(mode: str, size: tuple[int, int] = (91, 47)) -> Image.Image:
    """Gradients and noise in a mode of Pillow's; alpha runs from 0 to 255."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    planes = [x * 2, y * 5, 255 - x, rng.integers(0, 256, x.shape)]
    array = np.stack(planes, axis=-1).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray((array[..., 3].astype(np.uint16) << 8) + array[..., 0])
    if mode in ("RGBA", "CMYK"):
        return Image.fromarray(array, mode)
    return Image.fromarray(array[..., :3]).convert(mode)


FILES = {
    "grey": ("L", "PNG", {}),
    "grey-jpeg": ("L", "JPEG", {}),
    "black-and-white": ("1", "PNG", {}),
    "palette": ("P", "PNG", {}),
    "palette-gif": ("P", "GIF", {}),
    "transparent-palette": ("P", "PNG", {"transparency": 3}),
    "grey-alpha": ("LA", "PNG", {}),
    "rgba": ("RGBA", "PNG", {}),
    "rgba-webp": ("RGBA", "WEBP", {"lossless": True}),
    "cmyk": ("CMYK", "JPEG", {}),
    "cmyk-tiff": ("CMYK", "TIFF", {}),
    "16-bit": ("I;16", "PNG", {}),
    "one-pixel": ("RGB", "PNG", {}),
    **{f"exif-{n}": ("RGB", "JPEG", {"orientation": n}) for n in range(1, 9)},
}


def encode(name: str) -> bytes:
    mode, kind, options = FILES[name]
    picture = drawn(mode, (1, 1) if name == "one-pixel" else (91, 47))
    kept = {key: value for key, value in options.items() if key != "orientation"}
    if "orientation" in options:
        kept["exif"] = Image.Exif()
        kept["exif"][0x0112] = options["orientation"]
    buffer = io.BytesIO()
    picture.save(buffer, kind, **kept)
    return buffer.getvalue()


@pytest.mark.parametrize("policy", ["warp", "crop", "pad"])
@pytest.mark.parametrize("name", FILES)
def test_files(name: str, policy: str) -> None:
    """Whole road of a file: load_image and the graph against the processor on the upright RGB picture.

    >= 99.9 % of values within one level. The processor's own RGB conversion of the file agrees too, but for two kinds:
    Pillow clips 16-bit grey to white, load_image keeps its top byte; and transformers 5 lays transparent pictures on
    white, load_image drops alpha as convert("RGB") does, because the models were trained on pictures read so.
    """
    from PIL import ImageOps

    data, spec, processor = encode(name), changed(policy), hf_processor(policy, "bicubic", 64, 0)
    rgb = image.load_image(data)
    (got,) = run(spec, [rgb])
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    converted = np.asarray(upright.convert("RGB"))
    if name == "16-bit":
        assert len(np.unique(rgb)) > 100
        converted = rgb
    std = np.array(spec.image_std).reshape(1, 3, 1, 1)
    references = [rgb, converted]
    if policy != "pad" and name not in ("16-bit", "rgba", "rgba-webp", "transparent-palette"):
        references.append(upright)  # converted by the processor: do_convert_rgb
    for reference in references:
        fed = reference
        if policy == "pad":
            fed = image.pad_to_square(reference, spec.pad_color)
        kind = {"input_data_format": "channels_last"} if isinstance(fed, np.ndarray) else {"do_convert_rgb": True}
        wanted = processor(images=fed, return_tensors="np", **kind)["pixel_values"]
        levels = np.abs(got - wanted) * std * 255
        assert (levels < 1.01).mean() >= 0.999


def test_transparency_is_dropped() -> None:
    """As convert("RGB") does; the processor of transformers 5, given the file itself, would show white instead."""
    buffer = io.BytesIO()
    Image.new("RGBA", (64, 64), (200, 30, 90, 0)).save(buffer, "PNG")
    spec, processor = changed("warp"), hf_processor("warp", "bicubic", 64, 0)
    (got,) = run(spec, [image.load_image(buffer.getvalue())])
    levels = (got * np.array(spec.image_std).reshape(3, 1, 1) + np.array(spec.image_mean).reshape(3, 1, 1)) * 255
    np.testing.assert_allclose(levels[0, :, 5, 5], [200, 30, 90], atol=1e-3)
    white = processor(images=Image.open(buffer), return_tensors="np")["pixel_values"]
    assert float(np.abs(white - got).max()) > 1


def test_saturates_like_bytes() -> None:
    """Bicubic overshoots at hard edges; each pass clamps to 0..255, so nothing leaves the normalised range."""
    spec = model_spec("TinyLLaVA-base-NanoSig-Nano")
    edge = np.zeros((40, 24, 3), dtype=np.uint8)
    edge[:, 12:] = 255
    edge[20:, :] = 255 - edge[20:, :]
    (pixels,) = run(spec, [edge])
    assert pixels.min() == -1.0 and pixels.max() == 1.0


def test_constant_picture_stays_constant() -> None:
    """A flat colour comes out as exactly (c / 255 - mean) / std, whatever the shape."""
    spec = model_spec("TinyLLaVA-base-NanoC-Nano")
    color = np.array([10, 128, 250], dtype=np.uint8)
    wanted = (color / 255 - np.array(spec.image_mean)) / np.array(spec.image_std)
    for pixels in run(spec, [np.broadcast_to(color, (*size, 3)).copy() for size in [(7, 91), (130, 50)]]):
        np.testing.assert_allclose(pixels[0], np.broadcast_to(wanted.reshape(3, 1, 1), (3, 64, 64)), atol=2e-6)


def test_file_and_unknown_policy(tmp_path: Path) -> None:
    spec = model_spec("TinyLLaVA-base-NanoSig-Nano")
    assert preprocess.write_preprocess(spec, tmp_path / "preprocess.onnx")["float"] == 3
    session = ort.InferenceSession(tmp_path / "preprocess.onnx")
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [("image", "tensor(uint8)", [1, "H", "W", 3])]
    assert [(o.name, o.type, o.shape) for o in session.get_outputs()] == [
        ("pixel_values", "tensor(float)", [1, 3, 64, 64])
    ]
    for change in ({"image_policy": "stretch"}, {"resample": "lanczos"}):
        with pytest.raises(ExportError, match="stretch|lanczos"):
            preprocess.preprocess_graph(dataclasses.replace(spec, **change))
