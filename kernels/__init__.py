"""The operator library: the stages of MobileNetV2 as functions of tensors, each with a choice of backends.

It knows blocks and tensors, not models, files or command lines. `stem`, `inverted_residual` and `head` take
the input in any strides (channels_last is the one that needs no copy), the stages' weights and BatchNorms as
`ConvBN`, and return channels_last tensors. Which backend runs them: `backend`, `MBV2_BACKEND`, `report`. `staged`
has the steps of a block one by one.
"""

import importlib

from mbv2.kernels.dispatch import BackendError, backend, report
from mbv2.kernels.ops import head, inverted_residual, stem
from mbv2.kernels.stages import BatchNorm, ConvBN

__all__ = ["BackendError", "BatchNorm", "ConvBN", "backend", "head", "inverted_residual", "report", "staged", "stem"]


def __getattr__(name: str) -> object:
    # Fourteen operators that models do not call; registering them takes as long as all the others together.
    if name == "staged":
        return importlib.import_module("mbv2.kernels.staged")
    raise AttributeError(f"module 'mbv2.kernels' has no attribute {name!r}")
