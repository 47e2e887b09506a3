"""`mbv2 export WEIGHTS DST`: a trained network for other runtimes, checked in them."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mbv2 import arguments
from mbv2.errors import UserError
from mbv2.trained import Trained, load_trained

if TYPE_CHECKING:
    from mbv2.data import Source
    from mbv2.export.check import Report

FORMATS = {
    "onnx": "ONNX, float32, any batch",
    "onnx-int8": "ONNX in QDQ format, ranges measured on --data_url",
    "pt2": "torch.export program",
    "pt2e-int8": "torch.export program with int8 weights and activations by torchao, ranges measured on --data_url",
    "aoti": "AOTInductor package, compiled for this machine's CPU",
    "torchscript": "traced TorchScript",
    "safetensors": "our own weights file",
    "int8": "the same with the numbers of our int8 network for CPUs beside them, ranges measured on --data_url",
    "mindspore": "MindSpore .ckpt in mindcv's names",
}
_BY_SUFFIX = {
    ".onnx": "onnx",
    ".pt2": "pt2",
    ".pt": "torchscript",
    ".safetensors": "safetensors",
    ".ckpt": "mindspore",
}
# Judged by the classes they give, not by their logits; made with pictures.
INT8 = ("onnx-int8", "pt2e-int8", "int8")
_CALIBRATION, _BATCH = 128, 16


def export(
    pretrained: str,
    dst: str | Path,
    format: str = "auto",
    resize: int | None = None,
    data_url: str = "",
    check: bool = False,
) -> "Report | None":
    """Write a trained network in another format.

    Args:
        pretrained: weights as `mbv2 eval` takes them.
        dst: the file to write.
        format: one of `FORMATS`, or "auto" to go by the suffix of `dst`.
        resize: side of the network's input (default: from the weights).
        data_url: pictures to measure int8 ranges on and to check with; without, the check takes noise. An int8 file
            is checked on those that its ranges were not measured on.
        check: run the file in its own runtime and compare it with the network.

    Returns:
        What the check found, or None.

    Raises:
        UserError: bad weights or options, or what the format needs is not installed.
    """
    dst = Path(dst)
    format = _format(dst, format)
    if not dst.absolute().parent.is_dir() or dst.is_dir():
        raise UserError(f"{dst}: give the name of a file in a folder that exists")
    if format in INT8 and not data_url:
        raise UserError(f"--format {format} measures ranges on pictures: give --data_url a folder of them")
    trained = load_trained(pretrained, resize=resize)
    source = _source(data_url, trained) if data_url else None
    try:
        _write(trained, pretrained, dst, format, source)
    except OSError as error:
        raise UserError(f"{dst}: cannot be written ({error.strerror or error})") from error
    if not check:
        return None
    from mbv2.export.check import compare, runner

    if source is None:
        batches = _noise(trained)
    else:
        pictures, labelled = source
        batches = _pictures(trained, split(pictures)[1] if format in INT8 else pictures, labelled)
    return compare(trained.model, runner(dst, format), batches)


def main(argv: Sequence[str]) -> int:
    """`mbv2 export`: 0, or 1 when the check finds that the file computes something else.

    Raises:
        UserError: see `export`.
    """
    parser = arguments.parser("mbv2 export", "Write a trained network for other runtimes.", FORMATS)
    add = parser.add_argument
    add("weights", help="a .safetensors, .pth or .ckpt file, or True for torchvision's published weights")
    add("dst", help="file to write")
    add("--format", choices=("auto", *FORMATS), default="auto", help="(default: by the suffix of DST)")
    add("--resize", type=int, help="side of the network's input in pixels (default: from the weights, else 224)")
    add("--data_url", default="", help="pictures for int8 ranges and for --check: a folder, labelled or not")
    add("--check", action="store_true", help="run the file in its own runtime and compare; exit code 1 if it differs")
    add(
        "--min_agreement",
        type=float,
        default=0.9,
        help="int8: least share of pictures with the same class [%(default)s]",
    )
    options = arguments.parse(parser, argv, "WEIGHTS and DST")
    if not 0 <= options.min_agreement <= 1:
        raise UserError(f"--min_agreement {options.min_agreement}: a share lies between 0 and 1")
    report = export(options.weights, options.dst, options.format, options.resize, options.data_url, options.check)
    print(options.dst)
    if report is None:
        return 0
    print(f"check: {report.sentence()}", file=sys.stderr)
    refusal = report.refusal(_format(Path(options.dst), options.format), options.min_agreement)
    if refusal:
        print(f"mbv2: error: {options.dst} computes something else: {refusal}", file=sys.stderr)
        return 1
    return 0


def _format(dst: Path, format: str) -> str:
    if format != "auto":
        if format not in FORMATS:
            raise UserError(f"--format {format}: choose {', '.join(FORMATS)}")
        if format == "aoti" and dst.suffix != ".pt2":
            raise UserError(f"{dst}: torch loads compiled packages from files called .pt2 only; give such a name")
        if format == "int8" and dst.suffix != ".safetensors":
            raise UserError(f"{dst}: --format int8 writes a weights file; give a name that ends in .safetensors")
        return format
    if dst.suffix not in _BY_SUFFIX:
        raise UserError(f"{dst}: no format goes by {dst.suffix or 'no suffix'}; give --format {', '.join(FORMATS)}")
    return _BY_SUFFIX[dst.suffix]


def _write(trained: Trained, pretrained: str, dst: Path, format: str, source: "tuple[Source, bool] | None") -> None:
    if format == "int8":
        assert source is not None
        _write_int8(trained, dst, source[0])
        return
    if format in ("safetensors", "mindspore"):
        from mbv2.convert.command import save

        save(trained.model, trained.meta, dst, format)
        return
    from mbv2.export import write
    from mbv2.export.plain import PlainNetwork

    side = trained.recipe.resolution
    network = PlainNetwork(trained.model, side)
    if format in INT8:
        assert source is not None
        batches = (images for images, _ in _pictures(trained, split(source[0])[0], False))
        (write.onnx_int8 if format == "onnx-int8" else write.pt2e_int8)(network, side, dst, batches)
        return
    getattr(write, format)(network, side, dst)


def _write_int8(trained: Trained, dst: Path, source: "Source") -> None:
    from mbv2 import int8_file
    from mbv2.optimized import int8_numbers

    if dst.exists() and Path(trained.source).exists() and dst.samefile(trained.source):
        raise UserError(f"{dst}: is the source; give another name")
    try:
        numbers = int8_numbers(trained.model, (images for images, _ in _pictures(trained, split(source)[0], False)))
    except ValueError as error:
        raise UserError(f"--format int8: {error}") from error
    int8_file.save(dst, trained.model, trained.meta, numbers)


def _source(data_url: str, trained: Trained) -> "tuple[Source, bool]":
    """(pictures, whether they have labels of the network's classes)."""
    from mbv2.data import open_source
    from mbv2.infer import find_pictures

    try:
        source = open_source(data_url, "val", trained.class_names if trained.names_are_own else None)
    except UserError:
        return find_pictures(data_url), False
    return source, max(sample.label for sample in source.samples) < trained.model.num_real_classes


def split(source: "Source") -> "tuple[Source, Source]":
    """Pictures to measure ranges on, at most 128 and at most half of all, and the others; of one picture both."""
    samples = source.samples
    step = max(2, -(-len(samples) // _CALIBRATION))
    others = [sample for index, sample in enumerate(samples) if index % step]
    return replace(source, samples=samples[::step]), replace(source, samples=others or samples)


def _pictures(trained: Trained, source: "Source", labelled: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    from mbv2 import distributed
    from mbv2.data import make_loader

    world = distributed.init("CPU", run_distribute=False)
    loader = make_loader("torch", source, trained.recipe, False, _BATCH, world, workers=0, on_corrupt="skip")
    try:
        for images, labels, _ in loader:
            yield images, labels if labelled else None
    finally:
        loader.close()


def _noise(trained: Trained) -> Iterator[tuple[Tensor, None]]:
    side = trained.recipe.resolution
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 3):
        yield torch.randn(batch, 3, side, side, generator=generator), None
