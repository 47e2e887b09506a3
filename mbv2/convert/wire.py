"""Protobuf's wire format, read within bounds and written: what ONNX, TensorFlow and MindSpore files consist of.

https://protobuf.dev/programming-guides/encoding
"""

import struct
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from mbv2.convert.network import Malformed

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_MAX_NUMEL = 1 << 31


class Field(NamedTuple):
    """One field of a message: its number, its wire type, and an int (varint, fixed) or the bytes."""

    number: int
    kind: int
    value: int
    data: memoryview

    def text(self) -> str:
        """The bytes as UTF-8.

        Raises:
            Malformed: not bytes, or not UTF-8.
        """
        try:
            return str(self.bytes(), "utf-8")
        except UnicodeDecodeError as error:
            raise Malformed(f"field {self.number} is no text") from error

    def bytes(self) -> memoryview:
        """The bytes.

        Raises:
            Malformed: it is a number.
        """
        if self.kind != BYTES:
            raise Malformed(f"field {self.number} is a number where a message or text belongs")
        return self.data

    def integers(self) -> list[int]:
        """One varint, or a packed list of them, signed 64-bit."""
        if self.kind == VARINT:
            return [signed(self.value)]
        values, at, data = [], 0, self.bytes()
        while at < len(data):
            value, at = varint(data, at)
            values.append(signed(value))
        return values

    def number_of(self) -> int:
        """One signed integer.

        Raises:
            Malformed: it is bytes.
        """
        if self.kind == BYTES:
            raise Malformed(f"field {self.number} is text where a number belongs")
        return signed(self.value)

    def float32(self) -> float:
        """The fixed32 value as a float."""
        return struct.unpack("<f", struct.pack("<I", self.value & 0xFFFFFFFF))[0]


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, position after it).

    Raises:
        Malformed: it runs over the end, or over 64 bits.
    """
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise Malformed(f"cut short or damaged at byte {at}")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at


def fields(data: memoryview) -> Iterator[Field]:
    """The fields of a message, in order; bytes are views, not copies.

    Raises:
        Malformed: a length runs over the end, or a wire type does not exist.
    """
    at, end, nothing = 0, len(data), data[:0]
    while at < end:
        key, at = varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise Malformed(f"a field without a number at byte {at}")
        if kind == VARINT:
            value, at = varint(data, at)
            yield Field(number, kind, value, nothing)
            continue
        if kind == BYTES:
            size, at = varint(data, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise Malformed(f"wire type {kind} at byte {at}")
        if size > end - at:
            raise Malformed(f"cut short: {size} bytes wanted at byte {at}, {end - at} left")
        part = data[at : at + size]
        at += size
        yield Field(number, kind, 0 if kind == BYTES else int.from_bytes(part, "little"), part)


def signed(value: int) -> int:
    """A 64-bit two's complement."""
    return value - (1 << 64) if value >= 1 << 63 else value


def tensor(data: memoryview, dims: list[int], dtype: torch.dtype, name: str) -> Tensor:
    """Little-endian bytes as a tensor that owns its memory.

    Raises:
        Malformed: the bytes are not what the shape takes.
    """
    if any(size < 0 for size in dims) or prod(dims) > _MAX_NUMEL:
        raise Malformed(f"{name} has an impossible shape {dims[:8]}")
    count, size = prod(dims), torch.empty(0, dtype=dtype).element_size()
    if count * size != len(data):
        raise Malformed(f"{name} is {dims}, {count * size} bytes, but {len(data)} are there")
    if count == 0:
        return torch.empty(dims, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(dims)


def put_varint(value: int) -> bytes:
    """A non-negative integer as a varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def put(number: int, value: int | bytes | str) -> bytes:
    """One field."""
    if isinstance(value, int):
        return put_varint(number << 3 | VARINT) + put_varint(value)
    data = value.encode() if isinstance(value, str) else value
    return put_varint(number << 3 | BYTES) + put_varint(len(data)) + data
