"""`--dtype int8` of `mbv2 eval` and `mbv2 infer`: the int8 network, with ranges measured on a folder of pictures or
read from the weights file."""

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from mbv2 import int8_file
from mbv2.errors import UserError
from mbv2.kernels import BackendError, cpu_network
from mbv2.optimized import OptimizedMobileNetV2, optimize_for_inference
from mbv2.progress import Progress
from mbv2.quantize import MOST_PICTURES
from mbv2.trained import Trained


def check_options(dtype: str, calibrate: str) -> None:
    """Whether `--dtype` and `--calibrate` go together.

    Raises:
        UserError: pictures for nothing.
    """
    if calibrate and dtype != "int8":
        raise UserError("--calibrate measures the ranges of --dtype int8: give both or neither")


def int8_network(
    trained: Trained, device: torch.device, folder: str, progress: bool
) -> tuple[OptimizedMobileNetV2, str]:
    """The network in int8 and its name, calibrated on up to 200 pictures spread evenly over `folder`, or without a
    folder with the numbers that are in the weights file.

    Every process measures the same pictures, so all have the same network.

    Raises:
        UserError: not on a CPU, another backend is asked for, no compiled kernels, no picture that can be decoded, or
            weights that int8 cannot hold; neither a folder nor numbers in the weights file, or other weights' numbers.
    """
    if device.type != "cpu":
        raise UserError(f"--dtype int8 runs on CPUs only, not on {device.type}: give --device_target CPU")
    asked = os.environ.get("MBV2_BACKEND", "auto")
    if asked != "auto":
        raise UserError(f"--dtype int8 has its own compiled network; unset MBV2_BACKEND, which is {asked}")
    if cpu_network.refusal() is not None:
        raise UserError(f"--dtype int8: {cpu_network.refusal()}")
    if not folder and not int8_file.has_numbers(trained.source):
        raise UserError(
            "--dtype int8 takes its ranges from pictures: give --calibrate a folder of some hundred of the kind to be "
            "recognised, or --pretrained a file that mbv2 export --format int8 wrote"
        )
    try:
        cpu_network.isa("int8")  # before the pictures are read
        calibration = _batches(trained, folder, progress) if folder else trained.source
        fast = optimize_for_inference(trained.model.eval(), torch.int8, calibration)
    except (BackendError, ValueError) as error:
        raise UserError(f"--dtype int8: {error}") from error
    return fast, f"one compiled network in int8 ({fast.isa}), ranges from {folder or trained.source}"


def _batches(trained: Trained, folder: str, progress: bool) -> Iterator[Tensor]:
    from mbv2.data import make_loader
    from mbv2.data.sources import Source
    from mbv2.distributed import World
    from mbv2.infer import find_pictures

    found = find_pictures(folder, "--calibrate")
    step = max(1, len(found.samples) // MOST_PICTURES)
    source = Source(found.samples[::step][:MOST_PICTURES], found.class_names)
    loader = make_loader("torch", source, trained.recipe, False, 25, World(), workers=0, on_corrupt="skip")
    seen = 0
    try:
        with Progress(len(source.samples), "calibrate", enabled=progress) as shown:
            for images, _, _ in loader:
                seen += len(images)
                if len(images):
                    yield images
                shown.advance(len(images))
    finally:
        loader.close()
    if seen == 0:
        raise UserError(f"--calibrate {folder}: none of the pictures can be decoded")
