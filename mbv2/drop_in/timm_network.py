"""timm's EfficientNet, the class its MobileNetV2 is made of: the stem and the head around the blocks.

The network calls the stem's and the head's modules one by one, so only its own forward can be swapped for them. The
methods that give unpooled or intermediate values (`forward_features`, `forward_intermediates`) stay timm's.
"""

import functools

from torch import nn
from torch.nn import functional

from mbv2.drop_in.leaves import Mismatch, is_identity, type_name, watched
from mbv2.drop_in.patterns import Apart, Head, Stem, Step, Tap, head_at, stem_at

_POOL = "timm.layers.adaptive_avgmax_pool"


def read_timm_model(module: nn.Module) -> list[Step] | Mismatch:
    """EfficientNet: conv_stem, bn1, blocks, conv_head, bn2, global_pool, dropout, classifier."""
    first, last = _stem(module), _head(module)
    if isinstance(first, Apart) and isinstance(last, Apart):
        return first.why
    blocks: Step = module.blocks
    if module.grad_checkpointing:
        from timm.models import checkpoint_seq

        blocks = functools.partial(checkpoint_seq, module.blocks, flatten=True)
    steps = [first, blocks, last]
    if module.training and module.drop_rate > 0:
        steps.append(functools.partial(functional.dropout, p=module.drop_rate))
    return [*steps, module.classifier]


def read_timm_features(module: nn.Module) -> list[Step] | Mismatch:
    """EfficientNetFeatures: conv_stem, bn1 and the stages of blocks, with some of the values between them taken."""
    if module.feature_hooks is not None:
        return Mismatch(None, "takes its features by hooks inside the blocks")
    first = _stem(module)
    if isinstance(first, Apart):
        return first.why
    steps: list[Step] = [first]
    taken = module._stage_out_idx
    if 0 in taken:
        steps.append(Tap())
    for number, stage in enumerate(module.blocks, start=1):
        if module.grad_checkpointing:
            from timm.models import checkpoint

            stage = functools.partial(checkpoint, stage)
        steps.append(stage)
        if number in taken:
            steps.append(Tap())
    return steps


def _stem(module: nn.Module) -> Stem | Apart:
    leaves = (module.conv_stem, module.bn1)
    found = stem_at(leaves, 0)
    return Apart("stem", leaves, found) if isinstance(found, Mismatch) else found[0]


def _head(module: nn.Module) -> Head | Apart:
    leaves = (module.conv_head, module.bn2, module.global_pool)
    flat = _flattens(module.global_pool)
    found = flat if isinstance(flat, Mismatch) else head_at([*leaves[:2], nn.AdaptiveAvgPool2d(1)], 0)
    if isinstance(found, Mismatch):
        return Apart("head", leaves, found)
    return found[0]._replace(flat=flat)


def _flattens(pool: nn.Module) -> bool | Mismatch:
    """Whether timm's global average pooling gives [N, C], not [N, C, 1, 1]."""
    wrong = Mismatch(pool, "is no global average pooling")
    if type_name(pool) != f"{_POOL}.SelectAdaptivePool2d" or watched(pool) or watched(pool.pool):
        return wrong
    inner, flatten = pool.pool, pool.flatten
    if type_name(inner) == f"{_POOL}.FastAdaptiveAvgPool":
        return inner.flatten if inner.dim == (2, 3) and is_identity(flatten) else wrong
    if type_name(inner) != "torch.nn.modules.pooling.AdaptiveAvgPool2d" or inner.output_size not in (1, (1, 1)):
        return wrong
    if is_identity(flatten):
        return False
    whole = type_name(flatten) == "torch.nn.modules.flatten.Flatten" and not watched(flatten)
    return True if whole and (flatten.start_dim, flatten.end_dim) == (1, -1) else wrong
