"""Bytes of a picture file to an RGB tensor, whatever the format, or a clear refusal."""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

# PIL's own limit for a decompression bomb, doubled as PIL does before it raises.
_MAX_PIXELS = 178_956_970
_FILTERS = threading.Lock()


class CorruptImage(Exception):
    """A picture that cannot be decoded; the message names the file and says why."""


def decode(data: bytes, name: str) -> Tensor:
    """Decode one picture to uint8 [3, H, W] RGB.

    JPEG goes through libjpeg-turbo; everything else (PNG, GIF, WebP, CMYK, 16-bit, palette, gray, alpha) through
    PIL: the first frame of an animation, alpha dropped, 16 bits scaled to 8. EXIF orientation is not applied, as
    in torchvision.

    Raises:
        CorruptImage: empty, truncated, not a picture, or more than 178 million pixels.
    """
    if not data:
        raise CorruptImage(f"{name}: the file is empty")
    kind, mode, size = _header(data, name)
    if size[0] * size[1] > _MAX_PIXELS:
        raise CorruptImage(f"{name}: {size[0]}x{size[1]} pixels; at most {_MAX_PIXELS} are decoded")
    if kind == "JPEG" and mode in ("RGB", "L"):
        # libjpeg-turbo fills what a truncated file lacks with gray and only warns; the end marker tells.
        if not jpeg_has_end(data):
            raise CorruptImage(f"{name}: truncated JPEG (no end marker)")
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        try:
            with _no_warnings():
                return decode_jpeg(encoded, mode=ImageReadMode.RGB)
        except RuntimeError as error:
            raise CorruptImage(f"{name}: broken JPEG ({str(error).splitlines()[0]})") from error
    return _decode_with_pil(data, name)


def jpeg_has_end(data: bytes) -> bool:
    """Whether the picture's own data ends in the end marker.

    An embedded thumbnail is a whole JPEG with an end marker of its own, but it comes before the first scan.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:
            return data.rfind(b"\xff\xd9", at) >= 0
        # Fill bytes may stand before a marker; all markers before the first scan carry their length.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


@contextmanager
def _no_warnings() -> Iterator[None]:
    # PIL warns of big pictures and odd metadata, neither of them broken, and torchvision from 0.29 on that its decoder
    # will leave for TorchCodec. Python's warning filters belong to the whole process: without the lock, reader threads
    # that leave in another order than they came would change them for good.
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(data: bytes) -> Image.Image:
    with _no_warnings():
        return Image.open(io.BytesIO(data))


def _header(data: bytes, name: str) -> tuple[str, str, tuple[int, int]]:
    try:
        with _open(data) as image:
            return image.format or "", image.mode, image.size
    except Image.DecompressionBombError as error:
        raise CorruptImage(f"{name}: {error}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise CorruptImage(f"{name}: not a picture that can be read ({error})") from error


def _decode_with_pil(data: bytes, name: str) -> Tensor:
    try:
        with _open(data) as image:
            image.load()
            if image.mode.startswith(("I", "F")):
                values = np.asarray(image, dtype=np.float32)
                # 16-bit pictures: 65535 is white. PIL's own conversion to RGB would clip at 255.
                values = values / 257.0 if image.mode.startswith("I") else values
                gray = np.clip(np.rint(values), 0, 255).astype(np.uint8)
                array = np.repeat(gray[:, :, None], 3, axis=2)
            elif image.mode == "P" and "transparency" in image.info:
                # By way of RGBA: straight to RGB, PIL warns.
                array = np.asarray(image.convert("RGBA"))[:, :, :3]
            else:
                array = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise CorruptImage(f"{name}: broken picture ({error})") from error
    return torch.from_numpy(array.copy()).permute(2, 0, 1)
