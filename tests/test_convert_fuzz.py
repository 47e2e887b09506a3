"""Readers of foreign files on damaged input: a UserError or a network, never another exception."""

import functools
import io
import struct
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbv2.convert import configuration, mindspore, read_network, tensorflow, tflite, wire
from mbv2.convert.detect import FORMATS, _said
from mbv2.convert.flatbuffer import Table
from mbv2.convert.network import Malformed, NotThisNetwork
from mbv2.errors import UserError

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def value(tag: str, dims: list[int], content: bytes, kind: str = "Float32") -> bytes:
    body = b"".join(wire.put(1, size) for size in dims) + wire.put(2, kind) + wire.put(3, content)
    return wire.put(1, wire.put(1, tag) + wire.put(2, body))


MINDSPORE = b"".join(value(f"features.{n}.weight", [2, 3], struct.pack("<6f", *range(6))) for n in range(4))


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
    body = b"".join(b"\0" + wire.put_varint(len(k)) + wire.put_varint(len(v)) + k + v for k, v in entries)
    return body + struct.pack("<II", 0, 1) + b"\0\0\0\0\0"


def bundle(tensors: dict[str, torch.Tensor]) -> tuple[bytes, bytes]:
    """(index, data) of a checkpoint as TensorFlow lays it out, without checksums."""
    data, entries = b"", [(b"", wire.put(1, 1))]
    for name in sorted(tensors):
        content = tensors[name].contiguous().numpy().tobytes()
        shape = b"".join(wire.put(2, wire.put(1, size)) for size in tensors[name].shape)
        entry = wire.put(1, 1) + wire.put(2, shape) + wire.put(4, len(data)) + wire.put(5, len(content))
        entries.append((name.encode(), entry))
        data += content
    first = block(entries)
    handle = wire.put_varint(0) + wire.put_varint(len(first) - 5)
    index = block([(b"z", handle)])
    footer = wire.put_varint(0) * 2 + wire.put_varint(len(first)) + wire.put_varint(len(index) - 5)
    return first + index + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57), data


def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    data = bytearray(good[: draw(st.integers(0, len(good)))] if draw(st.booleans()) else good)
    for _ in range(draw(st.integers(0, 4))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


damages = functools.partial(st.composite(lambda draw, good: damaged(draw, good)))


@QUICK
@given(damages(MINDSPORE))
def test_damaged_mindspore_files(data: bytes) -> None:
    try:
        tensors = mindspore.read_tensors(memoryview(data))
        mindspore.read(tensors)
    except (Malformed, NotThisNetwork):
        return
    pytest.fail("four matrices are no MobileNetV2")


@QUICK
@given(damages(bundle({"a/b": torch.ones(2, 2), "c": torch.zeros(3)})[0]))
def test_damaged_checkpoint_indices(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.index"
        path.write_bytes(data)
        (Path(folder) / "m.data-00000-of-00001").write_bytes(bytes(28))
        try:
            for tensor in tensorflow.read_bundle(path).values():
                assert tensor.numel() <= 28
        except Malformed:
            return


@QUICK
@given(st.binary(max_size=300))
def test_random_flatbuffers(data: bytes) -> None:
    head = struct.pack("<I", 16) + b"TFL3"
    for content in (data, head + data):
        with pytest.raises((Malformed, NotThisNetwork)):
            tflite.read(memoryview(content))


def test_damaged_real_tflite_file(shared_data: Path) -> None:
    good = (shared_data / "weights" / "mobilenet_v2_1.0_224_quant.tflite").read_bytes()
    generator = torch.Generator().manual_seed(1)
    # The tables lie at the end; most damage in the weights would go unnoticed.
    for trial in range(12):
        data = bytearray(good[: len(good) - 4096 * trial] if trial % 3 == 0 else good)
        for place in torch.randint(max(0, len(data) - 30000), len(data), (20,), generator=generator).tolist():
            data[place] = int(torch.randint(256, (), generator=generator))
        try:
            tflite.read(memoryview(bytes(data)))
        except (Malformed, NotThisNetwork, UserError):
            continue


@QUICK
@given(st.binary(max_size=200), st.sampled_from(sorted(FORMATS)))
def test_random_bytes_as_every_format(data: bytes, format: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "thing"
        path.write_bytes(data)
        for kind in (format, "auto"):
            with pytest.raises(UserError, match="thing"):
                read_network(path, kind)


def test_sizes_are_checked_before_memory_is_taken() -> None:
    huge = value("features.0.weight", [1 << 20, 1 << 20], b"1234")
    with pytest.raises(Malformed, match="impossible shape"):
        mindspore.read_tensors(memoryview(huge))
    with pytest.raises(Malformed, match="but 4 are there"):
        mindspore.read_tensors(memoryview(value("w", [1 << 20], b"1234")))
    with pytest.raises(Malformed, match="runs over the end|cut short"):
        Table.root(memoryview(struct.pack("<I", 1 << 30) + b"TFL3"))


def test_a_zip_that_is_neither_keras_nor_torch(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    (tmp_path / "a.zip").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=r"a\.zip"):
        read_network(tmp_path / "a.zip")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
MODEL_KEYS = ("output_stride", "tf_padding", "layer_norm_eps", "image_size", "id2label", "model_type")
PICTURE_KEYS = ("image_mean", "image_std", "rescale_factor", "resample", "size", "crop_size", "do_center_crop")
TIMM_KEYS = ("mean", "std", "input_size", "crop_pct", "interpolation", "crop_mode")


@QUICK
@given(
    st.dictionaries(st.sampled_from(MODEL_KEYS), JSON),
    st.dictionaries(st.sampled_from(PICTURE_KEYS), JSON),
    st.dictionaries(st.sampled_from(TIMM_KEYS), JSON),
)
def test_anything_as_a_configuration(model: dict, pictures: dict, timm: dict) -> None:
    for read, *configs in (
        (configuration.of_hugging_face, model, pictures),
        (configuration.of_timm, {"pretrained_cfg": timm}),
    ):
        try:
            assert isinstance(_said(read, *configs), dict)
        except (Malformed, NotThisNetwork):
            continue


@QUICK
@given(st.binary(max_size=60))
def test_damaged_json_in_a_folder(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(data)
        with pytest.raises(UserError):
            read_network(folder)


def keras_archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", '{"config": {"layers": []}}')
        archive.writestr("model.weights.h5", b"\x89HDF\r\n\x1a\n" + bytes(range(256)) * 3)
    return buffer.getvalue()


@QUICK
@given(damages(keras_archive()))
def test_damaged_keras_archives(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.keras"
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"m\.keras"):
            read_network(path)
