"""Bytes or a path → an upright RGB picture, with limits that are checked on the header, before any pixel is decoded."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ImageError

MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 50_000_000  # a 50-megapixel phone camera; 150 MB as RGB
MAX_SIDE = 20_000
MAX_ASPECT = 1_000  # beyond it a resize to a square asks for gigabytes of filter weights
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_HINT = "give a PNG, JPEG, WebP, BMP, GIF or TIFF picture"

RgbImage = npt.NDArray[np.uint8]  # (height, width, 3)


def load_image(source: str | Path | bytes, name: str | None = None) -> RgbImage:
    """Read one picture as upright RGB.

    Args:
        source: a path, or the file's bytes.
        name: what messages call it; the path by default.

    Returns:
        uint8, shape (height, width, 3). EXIF rotation applied; alpha dropped as `convert("RGB")` does, because the
        models were trained on pictures read so (transformers 5's processors lay transparent files on white); 16-bit
        grey scaled to 8; the first frame of an animation.

    Raises:
        ImageError: missing, not a picture, truncated, or beyond MAX_FILE_BYTES, MAX_PIXELS, MAX_SIDE, MAX_ASPECT.
    """
    found, data = read_bytes(source)
    name = name or found
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(name, picture.size)
            picture.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)), dtype=np.uint8)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels", "scale the picture down first") from error
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a picture in a known format", _HINT) from error
    except (OSError, ValueError, SyntaxError, KeyError, IndexError, TypeError, OverflowError, EOFError) as error:
        raise ImageError(
            f"{name}: truncated or damaged picture ({error})", "get the file again, or re-save it"
        ) from error


def check_array(image: Any, name: str = "image") -> RgbImage:
    """Check an array that a caller passed as a picture. Raises ImageError unless it is uint8 (height, width, 3)."""
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(f"{name}: {array.dtype} of shape {array.shape}", "pass uint8 RGB of shape (height, width, 3)")
    _check_size(name, (array.shape[1], array.shape[0]))
    return array


def pad_to_square(image: RgbImage, color: tuple[int, int, int]) -> RgbImage:
    """Centre a picture on a square of `color`, as LLaVA's expand2square does: (h, w, 3) → (max, max, 3)."""
    height, width, _ = image.shape
    side = max(height, width)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = color
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def read_bytes(source: str | Path | bytes) -> tuple[str, bytes]:
    """A picture file's name for messages and its bytes. Raises ImageError: missing, empty, or over MAX_FILE_BYTES."""
    if isinstance(source, bytes):
        name, data = f"image of {len(source)} bytes", source
    else:
        path = Path(source)
        name = str(path)
        if not path.is_file():
            raise ImageError(f"{name}: no such file", "check the path given to --image")
        try:
            size = path.stat().st_size
            data = path.read_bytes() if size <= MAX_FILE_BYTES else b""
        except OSError as error:
            raise ImageError(f"{name}: can't be read ({error.strerror})", "check the file's permissions") from error
        if size > MAX_FILE_BYTES:
            raise ImageError(f"{name}: {size:,} bytes, limit {MAX_FILE_BYTES:,}", "scale the picture down first")
    if not data:
        raise ImageError(f"{name}: empty file", _HINT)
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"{name}: {len(data):,} bytes, limit {MAX_FILE_BYTES:,}", "scale the picture down first")
    return name, data


def _check_size(name: str, size: tuple[int, int]) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: {width} x {height} pixels", _HINT)
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE:
        raise ImageError(
            f"{name}: {width:,} x {height:,} pixels, limit {MAX_PIXELS:,} pixels and {MAX_SIDE:,} a side",
            "scale the picture down first",
        )
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(f"{name}: {width:,} x {height:,} is thinner than 1:{MAX_ASPECT}", "crop the picture first")


def _to_rgb(picture: Any) -> Any:
    """16-bit grey keeps its top byte (Pillow's own convert clips it to white); the rest is convert("RGB")."""
    if picture.mode.startswith("I;16") or picture.mode == "I":
        from PIL import Image

        return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    return picture.convert("RGB")
