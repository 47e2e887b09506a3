"""The usual file of torch.save, a dict of dense tensors, read without torch's reader.

torch.load with `weights_only` interprets the pickle in Python: 45 ms for MobileNetV2's 314 tensors, a quarter of what a
fresh process spends until its first logits. Python's own unpickler takes a fifth of that; it is given nothing to call
but an OrderedDict and a function that makes a tensor. Whatever else a file holds is left to torch.load.
"""

import mmap
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Unusual(Exception):
    """The file is not of the kind that this module reads; that says nothing about whether it is damaged."""


def read(path: Path) -> Any:
    """What torch.save wrote to `path`, its tensors on the CPU, sharing the file's pages until they are written to.

    Nothing in the file is executed.

    Raises:
        Unusual: it is for torch.load to read, or to refuse.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if archive.read(records["byteorder"]) != b"little":
                raise Unusual(f"{path}: not of a little-endian machine")
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            with archive.open(records["data.pkl"]) as content:
                return _Unpickler(content, memory, records).load()
    except Unusual:
        raise
    except Exception as error:  # a damaged file raises whatever its bytes happen to ask for
        raise Unusual(f"{path}: {error}") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: Any, memory: mmap.mmap, records: dict[str, zipfile.ZipInfo]) -> None:
        super().__init__(content)
        self._memory = memory
        self._records = records
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _new_rebuild()
        if module == "torch" and name in _DTYPES:
            return name  # a pickle can do nothing with it but hand it to persistent_load
        raise Unusual(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, storage, key, _, count = pid
        if kind != "storage":
            raise Unusual(f"it holds a {kind}")
        if key not in self._storages:
            self._storages[key] = self._flat(_DTYPES[storage], self._records[f"data/{key}"], count)
        if self._storages[key].dtype != _DTYPES[storage]:
            raise Unusual("two types share one storage")
        return self._storages[key]

    def _flat(self, dtype: torch.dtype, record: zipfile.ZipInfo, count: int) -> Tensor:
        if count == 0:
            return torch.empty(0, dtype=dtype)
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != count * dtype.itemsize:
            raise Unusual(f"{record.filename} is compressed or of another size")
        # The local header: 30 bytes, of which the last four are the lengths of name and extra field behind them.
        header = self._memory[record.header_offset : record.header_offset + 30]
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=record.header_offset + 30 + lengths)


def _new_rebuild() -> Callable[..., Tensor]:
    """A function of its own for each file: a pickle can set attributes of what it is given."""

    def rebuild(storage: Tensor, offset: int, size: Any, stride: Any, requires_grad: bool, *_: Any) -> Tensor:
        return storage.as_strided(size, stride, offset).requires_grad_(requires_grad)

    return rebuild
