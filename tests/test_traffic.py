"""What the kernels move between DRAM and the chip, held against the plan (bench/plan.py)."""

from types import SimpleNamespace
from typing import Any

import pytest

from bench import plan, traffic
from mbv2.kernels.triton import support

BLOCKS = plan.network()
DISTINCT = list(dict.fromkeys(BLOCKS))
NARROW = next(block for block in BLOCKS if block.stride == 1 and block.expands)


@pytest.fixture(autouse=True)
def only_emulated(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--device") != "ptx":
        pytest.skip("sectors are counted where PTX runs on the CPU")


def forward_and_backward(bytes_per_stage: dict[str, Any]) -> tuple[float, float]:
    forward, backward = (
        sum(bytes_per_stage.get(stage, 0) for stage in part) / 1e6 for part in (plan.FORWARD, plan.BACKWARD)
    )
    return forward, backward


def test_plan_of_one_block_by_hand():
    block = plan.Block(cin=24, hidden=144, cout=32, stride=2, side=56, expands=True)
    x, e1, e2, out = 24 * 56 * 56, 144 * 56 * 56, 144 * 28 * 28, 32 * 28 * 28
    want = {
        "expand": x + e1,
        "depthwise": e1 + e2,
        "project": e2 + out,
        "bn_apply": 2 * out,
        "bn_sums": 2 * out,
        "project_backward": 2 * out + 2 * e2,
        "depthwise_backward": 2 * e2 + 2 * e1,
        "expand_backward": 2 * e1 + 2 * x,
    }
    assert plan.planned(block, itemsize=2) == {stage: 2 * elements for stage, elements in want.items()}


def test_plan_of_the_network_is_half_of_what_a_compiler_moves():
    totals = [forward_and_backward(plan.planned(block)) for block in BLOCKS]
    forward, backward = (sum(part) for part in zip(*totals, strict=True))
    assert len(BLOCKS) == 17
    assert forward == pytest.approx(28.35, abs=0.01) and backward == pytest.approx(58.61, abs=0.01)
    assert forward < 0.5 * plan.COMPILED[0] and backward < 0.52 * plan.COMPILED[1]


def test_widths_and_resolutions_scale_the_plan():
    half = sum(plan.planned(block)["depthwise"] for block in plan.network(resolution=112))
    assert half == pytest.approx(sum(plan.planned(block)["depthwise"] for block in BLOCKS) / 4, rel=0.02)
    assert [block.cin for block in plan.network(width=0.35)][:3] == [16, 8, 8]


def test_launches_of_a_real_batch_take_the_arrays_of_the_plan_and_no_others():
    measured = {block: traffic.measure(block, run_side=None) for block in DISTINCT}
    assert traffic.faults(BLOCKS, measured) == []


def test_sectors_of_one_block_are_those_of_the_plan():
    check_sectors(NARROW, side=14)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", DISTINCT, ids=str)
def test_sectors_of_every_block_are_those_of_the_plan(block: plan.Block):
    # Wide layers are small pictures, whose emulation takes long; a quarter of one has every seam between blocks too.
    check_sectors(block, side=traffic.RUN_SIDE if block.hidden < 384 else 7)


def check_sectors(block: plan.Block, side: int) -> None:
    stages = traffic.measure(block, run_side=side)
    assert {stage.stage for stage in stages} == {*plan.planned(block), "bn_finalize", "bn_backward"}
    assert [fault for stage in stages for fault in stage.faults()] == []
    for stage, whole in zip(stages, traffic.measure(block, run_side=None), strict=True):
        assert stage.activations == pytest.approx(whole.activations, rel=0.01), f"{stage}: not every array once, whole"


def test_a_detour_through_memory_is_found():
    kernels = support.stages()
    stages = SimpleNamespace(**{name: getattr(kernels, name) for name in (*plan.FORWARD, *plan.BACKWARD)})

    def project(y2: Any, bn2: Any, weight: Any) -> Any:
        kernels.bn_apply(y2, bn2, None, True)
        return kernels.project(y2, bn2, weight)

    stages.project = project
    found = {stage.stage: stage.faults() for stage in traffic.measure(NARROW, stages, run_side=None)}
    assert any("times the activations" in fault for fault in found["project"])
    assert not found["depthwise"]
