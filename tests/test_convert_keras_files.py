"""Files that Keras and TensorFlow wrote, converted, against Keras' own logits.

TensorFlow is in none of this project's extras. It may live elsewhere: MBV2_TENSORFLOW names its python.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mbv2 import weights
from mbv2.convert import convert

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = os.environ.get("MBV2_TENSORFLOW", "")
    if not python and importlib.util.find_spec("tensorflow") is None:
        pytest.skip("no TensorFlow (MBV2_TENSORFLOW names a python that has it)")
    folder = tmp_path_factory.mktemp("keras")
    command = [python or sys.executable, str(Path(__file__).with_name("keras_files.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("m.keras", 1e-5),
        ("m.h5", 1e-5),
        ("m.weights.h5", 1e-5),
        ("exported", 1e-5),
        ("saved", 1e-5),
        ("checkpoint", 1e-5),
        ("float32.tflite", 1e-5),
        ("float16.tflite", 0.02),
        ("weights8.tflite", 0.2),
        ("int8.tflite", 0.3),
    ],
)
def test_the_converted_network_gives_keras_logits(files: Path, tmp_path: Path, name: str, error: float) -> None:
    convert(files / name, tmp_path / "w.safetensors")
    model, meta = weights.model_from_weights(tmp_path / "w.safetensors")
    saved = np.load(files / "pictures.npz")
    expected = torch.from_numpy(saved["logits"])
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(saved["pictures"]).permute(0, 3, 1, 2).contiguous())
    # Measured by what pictures change in the logits.
    spread = expected - expected.mean(0)
    assert spread.norm() > 0.05 * expected.norm()
    assert (found - expected).norm() < error * spread.norm()
    assert (meta["padding"], meta["bn_eps"], meta["alpha"], meta["num_classes"]) == ("same", 1e-3, 0.35, 7)
    # The others hold variables only.
    assert meta["resolution"] == (96 if name in ("m.keras", "m.h5") or name.endswith(".tflite") else 224)
