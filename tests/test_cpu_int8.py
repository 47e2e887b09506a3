"""The int8 network on CPUs: its kernels against whole-number arithmetic in plain torch, bit for bit."""

import copy
import pickle
import subprocess
from collections.abc import Sequence
from pathlib import Path

import int8_reference
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from test_cpu_network import KERNELS, ROOT, build, compiler_or_skip, run_built, trained
from torch import Tensor

import mbv2
from mbv2 import quantize
from mbv2.kernels import cpu_network
from mbv2.optimized import block_shapes, fold

pytestmark = pytest.mark.skipif(cpu_network.refusal() is not None, reason=f"{cpu_network.refusal()}")
ISAS = [] if cpu_network.refusal() else cpu_network.usable_isas("int8")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MBV2_CPU_ISA", request.param)
    return request.param


def numbers_of(model: mbv2.MobileNetV2, pictures: Tensor) -> list[Tensor]:
    """The model's int8 numbers, with a stem whose sums are exact in float32 on pictures in sixteenths."""
    folded, blocks = fold(model), block_shapes(model)
    numbers = quantize.quantize(folded, blocks, quantize.calibrate(folded, blocks, [pictures]))
    return [numbers[0].round(), numbers[1].round(), *numbers[2:]]


def pictures(*shape: int) -> Tensor:
    return torch.randn(*shape).mul_(16).round_().div_(16)


def run(model: mbv2.MobileNetV2, numbers: Sequence[Tensor], x: Tensor) -> Tensor:
    packed = cpu_network.pack(numbers, block_shapes(model), model.last_channel, model.num_classes, "int8")
    return cpu_network.run(x, packed)


def check(model: mbv2.MobileNetV2, x: Tensor) -> None:
    numbers = numbers_of(model, x)
    wanted = int8_reference.logits(numbers, block_shapes(model), x)
    assert wanted.isfinite().all()
    assert torch.equal(run(model, numbers, x), wanted)


@pytest.mark.parametrize("width", [0.35, 0.75])
def test_every_instruction_set_computes_the_whole_numbers(isa: str, width: float) -> None:
    check(trained(width), pictures(2, 3, 64, 72))


# Without shrinking, as in test_cpu_network.py.
@settings(max_examples=5, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    width=st.floats(0.1, 0.5),
    classes=st.integers(1, 70),
    batch=st.integers(1, 4),
    height=st.integers(1, 70),
    columns=st.integers(1, 70),
    isa=st.sampled_from(ISAS or ["portable"]),
    seed=st.integers(0, 99),
)
@example(width=0.25, classes=3, batch=2, height=19, columns=140, isa=(ISAS or ["portable"])[0], seed=0)  # stem shortcut
def test_any_width_resolution_and_batch(
    width: float, classes: int, batch: int, height: int, columns: int, isa: str, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MBV2_CPU_ISA", isa)
        check(trained(width, classes, seed), pictures(batch, 3, height, columns))


def test_one_and_two_threads_and_any_layout_give_the_same_bits(isa: str) -> None:
    model = trained(0.35)
    x = pictures(3, 3, 75, 90)
    numbers = numbers_of(model, x)
    wanted = run(model, numbers, x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(model, numbers, x.to(memory_format=torch.channels_last)), wanted)
            assert torch.equal(torch.cat([run(model, numbers, picture[None]) for picture in x]), wanted)
    finally:
        torch.set_num_threads(before)


def test_the_largest_sums_saturate_nowhere(isa: str) -> None:
    """Weights at the most that a group may have, on activations at their most: 16 bits hold the products."""
    model = trained(0.35)
    x = pictures(1, 3, 64, 64)
    numbers = numbers_of(model, x)
    for weight, outputs in zip(numbers[2::2], numbers[3::2], strict=True):
        if weight.dim() == 2 or weight.shape[2:] == (1, 1):
            flat = weight.flatten(1)
            flat[:] = 0
            flat[:, 0::8], flat[:, 4::8] = 127, 1
            flat[::2] *= -1
            outputs[0] = 0
    wanted = int8_reference.logits(numbers, block_shapes(model), x)
    assert torch.equal(run(model, numbers, x), wanted)


def test_weights_of_each_group_sum_to_what_16_bits_hold() -> None:
    torch.manual_seed(0)
    model, x = trained(0.35), pictures(4, 3, 64, 64)
    for weight in numbers_of(model, x)[2::2]:
        if weight.dim() == 4 and weight.shape[1] == 1:
            continue
        flat = weight.flatten(1)
        assert torch.equal(flat, flat.round())
        assert flat.abs().max() <= 127
        for start in range(0, flat.shape[1], 8):
            for places in ((0, 1, 4, 5), (2, 3, 6, 7)):
                group = flat[:, [start + place for place in places if start + place < flat.shape[1]]]
                assert 255 * group.clamp_min(0).sum(1).max() <= 32767
                assert 255 * group.clamp_max(0).sum(1).min() >= -32768


def test_each_channel_has_its_range_and_nothing_that_was_seen_is_cut_off() -> None:
    """One channel a hundred times as wide as the others, and one value far out."""
    generator = torch.Generator().manual_seed(0)
    found = quantize.Statistics()
    x = torch.randn(2, 8, 100, 100, generator=generator) * torch.tensor([100.0, 60, 1, 1, 1, 1, 1, 0]).view(1, -1, 1, 1)
    x[1, 2, 71, 93] = -77
    found.add(x)
    scale = quantize._scale(found)
    low, high = -scale.zero * scale.step, (255 - scale.zero) * scale.step
    assert (low - scale.step <= x.amin((0, 2, 3)).clamp_max(0)).all()
    assert (high + scale.step >= x.amax((0, 2, 3)).clamp_min(0)).all()
    assert scale.step[1] < 0.8 * scale.step[0]
    assert scale.step.min() >= 0.4 * scale.step.max()


def test_it_is_near_the_float_network() -> None:
    model, x = trained(0.35), torch.randn(8, 3, 96, 96)
    with torch.no_grad():
        wanted = model(x)
    fast = mbv2.optimize_for_inference(model, torch.int8, x)
    assert (fast.dtype, fast.isa) == (torch.int8, ISAS[0])
    assert (fast(x) - wanted).norm() < 0.1 * wanted.norm()


def test_batches_and_one_tensor_calibrate_alike_and_the_model_stays_as_it_was() -> None:
    model, x = trained(0.35), torch.randn(30, 3, 32, 32)
    state = copy.deepcopy(model.state_dict())
    one = mbv2.optimize_for_inference(model, torch.int8, x)
    batches = mbv2.optimize_for_inference(model, torch.int8, iter([x[:25], x[25:]]))
    assert torch.equal(one(x), batches(x))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_only_the_first_200_pictures_are_looked_at() -> None:
    batches = [torch.zeros(90, 3, 8, 8) for _ in range(9)]
    assert [len(batch) for batch in quantize.pictures_of(batches)] == [90, 90, 20]


def test_pickled_and_copied_it_packs_itself_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = mbv2.optimize_for_inference(trained(0.35), torch.int8, torch.randn(4, 3, 64, 64))
    # The stem's float sums are in the same order only on the same instruction set.
    x = torch.randn(2, 3, 45, 45)
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))
    stored = pickle.dumps(fast)
    assert torch.equal(pickle.loads(stored)(x), fast(x))
    monkeypatch.setenv("MBV2_CPU_ISA", "portable")
    loaded = pickle.loads(stored)
    assert (loaded.isa, loaded.dtype) == ("portable", torch.int8)


