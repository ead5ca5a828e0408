"""_core.PagedBuffer with the pager "file": tensors, residency, errors, nothing left behind."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_native import _core
from qlora_native._core import PagedBuffer

CHUNK = 1 << 20


@pytest.fixture
def directory() -> str:
    return "/var/tmp"  # on a disk, where /tmp is memory on some systems


def acquired(buffer: PagedBuffer, begin: int, n: int) -> Tensor:
    return torch.from_dlpack(buffer.acquire(begin, n))


def resident_by_mincore(tensor: Tensor) -> int:
    page = os.sysconf("SC_PAGE_SIZE")
    pages = (ctypes.c_ubyte * -(-tensor.nbytes // page))()
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(tensor.data_ptr())
    assert libc.mincore(address, ctypes.c_size_t(tensor.nbytes), pages) == 0
    return page * sum(state & 1 for state in pages)


def test_what_was_written_comes_back(directory: str) -> None:
    buffer = PagedBuffer("file", 4 * CHUNK, directory=directory)
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randint(0, 256, (4 * CHUNK,), dtype=torch.uint8, generator=generator)
    assert not torch.from_dlpack(buffer.host_view()).any()
    for begin in range(0, 4 * CHUNK, CHUNK):
        acquired(buffer, begin, CHUNK).copy_(wanted[begin : begin + CHUNK])
        buffer.release(begin, CHUNK)
        buffer.evict(begin, CHUNK)
    buffer.settle()
    assert buffer.stats()["resident"] == 0
    buffer.prefetch(0, CHUNK)
    assert torch.equal(acquired(buffer, 0, CHUNK), wanted[:CHUNK])
    view = torch.from_dlpack(buffer.host_view())
    assert torch.equal(view, wanted)
    assert buffer.stats()["resident"] == resident_by_mincore(view) == 4 * CHUNK


def test_a_tensor_keeps_the_buffer(directory: str) -> None:
    view = torch.from_dlpack(PagedBuffer("file", CHUNK, directory=directory).host_view())
    part = view[256:512].view(torch.float32)
    del view
    gc.collect()
    assert part.fill_(1.5).sum() == 96.0


def test_stats_count_what_moves(directory: str) -> None:
    buffer = PagedBuffer("file", 2 * CHUNK, directory=directory)
    acquired(buffer, 0, CHUNK).fill_(1)
    buffer.release(0, CHUNK)
    buffer.evict(0, CHUNK)
    buffer.settle()
    stats = buffer.stats()
    assert stats.pop("waited_ns") >= 0
    assert stats == {"bytes": 2 * CHUNK, "resident": 0, "moved_in": CHUNK, "moved_out": CHUNK}


def test_a_thousand_cycles_are_flat(directory: str) -> None:
    def cycle() -> None:
        buffer = PagedBuffer("file", CHUNK, directory=directory)
        acquired(buffer, 0, CHUNK)[-1] = 1
        buffer.release(0, CHUNK)

    def held() -> tuple[int, list[int]]:
        sizes = Path("/proc/self/statm").read_text().split()[:2]
        return len(os.listdir("/proc/self/fd")), [int(size) for size in sizes]

    for _ in range(50):
        cycle()
    gc.collect()
    files, sizes = held()
    for _ in range(1000):
        cycle()
    gc.collect()
    now_files, now_sizes = held()
    assert now_files == files
    # Of 256 pages each, a thousand leaked would be 256,000.
    assert all(now <= before + 512 for before, now in zip(sizes, now_sizes, strict=True))


@pytest.mark.parametrize(
    ("directory", "size", "error", "message"),
    [
        ("/var/tmp/no such", CHUNK, errno.ENOENT, "there is no such directory"),
        ("/dev/null", CHUNK, errno.ENOTDIR, "it is not a directory"),
        ("/var/tmp", 1 << 50, errno.ENOSPC, "there is not enough space on its disk"),
        ("/dev/shm", CHUNK, errno.EINVAL, "memory itself .tmpfs.: name a directory on a disk"),
        ("/proc", CHUNK, errno.EOPNOTSUPP, "its file system takes no new files"),
        (__file__, CHUNK, errno.ENOTDIR, "it is not a directory"),
    ],
)
def test_what_cannot_be_made(directory: str, size: int, error: int, message: str) -> None:
    if directory == "/dev/shm" and not os.access(directory, os.W_OK):
        pytest.skip("no /dev/shm here")
    with pytest.raises(OSError, match=message) as caught:
        PagedBuffer("file", size, directory=directory)
    assert caught.value.errno == error
    assert caught.value.filename == directory


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_is_not_ours(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="this user may not write there"):
        PagedBuffer("file", CHUNK, directory=str(tmp_path))


def test_bad_arguments(directory: str) -> None:
    with pytest.raises(ValueError, match=r"pager must be one of 'file'.*, got 'disk'"):
        PagedBuffer("disk", CHUNK)
    with pytest.raises(ValueError, match="bytes must be more than 0, got 0"):
        PagedBuffer("file", 0)
    with pytest.raises(ValueError, match="pager must be one of"):
        _core.why_no_pager("disk")
    buffer = PagedBuffer("file", CHUNK, directory=directory)
    for begin, n in ((-256, 256), (100, 256), (0, CHUNK + 1), (CHUNK, 1), (0, 0)):
        with pytest.raises(ValueError, match="begin must be a multiple of 256 and the range"):
            buffer.acquire(begin, n)
    assert _core.why_no_pager("file") is None
    assert buffer.pager == "file"


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    """Two in one directory; both killed in the middle, with everything dirty."""
    folder = Path("/var/tmp") / f"qlora_native-{tmp_path.name}-{os.getpid()}"
    folder.mkdir()
    code = (
        "import sys, torch; from qlora_native._core import PagedBuffer; "
        f"b = PagedBuffer('file', 8 << 20, directory={str(folder)!r}); "
        "torch.from_dlpack(b.host_view()).fill_(1); print('ready', flush=True); sys.stdin.read()"
    )
    try:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for _ in range(2)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert list(folder.iterdir()) == []
    finally:
        folder.rmdir()
