"""Results as files: what is written is read back, and nothing of this machine's folders is told."""

import json
from pathlib import Path

import pytest

from bench import report, schema, tables
from bench.schema import Result
from bench.tables import Column
from mbv2.errors import UserError

MACHINE = {"cpu": "AMD EPYC 7713 64-Core Processor", "cores": 2, "memory_gb": 24.0, "system": "Linux", "isa": "AVX2"}
MACHINE |= {"gpu": None, "load": 0.5}


def result(bench: str = "loader", rows: list[schema.Row] | None = None, **settings: object) -> Result:
    """A result as if it had been measured."""
    versions = {"python": "3.11.2", "torch": "2.14.1"}
    return Result(bench, f"python -m bench {bench}", "2026-11-26T10:00+00:00", MACHINE, versions, settings, rows or [])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = result(rows=[{"name": "a", "median_ms": 1.5}, {"name": "b", "median_ms": None}], batch=4)
    written.left_out["peer"] = "not installed"
    written.write(tmp_path / "folder" / "result.json")
    assert schema.read(tmp_path / "folder" / "result.json") == written


def test_a_row_is_one_line_of_the_file(tmp_path: Path) -> None:
    result(rows=[{"name": "a"}, {"name": "b"}]).write(tmp_path / "r.json")
    lines = (tmp_path / "r.json").read_text().splitlines()
    assert [line.strip().rstrip(",") for line in lines if '"name"' in line] == ['{"name": "a"}', '{"name": "b"}']


def test_the_result_tells_where_when_and_with_what() -> None:
    made = schema.new("kernels", ["--batch", "2"], {"batch": 2})
    assert made.command == "python -m bench kernels --batch 2"
    assert made.machine["cores"] >= 1
    assert made.machine["memory_gb"] > 0.1
    assert {"python", "mbv2", "torch"} <= set(made.versions)
    assert made.date.endswith("+00:00")


def test_folders_of_this_machine_are_left_out_of_the_command() -> None:
    argv = ["--data_url", "/somebody/secret/flowers5", "--out=/somebody/results/x", "--operators", "block 8"]
    assert schema.command("loader", argv) == (
        "python -m bench loader --data_url flowers5 --out=x --operators 'block 8'"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no result of `python -m bench`"),
        ('{"schema": "other"}', "no result of `python -m bench`"),
        (json.dumps({"schema": schema.SCHEMA, "bench": "x"}), "'command' is missing"),
    ],
)
def test_a_file_that_is_no_result_is_a_clear_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=message):
        schema.read(tmp_path / "r.json")


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        schema.read(tmp_path / "none.json")


def test_the_place_is_one_line() -> None:
    assert schema.place(result()) == "2 cores of AMD EPYC 7713, torch 2.14.1, 2026-11-26, load 0.5"


COLUMNS = (Column("name", "runner"), Column("median_ms", "ms", ".1f"), Column("note", "note"))


def test_numbers_stand_to_the_right_and_names_to_the_left() -> None:
    rows = [{"name": "short", "median_ms": 1.25}, {"name": "much longer", "median_ms": 100.0, "note": "x"}]
    shown = result(rows=rows)
    shown.left_out["peer"] = "not installed"
    lines = tables.text(shown, COLUMNS).splitlines()
    assert lines[3:] == [
        "runner          ms  note",
        "short          1.2",
        "much longer  100.0  x",
        "left out: peer: not installed",
    ]


def test_the_markdown_table_aligns_numbers() -> None:
    lines = tables.markdown(result(rows=[{"name": "a", "median_ms": 2, "note": None}]), COLUMNS).splitlines()
    assert lines == ["| runner | ms | note |", "| :-- | --: | :-- |", "| a | 2.0 |  |"]


def test_a_result_in_which_all_was_left_out_is_written_and_fails(tmp_path: Path) -> None:
    written = result("cpu_blocks")
    written.left_out["mbv2"] = "wrong: off by 1"
    assert report.finish(written, [Column("name", "name")], tmp_path / "r") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
