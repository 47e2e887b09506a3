"""Writers, one per format; each file appears whole or not at all."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mbv2.errors import UserError
from mbv2.files import write_atomic

_MAX_BATCH = 4096


def onnx(network: nn.Module, resolution: int, dst: Path) -> None:
    """ONNX by torch's dynamo exporter: input `images` [batch, 3, R, R], output `logits`; one file, any batch.

    Raises:
        UserError: onnx or onnxscript is not installed.
    """
    _require("onnx", "onnx", "onnxscript")

    def write(path: Path) -> None:
        torch.onnx.export(
            network,
            (torch.zeros(2, 3, resolution, resolution),),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=_MAX_BATCH)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )

    _aside(dst, write)


def onnx_int8(network: nn.Module, resolution: int, dst: Path, batches: Iterable[Tensor]) -> None:
    """ONNX in QDQ format: int8 weights per channel, uint8 activations, ranges measured on `batches`.

    Weights take 7 bits: on CPUs without VNNI, sums of 8-bit products would saturate.

    Raises:
        UserError: onnx, onnxscript or onnxruntime is not installed.
    """
    _require("onnx-int8", "onnx", "onnxscript", "onnxruntime")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch.numpy()}

    def write(path: Path) -> None:
        plain = path.with_name("float.onnx")
        onnx(network, resolution, plain)
        quantize_static(
            plain,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )

    _aside(dst, write)


def pt2e_int8(network: nn.Module, resolution: int, dst: Path, batches: Iterable[Tensor]) -> None:
    """A torch.export program quantised by torchao as Inductor lowers it on x86: int8 weights per channel, uint8 inputs.

    The operators are ATen's between quantize and dequantize: run as it is, it shows what int8 computes, and
    torch.compile makes int8 kernels of it. `import torchao.quantization.pt2e` goes before loading it. Activations
    take 7 bits: on CPUs without VNNI, sums of 8-bit products would saturate.

    Raises:
        UserError: torchao is not installed.
    """
    _require("pt2e-int8", "torchao")
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    def write(path: Path) -> None:
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=True))
        prepared = prepare_pt2e(_program(network, resolution).module(), quantizer)
        for batch in batches:
            prepared(batch)
        converted = convert_pt2e(prepared)
        # The float weights stay behind the int8 ones, used by nothing.
        used = {node.target for node in converted.graph.nodes if node.op == "get_attr"}
        for name in [name for name in converted.state_dict() if name not in used]:
            owner, _, leaf = name.rpartition(".")
            delattr(converted.get_submodule(owner), leaf)
        _save(_program(converted, resolution), path)

    _aside(dst, write)


def pt2(network: nn.Module, resolution: int, dst: Path) -> None:
    """A torch.export program of ATen operators, for `torch.export.load`."""
    _aside(dst, lambda path: _save(_program(network, resolution), path))


def aoti(network: nn.Module, resolution: int, dst: Path) -> None:
    """A compiled AOTInductor package for this machine's kind of CPU, for `torch._inductor.aoti_load_package`.

    Raises:
        UserError: the compiler refuses, as where there is no C++ compiler.
    """
    from torch._inductor import aoti_compile_and_package

    def write(path: Path) -> None:
        try:
            aoti_compile_and_package(_program(network, resolution), package_path=str(path))
        except Exception as error:  # whatever Inductor or the C++ compiler raises
            reason = str(error).strip().splitlines()[:1]
            raise UserError(f"{dst}: AOTInductor could not compile the network ({reason}); use --format pt2") from error

    _aside(dst, write)


def torchscript(network: nn.Module, resolution: int, dst: Path) -> None:
    """A traced TorchScript module, for `torch.jit.load` and libtorch; torch keeps it, but develops it no further."""

    def write(path: Path) -> None:
        traced = torch.jit.trace(network, torch.zeros(2, 3, resolution, resolution), check_trace=False)
        torch.jit.save(traced, path)

    _aside(dst, write)


def _program(network: nn.Module, resolution: int) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    pictures = torch.zeros(2, 3, resolution, resolution)
    return torch.export.export(network, (pictures,), dynamic_shapes=({0: batch},))


def _save(program: torch.export.ExportedProgram, path: Path) -> None:
    for node in program.graph.nodes:
        # Where each operator came from: lines of source with this machine's paths, larger than the int8 weights.
        for key in ("stack_trace", "from_node", "nn_module_stack"):
            node.meta.pop(key, None)
    torch.export.save(program, path)


def _require(format: str, *modules: str) -> None:
    import importlib.util

    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format {format} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _aside(dst: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a file in a folder of its own, then put it in place."""
    with tempfile.TemporaryDirectory(prefix="mbv2-export-") as folder, quiet():
        path = Path(folder) / f"network{dst.suffix}"
        write(path)
        data = path.read_bytes()
    write_atomic(dst, data)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' warnings and log lines, which a user can do nothing about."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
