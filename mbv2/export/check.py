"""Running an exported file in its own runtime, and comparing it with the network it came from."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mbv2.errors import UserError
from mbv2.export.write import quiet
from mbv2.model import MobileNetV2

Runner = Callable[[Tensor], Tensor]
# Of the largest logit: float32 sums in another order; 8 bits are judged by what they recognise.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Report:
    """What a comparison found.

    Attributes:
        count: pictures compared.
        difference: largest absolute difference of a logit.
        scale: largest absolute logit of the network itself.
        agreement: share of pictures with the same best class, 0..1.
        top1, top1_exported: share of pictures right, network and exported file; None without labels.
    """

    count: int
    difference: float
    scale: float
    agreement: float
    top1: float | None = None
    top1_exported: float | None = None

    def refusal(self, format: str, min_agreement: float) -> str | None:
        """Why the file does not pass, or None: a float file by its logits, an int8 one by its classes."""
        is_int8 = format in ("onnx-int8", "pt2e-int8", "int8")
        if not is_int8 and not self.difference <= TOLERANCE * max(self.scale, 1e-6):
            return f"logits differ by {self.difference:.3g}, the largest is {self.scale:.3g}"
        if self.agreement < (min_agreement if is_int8 else 0.99):
            return f"only {100 * self.agreement:.1f} % of the pictures get the same class"
        return None

    def sentence(self) -> str:
        """The figures on one line."""
        text = (
            f"{self.count} pictures: same class on {100 * self.agreement:.1f} %, logits differ by at most "
            f"{self.difference:.3g} (largest {self.scale:.3g})"
        )
        if self.top1 is not None and self.top1_exported is not None:
            text += f"; top-1 {100 * self.top1:.2f} % before, {100 * self.top1_exported:.2f} % exported"
        return text


def runner(path: Path, format: str) -> Runner:
    """A function from normalised pictures to logits that runs the exported file.

    Raises:
        UserError: its runtime is not installed.
    """
    if format.startswith("onnx"):
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError("--check runs ONNX files in onnxruntime: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
    with quiet():
        if format == "pt2e-int8":
            # Registers the operators that such a program quantises with.
            import torchao.quantization.pt2e  # noqa: F401
        if format in ("pt2", "pt2e-int8"):
            return torch.export.load(path).module()
        if format == "aoti":
            return torch._inductor.aoti_load_package(str(path))
        if format == "torchscript":
            return torch.jit.load(path)
    if format == "int8":
        return _int8_network(path)
    if format == "mindspore":
        from mbv2.convert.detect import read_network
        from mbv2.convert.network import state_dict
        from mbv2.weights import Weights, model_from_weights

        return model_from_weights(Weights(state_dict(read_network(path)[0]), {}, str(path)))[0].eval()
    from mbv2.weights import model_from_weights

    return model_from_weights(path)[0].eval()


def _int8_network(path: Path) -> Runner:
    from mbv2.optimized import BackendError, optimize_for_inference
    from mbv2.weights import model_from_weights

    try:
        return optimize_for_inference(model_from_weights(path)[0].eval(), torch.int8, path)
    except BackendError as error:
        raise UserError(f"--check: {error}") from error


@torch.no_grad()
def compare(model: MobileNetV2, run: Runner, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Report:
    """Run both over batches of (normalised pictures, real labels or None).

    Raises:
        UserError: there is no picture.
    """
    count = same = right = right_exported = 0
    difference, scale, labelled = 0.0, 0.0, True
    for images, labels in batches:
        images = images.contiguous()
        ours, theirs = model(images), run(images)
        difference = max(difference, (ours - theirs).abs().max().item())
        if not bool(theirs.isfinite().all()):
            difference = float("inf")
        scale = max(scale, ours.abs().max().item())
        a, b = (model.real_logits(logits).argmax(1) for logits in (ours, theirs))
        count += len(images)
        same += int((a == b).sum())
        if labels is None:
            labelled = False
        else:
            right += int((a == labels).sum())
            right_exported += int((b == labels).sum())
    if not count:
        raise UserError("--check: no picture could be read")
    scores = (right / count, right_exported / count) if labelled else (None, None)
    return Report(count, difference, scale, same / count, *scores)
