import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mbv2.errors import UserError
from mbv2.plots import draw_confusion, draw_curves

HEADER = "epoch,train_loss,val_loss,top1,top5,lr,images_per_s,seconds,skipped\n"


def _metrics(path, epochs=30, every=1):
    rows = [HEADER]
    for epoch in range(epochs):
        loss = 0.8 + 4 * 0.88**epoch
        measured = f"{loss + 0.2},{0.8 - 0.7 * 0.9**epoch},{0.95 - 0.7 * 0.85**epoch}" if epoch % every == 0 else ",,"
        rows.append(f"{epoch},{loss},{measured},0.1,100,10,0\n")
    path.write_text("".join(rows))
    return path


def _pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def _has(pixels, hexadecimal):
    colour = [int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(pixels - colour).max(axis=2) < 8).sum() > 50)


def test_curves_show_both_losses_and_both_accuracies(tmp_path):
    draw_curves(_metrics(tmp_path / "metrics.csv"), tmp_path / "curves.png")
    pixels = _pixels(tmp_path / "curves.png")
    assert pixels.shape == (600, 1500, 3)
    left, right = pixels[:, :750], pixels[:, 750:]
    assert _has(left, "#3b6fb6")
    assert _has(left, "#d9622b")
    assert _has(right, "#d9622b")
    assert _has(right, "#2f9e77")


@pytest.mark.parametrize("epochs", [0, 1, 200])
def test_curves_of_any_length_can_be_drawn(tmp_path, epochs):
    draw_curves(_metrics(tmp_path / "metrics.csv", epochs), tmp_path / "curves.png")
    assert _has(_pixels(tmp_path / "curves.png"), "#3b6fb6") == (epochs > 0)


def test_epochs_without_validation_and_a_torn_line_are_left_out(tmp_path):
    metrics = _metrics(tmp_path / "metrics.csv", 10, every=5)
    with metrics.open("a") as file:
        file.write("10,nan,inf,,,,,,\n11,0.")
    draw_curves(metrics, tmp_path / "curves.png")
    assert _has(_pixels(tmp_path / "curves.png"), "#2f9e77")


def test_the_old_picture_is_replaced_and_nothing_else_is_left(tmp_path):
    (tmp_path / "curves.png").write_bytes(b"old")
    draw_curves(_metrics(tmp_path / "metrics.csv", 2), tmp_path / "curves.png")
    _pixels(tmp_path / "curves.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.csv"]


def test_a_file_that_is_missing_or_no_metrics_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"could not read .*nothing\.csv"):
        draw_curves(tmp_path / "nothing.csv", tmp_path / "curves.png")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"other\.csv is not a run's metrics\.csv"):
        draw_curves(tmp_path / "other.csv", tmp_path / "curves.png")


def test_a_folder_that_is_missing_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="could not write"):
        draw_curves(_metrics(tmp_path / "metrics.csv", 2), tmp_path / "missing" / "curves.png")


def test_pyplot_is_not_touched(tmp_path):
    import subprocess

    code = (
        "import sys; from mbv2.plots import draw_curves; draw_curves(sys.argv[1], sys.argv[2]); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    arguments = [str(_metrics(tmp_path / "metrics.csv", 2)), str(tmp_path / "curves.png")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("number", [1, 2, 12, 60])
def test_a_confusion_matrix_is_darkest_on_its_diagonal(tmp_path, number):
    matrix = torch.eye(number, dtype=torch.int64) * 9 + torch.ones(number, number, dtype=torch.int64)
    draw_confusion(matrix, [f"class {index}" for index in range(number)], tmp_path / "confusion.png")
    pixels = _pixels(tmp_path / "confusion.png")
    assert max(pixels.shape) < 3600
    assert (pixels.sum(axis=2) < 500).sum() > 500


def test_odd_class_names_and_an_empty_class_can_be_drawn(tmp_path):
    names = ["$x_{$ and $", "波斯猫", "a very long class name that would fill the whole picture", ""]
    draw_confusion(np.diag([3, 0, 2, 1]), names, tmp_path / "confusion.png")
    _pixels(tmp_path / "confusion.png")


def test_too_many_classes_and_a_wrong_shape_are_errors(tmp_path):
    with pytest.raises(UserError, match="at most 60"):
        draw_confusion(np.eye(61), ["x"] * 61, tmp_path / "confusion.png")
    with pytest.raises(ValueError, match=r"\[2, 3\] for 2"):
        draw_confusion(np.zeros((2, 3)), ["x"] * 2, tmp_path / "confusion.png")
    assert not (tmp_path / "confusion.png").exists()
