"""The Triton backend's stages as a whole: the same functions as the contract's."""

import inspect
from types import ModuleType

import pytest

from mbv2.kernels import aten
from mbv2.kernels.triton import stages

TWINS = [name for name, value in vars(aten).items() if inspect.isfunction(value) and value.__module__ == aten.__name__]
PUBLIC = sorted(name for name in TWINS if not name.startswith("_"))


def documented(module: ModuleType, name: str) -> bool:
    return bool(inspect.getdoc(getattr(module, name)))


def test_every_stage_of_the_contract_is_there_and_no_other() -> None:
    assert sorted(stages.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_stage_has_the_contract_s_arguments_and_results(name: str) -> None:
    assert inspect.signature(getattr(stages, name)) == inspect.signature(getattr(aten, name))
    assert documented(stages, name)
