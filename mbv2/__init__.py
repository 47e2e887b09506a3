"""MobileNetV2 for PyTorch: train it on one to many devices, evaluate it, run it.

import mbv2

mbv2.list_models()
model = mbv2.create_model("mobilenet_v2_1.0_224", pretrained=True)
fast = mbv2.optimize_for_inference(model.eval())  # on a CPU: one compiled call from picture to logits
"""

from mbv2.errors import UserError
from mbv2.zoo import VARIANTS, Variant, create_model, list_models, variant_name

__version__ = "0.1.0"
__all__ = [
    "VARIANTS",
    "MobileNetV2",
    "UserError",
    "Variant",
    "accelerate",
    "create_model",
    "list_models",
    "optimize_for_inference",
    "restore",
    "variant_name",
]


def __getattr__(name: str) -> object:
    # torch takes a second to import; listing the variants does not need it.
    if name == "MobileNetV2":
        from mbv2.model import MobileNetV2

        return MobileNetV2
    if name == "optimize_for_inference":
        from mbv2.optimized import optimize_for_inference

        return optimize_for_inference
    if name in ("accelerate", "restore"):
        from mbv2.drop_in import accelerate as drop_in

        return getattr(drop_in, name)
    raise AttributeError(f"module 'mbv2' has no attribute {name!r}")
