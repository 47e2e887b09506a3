"""The compiled network in bfloat16 on a CPU, against float64 with the same roundings and torch's own bfloat16."""

import copy
import json
import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import mbv2
from mbv2 import evaluate, kernels, optimized
from mbv2.kernels import cpu_network
from mbv2.kernels.cpu_network import BlockShape

ISAS = [] if cpu_network.refusal() else cpu_network.usable_isas("bfloat16")

pytestmark = pytest.mark.skipif(not ISAS, reason=f"{cpu_network.refusal()}")


@pytest.fixture(params=("avx512", "portable"))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in ISAS:
        pytest.skip(f"this machine cannot run bfloat16 on {request.param}")
    monkeypatch.setenv("MBV2_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBV2_CPU_ISA", "portable")


def trained(width: float, classes: int = 10) -> mbv2.MobileNetV2:
    """A network whose BatchNorms have statistics, scales and shifts as training leaves them."""
    torch.manual_seed(0)
    model = mbv2.MobileNetV2(classes, width)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def rounded(x: Tensor) -> Tensor:
    return x.float().bfloat16().double()


def rounded_where_documented(weights: Sequence[Tensor], blocks: Sequence[BlockShape], x: Tensor) -> Tensor:
    """The network on folded weights in float64, rounded to bfloat16 where docs/cpu.md says."""
    left = [weight.double() for weight in weights]

    def pointwise(x: Tensor) -> Tensor:
        weight, bias = left.pop(0), left.pop(0)
        return F.conv2d(x, rounded(weight).view(*weight.shape[:2], 1, 1), bias)

    h = F.conv2d(x.double(), left.pop(0), left.pop(0), 2, 1).clamp(0, 6)
    block_input = None
    for index, block in enumerate(blocks):
        if index > 0:
            block_input = h
            h = pointwise(h).clamp(0, 6)
        shortcut = h if index == 0 else block_input
        weight, bias = left.pop(0), left.pop(0)
        h = rounded(F.conv2d(h, weight, bias, block.stride, 1, groups=block.hidden).clamp(0, 6))
        h = pointwise(h)
        h = rounded(h + shortcut if block.residual else h)
    h = rounded(pointwise(h).clamp(0, 6).mean((2, 3), keepdim=True))
    return pointwise(h).flatten(1)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (2, 65), (37, 53), (160, 131)])
@pytest.mark.parametrize("width", [0.25, 0.5])
def test_it_is_as_near_to_float64_as_torch_in_bfloat16(isa: str, width: float, size: tuple[int, int]) -> None:
    model, x = trained(width, 100), torch.randn(3, 3, *size)
    fast = mbv2.optimize_for_inference(model, torch.bfloat16)
    assert (fast.isa, fast.dtype) == (isa, torch.bfloat16)
    with kernels.backend("aten"):
        wanted = copy.deepcopy(model).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            eager = model(x)
    got = fast(x)
    assert got.dtype == torch.float32
    assert relative_error(got, wanted) < 1.3 * relative_error(eager, wanted)


@torch.no_grad()
def test_it_rounds_where_it_says_and_nowhere_else(isa: str) -> None:
    model, x = trained(0.5, 100), torch.randn(4, 3, 64, 64)
    weights, blocks = optimized.fold(model), optimized.block_shapes(model)
    exact = copy.deepcopy(model).double()(x.double())
    same = rounded_where_documented(weights, blocks, x)
    got = mbv2.optimize_for_inference(model, torch.bfloat16)(x)
    # Sums in another order put a few values on the other side of a tie, no more.
    assert relative_error(got, same) < 0.3 * relative_error(same, exact)


def odd_network(inputs: int, channels: Sequence[int], classes: int) -> tuple[list[Tensor], list[BlockShape], int]:
    """Folded weights and blocks of a network whose channels are no multiples of anything."""
    blocks = [BlockShape(inputs, inputs, channels[0], 1, channels[0] == inputs)]
    for before, after in pairwise(channels):
        blocks.append(BlockShape(before, 2 * before + 1, after, 1 + before % 2, before == after and before % 2 == 0))
    last = 2 * channels[-1] + 3
    weights = [torch.randn(inputs, 3, 3, 3) / 5, torch.randn(inputs)]
    for index, block in enumerate(blocks):
        if index > 0:
            weights += [torch.randn(block.hidden, block.inputs) / block.inputs**0.5, torch.randn(block.hidden)]
        weights += [torch.randn(block.hidden, 1, 3, 3) / 3, torch.randn(block.hidden)]
        weights += [torch.randn(block.outputs, block.hidden) / block.hidden**0.5, torch.randn(block.outputs)]
    weights += [torch.randn(last, channels[-1]) / channels[-1] ** 0.5, torch.randn(last)]
    weights += [torch.randn(classes, last) / last**0.5, torch.randn(classes)]
    return weights, blocks, last


