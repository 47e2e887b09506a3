"""A trained network as evaluation and inference need it: the network, its class names, and how it takes pictures."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mbv2.data.recipe import Recipe, eval_options
from mbv2.errors import UserError
from mbv2.labels import class_names

if TYPE_CHECKING:
    from mbv2.model import MobileNetV2


@dataclass(frozen=True)
class Trained:
    """What a weights file and the options together say.

    Attributes:
        model: loaded, in evaluation mode, on the CPU.
        class_names: of the real classes, by label.
        names_are_own: whether the weights file carried them.
        recipe: resolution and normalisation.
        source: the file or address of the weights.
        meta: what the weights file says, completed by what was asked for.
    """

    model: "MobileNetV2"
    class_names: list[str]
    names_are_own: bool
    recipe: Recipe
    source: str
    meta: dict[str, Any] = field(default_factory=dict)


def load_trained(
    pretrained: str,
    alpha: float | None = None,
    resize: int | None = None,
    num_classes: int | None = None,
    class_offset: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    described: dict[str, Any] | None = None,
) -> Trained:
    """Load the weights that `--pretrained` names; what is None comes from the file, else from the usual defaults.

    Args:
        pretrained: a path, or "True" for torchvision's published weights.
        alpha: width multiplier.
        resize: resolution of the network's input in pixels.
        num_classes: all logits.
        class_offset: see `MobileNetV2`.
        mean, std: of the normalisation, per channel on 0..1.
        described: class_offset as a YAML file has it: used only when the weights file does not say.

    Raises:
        UserError: no weights given, or they do not fit what was asked for.
    """
    from mbv2 import weights as files
    from mbv2.zoo import variant_name

    if pretrained.lower() in ("", "false", "none"):
        raise UserError("--pretrained is needed: the path of a weights file, or True for the published ones")
    if pretrained.lower() == "true":
        weights = files.published(variant_name(alpha or 1.0, resize or 224))
    else:
        weights = files.read_weights(pretrained)
    if class_offset is None and "class_offset" not in weights.meta:
        class_offset = (described or {}).get("class_offset")
    model, meta = files.model_from_weights(weights, alpha, num_classes, class_offset)
    names, own = class_names(meta, model.num_real_classes)
    resolution = resize or int(meta.get("resolution") or 224)
    recipe = Recipe(
        resolution=resolution,
        mean=_three(mean or meta.get("mean"), Recipe.mean, "--mean"),
        std=_three(std or meta.get("std"), Recipe.std, "--std"),
        **eval_options(meta, resolution),
    )
    return Trained(model.eval(), names, own, recipe, weights.source, meta)


def _three(values: Any, default: tuple[float, float, float], option: str) -> tuple[float, float, float]:
    if values is None:
        return default
    if len(values) != 3:
        raise UserError(f"{option} {values}: give three numbers, for red, green and blue")
    return tuple(float(value) for value in values)  # type: ignore[return-value]
