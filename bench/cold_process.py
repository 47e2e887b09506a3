"""One process of `bench.cold_start`: imports nothing but torch before the clock starts."""

import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPTIMIZED, PLAIN, EAGER = "mbv2 optimized", "mbv2 model", "torchvision eager"
RANDOM = f"{OPTIMIZED}, random weights"


def start(runner: str, weights: str) -> dict[str, list[float]]:
    """Milliseconds on the cores and on the clock of importing, creating, making ready and running once."""
    stamps = [(time.process_time(), time.perf_counter())]

    def done(value: Any = None) -> Any:
        stamps.append((time.process_time(), time.perf_counter()))
        return value

    build, ready = _library(runner)
    done()
    model = done(build(None if runner == RANDOM else weights))
    x = torch.zeros(1, 3, 224, 224)
    with torch.no_grad():
        run = done(ready(model.eval()))
        done(run(x))
    pairs = itertools.pairwise(stamps)
    cpu, wall = zip(*[[1e3 * (b - a) for a, b in zip(*pair, strict=True)] for pair in pairs], strict=True)
    return {"cpu": list(cpu), "wall": list(wall)}


def _library(runner: str) -> tuple[Callable[..., Any], Callable[..., Callable[[Tensor], Tensor]]]:
    """How a runner builds the network from a file of weights, and how it makes it ready; imports what that takes."""
    if runner == EAGER:
        import torchvision

        def build(weights: str) -> torch.nn.Module:
            model = torchvision.models.mobilenet_v2()
            model.load_state_dict(torch.load(weights, weights_only=True))
            return model

        return build, lambda model: model
    import mbv2
    import mbv2.model
    import mbv2.weights

    def create(weights: str | None) -> torch.nn.Module:
        return mbv2.create_model("mobilenet_v2_1.0_224", pretrained=weights or False)

    return create, (lambda model: model) if runner == PLAIN else mbv2.optimize_for_inference


if __name__ == "__main__":
    print(json.dumps(start(*sys.argv[1:])))
