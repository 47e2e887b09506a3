import json
import shutil
import subprocess

import pytest
import torch

import mbv2
from mbv2.distributed import World
from mbv2.train import environment


@pytest.fixture
def checkout(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("no git")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]

    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first", "--no-verify", "--no-gpg-sign")
    return tmp_path


def test_it_is_written_as_json_with_versions_and_device(tmp_path):
    environment.write(tmp_path / "environment.json", World())
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["mbv2"] == mbv2.__version__
    assert written["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (written["device"], written["world_size"]) == ("cpu", 1)


def test_secrets_of_the_environment_stay_out(monkeypatch):
    monkeypatch.setenv("MY_ACCESS_TOKEN", "hunter2")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    described = environment.describe(World())
    assert described["variables"]["OMP_NUM_THREADS"] == "3"
    assert "hunter2" not in json.dumps(described)


def test_the_revision_is_the_commit_and_says_when_files_were_changed(checkout):
    clean = environment.git_revision(checkout)
    assert len(clean) == 40
    (checkout / "file").write_text("2")
    assert environment.git_revision(checkout) == f"{clean}-dirty"


def test_a_repository_further_up_is_not_taken_for_ours(checkout):
    (checkout / "venv").mkdir()
    assert environment.git_revision(checkout / "venv") is None


def test_without_git_there_is_no_revision(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.git_revision(checkout) is None
