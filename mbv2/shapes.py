"""A small picture set drawn from a seed: twelve shapes in varied size, colour, pose, background and noise.

It stands in for a data set that would have to be downloaded: real JPEG files in the usual `train/` + `val/`
folders, easy enough to learn in a minute or two, and not so easy that a colour or a mean tells the class.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mbv2.errors import UserError

Rng = np.random.Generator
Colour = tuple[int, int, int]

# Shapes are drawn as 8-bit masks on a canvas of this side, then turned, scaled and pasted smaller.
_CANVAS = 256
# Degrees a shape is turned by, at most, to either side.
_TILT = 25


@dataclass(frozen=True)
class ShapesSpec:
    """What is drawn: pictures per class and split, side lengths in pixels (inclusive), and the seed."""

    train_per_class: int = 80
    val_per_class: int = 20
    min_side: int = 96
    max_side: int = 144
    seed: int = 0


def _polygon(points: list[tuple[float, float]]) -> Image.Image:
    mask, draw = _blank()
    half = _CANVAS / 2
    draw.polygon([(half + x * half, half + y * half) for x, y in points], fill=255)
    return mask


def _blank() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    mask = Image.new("L", (_CANVAS, _CANVAS), 0)
    return mask, ImageDraw.Draw(mask)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: int) -> None:
    """Draw a disc; `x`, `y`, `radius` in half canvas sides, the centre being 0, 0."""
    half = _CANVAS / 2
    left, top, size = half + (x - radius) * half, half + (y - radius) * half, 2 * radius * half
    draw.ellipse((left, top, left + size, top + size), fill=fill)


def _circle(rng: Rng) -> Image.Image:
    mask, draw = _blank()
    _disc(draw, 0, 0, rng.uniform(0.75, 0.95), 255)
    return mask


def _ring(rng: Rng) -> Image.Image:
    mask, draw = _blank()
    _disc(draw, 0, 0, 0.95, 255)
    _disc(draw, 0, 0, rng.uniform(0.5, 0.7), 0)
    return mask


def _crescent(rng: Rng) -> Image.Image:
    mask, draw = _blank()
    _disc(draw, 0, 0, 0.95, 255)
    _disc(draw, rng.uniform(0.4, 0.55), 0, rng.uniform(0.72, 0.8), 0)
    return mask


def _square(rng: Rng) -> Image.Image:
    half = rng.uniform(0.6, 0.7)
    return _polygon([(-half, -half), (half, -half), (half, half), (-half, half)])


def _triangle(rng: Rng) -> Image.Image:
    apex = rng.uniform(-0.25, 0.25)
    return _polygon([(apex, -0.85), (0.85, 0.7), (-0.85, 0.7)])


def _star(rng: Rng) -> Image.Image:
    inner = rng.uniform(0.36, 0.46)
    radii = [0.95 if i % 2 == 0 else inner for i in range(10)]
    return _polygon([(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)])


def _cross(rng: Rng) -> Image.Image:
    arm, reach = rng.uniform(0.2, 0.3), 0.9
    a, r = arm, reach
    right = [(a, -r), (a, -a), (r, -a), (r, a), (a, a), (a, r)]
    return _polygon(right + [(-x, -y) for x, y in right])


def _arrow(rng: Rng) -> Image.Image:
    shaft, head = rng.uniform(0.12, 0.2), rng.uniform(-0.05, 0.25)
    above = [(-0.95, -shaft), (head, -shaft), (head, -0.6), (0.95, 0)]
    return _polygon(above + [(x, -y) for x, y in reversed(above[:-1])])


def _heart(rng: Rng) -> Image.Image:
    stretch = rng.uniform(0.85, 1.0)
    points = []
    for step in range(90):
        t = step * 2 * math.pi / 90
        x = math.sin(t) ** 3
        y = (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17
        points.append((0.95 * x * stretch, -0.9 * y - 0.1))
    return _polygon(points)


def _spiral(rng: Rng) -> Image.Image:
    mask, draw = _blank()
    turns, width = rng.uniform(2.2, 2.8), rng.uniform(0.09, 0.12)
    for step in range(320):
        angle = step / 320 * turns * 2 * math.pi
        radius = 0.85 * step / 320
        _disc(draw, radius * math.cos(angle), radius * math.sin(angle), width, 255)
    return mask


def _stripes(rng: Rng) -> Image.Image:
    mask, draw = _blank()
    bars = int(rng.integers(3, 6))
    pitch = 0.84 * _CANVAS / (2 * bars - 1)
    for bar in range(bars):
        left = 0.08 * _CANVAS + 2 * bar * pitch
        draw.rectangle((left, 0.1 * _CANVAS, left + pitch, 0.9 * _CANVAS), fill=255)
    return mask


def _checkerboard(rng: Rng) -> Image.Image:
    mask, draw = _blank()
    cells = int(rng.integers(4, 7))
    pitch = 0.8 * _CANVAS / cells
    for row in range(cells):
        for column in range(row % 2, cells, 2):
            left, top = 0.1 * _CANVAS + column * pitch, 0.1 * _CANVAS + row * pitch
            draw.rectangle((left, top, left + pitch, top + pitch), fill=255)
    return mask


_MASKS: dict[str, Callable[[Rng], Image.Image]] = {
    "arrow": _arrow,
    "checkerboard": _checkerboard,
    "circle": _circle,
    "crescent": _crescent,
    "cross": _cross,
    "heart": _heart,
    "ring": _ring,
    "spiral": _spiral,
    "square": _square,
    "star": _star,
    "stripes": _stripes,
    "triangle": _triangle,
}

CLASS_NAMES: tuple[str, ...] = tuple(sorted(_MASKS))
"""The classes in the order of their labels (as an alphabetical folder listing gives them)."""


def draw_shape(class_name: str, side: int, rng: Rng) -> Image.Image:
    """Draw one RGB picture of `side` x `side` pixels showing `class_name`; `rng` decides everything else.

    Raises:
        UserError: `class_name` is none of `CLASS_NAMES`.
    """
    if class_name not in _MASKS:
        raise UserError(f"no shape is called {class_name!r}; choose from {', '.join(CLASS_NAMES)}")
    picture = _background(side, rng)
    ground = np.asarray(picture, np.float32).mean((0, 1))
    _add_clutter(picture, ground, rng)
    _paste_shape(picture, _MASKS[class_name](rng), ground, rng)
    return _spoil(picture, rng)


def draw_shapes(root: Path, spec: ShapesSpec | None = None) -> Path:
    """Draw the whole set as `root/train/<class>/*.jpg` and `root/val/<class>/*.jpg`, and return `root`.

    The same spec gives the same files byte for byte (with the same versions of Pillow and NumPy): every
    picture has its own random stream, so the two splits never share one. Existing files are replaced.
    """
    spec = spec or ShapesSpec()
    for split_number, (split, count) in enumerate((("train", spec.train_per_class), ("val", spec.val_per_class))):
        for label, class_name in enumerate(CLASS_NAMES):
            folder = root / split / class_name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                rng = np.random.default_rng([spec.seed, split_number, label, number])
                side = int(rng.integers(spec.min_side, spec.max_side + 1))
                picture = draw_shape(class_name, side, rng)
                encoded = io.BytesIO()
                picture.save(encoded, "JPEG", quality=int(rng.integers(60, 96)))
                # Not write_atomic: waiting for the disk a thousand times would take longer than drawing.
                (folder / f"{class_name}-{number:03d}.jpg").write_bytes(encoded.getvalue())
    return root


def _background(side: int, rng: Rng) -> Image.Image:
    """Draw a colour gradient in a random direction, with a smooth texture of random grain over it."""
    start, end = rng.uniform(10, 130, (2, 3))
    end = start + (end - start) * rng.uniform(0.1, 0.6)
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, side)
    along = (axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)) / math.sqrt(2) + 0.5
    pixels = start + (end - start) * along[..., None]
    grain = int(rng.integers(3, 25))
    texture = Image.fromarray(rng.integers(0, 256, (grain, grain), dtype=np.uint8))
    texture = texture.resize((side, side), Image.Resampling.BICUBIC)
    pixels = pixels + (np.asarray(texture, np.float64)[..., None] / 255 - 0.5) * rng.uniform(0, 40)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _contrasting(ground: np.ndarray, rng: Rng, lift: float) -> Colour:
    """Pick a colour brighter than `ground` [3] by at least `lift` (0 to 255, mean of the channels)."""
    while True:
        colour = rng.integers(0, 256, 3)
        if float((colour - ground).mean()) >= lift:
            return int(colour[0]), int(colour[1]), int(colour[2])


def _add_clutter(picture: Image.Image, ground: np.ndarray, rng: Rng) -> None:
    """Draw a few thin lines and dots behind the shape, so that edges alone do not give it away."""
    draw, side = ImageDraw.Draw(picture), picture.width
    for _ in range(int(rng.integers(0, 4))):
        x0, y0, x1, y1 = rng.uniform(0, side, 4)
        draw.line((x0, y0, x1, y1), fill=_contrasting(ground, rng, 20), width=1)
    for _ in range(int(rng.integers(0, 6))):
        x, y = rng.uniform(0, side, 2)
        radius = rng.uniform(1, 2.5)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_contrasting(ground, rng, 20))


def _paste_shape(picture: Image.Image, mask: Image.Image, ground: np.ndarray, rng: Rng) -> None:
    """Turn, squeeze, scale and place the shape, in one colour or a gradient, with an occluder now and then."""
    side = picture.width
    size = int(side * rng.uniform(0.6, 0.9))
    squeeze = rng.uniform(0.8, 1.0)
    mask = mask.resize((_CANVAS, round(_CANVAS * squeeze)), Image.Resampling.BILINEAR)
    mask = mask.rotate(rng.uniform(-_TILT, _TILT), Image.Resampling.BICUBIC, expand=True)
    mask = mask.crop(mask.getbbox())
    scale = size / max(mask.size)
    mask = mask.resize(
        (max(1, round(mask.width * scale)), max(1, round(mask.height * scale))), Image.Resampling.LANCZOS
    )
    if rng.random() < 0.2:
        _occlude(mask, rng)
    first = np.array(_contrasting(ground, rng, 70), np.float32)
    second = first + (np.array(_contrasting(ground, rng, 70), np.float32) - first) * rng.uniform(0, 0.35)
    ramp = np.linspace(0, 1, mask.width, dtype=np.float32)[None, :, None]
    fill = np.broadcast_to(first + (second - first) * ramp, (mask.height, mask.width, 3))
    corner = (int(rng.integers(0, side - mask.width + 1)), int(rng.integers(0, side - mask.height + 1)))
    picture.paste(Image.fromarray(fill.clip(0, 255).astype(np.uint8)), corner, mask)


def _occlude(mask: Image.Image, rng: Rng) -> None:
    """Cut a bar, about a fourteenth of the shape's size, across the mask: the background shows through."""
    draw = ImageDraw.Draw(mask)
    half = 0.035 * max(mask.size)
    if rng.random() < 0.5:
        x = rng.uniform(0.2, 0.8) * mask.width
        draw.rectangle((x - half, 0, x + half, mask.height), fill=0)
    else:
        y = rng.uniform(0.2, 0.8) * mask.height
        draw.rectangle((0, y - half, mask.width, y + half), fill=0)


def _spoil(picture: Image.Image, rng: Rng) -> Image.Image:
    """Blur some pictures a little and add sensor noise and a change of brightness to all."""
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.0))))
    pixels = np.asarray(picture, np.float32)
    pixels = pixels * rng.uniform(0.8, 1.15) + rng.normal(0, rng.uniform(1, 10), pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
