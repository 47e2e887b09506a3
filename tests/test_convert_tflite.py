"""The real quantised TFLite files, converted, against the same files run by ai-edge-litert."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import mbv2
from mbv2.convert import convert
from mbv2.data.decode import decode
from mbv2.data.torch_loader import eval_picture
from mbv2.kernels import cpu_network
from mbv2.trained import load_trained

litert = pytest.importorskip("ai_edge_litert.interpreter")


def compared(source: Path, data: Path, folder: Path) -> tuple[float, int, int]:
    """(share of the same class, ours right, theirs right) over the whole set, pictures squeezed to the square."""
    convert(source, folder / "w.safetensors")
    trained = load_trained(str(folder / "w.safetensors"))
    fast = mbv2.optimize_for_inference(trained.model) if cpu_network.refusal() is None else trained.model
    interpreter = litert.Interpreter(str(source), num_threads=1)
    interpreter.allocate_tensors()
    feed, answer = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (trained.recipe.mean, trained.recipe.std))
    same = ours = theirs = 0
    with (data / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        pixels = eval_picture(decode((data / "images" / row["file"]).read_bytes(), row["file"]), trained.recipe)
        interpreter.set_tensor(feed, np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())[None])
        interpreter.invoke()
        b = int(interpreter.get_tensor(answer)[0, 1:].argmax())
        with torch.no_grad():
            a = int(trained.model.real_logits(fast((pixels[None] / 255 - mean) / std)).argmax())
        same, ours, theirs = same + (a == b), ours + (a == int(row["label"])), theirs + (b == int(row["label"]))
    return same / len(rows), ours, theirs


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quantisation_aware_file_recognises_the_same(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "weights" / "mobilenet_v2_1.0_224_quant.tflite"
    agreement, ours, theirs = compared(source, shared_data / "eval" / "nips17_ccby_299", tmp_path)
    print(f"{source.name}: same class {100 * agreement:.2f} %, right of 700: ours {ours}, litert {theirs}")
    assert agreement >= 0.975
    assert ours >= 579


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_post_training_file_recognises_nearly_the_same(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "weights" / "tf2_mobilenet_v2_1.0_224_ptq.tflite"
    agreement, ours, theirs = compared(source, shared_data / "eval" / "nips17_ccby_299", tmp_path)
    print(f"{source.name}: same class {100 * agreement:.2f} %, right of 700: ours {ours}, litert {theirs}")
    assert agreement >= 0.93
    assert ours >= theirs - 7


def test_facts_are_read_from_the_file(shared_data: Path, tmp_path: Path) -> None:
    said = convert(shared_data / "weights" / "mobilenet_v2_1.0_224_quant.tflite", tmp_path / "w.safetensors")
    trained = load_trained(str(tmp_path / "w.safetensors"))
    assert (trained.model.padding, trained.model.class_offset, trained.model.num_classes) == ("same", 1, 1001)
    assert trained.recipe.squeeze and trained.recipe.resolution == 224
    # The file's own quantisation: (x - 128) / 128.
    assert trained.recipe.mean == pytest.approx((128 / 255,) * 3) and trained.recipe.std == pytest.approx(
        (128 / 255,) * 3
    )
    assert "--calibrate" in said[-1]
