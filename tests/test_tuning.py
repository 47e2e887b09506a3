"""Tables of tiles: which entry is taken, and that every kernel's table is whole."""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Gpu
from stage_check import check_stage
from triton.runtime.interpreter import GridExecutor

from bench import workload
from mbv2.kernels.triton import stages, tuning

HALF, SINGLE = torch.float16, torch.float32
TILES = Path(tuning.__file__).parent / "tiles"
NAMES = sorted(path.stem for path in TILES.glob("*.json"))
ARCHITECTURES = {"default", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the project's own tables; a "matmul" is in it."""
    monkeypatch.setattr(tuning, "_TABLES", tmp_path)
    write(
        tmp_path,
        {
            "sm_80": [
                {"bytes": 2, "cin": 16, "tile": {"BLOCK_M": 16}},
                {"bytes": 2, "cin": 64, "cout": 32, "tile": {"BLOCK_M": 32}},
                {"bytes": 4, "tile": {"BLOCK_M": 64}},
            ],
            "default": [{"cin": 512, "tile": {"BLOCK_M": 128}}],
        },
    )
    tuning._entries.cache_clear()
    yield tmp_path
    tuning._entries.cache_clear()


def write(folder: Path, table: dict[str, Any]) -> None:
    (folder / "matmul.json").write_text(json.dumps(table))


def at(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    monkeypatch.setattr(tuning, "architecture", lambda: arch)


@pytest.mark.parametrize(
    ("sizes", "block"),
    [
        ({"cin": 16, "cout": 999}, 16),
        ({"cin": 17, "cout": 32}, 32),
        ({"cin": 16, "cout": 32}, 16),
        ({"cin": 64, "cout": 33}, 128),
        ({"cin": 65, "cout": 8}, 128),
    ],
)
def test_the_first_entry_whose_bounds_hold_is_taken(
    tables: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], block: int
) -> None:
    at(monkeypatch, "sm_80")
    assert tuning.tile("matmul", HALF, **sizes) == {"BLOCK_M": block}


def test_entries_are_for_one_size_of_an_element(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, "sm_80")
    assert tuning.tile("matmul", torch.bfloat16, cin=8, cout=8) == tuning.tile("matmul", HALF, cin=8, cout=8)
    assert tuning.tile("matmul", SINGLE, cin=8, cout=8) == {"BLOCK_M": 64}
    assert tuning.tile("matmul", torch.float64, cin=8, cout=8) == {"BLOCK_M": 128}


def test_an_architecture_without_a_list_takes_the_default(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, "sm_77")
    assert tuning.tile("matmul", HALF, cin=8, cout=8) == {"BLOCK_M": 128}


def test_sizes_beyond_every_entry_are_an_error_that_names_them(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, "sm_80")
    with pytest.raises(LookupError, match=r"matmul.*sm_80.*float16.*'cin': 513"):
        tuning.tile("matmul", HALF, cin=513, cout=8)


def test_a_kernel_without_a_table_is_an_error_that_names_it(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, "sm_80")
    with pytest.raises(LookupError, match="nosuch"):
        tuning.tile("nosuch", HALF)


def test_measured_tables_are_looked_at_first(
    tables: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = tmp_path_factory.mktemp("measured")
    write(measured, {"sm_80": [{"bytes": 2, "cin": 32, "tile": {"BLOCK_M": 256}}]})
    monkeypatch.setenv("MBV2_TILES", str(measured))
    at(monkeypatch, "sm_80")
    assert tuning.tile("matmul", HALF, cin=32, cout=8) == {"BLOCK_M": 256}
    assert tuning.tile("matmul", HALF, cin=64, cout=8) == {"BLOCK_M": 32}
    assert tuning.tile("matmul", SINGLE, cin=8, cout=8) == {"BLOCK_M": 64}
    at(monkeypatch, "sm_90")
    assert tuning.tile("matmul", HALF, cin=32, cout=8) == {"BLOCK_M": 128}


def test_what_a_lookup_returns_may_be_changed(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, "sm_80")
    tuning.tile("matmul", HALF, cin=8, cout=8)["BLOCK_M"] = 1
    assert tuning.tile("matmul", HALF, cin=8, cout=8) == {"BLOCK_M": 16}


def test_forced_holds_inside_and_nests(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, "sm_80")
    with tuning.forced("matmul", BLOCK_M=1):
        with tuning.forced("matmul", BLOCK_M=2), tuning.forced("other", BLOCK_M=3):
            assert tuning.tile("matmul", HALF, cin=9999) == {"BLOCK_M": 2}
            assert tuning.tile("other", HALF) == {"BLOCK_M": 3}
        assert tuning.tile("matmul", HALF, cin=8) == {"BLOCK_M": 1}
    assert tuning.tile("matmul", HALF, cin=8, cout=8) == {"BLOCK_M": 16}


def test_forced_ends_with_an_error_inside(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, "sm_80")
    with pytest.raises(KeyError), tuning.forced("matmul", BLOCK_M=1):
        raise KeyError
    assert tuning.tile("matmul", HALF, cin=8, cout=8) == {"BLOCK_M": 16}


def test_lookups_are_recorded_in_order(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, "sm_80")
    with tuning.recorded() as record:
        tuning.tile("matmul", HALF, cin=8, cout=8)
        with tuning.recorded() as inner:
            tuning.tile("matmul", SINGLE, cin=9, cout=8)
        tuning.tile("matmul", SINGLE, cin=10, cout=8)
    assert [lookup.sizes["cin"] for lookup in record] == [8, 10]
    assert inner == [tuning.Lookup("matmul", SINGLE, {"cin": 9, "cout": 8}, {"BLOCK_M": 64})]


def test_the_architecture_is_all_a_lookup_asks_the_device(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", None)
    expected = {"interpreter": "default", "ptx": "sm_80"}
    assert gpu.mode not in expected or tuning.architecture() == expected[gpu.mode]
    assert {tuning.architecture() for _ in range(2)} == {tuning.architecture()}


def test_dot_precision_follows_torch() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert (tuning.dot_precision(SINGLE), tuning.dot_precision(HALF)) == ("tf32", "ieee")
        torch.backends.cuda.matmul.allow_tf32 = False
        assert tuning.dot_precision(SINGLE) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("kernel", NAMES)
def test_every_table_is_whole(kernel: str) -> None:
    table = json.loads((TILES / f"{kernel}.json").read_text())
    assert set(table) <= ARCHITECTURES
    assert set(table["default"][-1]) == {"tile"}, "the last entry must match everything"
    tiles = [entry["tile"] for entries in table.values() for entry in entries]
    names = {frozenset(tile) - {"maxnreg"} for tile in tiles if "SPLIT" not in tile}
    assert len(names) == 1, "every tile must set the same parameters"
    assert {"num_warps", "num_stages"} <= names.pop()
    for arch, entries in table.items():
        for entry in entries:
            assert entry.get("bytes", 2) in (2, 4, 8), (arch, entry)
            tile = entry["tile"]
            if tile == {"SPLIT": 1}:
                continue
            powers = {n: v for n, v in tile.items() if n.startswith("BLOCK_") or n == "num_warps"}
            assert all(v > 0 and v & (v - 1) == 0 for v in powers.values()), (arch, entry)
            assert tile["num_warps"] in (1, 2, 4, 8, 16), (arch, entry)
            assert 1 <= tile["num_stages"] <= 5, (arch, entry)


@pytest.mark.parametrize("kernel", NAMES)
def test_no_entry_is_hidden_by_an_earlier_one(kernel: str) -> None:
    for arch, entries in json.loads((TILES / f"{kernel}.json").read_text()).items():
        bounds = [{name: value for name, value in entry.items() if name != "tile"} for entry in entries]
        for index, late in enumerate(bounds):
            for early in bounds[:index]:
                covers = all(late.get(n) == v if n == "bytes" else late.get(n, v + 1) <= v for n, v in early.items())
                assert not covers, f"{arch}: {late} can never be taken, {early} comes first"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_tile_that_the_tables_give_a_networks_layers_computes_right(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpu.mode != "interpreter":
        pytest.skip("tiles of all architectures are run in the interpreter, which is none of them")
    done: set[tuple[Any, ...]] = set()
    for arch, alpha in product(sorted(ARCHITECTURES), (1.0, 1.4)):
        at(monkeypatch, arch)
        for call in workload.calls(alpha, 32, 1, HALF):
            if call.args[0].dim() == 4 and (kind := how(call, monkeypatch)) not in done:
                done.add(kind)
                check_stage(gpu, getattr(stages, call.stage), *(filled(value) for value in call.args), slack=3)


def how(call: workload.Call, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """The tiles a call takes, and on which side of them its channels lie; nothing is run."""
    with monkeypatch.context() as quiet, tuning.recorded() as record:
        quiet.setattr(GridExecutor, "__call__", lambda *_, **__: None)
        getattr(stages, call.stage)(*call.args)
    sides = [
        (lookup.kernel, *lookup.meta.items(), *((size > block, size % block) for size, block in pairs(lookup)))
        for lookup in record
    ]
    return call.stage, *sides


def pairs(lookup: tuning.Lookup) -> Iterator[tuple[int, int]]:
    blocks = [value for name, value in lookup.meta.items() if name.startswith("BLOCK_")]
    yield from product((size for name, size in lookup.sizes.items() if name != "rows"), blocks)


def filled(value: Any) -> Any:
    """A tensor with values in place of one without memory; statistics positive."""
    if not isinstance(value, torch.Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return made.copy_(torch.randn(value.shape) if value.dim() == 4 else torch.rand(value.shape) + 0.5)
