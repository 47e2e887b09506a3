"""`--dtype int8` of `mbv2 eval` and `mbv2 infer`: the int8 network, with ranges measured on a folder of pictures."""

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from mbv2.errors import UserError
from mbv2.kernels import BackendError, cpu_network
from mbv2.optimized import OptimizedMobileNetV2, optimize_for_inference
from mbv2.progress import Progress
from mbv2.quantize import MOST_PICTURES
from mbv2.trained import Trained


def check_options(dtype: str, calibrate: str) -> None:
    """Whether `--dtype` and `--calibrate` go together.

    Raises:
        UserError: int8 without pictures, or pictures for nothing.
    """
    if dtype == "int8" and not calibrate:
        raise UserError(
            "--dtype int8 takes its ranges from pictures: give --calibrate a folder of some hundred of the kind to be "
            "recognised"
        )
    if calibrate and dtype != "int8":
        raise UserError("--calibrate measures the ranges of --dtype int8: give both or neither")


def int8_network(
    trained: Trained, device: torch.device, folder: str, progress: bool
) -> tuple[OptimizedMobileNetV2, str]:
    """The network in int8 and its name, calibrated on up to 200 pictures spread evenly over `folder`.

    Every process measures the same pictures, so all have the same network.

    Raises:
        UserError: not on a CPU, another backend is asked for, no compiled kernels, no picture that can be decoded, or
            weights that int8 cannot hold.
    """
    if device.type != "cpu":
        raise UserError(f"--dtype int8 runs on CPUs only, not on {device.type}: give --device_target CPU")
    asked = os.environ.get("MBV2_BACKEND", "auto")
    if asked != "auto":
        raise UserError(f"--dtype int8 has its own compiled network; unset MBV2_BACKEND, which is {asked}")
    if cpu_network.refusal() is not None:
        raise UserError(f"--dtype int8: {cpu_network.refusal()}")
    try:
        cpu_network.isa("int8")  # before the pictures are read
        fast = optimize_for_inference(trained.model.eval(), torch.int8, _batches(trained, folder, progress))
    except (BackendError, ValueError) as error:
        raise UserError(f"--dtype int8: {error}") from error
    return fast, f"one compiled network in int8 ({fast.isa}), ranges from {folder}"


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
