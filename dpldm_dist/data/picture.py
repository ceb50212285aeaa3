"""One image of a source: where it is, how it is read, how it becomes a square of the data set.

Shapes: H, W of an image as found, S the side of the data set, C its channels.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from dpldm_dist.errors import DataError

# Read by Pillow itself. Formats that start another program (EPS) or hold programs are left out.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
    ".gif",
    ".pgm",
    ".ppm",
    ".pnm",
    ".tif",
    ".tiff",
    ".webp",
)
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image that a source offers, not yet read.

    name: of its file or place, for messages. read: uint8 (H, W), (H, W, 1) or (H, W, 3), or a
    DataError. unit: who it belongs to; None: it is a unit of its own.
    """

    name: str
    label: str
    read: Callable[[], np.ndarray]
    caption: str | None = None
    unit: str | None = None


def decode_image(payload: bytes, name: str) -> np.ndarray:
    """An encoded image as uint8 (H, W) or (H, W, 3), turned upright as its EXIF tag says.

    Transparent pixels become black, 16-bit values keep their upper 8 bits, an animation gives its
    first frame. Raises: DataError with ``name`` if it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a decompression bomb is a warning first
            with Image.open(io.BytesIO(payload), formats=FORMATS) as image:
                return _eight_bits(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders of damaged images raise anything
        raise DataError(
            f"Image {name} cannot be read ({type(error).__name__}): mend or remove it, or set "
            "data.on_bad_image=skip."
        ) from None


def square_image(
    image: np.ndarray, *, size: int, channels: int, crop: Literal["center", "resize"]
) -> np.ndarray:
    """An image of any shape as uint8 (S, S, C).

    "center": the largest centred square, made smaller if it is larger than ``size``. It is never
    enlarged: an image of at most ``size`` in both directions is kept whole, pixel by pixel, and
    what is missing is filled evenly with its background, the median of its border (28 x 28 digits
    get two black pixels on every side at size 32). "resize": squeezed or stretched to fit.
    Grey becomes colour by repetition, colour becomes grey by luminance (ITU-R 601-2).
    """
    pixels = _with_channels(image, channels)
    height, width = pixels.shape[:2]
    if crop == "resize":
        return _resized(pixels, size)
    if max(height, width) > size:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[top : top + side, left : left + side]
        if side > size:
            return _resized(pixels, size)
    return _padded(pixels, size)


def content_digest(image: np.ndarray) -> bytes:
    """16 bytes that are equal for images of equal shape and pixels (keyless BLAKE2b)."""
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=DIGEST_BYTES)
    digest.update(np.ascontiguousarray(image))
    return digest.digest()


def _eight_bits(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("more than 16 bits per pixel")
        return (values >> 8).astype(np.uint8)
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.asarray(image.convert("RGB"))


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    pixels = image[:, :, None] if image.ndim == 2 else image
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[:, :, None]


def _resized(pixels: np.ndarray, size: int) -> np.ndarray:
    if pixels.shape[:2] == (size, size):
        return pixels
    grey = pixels.shape[2] == 1
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if grey else pixels))
    resized = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
    return resized[:, :, None] if grey else resized


def _padded(pixels: np.ndarray, size: int) -> np.ndarray:
    height, width, channels = pixels.shape
    if (height, width) == (size, size):
        return pixels
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    canvas = np.empty((size, size, channels), dtype=np.uint8)
    canvas[:] = np.median(border, axis=0).astype(np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    return canvas
