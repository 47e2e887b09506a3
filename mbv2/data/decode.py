"""Bytes of a picture file to an RGB tensor, whatever the format, or a clear refusal."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

# PIL's own limit for a decompression bomb, doubled as PIL does before it raises.
_MAX_PIXELS = 178_956_970


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
        if b"\xff\xd9" not in data[-65536:]:
            raise CorruptImage(f"{name}: truncated JPEG (no end marker)")
        try:
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError as error:
            raise CorruptImage(f"{name}: broken JPEG ({str(error).splitlines()[0]})") from error
    return _decode_with_pil(data, name)


def is_plain_jpeg(data: bytes, name: str) -> bool:
    """Whether any JPEG decoder takes these bytes as they are: whole, 8-bit, RGB or gray.

    Raises:
        CorruptImage: as `decode`, without decoding the pixels.
    """
    if not data:
        raise CorruptImage(f"{name}: the file is empty")
    kind, mode, size = _header(data, name)
    if size[0] * size[1] > _MAX_PIXELS:
        raise CorruptImage(f"{name}: {size[0]}x{size[1]} pixels; at most {_MAX_PIXELS} are decoded")
    if kind != "JPEG" or mode not in ("RGB", "L"):
        return False
    if b"\xff\xd9" not in data[-65536:]:
        raise CorruptImage(f"{name}: truncated JPEG (no end marker)")
    return True


def _header(data: bytes, name: str) -> tuple[str, str, tuple[int, int]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                return image.format or "", image.mode, image.size
    except Image.DecompressionBombError as error:
        raise CorruptImage(f"{name}: {error}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise CorruptImage(f"{name}: not a picture that can be read ({error})") from error


def _decode_with_pil(data: bytes, name: str) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                if image.mode.startswith(("I", "F")):
                    values = np.asarray(image, dtype=np.float32)
                    # 16-bit pictures: 65535 is white. PIL's own conversion to RGB would clip at 255.
                    values = values / 257.0 if image.mode.startswith("I") else values
                    gray = np.clip(np.rint(values), 0, 255).astype(np.uint8)
                    array = np.repeat(gray[:, :, None], 3, axis=2)
                else:
                    array = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise CorruptImage(f"{name}: broken picture ({error})") from error
    return torch.from_numpy(array.copy()).permute(2, 0, 1)
