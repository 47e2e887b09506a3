"""The static report's parts against cases counted by hand, and the gate: no kernel spills, all fit, none got slower."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench import launches, occupancy, planner, report_text, resources, sass, ttir, tune, workload
from bench.occupancy import ARCHITECTURES
from bench.workload import Call
from mbv2.kernels.triton import tuning

HALF = torch.float16

# A loop with a loop in it, a conditional way round the inner one, a wait for a barrier, and what ends every function.
LISTING = """
kernel:
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E R1, desc[UR4][R2.64] ;
.L_x_3:
        /*0020*/                   FADD R1, R1, R0 ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   LDS R4, [R0] ;
        /*0050*/                   FFMA R1, R4, R4, R1 ;
        /*0060*/              @!P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   STG.E desc[UR4][R2.64], R1 ;
        /*0080*/                   BRA.U UP0, `(.L_x_3) ;
.L_x_4:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR16], R4 ;
        /*00a0*/              @!P2 BRA `(.L_x_4) ;
        /*00b0*/                   EXIT ;
.L_x_5:
        /*00c0*/                   BRA `(.L_x_5);
        /*00d0*/                   NOP;
"""


def test_loops_are_found_in_machine_code() -> None:
    instructions = sass.parse(LISTING)
    loops = sass.find_loops(instructions)
    code = sass.Code(instructions, loops, registers=8, stack_bytes=0)
    assert [(loop.depth, len(loop.body)) for loop in loops] == [(0, 7), (1, 3)]
    assert code.own_instructions() == (5, [4, 3])
    assert code.count("FFMA", "FADD") == 2
    assert code.opcodes_of(loops[1]) == {"LDS": 1, "FFMA": 1, "BRA": 1}


def test_a_jump_written_as_a_call_closes_a_loop() -> None:
    listing = """
.L_x_1:
        /*0000*/                   FADD R1, R1, R0 ;
        /*0010*/               @P0 CALL.REL.NOINC `(.L_x_2) ;
        /*0020*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_u64) ;
        /*0040*/                   EXIT ;
