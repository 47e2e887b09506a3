"""The command line as a whole: choosing the subcommand, exit codes, one-line errors."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from types import ModuleType

import pytest

import mbv2
from mbv2 import cli
from mbv2.errors import UserError


def _stand_in(monkeypatch: pytest.MonkeyPatch, main: object) -> None:
    """Let `main` be what `mbv2 train` runs."""
    module = ModuleType("stand_in")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(cli.COMMANDS, "train", ("stand_in", ""))


def _raising(error: BaseException) -> object:
    def main(argv: Sequence[str]) -> int:
        raise error

    return main


def test_every_command_has_its_module() -> None:
    missing = [module for module, _ in cli.COMMANDS.values() if importlib.util.find_spec(module) is None]
    assert missing == []


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)


def test_no_command_shows_the_usage_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: mbv2")


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mbv2 {mbv2.__version__}\n"


def test_a_mistyped_command_names_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evla"]) == 2
    assert "did you mean eval?" in capsys.readouterr().err


def test_a_command_gets_the_arguments_after_its_name_and_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def main(argv: Sequence[str]) -> int:
        seen.append(list(argv))
        return 75

    _stand_in(monkeypatch, main)
    assert cli.main(["train", "--alpha", "0.5"]) == 75
    assert seen == [["--alpha", "0.5"]]


def test_a_user_error_is_one_line_and_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _stand_in(monkeypatch, _raising(UserError("--alpha 9: too wide; use 1.4")))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "mbv2: error: --alpha 9: too wide; use 1.4\n"


def test_a_backend_that_cannot_run_is_one_line_and_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mbv2.kernels import BackendError

    _stand_in(monkeypatch, _raising(BackendError("no backend 'abacus'")))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "mbv2: error: no backend 'abacus'\n"


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch, _raising(KeyboardInterrupt()))
    assert cli.main(["train"]) == 130


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), FileNotFoundError("a bug")])
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    _stand_in(monkeypatch, _raising(error))
    with pytest.raises(type(error), match="a bug"):
        cli.main(["train"])


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "mbv2", "models"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert done.returncode == cli.EXIT_BROKEN_PIPE
    assert done.stderr == ""


def test_help_and_the_table_of_models_do_not_import_torch() -> None:
    code = (
        "import sys\nfrom mbv2.cli import main\n"
        "main(['--help']), main(['models'])\n"
        "sys.exit(sorted({'torch', 'torchvision', 'jsonargparse', 'matplotlib'} & set(sys.modules)).__repr__()"
        " if {'torch', 'torchvision', 'jsonargparse', 'matplotlib'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_models_lists_all_variants_and_whose_figures_these_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in mbv2.list_models())
    assert "published by MindSpore / TF, not ours" in out
    row = next(line for line in out.splitlines() if line.startswith("mobilenet_v2_0.75_192 "))
    assert row.split()[1:] == ["69.20", "88.70", "68.70", "88.90"]


def test_models_as_json_has_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert "not ours" in listed["note"]
    assert [entry["name"] for entry in listed["models"]] == mbv2.list_models()


@pytest.mark.parametrize("command", ["eval", "infer", "doctor", "models"])
def test_every_command_has_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"mbv2 {command}" in capsys.readouterr().out
