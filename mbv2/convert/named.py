"""Formats that are a dict of tensors by name: torchvision, timm, Hugging Face, TF-slim, Keras."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from mbv2.convert.network import BLOCKS, Network, NotThisNetwork, gather, stage_names, unused

_SAME = {"padding": "same", "bn_eps": 1e-3, "preprocessing": "tf"}
_TORCH = {"padding": "symmetric", "bn_eps": 1e-5, "preprocessing": "torch"}
_TF_NORM = ("gamma", "beta", "moving_mean", "moving_variance")


def torchvision(tensors: Mapping[str, Tensor]) -> Network:
    """`features.0.0.weight` and so on.

    Raises:
        NotThisNetwork: tensors are missing or left over.
    """
    stages = stage_names()
    weights, norms = gather(tensors, stages)
    _reject_rest(tensors, stages, ("classifier.1.weight", "classifier.1.bias"))
    return Network(weights, norms, *_classifier(tensors, "classifier.1"), facts=dict(_TORCH))


def timm(tensors: Mapping[str, Tensor], pictures: Mapping[str, Any] = MappingProxyType({})) -> Network:
    """`conv_stem.weight`, `blocks.1.0.conv_pw.weight` and so on; the deeper 110d and 120d are other networks.

    `pictures` is what `configuration.of_timm` found out.

    Raises:
        NotThisNetwork: tensors are missing or left over.
    """
    stages = [("conv_stem", "bn1"), ("blocks.0.0.conv_dw", "blocks.0.0.bn1"), ("blocks.0.0.conv_pw", "blocks.0.0.bn2")]
    for group, repeats in enumerate((2, 3, 4, 3, 3, 1), start=1):
        for index in range(repeats):
            block = f"blocks.{group}.{index}"
            stages += [
                (f"{block}.{conv}", f"{block}.bn{n}") for n, conv in enumerate(("conv_pw", "conv_dw", "conv_pwl"), 1)
            ]
    stages.append(("conv_head", "bn2"))
    weights, norms = gather(tensors, stages)
    _reject_rest(tensors, stages, ("classifier.weight", "classifier.bias"))
    return Network(weights, norms, *_classifier(tensors, "classifier"), facts={**_TORCH, **pictures})


def hugging_face(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Network:
    """transformers' MobileNetV2ForImageClassification.

    Args:
        tensors: of `model.safetensors` or `pytorch_model.bin`.
        facts: what `configuration.of_hugging_face` found out.

    Raises:
        NotThisNetwork: tensors are missing or left over.
    """
    stem = "mobilenet_v2.conv_stem"
    parts = [f"{stem}.first_conv", f"{stem}.conv_3x3", f"{stem}.reduce_1x1"]
    for layer in range(BLOCKS - 1):
        parts += [f"mobilenet_v2.layer.{layer}.{part}" for part in ("expand_1x1", "conv_3x3", "reduce_1x1")]
    parts.append("mobilenet_v2.conv_1x1")
    stages = [(f"{part}.convolution", f"{part}.normalization") for part in parts]
    weights, norms = gather(tensors, stages)
    _reject_rest(tensors, stages, ("classifier.weight", "classifier.bias"))
    return Network(weights, norms, *_classifier(tensors, "classifier"), facts=dict(facts))


def tf_slim(tensors: Mapping[str, Tensor]) -> Network:
    """TF-slim's variables (`MobilenetV2/expanded_conv_1/expand/weights`); their moving averages where kept.

    Raises:
        NotThisNetwork: tensors are missing.
    """
    blocks = ["expanded_conv", *(f"expanded_conv_{n}" for n in range(1, BLOCKS))]
    parts = ["Conv"]
    for block in blocks:
        parts += [
            f"{block}/{part}" for part in ("expand", "depthwise", "project") if (block, part) != (blocks[0], "expand")
        ]
    parts.append("Conv_1")
    average = "/ExponentialMovingAverage"
    best = {name: tensors.get(name + average, value) for name, value in tensors.items() if not name.endswith(average)}
    renamed: dict[str, Tensor] = {}
    for part in parts:
        kernel = "depthwise_weights" if part.endswith("depthwise") else "weights"
        source = {"weight": f"{part}/{kernel}", **{name: f"{part}/BatchNorm/{name}" for name in _TF_NORM}}
        for name, path in source.items():
            if f"MobilenetV2/{path}" not in best:
                raise NotThisNetwork(f"no variable MobilenetV2/{path}")
            renamed[f"{part}.{name}"] = best[f"MobilenetV2/{path}"]
    return _tensorflow(renamed, parts, best, "MobilenetV2/Logits/Conv2d_1c_1x1/weights", "biases")


def keras(tensors: Mapping[str, Tensor], eps: float | None = None) -> Network:
    """keras.applications' MobileNetV2 by layer and variable: `block_1_expand/kernel`, `block_1_expand_BN/gamma`.

    Raises:
        NotThisNetwork: tensors are missing, as in a file saved without its top.
    """
    stages = [("Conv1", "bn_Conv1")]
    for block in ("expanded_conv", *(f"block_{n}" for n in range(1, BLOCKS))):
        steps = ("depthwise", "project") if block == "expanded_conv" else ("expand", "depthwise", "project")
        stages += [(f"{block}_{step}", f"{block}_{step}_BN") for step in steps]
    stages.append(("Conv_1", "Conv_1_bn"))
    renamed: dict[str, Tensor] = {}
    for conv, norm in stages:
        names = [f"{conv}/kernel", f"{conv}/depthwise_kernel"]
        found = [name for name in names if name in tensors]
        if not found:
            raise NotThisNetwork(f"no weights of the layer {conv}")
        renamed[f"{conv}.weight"] = tensors[found[0]]
        for name in _TF_NORM:
            if f"{norm}/{name}" not in tensors:
                raise NotThisNetwork(f"no {name} of the layer {norm}")
            renamed[f"{conv}.{name}"] = tensors[f"{norm}/{name}"]
    used = {name for pair in stages for name in pair}
    tops = [name for name in tensors if name.endswith("/kernel") and name.rsplit("/", 1)[0] not in used]
    if len(tops) != 1:
        raise NotThisNetwork(f"{len(tops)} layers that could be the classifier; save the model with its top")
    network = _tensorflow(renamed, [conv for conv, _ in stages], tensors, tops[0], "bias")
    return Network(
        network.weights, network.norms, network.classifier, network.bias, facts=_SAME | {"bn_eps": eps or 1e-3}
    )


def in_running_order(
    kernels: list[Tensor], depthwise: list[Tensor], norms: list[list[Tensor]], top: list[Tensor]
) -> Network:
    """A Keras network of which only the order within each kind of layer is known.

    Args:
        kernels: [k, k, in, out] of the ordinary convolutions.
        depthwise: [3, 3, C, 1].
        norms: gamma, beta, mean, variance of each BatchNorm.
        top: kernel [C, classes] and bias of the classifier.

    Raises:
        NotThisNetwork: not as many of each as a MobileNetV2 has.
    """
    found = (len(kernels), len(depthwise), len(norms), len(top))
    if found != (2 * BLOCKS + 1, BLOCKS, 3 * BLOCKS + 1, 2) or any(len(norm) != 4 for norm in norms):
        raise NotThisNetwork(
            f"{found[0]} convolutions, {found[1]} depthwise convolutions and {found[2]} BatchNorms; "
            f"MobileNetV2 has {2 * BLOCKS + 1}, {BLOCKS} and {3 * BLOCKS + 1}"
        )
    order = [("conv", 0), ("depthwise", 0), ("conv", 1)]
    for block in range(1, BLOCKS):
        order += [("conv", 2 * block), ("depthwise", block), ("conv", 2 * block + 1)]
    order.append(("conv", 2 * BLOCKS))
    renamed: dict[str, Tensor] = {"top/kernel": top[0], "top/bias": top[1]}
    parts = [str(index) for index in range(len(order))]
    for part, (kind, index), norm in zip(parts, order, norms, strict=True):
        renamed[f"{part}.weight"] = kernels[index] if kind == "conv" else depthwise[index]
        renamed.update({f"{part}.{name}": value for name, value in zip(_TF_NORM, norm, strict=True)})
    return _tensorflow(renamed, parts, renamed, "top/kernel", "bias")


def _tensorflow(
    renamed: Mapping[str, Tensor], parts: list[str], tensors: Mapping[str, Tensor], top: str, bias_name: str
) -> Network:
    """A network out of TensorFlow's layouts: kernels [h, w, in, out], depthwise [h, w, C, 1], dense [C, classes]."""
    weights, norms = gather(renamed, [(part, part) for part in parts], _TF_NORM)
    turned = []
    for index, weight in enumerate(weights):
        if weight.dim() != 4:
            raise NotThisNetwork(f"{parts[index]} has a kernel of shape {list(weight.shape)}")
        is_depthwise = 0 < index < len(parts) - 1 and index % 3 == 1
        turned.append(weight.permute(2, 3, 0, 1) if is_depthwise else weight.permute(3, 2, 0, 1))
    bias = f"{top.rsplit('/', 1)[0]}/{bias_name}"
    if top not in tensors or bias not in tensors:
        raise NotThisNetwork(f"no classifier ({top} and {bias})")
    classifier = tensors[top]
    return Network(turned, norms, classifier.reshape(-1, classifier.shape[-1]).T, tensors[bias], facts=dict(_SAME))


def _classifier(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    if f"{prefix}.weight" not in tensors or f"{prefix}.bias" not in tensors:
        raise NotThisNetwork(f"no classifier ({prefix}.weight and {prefix}.bias)")
    weight = tensors[f"{prefix}.weight"]
    return weight.flatten(1) if weight.dim() == 4 else weight, tensors[f"{prefix}.bias"]


def _reject_rest(tensors: Mapping[str, Tensor], stages: list[tuple[str, str]], rest: tuple[str, ...]) -> None:
    used = [f"{conv}.weight" for conv, _ in stages]
    used += [f"{norm}.{name}" for _, norm in stages for name in ("weight", "bias", "running_mean", "running_var")]
    unused(tensors, [*used, *rest], ("num_batches_tracked",))
