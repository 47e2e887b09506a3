"""The roofline model: its arithmetic against hand-computed figures, its text, its files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import gpu_static, plan, roofline
from bench.occupancy import ARCHITECTURES, Architecture

H100 = ARCHITECTURES[90]


def test_a_kernel_takes_the_longer_of_its_bytes_and_its_instructions_and_a_launch() -> None:
    gpu = replace(H100, bandwidth=1e12 / 0.85, processors=1, clock=1e12 / (128 * 0.60))
    moved = roofline.Kernel("moves", 2e6, 1e6, "")
    computed = roofline.Kernel("computes", 2e6, 5e6, "")
    assert moved.seconds(gpu, 10) == pytest.approx(20e-6 + 1e-6)
    assert computed.seconds(gpu, 10) == pytest.approx(50e-6 + 1e-6)
    assert (moved.bound(gpu), computed.bound(gpu)) == ("DRAM", "issue")


def test_training_moves_the_bytes_that_were_counted() -> None:
    traffic = json.loads((roofline.RESULTS / "traffic.json").read_text())["megabytes_per_image"]
    counted = sum(sum(traffic[part][kind] for kind in ("activations", "small")) for part in ("forward", "backward"))
    moved = sum(kernel.bytes for kernel in roofline.training(H100, plan.network())) / 1e6
    assert moved == pytest.approx(counted, rel=0.01)


def test_peers_move_what_the_design_says() -> None:
    peers = roofline.peers(plan.network())
    assert sum(kernel.bytes for kernel in peers["BN-folded eager"]) / 1e6 == pytest.approx(47.2, rel=0.05)
    # The design's figure lets L2 keep some of it.
    assert sum(kernel.bytes for kernel in peers["act-fused"]) / 1e6 == pytest.approx(24.7, rel=0.06)


def test_depthwise_kernels_are_the_chosen_ones() -> None:
    kernels = [kernel for kernel in roofline.training(H100, plan.network()) if "_depthwise_kernel" in kernel.name]
    choice = json.loads(gpu_static.CHOICE.read_text())["sm_90"]
    assert len(kernels) == 17
    for kernel in kernels:
        stride = 2 if " s2 " in kernel.name else 1
        assert kernel.source == ("CUDA C++" if choice[f"depthwise 2 s{stride}"] else "Triton")


@pytest.mark.parametrize("gpu", roofline.GPUS, ids=lambda gpu: gpu.gpu)
def test_the_fused_blocks_line_is_of_its_machine_code_and_moves_input_and_output_once(gpu: Architecture) -> None:
    kernels = roofline.fused(gpu, plan.network(), 256)
    assert len(kernels) == 17 and {kernel.source for kernel in kernels} == {"CUDA C++"}
    # Input and output of 17 blocks in 2 bytes each, and a 256th of the weights.
    least = sum(2 * (b.cin * b.side**2 + b.cout * b.side_out**2) for b in plan.network())
    assert least < sum(kernel.bytes for kernel in kernels) < 1.02 * least
    # The design hoped for 20 an output of the depthwise stage; setting up, copying and storing come on top.
    outputs = sum(block.elements["E2"] for block in plan.network())
    assert 20 < sum(kernel.instructions for kernel in kernels) / outputs < 120
    more = roofline.fused(gpu, plan.network(), 1)
    assert all(kernel.launches in (1, 2) for kernel in more) and any(kernel.launches == 2 for kernel in more)


def test_a_pair_is_two_launches_that_write_and_read_the_hidden_tensor() -> None:
    blocks = plan.network()
    gpu = roofline.GPUS[0]
    one, planned = roofline.fused(gpu, blocks, 64), roofline.planned(gpu, blocks, 64)
    second = [kernel for kernel in planned if kernel.name.endswith(" project")]
    assert len(planned) == len(one) + len(second) > len(one)
    last = blocks[-1]
    [front] = [kernel for kernel in planned if kernel.name == f"{last} expand+depthwise"]
    [product] = [kernel for kernel in planned if kernel.name == f"{last} project"]
    e, weights = last.elements, last.hidden * (last.cin + 9)
    assert front.bytes == pytest.approx(2 * (e["X"] + e["E2"] + weights / 64))
    assert product.bytes == pytest.approx(2 * (e["E2"] + e["O"] + last.hidden * last.cout / 64))


@pytest.mark.parametrize("gpu", roofline.GPUS, ids=lambda gpu: gpu.gpu)
def test_every_prediction_says_that_it_is_one_and_names_what_misses_the_target(gpu: object) -> None:
    row = roofline.predict(gpu, 256)
    assert all(key.startswith("predicted_") for key in row if key not in ("gpu", "arch", "batch", "misses"))
    infer = row["predicted_inference_us_per_image"]
    for way in roofline.BUILT:
        ratio = infer["BN-folded eager"] / infer[way]
        assert (ratio < roofline.TARGET_EAGER) == any(way in m and "eager" in m for m in row["misses"])


def test_more_bandwidth_is_never_slower_and_small_batches_cost_more_a_picture() -> None:
    kernels = roofline.training(H100, plan.network())
    slow, fast = (replace(H100, bandwidth=bandwidth) for bandwidth in (2e12, 4e12))
    assert roofline._total(kernels, fast, 256) <= roofline._total(kernels, slow, 256)
    assert roofline._total(kernels, H100, 1) > roofline._total(kernels, H100, 256) / 256


def test_command_writes_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--batch", "1", "256", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "PREDICTED" in printed and "T4: no kernels" in printed and "Where the counts do not reach" in printed
    document = json.loads((tmp_path / "roofline.json").read_text())
    assert [row["batch"] for row in document["rows"]] == [1] * len(roofline.GPUS) + [256] * len(roofline.GPUS)
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_choice_is_what_the_committed_figures_say() -> None:
    static = json.loads(gpu_static.RESULTS.read_text())
    budget = json.loads((roofline.RESULTS / "resources.json").read_text())
    assert gpu_static.choice(static, budget) == json.loads(gpu_static.CHOICE.read_text())
    assert not [fault for kernels in static.values() for row in kernels.values() for fault in row["faults"]]
    assert set(static) == {arch.name for arch in ARCHITECTURES.values()}


@pytest.mark.slow
@pytest.mark.parametrize("number", (80, 90))
def test_compiled_kernels_keep_their_budget(number: int) -> None:
    from ptxcpu.nvcc import find_nvcc

    if find_nvcc() is None:
        pytest.skip("needs nvcc")
    known = json.loads(gpu_static.RESULTS.read_text())[f"sm_{number}"]
    now = gpu_static.rows(ARCHITECTURES[number])
    assert set(now) == set(known)
    for name, row in now.items():
        assert not row["faults"], name
        # Another nvcc may differ a little.
        assert row["instructions_per_element"] <= 1.1 * known[name]["instructions_per_element"], name
