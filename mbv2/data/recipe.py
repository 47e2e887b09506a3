"""What is done to a picture, independent of which loader does it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mbv2.errors import UserError

Window = tuple[int, int, int, int]
INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Recipe:
    """Crop, flip and normalisation; with antialias everywhere, bilinear but for evaluation's `interpolation`.

    Attributes:
        resolution: side of the network's square input, in pixels.
        mean, std: per channel (RGB), on values scaled to 0..1.
        area, ratio: training crop: share of the picture's area, and width over height (Inception's crop).
        flip: probability of a horizontal flip in training.
        resize: evaluation: shorter side before the centre crop; None is 256/224 of the resolution.
        squeeze: evaluation: the whole picture squeezed into the square, whatever its shape, and nothing cropped; with
            `resize` into a square of that side, and its centre taken.
        interpolation: evaluation: "bilinear" or "bicubic".
        trivial_augment: TrivialAugmentWide on training pictures (arXiv 2103.10158).
        random_erasing: probability of erasing a rectangle of a training picture (arXiv 1708.04896).
    """

    resolution: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    resize: int | None = None
    squeeze: bool = False
    interpolation: str = "bilinear"
    trivial_augment: bool = False
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        if self.resolution < 32:
            raise UserError(f"--resize {self.resolution}: the network halves the picture five times; use 32 or more")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise UserError(f"crop area {self.area}: both ends must lie in (0, 1], the smaller first")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"crop aspect ratio {self.ratio}: both ends must be positive, the smaller first")
        for name, value in (("flip", self.flip), ("random_erasing", self.random_erasing)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} {value}: a probability lies between 0 and 1")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(f"interpolation {self.interpolation!r}: choose {' or '.join(INTERPOLATIONS)}")
        if min(self.std) <= 0:
            raise UserError(f"std {self.std}: must be positive")
        if self.resize is not None and self.resize < self.resolution:
            raise UserError(f"evaluation resize {self.resize} is smaller than the resolution {self.resolution}")

    @property
    def eval_resize(self) -> int:
        """Shorter side before the evaluation's centre crop, in pixels."""
        return self.resize if self.resize is not None else round(self.resolution * 256 / 224)


def eval_options(meta: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """What weights' metadata say of evaluation, as arguments of `Recipe`.

    Args:
        meta: squeeze; crop_pct, the side of the crop as a share of the resized picture's shorter side, as timm has it;
            interpolation. What is not there is as usual.
        resolution: side of the network's input in pixels.

    Raises:
        UserError: a crop_pct that is no share.
    """
    share = meta.get("crop_pct")
    if share is not None and not (isinstance(share, int | float) and 0 < share <= 1):
        raise UserError(f"crop_pct {share!r}: a share lies above 0 and is at most 1")
    return {
        "squeeze": bool(meta.get("squeeze", False)),
        # A little more, so that 224 / (224 / 256) is 256.
        "resize": None if share is None else math.floor(resolution / share + 1e-6),
        "interpolation": str(meta.get("interpolation", "bilinear")),
    }


def eval_geometry(height: int, width: int, recipe: Recipe) -> tuple[tuple[int, int], tuple[int, int]]:
    """((resized height, width), (top, left)) of the evaluation's resize and centre crop, as torchvision rounds."""
    if recipe.squeeze:
        side = recipe.resize or recipe.resolution
        origin = round((side - recipe.resolution) / 2.0)
        return (side, side), (origin, origin)
    short, long = min(height, width), max(height, width)
    resized_long = int(recipe.eval_resize * long / short)
    size = (resized_long, recipe.eval_resize) if height > width else (recipe.eval_resize, resized_long)
    top, left = (round((side - recipe.resolution) / 2.0) for side in size)
    return size, (top, left)


def train_window(height: int, width: int, recipe: Recipe, generator: torch.Generator) -> Window:
    """(top, left, height, width) of a random crop: ten tries at area and ratio, then the largest central one."""
    log_low, log_high = math.log(recipe.ratio[0]), math.log(recipe.ratio[1])
    for _ in range(10):
        draw = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        target = height * width * (recipe.area[0] + draw[0] * (recipe.area[1] - recipe.area[0]))
        ratio = math.exp(log_low + draw[1] * (log_high - log_low))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draw[2] * (height - h + 1)), int(draw[3] * (width - w + 1)), h, w
    if width / height < recipe.ratio[0]:
        w, h = width, min(height, round(width / recipe.ratio[0]))
    elif width / height > recipe.ratio[1]:
        w, h = min(width, round(height * recipe.ratio[1])), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The random numbers of one picture in one epoch: the same whichever process or loader asks."""
    # splitmix64 over the three numbers: neighbouring seeds must not give related streams.
    state = 0
    for value in (seed, epoch, index):
        state = (state + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)
