"""The table of what is known of each kernel without a GPU."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import proof, resources
from mbv2.kernels import aten
from mbv2.kernels.triton import support


@pytest.fixture(autouse=True)
def only_emulated(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--device") != "ptx":
        pytest.skip("the table is of PTX that runs on the CPU")


def test_the_stages_are_those_of_the_contract_in_its_order() -> None:
    assert proof.STAGES[:2] == ["stem", "expand"] and proof.STAGES[-1] == "head_folded"
    assert {"bn_finalize", "depthwise_backward", "inverted_residual_folded"} <= set(proof.STAGES)


def test_errors_are_of_kernels_that_ran() -> None:
    found = proof.errors("bn_apply", torch.float16)
    assert len(found) == 3 and all(0 < pair.kernel <= 1.3 * pair.eager + proof.FLOOR["float16"] for pair in found)


def test_a_stage_that_launches_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "stages", lambda: aten)
    with pytest.raises(RuntimeError, match="bn_apply launched no kernel"):
        proof.errors("bn_apply", torch.float16)


def test_a_wrong_kernel_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    right = support.stages().bn_apply

    def wrong(*args: Any) -> Any:
        return right(*args) * 1.01

    monkeypatch.setattr(support, "stages", lambda: SimpleNamespace(bn_apply=wrong))
    monkeypatch.setattr(proof, "STAGES", ["bn_apply"])
    table, problems = proof.rows()
    assert len(problems) == 9 and "bn_apply float16" in problems[3]
    assert proof.as_markdown(table).count("\n| `") == 1


def test_the_committed_table_has_every_stage_and_the_budget_s_figures() -> None:
    table = {row["stage"]: row for row in json.loads((proof.RESULTS / "proof.json").read_text())}
    assert list(table) == proof.STAGES
    rows = resources.read_budget()["sm_90"]["float16"]
    registers = max(row["registers"] for name, row in rows.items() if ": project " in name)
    assert table["project"]["static"]["sm_90"]["registers"] == registers
