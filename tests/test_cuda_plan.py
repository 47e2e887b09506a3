"""The planner of fused blocks: every block of every network gets a plan that fits, and the plan is what it says."""

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from emulated_cuda import A100, GPUS
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import fused_counts, resources_cuda
from mbv2.kernels.cuda import fused
from mbv2.model import MobileNetV2

pytest.importorskip("mbv2._C", reason="the planner is not compiled here")

ROOT = Path(__file__).resolve().parents[1]
SHARED = {"A100": 163 << 10, "H100": 227 << 10, "RTX 4090": 99 << 10}


def blocks(width: float, size: int, images: int, element: int = 0) -> list[fused.Shape]:
    """The blocks of a network as the planner takes them."""
    shapes, size = [], (size - 1) // 2 + 1
    for block in MobileNetV2(10, width).features[1:-1]:
        expand, depthwise, project = block.stages()
        hidden, outputs = depthwise.weight.shape[0], project.weight.shape[0]
        inputs = hidden if expand is None else expand.weight.shape[1]
        shapes.append(
            fused.Shape(
                element,
                images,
                size,
                size,
                inputs,
                hidden,
                outputs,
                block.stride,
                expand is not None,
                block.use_res_connect,
            )
        )
        size = (size - 1) // block.stride + 1
    return shapes


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.3, 1.4])
def test_every_block_has_a_plan(gpu: str, width: float) -> None:
    for images in (1, 8, 256):
        for shape in blocks(width, 224, images):
            plan = fused.plan_for(shape, GPUS[gpu])
            assert isinstance(plan, fused.Plan), f"{shape}: {plan}"
            assert plan.shared_bytes <= SHARED[gpu]


def test_hidden_channels_are_split_only_where_tiles_leave_processors_idle() -> None:
    shapes = blocks(1.0, 224, 256)
    assert all(plan.splits == 1 for shape in shapes if isinstance(plan := fused.plan_for(shape, A100), fused.Plan))
    last = fused.plan_for(blocks(1.0, 224, 1)[-1], A100)
    assert isinstance(last, fused.Plan)
    assert last.splits > 1 and last.partial_bytes == last.splits * 49 * 320 * 4


@pytest.mark.parametrize(
    ("element", "name", "apart"), [(0, "float16", 0.15), (1, "bfloat16", 0.15), (2, "float32", 0.25)]
)
def test_the_planner_counts_the_instructions_of_the_machine_code(element: int, name: str, apart: float) -> None:
    known = json.loads(resources_cuda.RESULTS.read_text())["sm_80"][name]
    counts = {tile: row["counts"] for tile, row in known.items()}
    for shape in dict.fromkeys(blocks(1.0, 224, 256, element)):
        plan = fused.plan_for(shape, A100)
        assert isinstance(plan, fused.Plan)
        assert plan.instructions == pytest.approx(fused_counts.executed(shape, plan, counts), rel=apart), shape


@pytest.mark.parametrize(
    ("element", "name", "apart"), [(0, "float16", 0.15), (1, "bfloat16", 0.15), (2, "float32", 0.25)]
)
def test_the_planner_counts_the_instructions_of_both_launches_of_a_pair(element: int, name: str, apart: float) -> None:
    known = json.loads(resources_cuda.RESULTS.read_text())["sm_80"][name]
    counts = {tile: row["counts"] for tile, row in known.items()}
    for images in (64, 256):
        for shape in dict.fromkeys(blocks(1.0, 224, images, element)):
            if shape.expands:
                pair = fused.pair_for(shape, A100)
                assert isinstance(pair, fused.Pair)
                front, product = fused_counts.pair_executed(shape, pair, counts)
                assert pair.front.instructions == pytest.approx(front, rel=apart), shape
                assert pair.product.instructions == pytest.approx(product, rel=apart), shape


@pytest.mark.parametrize("gpu", GPUS)
def test_a_pair_is_taken_where_it_is_estimated_a_tenth_faster(gpu: str) -> None:
    taken = 0
    for images in (1, 8, 64, 256):
        for shape in dict.fromkeys(blocks(1.0, 224, images)):
            whole, choice = fused.plan_for(shape, GPUS[gpu]), fused.choice_for(shape, GPUS[gpu])
            assert isinstance(whole, fused.Plan) and not isinstance(choice, str)
            pair = fused.pair_for(shape, GPUS[gpu])
            gains = isinstance(pair, fused.Pair) and pair.microseconds < 0.9 * whole.microseconds
            assert choice == (pair if gains else whole)
            taken += gains
            # Two launches cost more than so small a picture.
            assert images > 1 or not gains
    assert taken > 0


