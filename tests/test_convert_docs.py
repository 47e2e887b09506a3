"""The commands of docs/converting.md and docs/export.md, as they stand there."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from mbv2 import cli, weights
from mbv2.model import MobileNetV2

DOCS = Path(__file__).resolve().parents[1] / "docs"


def commands(page: str) -> list[list[str]]:
    """All lines of the page's shell blocks but those of the first, which shows the pattern."""
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks[1:] for line in block.splitlines() if line]


@pytest.mark.parametrize("page", ["converting.md", "export.md"])
def test_every_command_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = MobileNetV2(3, 0.35)
    torch.save(model.state_dict(), "torchvision.pth")
    weights.save_weights("ours.safetensors", model.state_dict(), {"alpha": 0.35, "resolution": 64})
    found = commands(page)
    assert len(found) >= 3
    for program, *arguments in found:
        assert program == "mbv2"
        assert cli.main(arguments) == 0, arguments
