"""Just enough of FlatBuffers to read a file within bounds: tables, vectors, strings (flatbuffers.dev/internals)."""

import struct

from mbv2.convert.network import Malformed


class Table:
    """A table at a position of a buffer; a field that the file leaves out has its default.

    Every read is checked against the buffer, so that a damaged file raises Malformed and nothing else.
    """

    def __init__(self, data: memoryview, at: int) -> None:
        self._data, self._at = data, at
        vtable = at - _number(data, at, "<i")
        size = _number(data, vtable, "<H")
        if vtable < 0 or size < 4 or size % 2 or vtable + size > len(data):
            raise Malformed(f"a table at byte {at} without a valid layout")
        self._vtable, self._fields = vtable, (size - 4) // 2

    @classmethod
    def root(cls, data: memoryview) -> "Table":
        """The table a file begins with."""
        return cls(data, _number(data, 0, "<I"))

    def integer(self, field: int, kind: str, default: int = 0) -> int:
        """A scalar field; `kind` is its struct format, such as "i" or "B"."""
        at = self._field(field)
        return default if at is None else int(_number(self._data, at, "<" + kind))

    def table(self, field: int) -> "Table | None":
        """A table field, or None."""
        at = self._field(field)
        return None if at is None else Table(self._data, at + _number(self._data, at, "<I"))

    def tables(self, field: int) -> list["Table"]:
        """A vector of tables."""
        start, count = self._vector(field, 4)
        places = [start + 4 * index for index in range(count)]
        return [Table(self._data, at + _number(self._data, at, "<I")) for at in places]

    def numbers(self, field: int, kind: str) -> list[int | float]:
        """A vector of scalars."""
        start, count = self._vector(field, struct.calcsize("<" + kind))
        return list(struct.unpack_from(f"<{count}{kind}", self._data, start))

    def bytes(self, field: int) -> memoryview:
        """A vector of bytes, as a view."""
        start, count = self._vector(field, 1)
        return self._data[start : start + count]

    def _field(self, field: int) -> int | None:
        if field >= self._fields:
            return None
        offset = _number(self._data, self._vtable + 4 + 2 * field, "<H")
        return self._at + offset if offset else None

    def _vector(self, field: int, size: int) -> tuple[int, int]:
        at = self._field(field)
        if at is None:
            return 0, 0
        start = at + _number(self._data, at, "<I")
        count = _number(self._data, start, "<I")
        if start + 4 + count * size > len(self._data):
            raise Malformed(f"a list of {count} at byte {start} runs over the end of the file")
        return start + 4, count


def _number(data: memoryview, at: int, kind: str) -> int:
    if at < 0 or at + struct.calcsize(kind) > len(data):
        raise Malformed(f"cut short or damaged: byte {at} of {len(data)} is pointed to")
    return struct.unpack_from(kind, data, at)[0]
