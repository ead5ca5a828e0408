"""Our safetensors reader and writer against the published package, and against damage."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from qlora_native.loading.errors import CheckpointError
from qlora_native.loading.safetensors_io import SafetensorsReader, shards, write_safetensors

safetensors_torch = pytest.importorskip("safetensors.torch", reason="no safetensors package")

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "brain": torch.tensor([[1.0], [3.0]], dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 5),
    "bytes": torch.arange(256, dtype=torch.uint8),
    "flags": torch.tensor([True, False, True]),
}


def read_all(path: Path) -> dict[str, torch.Tensor]:
    with SafetensorsReader(path) as reader:
        return {name: reader.read(name) for name in reader.entries}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    safetensors_torch.save_file(TENSORS, tmp_path / "a.safetensors")
    assert_same(read_all(tmp_path / "a.safetensors"), TENSORS)


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {**TENSORS, "transposed": TENSORS["matrix"].T})
    wanted = {**TENSORS, "transposed": TENSORS["matrix"].T}
    assert_same(safetensors_torch.load_file(tmp_path / "a.safetensors"), wanted)
    assert_same(read_all(tmp_path / "a.safetensors"), wanted)


def file_with(path: Path, header: object, data: bytes = b"\0" * 16) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(
    dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)
) -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json at all", "its header is no JSON"),
        ([1, 2], "must be a JSON object"),
        (entry(dtype="F99"), "'w' has a header entry that cannot be read"),
        (entry(shape="x"), "'w' has a header entry that cannot be read"),
        (entry(offsets=(0,)), "'w' has a header entry that cannot be read"),
        (
            entry(offsets=(0, 12)),
            r"'w' of shape \[2, 2\] and dtype F32 needs 16 bytes, its header gives 12",
        ),
        (entry(offsets=(-16, 0)), "'w' of shape"),
        (entry(shape=(-2, -2)), "'w' of shape"),
        (entry(offsets=(8, 24)), "is truncated: tensor 'w' ends at byte"),
        (entry(shape=(2**40, 2**40), offsets=(0, 2**82)), "is truncated: tensor 'w'"),
    ],
)
def test_a_damaged_header_is_refused_by_name(tmp_path: Path, header: object, message: str) -> None:
    path = file_with(tmp_path / "bad.safetensors", header)
    with pytest.raises(CheckpointError, match=message) as error:
        SafetensorsReader(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"1234", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 100) + b"{}"]
)
def test_a_file_that_ends_within_its_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        SafetensorsReader(path)


def test_a_file_cut_after_opening_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": torch.zeros(1000)})
    with SafetensorsReader(path) as reader:
        path.open("r+b").truncate(200)
        with pytest.raises(CheckpointError, match="became shorter while it was read: tensor 'w'"):
            reader.read("w")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot open .*nowhere"):
        SafetensorsReader(tmp_path / "nowhere.safetensors")


def test_shards_keep_order_and_size() -> None:
    tensors = {
        name: torch.zeros(size, dtype=torch.uint8)
        for name, size in zip("abcd", (4, 4, 9, 1), strict=True)
    }
    assert [list(part) for part in shards(tensors, 8)] == [["a", "b"], ["c"], ["d"]]