@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    inputs=st.integers(1, 40),
    channels=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    classes=st.integers(1, 30),
    height=st.integers(1, 40),
    width=st.integers(1, 60),
    isa=st.sampled_from(ISAS or ["portable"]),
    seed=st.integers(0, 99),
)
def test_any_number_of_channels_and_pixels(
    inputs: int, channels: list[int], classes: int, height: int, width: int, isa: str, seed: int
) -> None:
    torch.manual_seed(seed)
    weights, blocks, last = odd_network(inputs, channels, classes)
    x = torch.randn(2, 3, height, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MBV2_CPU_ISA", isa)
        got = cpu_network.run(x, cpu_network.pack(weights, blocks, last, classes, "bfloat16"))
    wanted = rounded_where_documented(weights, blocks, x)
    assert relative_error(got, wanted) < 1e-2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-42])
def test_special_values_stay_in_their_picture_also_where_channels_are_odd(isa: str, value: float) -> None:
    torch.manual_seed(3)
    weights, blocks, last = odd_network(5, [7, 7, 9, 11], 6)
    network = cpu_network.pack(weights, blocks, last, 6, "bfloat16")
    x = torch.randn(3, 3, 30, 30)
    clean = cpu_network.run(x, network)
    x[1, 2, 17, 23] = value
    got, wanted = cpu_network.run(x, network), rounded_where_documented(weights, blocks, x)
    assert torch.equal(got[::2], clean[::2])
    assert torch.equal(got.isnan(), wanted.isnan())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("size", [(20, 23), (150, 190)])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_and_two_threads_and_repeated_calls_give_the_same_bits(isa: str, batch: int, size: tuple[int, int]) -> None:
    fast = mbv2.optimize_for_inference(trained(0.35), torch.bfloat16)
    x = torch.randn(batch, 3, *size)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(fast(x.to(memory_format=torch.channels_last)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(torch.cat([fast(picture[None]) for picture in x]), results[0])


def test_pickled_copied_and_compiled_it_stays_in_bfloat16(portable: None) -> None:
    fast = mbv2.optimize_for_inference(trained(0.35), torch.bfloat16)
    x = torch.randn(2, 3, 45, 45)
    for same in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
        assert same.dtype == torch.bfloat16
        assert torch.equal(same(x), fast(x))
    with torch.no_grad():
        assert torch.equal(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), fast(x))
    torch.library.opcheck(
        torch.ops.mbv2.cpu_network.default,
        (x, fast._packed, fast._plan, fast.num_classes, fast.isa, "bfloat16"),
        test_utils=("test_schema", "test_faketensor"),
    )
    with pytest.raises(RuntimeError, match="stays in bfloat16"):
        fast.half()
    with pytest.raises(RuntimeError, match="does not belong to this plan.*float32"):
        torch.ops.mbv2.cpu_network(x, fast._packed, fast._plan, fast.num_classes, fast.isa)


def test_its_weights_take_half_the_memory(portable: None) -> None:
    model = trained(1.0, 1000)
    half, full = mbv2.optimize_for_inference(model, torch.bfloat16), mbv2.optimize_for_inference(model)
    assert half._packed.numel() < 0.52 * full._packed.numel()


def test_where_the_machine_has_no_such_instructions_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cpu = trained(0.35), torch.device("cpu")
    monkeypatch.delenv("MBV2_BACKEND", raising=False)
    monkeypatch.delenv("MBV2_CPU_ISA", raising=False)
    if "avx512" not in ISAS:
        with pytest.raises(kernels.BackendError, match=r"AVX512_BF16.*float32 is the fast format.*portable"):
            mbv2.optimize_for_inference(model, torch.bfloat16)
        same, runs = optimized.fastest(model, cpu, torch.bfloat16)
        assert same is model
        assert "AVX512_BF16" in runs
    monkeypatch.setenv("MBV2_CPU_ISA", "avx2")
    with pytest.raises(kernels.BackendError, match=r"avx2.*no such instructions for bfloat16.*portable"):
        mbv2.optimize_for_inference(model, torch.bfloat16)
    with pytest.raises(ValueError, match="torch.float16"):
        mbv2.optimize_for_inference(model, torch.float16)
    with pytest.raises(RuntimeError, match="no network in decimal"):
        torch.ops.mbv2.cpu_isa("decimal")


def test_mixed_precision_in_bfloat16_runs_it(portable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MBV2_BACKEND", raising=False)
    model, cpu = trained(0.35), torch.device("cpu")
    fast, runs = optimized.fastest(model, cpu, torch.bfloat16)
    assert fast.dtype == torch.bfloat16
    assert runs == "one compiled network in bfloat16 (portable)"
    assert optimized.fastest(model, cpu, torch.float16)[0] is model


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_on_real_pictures_it_is_as_good_as_float32(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = shared_data / "weights" / "mobilenet_v2_torchvision_qnnpack_dequant_unitvar.pth"
    pictures = shared_data / "eval" / "ilsvrc_val_227"
    found = {}
    for dtype, isa in (("none", ""), ("bf16", ISAS[0])):
        monkeypatch.setenv("MBV2_CPU_ISA", isa)
        result = tmp_path / f"{dtype}.json"
        arguments = ["--pretrained", weights, "--data_url", pictures, "--json", result, "--dtype", dtype]
        assert evaluate.main([str(argument) for argument in [*arguments, "--num_parallel_workers", 0]]) == 0
        found[dtype] = json.loads(result.read_text())
    assert "in bfloat16" in found["bf16"]["runs"]
    assert found["bf16"]["count"] == found["none"]["count"] == 1000
    assert found["bf16"]["top1_right"] >= found["none"]["top1_right"] - 3
