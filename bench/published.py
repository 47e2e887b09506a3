"""Accuracies that others published for networks of exactly our variants' width and resolution; none is ours."""

from collections.abc import Iterator
from typing import NamedTuple

from mbv2.zoo import VARIANTS

# Percent on ImageNet's validation set. torchvision: the meta data of MobileNet_V2_Weights; timm: results-imagenet.csv
# of August 2026. Their other MobileNetV2 networks are deeper (110d, 120d), which no variant here is.
_OTHERS = (
    ("mobilenet_v2_1.0_224", "torchvision", "IMAGENET1K_V1", 71.878, 90.286),
    ("mobilenet_v2_1.0_224", "torchvision", "IMAGENET1K_V2", 72.154, 90.822),
    ("mobilenet_v2_1.4_224", "timm", "mobilenetv2_140.ra_in1k", 76.53, 93.01),
    ("mobilenet_v2_1.0_224", "timm", "mobilenetv2_100.ra_in1k", 72.91, 91.00),
    ("mobilenet_v2_0.5_224", "timm", "mobilenetv2_050.lamb_in1k", 65.93, 86.11),
)


class Figure(NamedTuple):
    """One published accuracy, in percent; `weights` is their name where a source has several."""

    model: str
    source: str
    weights: str
    top1: float
    top5: float


def figures() -> Iterator[Figure]:
    """MindSpore's and TensorFlow's for all variants, then torchvision's and timm's."""
    for variant in VARIANTS.values():
        yield Figure(variant.name, "MindSpore", "", variant.mindspore_top1, variant.mindspore_top5)
        yield Figure(variant.name, "TensorFlow", "", variant.tf_top1, variant.tf_top5)
    for row in _OTHERS:
        yield Figure(*row)
