"""The compiled operators work on as many threads as torch is told, not on one that does everything."""

import subprocess
import sys

import pytest

from mbv2.kernels import cpu_network

pytestmark = [
    pytest.mark.skipif(cpu_network.refusal() is not None, reason=f"{cpu_network.refusal()}"),
    pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc"),
]
PROGRAM = """
import os
import torch
import mbv2

torch.set_num_threads(1)
torch.manual_seed(0)
model = mbv2.MobileNetV2(10, 0.35).eval()
x = torch.randn(4, 3, 96, 96)
{prepare}
with torch.no_grad():
    call = lambda: {call}
    call()
    before = len(os.listdir("/proc/self/task"))
    torch.set_num_threads(5)
    call()
    print(len(os.listdir("/proc/self/task")) - before)
"""
CALLS = {
    "network": ("fast = mbv2.optimize_for_inference(model)", "fast(x)"),
    "stage": (
        "import mbv2.kernels\ny, w = torch.randn(4, 16, 96, 96), torch.randn(96, 16, 1, 1)\n"
        "y = y.to(memory_format=torch.channels_last)",
        "mbv2.kernels.staged.expand(y, w)",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_starts_the_threads_it_may_use(name: str) -> None:
    prepare, call = CALLS[name]
    program = PROGRAM.format(prepare=prepare, call=call)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 4
