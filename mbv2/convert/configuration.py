"""What timm's and Hugging Face's JSON files say of a network and its pictures, in our metadata's terms."""

from collections.abc import Mapping
from typing import Any

from mbv2.convert.network import NotThisNetwork

# PIL's numbers, which transformers writes.
_RESAMPLING = {2: "bilinear", 3: "bicubic"}


def of_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """mean, std, resolution, crop_pct, interpolation and squeeze, as far as timm's `config.json` has them.

    timm resizes to floor(resolution / crop_pct) and crops the centre; its crop_mode "squash" is our squeeze, which
    crops as well.
    """
    own = config.get("pretrained_cfg")
    if not isinstance(own, Mapping):
        return {}
    facts: dict[str, Any] = {}
    for key in ("mean", "std"):
        if key in own:
            facts[key] = [float(value) for value in own[key]]
    if "input_size" in own:
        facts["resolution"] = int(own["input_size"][-1])
    if "crop_pct" in own:
        facts["crop_pct"] = float(own["crop_pct"])
    if own.get("interpolation") in ("bilinear", "bicubic"):
        facts["interpolation"] = own["interpolation"]
    facts["squeeze"] = own.get("crop_mode", "center") == "squash"
    return facts


def of_hugging_face(config: Mapping[str, Any] | None, pictures: Mapping[str, Any]) -> dict[str, Any]:
    """Padding, epsilon, resolution, class names and how pictures are given to transformers' network.

    Args:
        config: `config.json`; None where there is none.
        pictures: `preprocessor_config.json`, or empty.

    Raises:
        NotThisNetwork: the configuration changes the network itself, or pictures are resized in a way that evaluation
            here does not know.
    """
    facts: dict[str, Any] = {"preprocessing": "tf", "squeeze": False}
    if config is not None:
        for key, wanted in (("output_stride", 32), ("hidden_act", "relu6"), ("first_layer_is_expansion", True)):
            if config.get(key, wanted) != wanted:
                raise NotThisNetwork(f"config.json has {key} {config[key]!r}; only {wanted!r} is this network")
        facts["padding"] = "same" if config.get("tf_padding", True) else "symmetric"
        facts["bn_eps"] = float(config.get("layer_norm_eps", 1e-3))
        facts["resolution"] = int(config.get("image_size", 224))
        names = config.get("id2label") or {}
        if str(names.get("0", "")).lower() == "background":
            facts["class_offset"] = 1
        ordered = [str(names.get(str(index), "LABEL_")) for index in range(len(names))]
        if ordered and not any(name.startswith("LABEL_") for name in ordered):
            facts["class_names"] = ordered[facts.get("class_offset", 0) :]
    return facts | _pictures(pictures)


def _pictures(config: Mapping[str, Any]) -> dict[str, Any]:
    """Resize by the shorter edge, crop, rescale, normalise, each if done."""
    facts: dict[str, Any] = {}
    if config.get("image_mean") and config.get("image_std"):
        # On values 0..255 times the factor; ours are on values 0..1.
        factor = 255 * float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 255.0
        normalises = config.get("do_normalize", True)
        mean = config["image_mean"] if normalises else [0.0] * 3
        std = config["image_std"] if normalises else [1.0] * 3
        facts["mean"] = [float(value) / factor for value in mean]
        facts["std"] = [float(value) / factor for value in std]
    resample = config.get("resample", 2)
    if resample not in _RESAMPLING:
        raise NotThisNetwork(
            f"preprocessor_config.json has resample {resample!r}; 2 (bilinear) and 3 (bicubic) are known"
        )
    if "resample" in config:
        facts["interpolation"] = _RESAMPLING[resample]
    size, crop = config.get("size"), _side(config.get("crop_size"))
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else size
    if not config.get("do_center_crop", True):
        side = _side(size)
        if side:
            facts |= {"squeeze": True, "resolution": side}
    elif crop:
        facts["resolution"] = crop
        if edge and config.get("do_resize", True):
            facts["crop_pct"] = min(1.0, crop / int(edge))
    return facts


def _side(size: Any) -> int:
    """The side of a square, given as a number or as height and width; 0 for anything else."""
    if isinstance(size, Mapping):
        return int(size["height"]) if size.get("height") and size.get("height") == size.get("width") else 0
    return int(size) if isinstance(size, int) else 0
