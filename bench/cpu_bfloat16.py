"""`python -m bench.cpu_bfloat16`: inference in bfloat16 on a CPU against what else runs MobileNetV2 so there.

Only where the CPU has AVX512_BF16 is there anything to compare; elsewhere one line says so (MBV2_CPU_ISA=portable
measures the slow path all the same). All runners have the same weights, and none is timed whose logits are further from
float64 than 5 %. Our network in float32 is timed beside them. Rounds are interleaved; `faster` is the median of the
rounds' ratios over eager, of time on the core, by the clock with several threads.
"""

import copy
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import mbv2
from bench import cpu_formats
from bench.cpu_formats import COLUMNS as COLUMNS
from bench.cpu_formats import Comparison, MakeRunner, Models
from bench.cpu_peers import Case, Runner, openvino_runner
from mbv2.cli import run_guarded


def ours(models: Models, case: Case, x: Tensor) -> Runner:
    return mbv2.optimize_for_inference(models[0], torch.bfloat16)


def ours_in_float32(models: Models, case: Case, x: Tensor) -> Runner:
    return mbv2.optimize_for_inference(models[0])


def openvino(models: Models, case: Case, x: Tensor) -> Runner:
    import openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError("OpenVINO has no bfloat16 on this CPU")
    return openvino_runner(models[1], case, x, "bf16")


def onednn_graph(models: Models, case: Case, x: Tensor) -> Runner:
    """TorchScript with oneDNN's graph compiler, as torch's documentation prescribes it for bfloat16."""
    torch.jit.enable_onednn_fusion(True)
    before = torch._C._jit_set_autocast_mode(False)
    try:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            frozen = torch.jit.freeze(torch.jit.trace(copy.deepcopy(models[1]), x))
        # It compiles its graph in the first two calls, for the shapes that it sees.
        for _ in range(2):
            frozen(x)
    finally:
        torch._C._jit_set_autocast_mode(before)
        torch.jit.enable_onednn_fusion(False)
    return frozen


def eager(models: Models, case: Case, x: Tensor) -> Runner:
    last = copy.deepcopy(models[1]).to(memory_format=torch.channels_last)
    nhwc = x.to(memory_format=torch.channels_last)

    def run(_: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return last(nhwc)

    return run


RUNNERS: dict[str, MakeRunner] = {
    "eager autocast": eager,
    "mbv2": ours,
    "mbv2 float32": ours_in_float32,
    "OpenVINO bf16": openvino,
    "oneDNN graph": onednn_graph,
}


def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    comparison = Comparison("cpu_bfloat16", "bfloat16", RUNNERS, "eager autocast", 0.05)
    return cpu_formats.main(comparison, __doc__.split("\n")[0], argv)


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