def test_a_pair_adds_up_both_launches_and_one_start() -> None:
    pair = fused.pair_for(blocks(1.0, 224, 64)[-1], A100)
    assert isinstance(pair, fused.Pair)
    assert pair.microseconds == pytest.approx(pair.front.microseconds + pair.product.microseconds + 2)


def test_a_hidden_tensor_beyond_half_of_l2_is_written_and_read_through_dram() -> None:
    slow = A100._replace(processors=1)  # the model's DRAM and L2 are an SM's share
    for images, through in ((1, False), (4096, True)):
        shape = fused.Shape(0, images, 14, 14, 64, 384, 64, 1, True, True)
        pair = fused.pair_for(shape, slow)
        assert isinstance(pair, fused.Pair)
        positions, share = images * 14 * 14, 8.7 * 1410
        hidden = 2 * positions * 384
        assert (hidden > 40e6 / 108 / 2) == through
        expected = 2 * positions * 64 + 2 * 384 * (64 + 9) + through * hidden
        assert pair.front.microseconds >= expected / share
        if through:
            assert pair.product.microseconds >= (hidden + 4 * positions * 64) / share


def test_rows_of_the_hidden_tensor_beyond_32_bits_are_one_launch() -> None:
    shape = fused.Shape(0, 1, 1, 1 << 20, 16, 2048, 16, 1, True, True)
    assert fused.pair_for(shape, A100) == "no tile fits the GPU's shared memory"
    assert isinstance(fused.pair_for(shape._replace(hidden=2040), A100), fused.Pair)
    assert isinstance(fused.choice_for(shape, A100), fused.Plan)


def test_without_expansion_there_is_no_pair() -> None:
    shape = blocks(1.0, 224, 64)[0]
    assert fused.pair_for(shape, A100) == "a block without expansion is one launch"
    assert isinstance(fused.choice_for(shape, A100), fused.Plan)


def test_what_dram_bounds_takes_as_long_as_its_bytes() -> None:
    # No expansion and few channels: on a GPU with so many SMs memory is what counts.
    shape = fused.Shape(0, 256, 112, 112, 32, 32, 16, 1, False, False)
    plan = fused.plan_for(shape, A100._replace(arch=89, processors=128))
    assert isinstance(plan, fused.Plan)
    moved = 2 * 256 * 112 * 112 * (32 + 16)
    assert plan.microseconds >= moved / (2.7 * 128 * 2500)