def test_what_it_cannot_do_is_said() -> None:
    model, x = trained(0.35), torch.randn(2, 3, 32, 32)
    optimize = mbv2.optimize_for_inference
    with pytest.raises(ValueError, match="calibration some hundred"):
        optimize(model, torch.int8)
    with pytest.raises(ValueError, match=r"dtype=torch\.int8"):
        optimize(model, calibration=x)
    with pytest.raises(ValueError, match="no optimized network in torch.int16"):
        optimize(model, torch.int16)
    with pytest.raises(ValueError, match="no pictures"):
        optimize(model, torch.int8, [])
    with pytest.raises(ValueError, match=r"\[3, 32, 32\]"):
        optimize(model, torch.int8, x[0])
    with pytest.raises(TypeError, match="str"):
        optimize(model, torch.int8, ["picture.jpg"])
    with pytest.raises(ValueError, match="not finite"):
        optimize(model, torch.int8, x * float("nan"))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.classifier[-1].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        optimize(broken, torch.int8, x)
    with pytest.raises(RuntimeError, match="stays in int8"):
        optimize(model, torch.int8, x).half()


@pytest.mark.slow
def test_the_vnni_kernels_through_simde_are_the_portable_ones_on_any_machine(tmp_path: Path) -> None:
    probe = [compiler_or_skip(), "-xc++", "-E", "-"]
    if subprocess.run(probe, input=b"#include <simde/x86/avx512.h>\n", capture_output=True).returncode != 0:
        pytest.skip("no SIMDe headers (Debian: apt-get install libsimde-dev)")
    native = ["-mavx2", "-mfma"] if "avx2" in ISAS else []
    names = ("kernels_int8_portable", "kernels_int8_avx512vnni", "network_int8", "plan")
    sources = [*(KERNELS / f"{name}.cpp" for name in names), ROOT / "tests" / "cpu_int8_simde.cpp"]
    simde = ["-DMBV2_SIMDE", "-include", str(ROOT / "tests" / "simde_missing.h"), *native]
    build(sources, ["-O1"], {"kernels_int8_avx512vnni": simde}, tmp_path / "simde")
    assert run_built(tmp_path / "simde") == 21