"""
    loops = sass.find_loops(sass.parse(listing))
    assert [len(loop.body) for loop in loops] == [3]


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "columns", "resident"),
    [
        (80, 4, 32, 0, 0, 64),
        (80, 4, 128, 0, 0, 16),
        (80, 4, 129, 0, 0, 12),
        (80, 8, 255, 0, 0, 8),
        (80, 8, 168, 0, 0, 8),
        (80, 1, 32, 0, 0, 32),
        (80, 4, 32, 40 << 10, 0, 16),
        (80, 4, 32, 163 << 10, 0, 4),
        (80, 4, 32, (163 << 10) + 1, 0, 0),
        (86, 4, 32, 0, 0, 48),
        (86, 4, 32, 100 << 10, 0, 0),
        (89, 2, 32, 0, 0, 48),
        (90, 4, 32, 200 << 10, 0, 4),
        (100, 4, 32, 0, 256, 8),
        (100, 4, 32, 0, 1024, 0),
    ],
)
def test_occupancy(arch: int, warps: int, registers: int, shared: int, columns: int, resident: int) -> None:
    assert occupancy.warps_per_sm(ARCHITECTURES[arch], warps, registers, shared, columns) == resident


def test_issue_budgets_are_those_of_the_traffic_model() -> None:
    budgets = {number: round(a.instructions_per_byte, 1) for number, a in ARCHITECTURES.items()}
    assert budgets == {80: 8.8, 86: 13.4, 89: 28.9, 90: 6.2, 100: 3.1, 120: 20.7}


@triton.jit(do_not_specialize=["rows", "columns", "parts"])
def walk(x_ptr, y_ptr, rows, columns, parts, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    offs = tl.arange(0, BLOCK_M)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), parts):
        total = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, columns, BLOCK_K):
            here = x_ptr + (tile * BLOCK_M + offs)[:, None] * K + start + tl.arange(0, BLOCK_K)[None, :]
            total += tl.sum(tl.load(here).to(tl.float32), 1)
        if tile == 0:
            total += 1.0
        tl.store(y_ptr + tile * BLOCK_M + offs, total)


def launched(arch: int, **options: int) -> launches.Launch:
    """`walk` over 1000 rows of 96 values in five programs."""
    x, y = torch.empty(1000, 96, dtype=HALF, device="meta"), torch.empty(1000, device="meta")
    with launches.compiled_only(arch) as log:
        walk[(5,)](x, y, 1000, 96, 5, K=96, BLOCK_M=64, BLOCK_K=32, **options)
    return launches.Launch(ARCHITECTURES[arch], log[0], launches.machine_of(log[0].cubin))


def test_a_launch_is_followed_from_its_triton_ir() -> None:
    launch = launched(80)
    # 16 tiles: program 0 walks over four of them, the middle and the last program over three.
    mean_tiles = (4 + 3 + 3) / 3
    program = launch.program
    assert [(loop.depth, round(loop.runs, 3)) for loop in program.loops] == [(0, round(mean_tiles, 3)), (1, 3.0)]
    assert not program.unknown
    assert program.loaded_bytes == pytest.approx(mean_tiles * 3 * 64 * 32 * 2)
    assert program.stored_bytes == pytest.approx(mean_tiles * 64 * 4)
    assert launch.bytes == 1000 * 96 * 2 + 1000 * 4
    assert launch.elements == 96_000


def test_instructions_of_a_launch_are_counted_through_its_loops() -> None:
    launch = launched(80)
    machine = launch.machine
    (outer, own), (inner, innermost) = machine.loops
    assert (outer, inner) == (0, 1)
    tiles = 10 / 3
    per_thread = machine.straight + tiles * (own + 3 * innermost)
    assert launch.instructions == pytest.approx(per_thread * 5 * 128)
    assert launch.instructions_per_element == pytest.approx(per_thread * 5 * 128 / 96_000)


def test_a_kernel_short_of_registers_is_reported() -> None:
    assert launched(80).faults() == []
    launch = launched(80, num_warps=1, maxnreg=24)
    assert launch.machine.spills() > 0
    assert "local memory" in launch.faults()[0]


def test_unrolled_loops_are_matched_to_the_source() -> None:
    source = [ttir.Loop(0, 5.0, False), ttir.Loop(1, 3.0, True)]
    assert launches.matched(((0, 10), (1, 20)), source) == [5.0, 3.0]
    assert launches.matched(((0, 70),), source) == [5.0]
    assert launches.matched((), source) == []
    assert launches.matched(((0, 70), (0, 9)), source[:1]) == [5.0, 1.0]


def test_kernels_that_differ_in_sizes_only_are_compiled_once() -> None:
    seen: set[Any] = set()
    x, y = torch.empty(0, dtype=HALF, device="meta"), torch.empty(0, device="meta")
    with launches.compiled_only(80) as log, launches.one_of_a_kind(seen):
        for k in (96, 96, 160, 24):
            walk[(5,)](x, y, 1000, k, 5, K=k, BLOCK_M=64, BLOCK_K=16)
        walk[(5,)](x, y, 1000, 96, 5, K=96, BLOCK_M=64, BLOCK_K=16, maxnreg=128)
    assert [(entry.constants["K"], entry.metadata.maxnreg) for entry in log] == [
        (96, None),
        (96, None),
        (24, None),
        (96, 128),
    ]


METAS = tuple({"BLOCK_M": 16 << i, "num_warps": 4} for i in range(4))


def test_the_planner_takes_the_cheapest_tile_for_each_range_of_sizes() -> None:
    points = [
        planner.Point({"rows": 99, "cin": 16}, (1.0, 2.0, 2.0, 2.0)),
        planner.Point({"rows": 99, "cin": 64}, (2.0, 2.0, 1.0, 3.0)),
        planner.Point({"rows": 10, "cin": 64}, (2.0, 1.0, 2.0, 3.0)),
    ]
    entries = planner.entries_of(points, METAS)
    assert entries == [
        {"cin": 16, "tile": METAS[0]},
        {"rows": 10, "tile": METAS[1]},
        {"tile": METAS[2]},
    ] or entries == [
        {"rows": 10, "tile": METAS[1]},
        {"cin": 16, "tile": METAS[0]},
        {"tile": METAS[2]},
    ]


def test_the_planner_writes_few_entries_and_none_that_saves_little() -> None:
    metas = tuple({"BLOCK_M": 16 << i, "num_warps": 4} for i in range(8))

    def points(more: float) -> list[planner.Point]:
        costs = [tuple(1.0 + more * (best != i // 3) for best in range(8)) for i in range(24)]
        return [planner.Point({"cin": 8 * i}, of_size) for i, of_size in enumerate(costs)]

    assert len(planner.entries_of(points(1.0), metas)) == planner.ENTRIES
    assert len(planner.entries_of(points(0.02), metas)) == 1


def test_tables_written_by_the_planner_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "TILES", tmp_path)
    (tmp_path / "matmul.json").write_text('{"default": [{"tile": {"BLOCK_M": 16}}]}')
    planner.write("matmul", {"sm_100": [{"bytes": 2, "tile": {"BLOCK_M": 64}}], "sm_80": []})
    table = json.loads((tmp_path / "matmul.json").read_text())
    assert list(table) == ["default", "sm_80", "sm_100"]
    assert table["sm_100"] == [{"bytes": 2, "tile": {"BLOCK_M": 64}}]


def test_what_is_worse_than_the_budget_is_named() -> None:
    good = {"registers": 100, "instructions_per_element": 10.0, "faults": []}
    assert resources.worse({"k": good, "new": good}, {"k": good, "gone": good}) == []
    slow = {**good, "instructions_per_element": 11.1}
    assert resources.worse({"k": slow}, {"k": good}) == ["k: instructions_per_element 11.1, the budget is 10.0"]
    assert len(resources.worse({"k": {**good, "registers": 111}}, {"k": good})) == 1
    assert resources.worse({"k": {**good, "faults": ["3 accesses"]}}, {"k": good}) == ["k: 3 accesses"]


def test_the_workload_is_the_network() -> None:
    calls = workload.calls(1.0, 224, 2, HALF)
    stages = [call.stage for call in calls]
    assert stages.count("expand") == 7
    assert stages.count("inverted_residual_folded") == 12
    shapes = {call.args[0].shape[1:] for call in calls if call.stage == "project"}
    assert (960, 7, 7) in shapes and (96, 56, 56) in shapes
    assert len(set(workload.variants())) == 22


def test_every_kind_of_report_is_written() -> None:
    budget = resources.read_budget()
    assert json.loads(report_text.as_json(budget)) == budget
    text = report_text.as_markdown(budget)
    assert all(arch in text for arch in budget)


def test_tiles_are_timed_and_written_for_this_device(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The emulated driver's clock counts bytes: a tile as wide as the output reads the input once, not four times.
    tile = {"BLOCK_M": 16, "BLOCK_K": 16, "num_warps": 1, "num_stages": 1}
    metas = ({**tile, "BLOCK_N": 16}, {**tile, "BLOCK_N": 64})
    monkeypatch.setattr(planner, "candidates", lambda: {"pointwise_folded": metas})
    x = torch.empty(1, 4, 4, 16, device="meta", dtype=HALF).permute(0, 3, 1, 2)
    weight, bias = torch.empty(64, 16, 1, 1, device="meta", dtype=HALF), torch.empty(64, device="meta")
    call = Call("pointwise_folded", (x, weight, bias, True, None))
    entries = tune.measured("pointwise_folded", [({"cin": 16, "cout": 64}, call)], gpu.device)
    tune.write(tmp_path, "pointwise_folded", entries)
    if gpu.mode == "ptx":
        assert entries == [{"tile": metas[1]}]
    monkeypatch.setenv("MBV2_TILES", str(tmp_path))
    assert tuning.tile("pointwise_folded", HALF, cin=8, cout=8) in metas


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_keep_to_the_budget_on_one_layer(arch: int) -> None:
    chosen: dict[str, Call] = {}
    for call in workload.calls(1.0, 224, 128, HALF):
        if call.stage in ("expand", "depthwise", "project", "bn_apply", "project_backward", "expand_backward"):
            chosen.setdefault(call.stage, call)
    budget = resources.read_budget()[f"sm_{arch}"]["float16"]
    now = resources.rows_of(chosen.values(), ARCHITECTURES[arch])
    assert len(now) >= len(chosen)
    assert resources.worse(now, budget) == []


# All six architectures with all three types take an hour: `python -m bench.resources check`. Here are one of each kind
# of tensor core in half precision and the code without tensor cores in single precision.
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("arch", "dtype"), [(80, "float16"), (90, "float16"), (100, "float16"), (80, "float32")])
def test_kernels_keep_to_the_budget(arch: int, dtype: str) -> None:
    now = resources.rows(ARCHITECTURES[arch], resources.DTYPES[dtype], resources.FULL_WIDTH)
    assert resources.worse(now, resources.read_budget()[f"sm_{arch}"][dtype]) == []
