"""The package: what is in it, what importing it costs, and that it installs without a compiler."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import mbv2

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
# Each takes longer to import than all of mbv2; whoever calls for them pays for them.
HEAVY = ("torchvision", "matplotlib", "nvidia.dali", "jsonargparse", "torchmetrics", "onnx", "onnxruntime", "timm")
HEAVY += ("transformers", "PIL", "tensorboard", "torch._dynamo", "torch._inductor")


def _imported(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    extra = _imported("import mbv2; mbv2.list_models()")
    assert "mbv2.zoo" in extra
    assert not extra & {"torch", "numpy", "yaml", *HEAVY}


def test_the_model_and_the_kernels_need_torch_alone() -> None:
    extra = _imported("import mbv2; mbv2.MobileNetV2; mbv2.kernels") - _imported("import torch")
    assert "mbv2.kernels.ops" in extra
    assert not extra & set(HEAVY)
    # Triton's compiler is for whoever launches a kernel.
    assert not {name for name in extra if name.startswith("triton")}


def test_sources_are_in_the_language_of_the_oldest_python() -> None:
    oldest = tuple(map(int, re.search(r'requires-python = ">=(\d+)\.(\d+)"', PROJECT).groups()))
    for folder in ("mbv2", "kernels", "bench", "tests", "docs"):
        for source in (ROOT / folder).rglob("*.py"):
            ast.parse(source.read_text(encoding="utf-8"), str(source), feature_version=oldest)
    assert f'target-version = "py{oldest[0]}{oldest[1]}"' in PROJECT


def test_the_version_is_the_same_everywhere() -> None:
    assert f'version = "{mbv2.__version__}"' in PROJECT
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == mbv2.__version__
    assert citation["license"] == "Apache-2.0"
    assert f"## {mbv2.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left beside the sources."""
    copy, out = tmp_path_factory.mktemp("source") / "mbv2", tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".git", ".venv", "*.so", "__pycache__", "build", "runs", "results", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    environment = {**os.environ, "MBV2_BUILD": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=copy, env=environment, check=True, capture_output=True)
    return next(out.glob("*.tar.gz"))


def _wheel(sdist: Path, folder: Path, **variables: str) -> tuple[list[str], str]:
    """(names in the wheel built from the sdist, what the build said)."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=next(path for path in folder.iterdir() if path.is_dir()),
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return archive.namelist(), done.stderr


def _has_everything(names: list[str]) -> None:
    assert {
        "mbv2/py.typed",
        "mbv2/kernels/ops.py",
        "mbv2/kernels/triton/stages.py",
        "mbv2/imagenet_classes.txt",
    } <= set(names)
    assert len([name for name in names if name.startswith("mbv2/configs/")]) == 22
    tiles = {f"mbv2/kernels/triton/tiles/{path.name}" for path in (ROOT / "kernels/triton/tiles").glob("*.json")}
    assert tiles <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith("mbv2") for name in names)
    # Every module of the checkout is there: a new folder that setup.py does not name would be missed.
    for folder, package in (("mbv2", "mbv2"), ("kernels", "mbv2/kernels")):
        for source in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{source.relative_to(ROOT / folder).as_posix()}" in names


@pytest.mark.slow
def test_a_wheel_without_the_compiled_module_has_everything_else(sdist: Path, tmp_path: Path) -> None:
    names, said = _wheel(sdist, tmp_path, MBV2_BUILD="0")
    _has_everything(names)
    assert not [name for name in names if name.endswith(".so")]
    assert "no compiled kernels" not in said


@pytest.mark.slow
def test_without_a_compiler_the_package_is_pure_python_and_says_so(sdist: Path, tmp_path: Path) -> None:
    names, said = _wheel(sdist, tmp_path, CC="false", CXX="false", MBV2_BUILD="", MBV2_CUDA="0")
    _has_everything(names)
    assert not [name for name in names if name.endswith(".so")]
    assert re.search(r"mbv2: no compiled C\+\+ kernels, as their build failed .*works without them", said)
