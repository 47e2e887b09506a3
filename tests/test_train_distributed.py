"""Training in two processes over gloo, started as a user starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from mbv2 import distributed
from mbv2.data import Batch
from mbv2.model import MobileNetV2
from mbv2.train.batch_augment import BatchAugment
from mbv2.train.loop import _optimizer_step
from mbv2.train.options import TrainOptions
from mbv2.train.run import _prepare

COMMON = ["--device_target=CPU", "--alpha=0.35", "--resize=64", "--max_lr=0.001", "--num_parallel_workers=0"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("val", 3)):
        for channel, name in enumerate(("red", "green")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture = torch.randint(0, 80, (64, 64, 3), generator=generator, dtype=torch.uint8)
                picture[..., channel] += 150
                Image.fromarray(picture.numpy()).save(folder / f"{number}.png")
    return root


def start(processes: int, folder: Path, data: Path, *options: str) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "mbv2.train", *COMMON, f"--data_url={data}"]
    return subprocess.run(
        [*command, f"--ckpt_save_dir={folder}", *options],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def steps_in_double(rank: int, world_size: int, port: int, folder: str) -> None:
    """Three steps of this rank's share of a joint batch, in float64, where the order of sums does not show."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = distributed.init("CPU")
    torch.manual_seed(0)
    images, labels = torch.randn(3, 8, 3, 32, 32).double(), torch.randint(3, (3, 8))
    options = TrainOptions(alpha=0.35, sync_bn=True, dropout=0.0, max_lr=1e-3, batch_size=8 // world_size)
    training = _prepare(options, MobileNetV2(3, 0.35, 0.0).double(), [None] * 3, world)
    gradients = []
    for step in range(3):
        mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
        batch = Batch(images[step, mine], labels[step, mine], [])
        augment = BatchAugment(3, 0.0, 0.0, 0, rank)
        _optimizer_step(training, options, nn.CrossEntropyLoss(), augment, [batch], step, world)
        gradients.append([value["momentum_buffer"].clone() for value in training.optimizer.state.values()])
    if rank == 0:
        torch.save((gradients, training.model.state_dict()), Path(folder) / f"{world_size}.pt")
    distributed.shutdown()


def test_two_ranks_with_shared_batch_norm_step_as_one_with_the_joint_batch(tmp_path):
    for world_size in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(steps_in_double, (world_size, port, str(tmp_path)), nprocs=world_size)
    one, two = (torch.load(tmp_path / f"{size}.pt") for size in (1, 2))
    # The first momentum is the averaged gradient itself.
    torch.testing.assert_close(two[0][0], one[0][0], rtol=1e-6, atol=1e-9)
    # BatchNorm over few values amplifies what rounding is left, from step to step.
    torch.testing.assert_close(two[0], one[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(two[1], one[1], rtol=1e-4, atol=1e-7)


def test_two_ranks_under_torchrun_train_without_a_stride_warning(pictures, tmp_path):
    found = start(2, tmp_path / "two", pictures, "--epoch_size=1", "--decay_epoch=3", "--batch_size=6")
    assert found.returncode == 0, found.stderr
    assert "strides" not in found.stderr
    assert (tmp_path / "two" / "metrics.csv").read_text().count("\n") == 2


def test_a_broken_picture_on_one_rank_ends_both_with_one_line(pictures, tmp_path):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    (data / "train" / "red" / "3.png").write_bytes(b"not a picture")
    found = start(2, tmp_path / "run", data, "--batch_size=3", "--epoch_size=1")
    assert found.returncode != 0
    lines = [line for line in found.stderr.splitlines() if line.startswith("mbv2: error:")]
    assert len(lines) == 1
    assert "red/3.png" in lines[0]
