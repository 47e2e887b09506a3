"""Size and plainness of a JPEG from its header, at a few microseconds a picture."""

import struct

from mbv2.data.decode import jpeg_has_end

# Start-of-frame markers of baseline, extended and progressive Huffman JPEG; the others go through `decode`.
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)
_MAX_PLAIN_PIXELS = 178_956_970


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) when `data` is a whole 8-bit gray or YCbCr JPEG that every decoder reads alike, else None.

    None is no verdict: `mbv2.data.decode.decode` then says whether the picture is good.
    """
    if data[:2] != b"\xff\xd8" or not jpeg_has_end(data):
        return None
    at, end, is_jfif, adobe_transform = 2, len(data) - 9, False, None
    while at < end:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        length = (data[at + 2] << 8) | data[at + 3]
        if marker == 0xE0 and data[at + 4 : at + 8] == b"JFIF":
            is_jfif = True
        elif marker == 0xEE and data[at + 4 : at + 9] == b"Adobe" and at + 15 < end:
            adobe_transform = data[at + 15]
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker not in _PLAIN_FRAMES or at + 19 > end:
                return None
            precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            if precision != 8 or height == 0 or width == 0 or height * width > _MAX_PLAIN_PIXELS:
                return None
            ids = data[at + 10], data[at + 13], data[at + 16]
            # Without a JFIF header the component names or Adobe's flag may say that the three are RGB already.
            is_ycc = is_jfif or adobe_transform == 1 or (adobe_transform is None and ids == (1, 2, 3))
            if components == 1 or (components == 3 and is_ycc):
                return height, width
            return None
        elif length < 2 or marker in (0xD8, 0xD9, 0xDA):
            return None
        at += 2 + length
    return None