@settings(max_examples=60, deadline=None)
@given(
    element=st.integers(0, 2),
    images=st.integers(1, 5),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    channels=st.tuples(st.integers(1, 28), st.integers(1, 60), st.integers(1, 56)),
    stride=st.integers(1, 2),
    gpu=st.sampled_from(sorted(GPUS)),
)
def test_a_plan_covers_every_output_and_fits(
    element: int, images: int, height: int, width: int, channels: tuple[int, int, int], stride: int, gpu: str
) -> None:
    inputs, hidden, outputs = (8 * c for c in channels)
    shape = fused.Shape(element, images, height, width, inputs, hidden, outputs, stride, True, False)
    plan = fused.plan_for(shape, GPUS[gpu])
    if isinstance(plan, str):
        assert plan == "no tile fits the GPU's shared memory"
        return
    ho, wo = (height - 1) // stride + 1, (width - 1) // stride + 1
    tiles = -(-images // plan.images) * -(-ho // plan.height) * -(-wo // plan.width)
    assert plan.blocks == tiles * plan.splits
    assert plan.shared_bytes <= SHARED[gpu] and plan.threads % 32 == 0
    chunks = struct.unpack_from("<i", plan.params, _offset("chunks"))[0]
    chunk = {4: 128, 5: 128}.get(plan.tile, 64) // (4 if element == 2 else 2)
    # Every split has a chunk of its own, and together they have all of them.
    assert (plan.splits - 1) * chunks * chunk < hidden <= plan.splits * chunks * chunk
    pair = fused.pair_for(shape, GPUS[gpu])
    assert isinstance(pair, fused.Pair)
    front, product = pair.front, pair.product
    tiles = -(-images // front.images) * -(-ho // front.height) * -(-wo // front.width)
    assert front.blocks == tiles * front.splits and front.tile in (7, 8) and front.partial_bytes == 0
    assert max(front.shared_bytes, product.shared_bytes) <= SHARED[gpu]
    chunks = struct.unpack_from("<i", front.params, _offset("chunks"))[0]
    chunk = 16 if element == 2 else 32
    assert (front.splits - 1) * chunks * chunk < hidden <= front.splits * chunks * chunk
    tile = fused_counts.product_tiles()[product.tile]
    down, across = 16 * tile.warps_m * tile.tiles_m, 8 * tile.warps_n * tile.tiles_n
    assert product.blocks == -(-images * ho * wo // down) * -(-outputs // across)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"inputs": 12}, "channels are not multiples of 8"),
        ({"outputs": 456}, "the projection has too many channels"),
        ({"stride": 3}, "the stride is neither 1 nor 2"),
        ({"residual": True, "stride": 2}, "the shortcut needs stride 1 and equal channels"),
        ({"expands": False}, "without expansion, inputs and hidden channels are the same"),
        ({"images": 0}, "there are no pixels"),
        ({"height": 1 << 15, "width": 1 << 15}, "an image is too large"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_reason(change: dict[str, int], reason: str) -> None:
    shape = fused.Shape(0, 1, 8, 8, 16, 96, 16, 1, True, False)._replace(**change)
    assert fused.plan_for(shape, A100) == reason
    assert "8.0" in str(fused.plan_for(shape._replace(**{}), A100._replace(arch=75)))


def test_offsets_beyond_32_bits_are_planned() -> None:
    plan = fused.plan_for(fused.Shape(0, 4096, 112, 112, 16, 96, 24, 2, True, False), A100)
    assert isinstance(plan, fused.Plan)
    assert struct.unpack_from("<q", plan.params, _offset("out_positions"))[0] == 4096 * 56 * 56


def _offset(name: str) -> int:
    """Where a field of FusedParams lies, told from the header."""
    text = (ROOT / "csrc" / "cuda" / "fused_params.h").read_text().split("struct FusedParams {")[1].split("};")[0]
    at = 0
    for line in text.splitlines():
        line = line.split("//")[0].strip()
        if not line.endswith(";"):
            continue
        kind, names = line[:-1].removeprefix("const ").split(" ", 1)
        for field in names.split(","):
            size = 8 if "*" in line or kind in ("int64_t", "Divisor") else 4
            align = 4 if kind == "Divisor" else size
            at = -(-at // align) * align
            if field.strip(" *") == name:
                return at
            at += size
    raise KeyError(name)


@pytest.mark.slow
def test_the_planner_is_clean_under_sanitizers(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    source = tmp_path / "sweep.cpp"
    source.write_text(
        """
        #include "plan.h"
        #include <cstdio>
        using namespace mbv2::cuda;
        int main() {
            const Gpu gpus[] = {{80, 108, 163 << 10, 164 << 10}, {89, 128, 99 << 10, 100 << 10},
                                {120, 1, 99 << 10, 100 << 10}};
            long planned = 0, refused = 0;
            for (const Gpu& gpu : gpus)
                for (int element = 0; element < 3; ++element)
                    for (int64_t images : {1, 3, 70000})
                        for (int64_t size : {1, 2, 7, 33, 112, 1000})
                            for (int64_t inputs : {8, 24, 160, 1024})
                                for (int64_t outputs : {8, 96, 448})
                                    for (int64_t stride : {1, 2}) {
                                        BlockShape shape = {Element(element), images, size, size + 1, inputs,
                                                            6 * inputs, outputs, stride, true, false};
                                        for (int cut = -1; cut < 2; ++cut) {
                                            Wish wish;
                                            wish.cut = cut;
                                            BlockPlan plan;
                                            (plan_block(shape, gpu, wish, &plan) ? planned : refused) += 1;
                                        }
                                    }
            std::printf("%ld planned, %ld refused\\n", planned, refused);
            return planned == 0 || refused == 0;
        }
        """
    )
    program = tmp_path / "sweep"
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    command = [compiler, *flags, "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc' / 'cuda'}", str(source)]
    sources = [str(ROOT / "csrc" / "cuda" / name) for name in ("plan.cpp", "plan_pair.cpp")]
    subprocess.run([*command, *sources, "-o", str(program)], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([str(program)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
