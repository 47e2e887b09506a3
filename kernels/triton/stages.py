"""The stage functions of the Triton backend, named as their plain-torch twins in `kernels/aten.py`."""

from mbv2.kernels.triton.batch_norm import bn_apply, bn_backward, bn_constant, bn_finalize, bn_sums, merge_moments
from mbv2.kernels.triton.depthwise import depthwise, depthwise_folded
from mbv2.kernels.triton.depthwise_backward import depthwise_backward
from mbv2.kernels.triton.expand_backward import expand_backward
from mbv2.kernels.triton.folded import (
    depthwise_project_folded,
    expand_depthwise_folded,
    inverted_residual_folded,
)
from mbv2.kernels.triton.head import bn_relu6_pool, head_folded, pool_backward
from mbv2.kernels.triton.pointwise import expand, pointwise_folded, project
from mbv2.kernels.triton.project_backward import project_backward
from mbv2.kernels.triton.stem import stem, stem_backward, stem_folded

__all__ = [
    "bn_apply",
    "bn_backward",
    "bn_constant",
    "bn_finalize",
    "bn_relu6_pool",
    "bn_sums",
    "depthwise",
    "depthwise_backward",
    "depthwise_folded",
    "depthwise_project_folded",
    "expand",
    "expand_backward",
    "expand_depthwise_folded",
    "head_folded",
    "inverted_residual_folded",
    "merge_moments",
    "pointwise_folded",
    "pool_backward",
    "project",
    "project_backward",
    "stem",
    "stem_backward",
    "stem_folded",
]
