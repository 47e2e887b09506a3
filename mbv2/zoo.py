"""The 22 published variants by name, and building one with or without weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mbv2.errors import UserError

if TYPE_CHECKING:
    from mbv2.model import MobileNetV2

# alpha, resolution, then published ImageNet accuracy in percent: MindSpore top-1, top-5, TensorFlow top-1, top-5.
# They are those projects' figures, from the MindSpore Vision model card; none was measured by us.
_PUBLISHED = (
    (1.4, 224, 75.43, 92.5, 75.0, 92.5),
    (1.3, 224, 74.7, 92.3, 74.4, 92.1),
    (1.0, 224, 72.4, 90.8, 71.8, 91.0),
    (1.0, 192, 71.3, 90.2, 70.7, 90.1),
    (1.0, 160, 69.7, 89.1, 68.8, 89.0),
    (1.0, 128, 67.1, 86.9, 65.3, 86.9),
    (1.0, 96, 61.9, 83.6, 60.3, 83.2),
    (0.75, 224, 70.3, 89.4, 69.8, 89.6),
    (0.75, 192, 69.2, 88.7, 68.7, 88.9),
    (0.75, 160, 67.3, 87.4, 66.4, 87.3),
    (0.75, 128, 64.5, 85.4, 63.2, 85.3),
    (0.75, 96, 59.4, 81.6, 58.8, 81.6),
    (0.5, 224, 66.1, 86.3, 65.4, 86.4),
    (0.5, 192, 64.7, 85.2, 63.9, 85.4),
    (0.5, 160, 61.9, 83.4, 61.0, 83.2),
    (0.5, 128, 58.7, 80.9, 57.7, 80.8),
    (0.5, 96, 52.9, 76.3, 51.2, 75.8),
    (0.35, 224, 61.9, 83.2, 60.3, 82.9),
    (0.35, 192, 59.5, 81.6, 58.2, 81.2),
    (0.35, 160, 57.6, 79.8, 55.7, 79.1),
    (0.35, 128, 52.8, 76.3, 50.8, 75.0),
    (0.35, 96, 47.5, 71.3, 45.5, 70.4),
)


@dataclass(frozen=True)
class Variant:
    """One row of the table: width multiplier, resolution in pixels, and others' published accuracy in percent."""

    name: str
    alpha: float
    resolution: int
    mindspore_top1: float
    mindspore_top5: float
    tf_top1: float
    tf_top5: float


def variant_name(alpha: float, resize: int) -> str:
    """`mobilenet_v2_1.0_224` for alpha 1.0 and 224 pixels."""
    return f"mobilenet_v2_{float(alpha):g}_{resize}" if alpha != int(alpha) else f"mobilenet_v2_{alpha:.1f}_{resize}"


VARIANTS: dict[str, Variant] = {
    variant_name(row[0], row[1]): Variant(variant_name(row[0], row[1]), *row) for row in _PUBLISHED
}


def list_models() -> list[str]:
    """The names of the 22 variants, widest and largest first."""
    return list(VARIANTS)


def create_model(
    name: str,
    pretrained: bool | str | Path = False,
    num_classes: int = 1000,
    class_offset: int = 0,
    dropout: float = 0.2,
) -> "MobileNetV2":
    """Build a variant, e.g. `create_model("mobilenet_v2_1.0_224", pretrained=True)`.

    Args:
        name: one of `list_models()`.
        pretrained: False for fresh weights, a path to a weights file, or True for torchvision's published ones
            (1.0_224 only), downloaded once into torch.hub's cache.
        num_classes: all logits; a pretrained classifier of another size is replaced by a fresh one. Padding and
            BatchNorm's epsilon are those the weights were trained with.
        class_offset: see `MobileNetV2`.
        dropout: probability before the classifier.

    Raises:
        UserError: unknown name, no published weights, or a weights file that does not fit.
    """
    from mbv2 import weights
    from mbv2.model import MobileNetV2

    if name not in VARIANTS:
        raise UserError(f"no model {name!r}; choose one of {', '.join(VARIANTS)}")
    given = None
    if pretrained:
        given = weights.published(name) if pretrained is True else weights.read_weights(pretrained)
    conventions = weights.conventions(given.meta if given else {})
    # A classifier that is fine-tuned for other classes is not in the file.
    fresh = given is None or given.state_dict["classifier.1.weight"].shape[0] != num_classes
    model = MobileNetV2(num_classes, VARIANTS[name].alpha, dropout, class_offset, initialise=fresh, **conventions)
    if given:
        weights.load_into(model, given, fine_tune=True)
    return model
