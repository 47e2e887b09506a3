"""What training keeps for the backward pass: `python -m bench.memory`.

Bytes of activations that autograd saves per picture in the 17 inverted-residual blocks, counted with saved-tensor
hooks (each storage once, parameters left out) while the blocks run forward on the CPU: torchvision's own blocks,
the same through torch.compile's partitioner, and the operators of mbv2.kernels. The counts depend on shapes and types
only, so they hold for a GPU too.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from mbv2.kernels import fused
from mbv2.model import MobileNetV2


def saved_bytes(run: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> int:
    """Bytes of storages that autograd keeps while `run` maps x, not counting those of `parameters`."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run(x)
    assert out.requires_grad
    return sum(kept.values())


def fused_blocks(net: MobileNetV2) -> Callable[[Tensor], Tensor]:
    """The 17 blocks through mbv2's operators, whichever backend would be chosen."""

    def run(x: Tensor) -> Tensor:
        for block in net.features[1:-1]:
            x = fused.inverted_residual(x, *block.stages(), block.stride, block.use_res_connect)
        return x

    return run


def measure(resolution: int, batch: int, dtype: torch.dtype) -> dict[str, float]:
    """MB saved per picture by each way of running the blocks of width 1.0."""
    half = (resolution + 1) // 2
    x = torch.randn(batch, 32, half, half, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    peer = torchvision.models.mobilenet_v2(weights=None).to(dtype).train()
    blocks = nn.Sequential(*peer.features[1:-1]).to(memory_format=torch.channels_last)
    ours = MobileNetV2().to(dtype).train()
    # The partitioner decides what is saved; Inductor's code generation after it changes nothing about that.
    compiled = torch.compile(blocks, backend="aot_eager_decomp_partition")
    ways: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]] = {
        "torchvision eager": (blocks, blocks),
        "torchvision torch.compile": (compiled, blocks),
        "mbv2 operators": (fused_blocks(ours), ours),
    }
    return {
        name: saved_bytes(run, [*module.parameters(), *module.buffers()], x) / batch / 1e6
        for name, (run, module) in ways.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    found = measure(given.resolution, given.batch, getattr(torch, given.dtype))
    eager = found["torchvision eager"]
    print(f"saved for backward in the 17 blocks, 1.0_{given.resolution}, {given.dtype}, MB per picture")
    for name, megabytes in found.items():
        print(f"  {name:<28}{megabytes:8.2f}   {eager / megabytes:5.2f}x less than eager")
    if given.json:
        given.json.write_text(
            json.dumps(
                {"torch": torch.__version__, "resolution": given.resolution, "dtype": given.dtype, "megabytes": found},
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
