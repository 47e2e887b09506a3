"""Decoding: every kind of picture people have, and every kind of broken one."""

import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mbv2.data.decode import CorruptImage, decode, jpeg_has_end

HEIGHT, WIDTH = 40, 56


def pixels(seed: int = 0) -> np.ndarray:
    """A smooth coloured picture; uint8 [40, 56, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


RGB = Image.fromarray(pixels())
JPEG = encoded(RGB, "JPEG", quality=95)


def with_thumbnail() -> bytes:
    """A JPEG that carries a whole smaller one in its header, as cameras write them."""
    thumbnail = encoded(RGB.resize((16, 12)), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2 + 6) + b"Exif\0\0" + thumbnail
    return JPEG[:2] + segment + JPEG[2:]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims this size and has next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose header claims this size."""
    at = JPEG.index(b"\xff\xc0")
    return JPEG[: at + 5] + struct.pack(">HH", height, width) + JPEG[at + 9 :]


def expected_gray() -> np.ndarray:
    return np.repeat(np.asarray(RGB.convert("L"))[:, :, None], 3, axis=2)


def transparent_palette() -> bytes:
    return encoded(RGB.convert("P"), "PNG", transparency=bytes(range(256)))


LOSSLESS = {
    "png": (encoded(RGB, "PNG"), pixels()),
    "alpha png": (encoded(Image.merge("RGBA", [*RGB.split(), RGB.split()[0]]), "PNG"), pixels()),
    "palette png": (encoded(RGB.convert("P"), "PNG"), np.asarray(RGB.convert("P").convert("RGB"))),
    "transparent palette png": (transparent_palette(), np.asarray(RGB.convert("P").convert("RGB"))),
    "gray png": (encoded(RGB.convert("L"), "PNG"), expected_gray()),
    "one-bit png": (
        encoded(RGB.convert("1"), "PNG"),
        np.repeat(np.asarray(RGB.convert("1"))[:, :, None] * np.uint8(255), 3, axis=2),
    ),
    "16-bit png": (
        encoded(Image.fromarray(np.asarray(RGB.convert("L")).astype(np.uint16) * 257), "PNG"),
        expected_gray(),
    ),
    "bmp": (encoded(RGB, "BMP"), pixels()),
    "ppm": (encoded(RGB, "PPM"), pixels()),
    "tiff": (encoded(RGB, "TIFF"), pixels()),
    "lossless webp": (encoded(RGB, "WEBP", lossless=True), pixels()),
    "animated gif": (
        encoded(RGB.convert("P"), "GIF", save_all=True, append_images=[Image.fromarray(pixels(1)).convert("P")]),
        np.asarray(RGB.convert("P").convert("RGB")),
    ),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_pictures_keep_their_pixels(kind: str) -> None:
    data, expected = LOSSLESS[kind]
    image = decode(data, "x")
    assert image.dtype == torch.uint8
    assert image.shape == (3, HEIGHT, WIDTH)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


LOSSY = {
    "jpeg": JPEG,
    "progressive jpeg": encoded(RGB, "JPEG", quality=95, progressive=True),
    "cmyk jpeg": encoded(RGB.convert("CMYK"), "JPEG", quality=95),
    "jpeg with a tail": JPEG + b"\0" * 70_000,
    "jpeg with a thumbnail": with_thumbnail(),
    "webp": encoded(RGB, "WEBP", quality=95),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_pictures_come_close_to_their_pixels(kind: str) -> None:
    image = decode(LOSSY[kind], "x").permute(1, 2, 0).numpy()
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(image.astype(int) - pixels().astype(int)).mean() < 4


def test_gray_jpeg_has_three_equal_channels() -> None:
    image = decode(encoded(RGB.convert("L"), "JPEG", quality=95), "x")
    assert image.shape == (3, HEIGHT, WIDTH)
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])


def test_orientation_in_exif_is_left_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert torch.equal(decode(encoded(RGB, "JPEG", quality=95, exif=exif), "x"), decode(JPEG, "x"))


BROKEN = {
    "zero-byte": (b"", "empty"),
    "text": (b"<html>404 not found</html>", "not a picture"),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "jpeg without its last byte": (JPEG[:-1], "truncated"),
    "truncated jpeg with a whole thumbnail": (with_thumbnail()[:-200], "truncated"),
    "jpeg header alone": (JPEG[:100], "x"),
    "jpeg without a scan": (JPEG[: JPEG.index(b"\xff\xda")] + b"\xff\xd9", "truncated"),
    "truncated cmyk jpeg": (encoded(RGB.convert("CMYK"), "JPEG")[:900], "broken"),
    "truncated png": (LOSSLESS["png"][0][:900], "broken"),
    "truncated gif": (LOSSLESS["animated gif"][0][:900], "x"),
    "huge png": (png_header(60_000, 60_000), "pixels"),
    "huge jpeg": (jpeg_of_size(65_000, 65_000), "pixels"),
    "big png without data": (png_header(10_000, 10_000), "broken"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures_are_refused_by_name(kind: str) -> None:
    data, why = BROKEN[kind]
    with pytest.raises(CorruptImage, match="^dir/x.jpg: ") as caught:
        decode(data, "dir/x.jpg")
    assert why in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["jpeg", "cmyk jpeg", "png", "animated gif", "bmp", "webp", "tiff"]),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    keep=st.floats(0.02, 1),
)
def test_damaged_bytes_give_a_picture_or_a_refusal(kind: str, changes: list, keep: float) -> None:
    data = bytearray(LOSSY[kind] if kind in LOSSY else LOSSLESS[kind][0])
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    try:
        image = decode(bytes(data[: max(1, int(keep * len(data)))]), "x")
    except CorruptImage as error:
        assert str(error).startswith("x: ")
    else:
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3


def test_the_end_marker_of_a_thumbnail_does_not_count() -> None:
    whole = with_thumbnail()
    assert jpeg_has_end(whole)
    assert whole.count(b"\xff\xd9") == 2
    assert not any(jpeg_has_end(whole[:cut]) for cut in range(len(whole) - 1))


def test_threads_leave_the_warning_filters_as_they_were() -> None:
    before = list(warnings.filters)
    threads = [
        threading.Thread(target=lambda: [decode(data, "x") for _ in range(60) for data in (JPEG, LOSSLESS["png"][0])])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
