"""mbv2.pth_file against torch.load: equal where it reads, and left to torch.load otherwise."""

import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mbv2 import pth_file
from mbv2.errors import UserError
from mbv2.weights import read_tensors

TYPES = list(pth_file._DTYPES.values())


def agrees(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert ours.requires_grad == theirs.requires_grad
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            agrees(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            agrees(*pair)
    else:
        assert ours == theirs


def saved(tmp_path: Path, content: Any) -> Path:
    torch.save(content, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_a_network_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    path = saved(tmp_path, torchvision.models.mobilenet_v2(width_mult=0.35).state_dict())
    ours = pth_file.read(path)
    assert len(ours) == 314
    agrees(ours, torch.load(path, weights_only=True))
    assert ours._metadata == torch.load(path, weights_only=True)._metadata


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_types_layouts_and_shared_memory(tmp_path: Path, data: st.DataObject) -> None:
    content: dict[str, Any] = {"epoch": 3, "meta": {"alpha": 0.5, "names": ["a", "b"]}, "inner": OrderedDict()}
    for index in range(data.draw(st.integers(0, 4))):
        shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
        base = torch.randint(0, 2, [*shape, 3]).to(data.draw(st.sampled_from(TYPES)))
        content["inner"][f"whole{index}"] = base
        content["inner"][f"part{index}"] = base[..., data.draw(st.integers(0, 2))]
        content[f"turned{index}"] = base.movedim(-1, 0)
    path = saved(tmp_path, content)
    agrees(pth_file.read(path), torch.load(path, weights_only=True))


def test_views_of_one_storage_stay_so_and_the_file_is_not_written_to(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    path = saved(tmp_path, {"whole": whole, "part": whole[2:4]})
    before = path.read_bytes()
    ours = pth_file.read(path)
    ours["part"].zero_()
    assert ours["whole"].tolist() == [0, 1, 0, 0, 4, 5]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        {"parameter": nn.Parameter(torch.ones(2))},
        {"complex": torch.ones(2, dtype=torch.complex64)},
        {"sparse": torch.eye(2).to_sparse()},
        {"size": torch.Size([2])},
    ],
    ids=lambda content: next(iter(content)),
)
def test_what_it_does_not_know_is_left_to_torch(tmp_path: Path, content: dict[str, Any]) -> None:
    path = saved(tmp_path, content)
    with pytest.raises(pth_file.Unusual):
        pth_file.read(path)
    expected = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    expected.pop("sparse", None)
    agrees(read_tensors(path)[0], {key: torch.load(path, weights_only=True)[key] for key in expected})


def test_files_of_before_torch_1_6_are_left_to_torch(tmp_path: Path) -> None:
    content = {"a": torch.arange(3.0)}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(pth_file.Unusual):
        pth_file.read(tmp_path / "old.pth")
    agrees(read_tensors(tmp_path / "old.pth")[0], content)


class Code:
    """What a hostile file would hold."""

    def __init__(self, target: Any, *args: Any) -> None:
        self.call = (target, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("target", [os.mkdir, eval, getattr], ids=lambda target: target.__name__)
def test_code_is_never_run(tmp_path: Path, target: Any) -> None:
    mark = tmp_path / "mark"
    argument = {os.mkdir: (str(mark),), eval: (f"__import__('os').mkdir({str(mark)!r})",), getattr: (mark, "mkdir")}
    path = saved(tmp_path, {"a": torch.ones(1), "code": Code(target, *argument[target])})
    with pytest.raises(pth_file.Unusual, match="it asks for"):
        pth_file.read(path)
    with pytest.raises(UserError, match="never run"):
        read_tensors(path)
    assert not mark.exists()


def rewritten(path: Path, pickled: bytes) -> Path:
    """The file with another pickle in it."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in records.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else value)
    return path


def test_a_file_cannot_change_what_the_next_one_is_read_with(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.arange(4.0)})
    # The function that makes tensors, then attributes for it: BUILD with (None, {"__defaults__": (1,)}).
    hostile = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    rewritten(path, hostile)
    pth_file.read(path)
    whole = saved(tmp_path, {"a": torch.arange(4.0)})
    agrees(pth_file.read(whole), torch.load(whole, weights_only=True))


def test_a_tensor_beyond_its_storage_is_no_tensor(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.arange(4.0)})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("weights/data.pkl")
    assert pickled.count(b"K\x04\x85") == 1  # the size, (4,)
    rewritten(path, pickled.replace(b"K\x04\x85", b"K\xff\x85"))
    with pytest.raises(pth_file.Unusual):
        pth_file.read(path)
    with pytest.raises(UserError):
        read_tensors(path)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_refused_or_read_as_torch_reads_it(tmp_path: Path, data: st.DataObject) -> None:
    path = saved(tmp_path, {"epoch": 3, "a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.int16)})
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(len(whole) // 2, len(whole)))])
    try:
        ours = pth_file.read(path)
    except pth_file.Unusual:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = torch.load(path, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, UnicodeDecodeError, ValueError, KeyError):
            return
    agrees(ours, theirs)
