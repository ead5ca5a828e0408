"""Fixtures that every test file may use.

isa           runs the test on each instruction set that this processor has and, in modules marked
              `emulated`, on the CUDA kernels: where the build emulates them (docs/emulation.md),
              on a GPU where there is one (on_device.py)
threads       runs the test with 1 and with 2 threads
one_thread    runs the test with 1 thread: tiny models spend their time in waking others
sentinels     hands out tensors with guarded margins, which are checked when the test ends
"""

from __future__ import annotations

import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

import qlora_native
from on_device import OnDevice

try:
    from qlora_native import _emulation
except ImportError:  # of a build without QLORA_EMULATION=ON
    _emulation = None

_AVAILABLE = qlora_native.available_isas()
_BUILT: list[str] = qlora_native.build_info()["isas_built"]
_GPU = "cuda"
_HAS_GPU = "cuda_compiler" in qlora_native.build_info() and torch.cuda.is_available()
# "default": the one that is used by itself, for a test of something else than the kernels, which
# runs each test once; or names, with commas between them.
_ASKED = os.environ.get("QLORA_TEST_ISAS", "")
_ran: Counter[str] = Counter()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" not in metafunc.fixturenames:
        return
    names = [*_BUILT]
    if metafunc.definition.get_closest_marker("emulated"):
        names += [_emulation.name] if _emulation is not None else []
        names += [_GPU] if _HAS_GPU else []
    if _ASKED:
        asked = [qlora_native.cpu_isa()] if _ASKED == "default" else _ASKED.split(",")
        names = [name for name in names if name in asked]
    metafunc.parametrize("isa", names, indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the instruction set, or of the CUDA backend, that the ops use in the test."""
    name: str = request.param
    if name == _GPU:
        _ran[name] += 1
        with OnDevice(_GPU):
            yield name
        return
    if _emulation is not None and name == _emulation.name:
        _ran[name] += 1
        _emulation.use(True)
        yield name
        _emulation.use(False)
        return
    if name not in _AVAILABLE:
        pytest.skip(f"this processor has no {name}")
    before = qlora_native.cpu_isa()
    qlora_native.force_isa(name)
    _ran[name] += 1
    yield name
    qlora_native.force_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads that torch's pool has while the test runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


MARGIN_BYTES = 256
_SENTINEL = 0xA5

# sentinels(shape, dtype, fill=…) -> tensor
Sentinels = Callable[..., torch.Tensor]


@pytest.fixture
def sentinels() -> Iterator[Sentinels]:
    """A factory of contiguous tensors that stand in the middle of a guarded buffer.

    What is written outside such a tensor fails the test. `offset` moves its start by that many
    bytes off a 64-byte boundary, a multiple of the element's size.
    """
    guarded: list[tuple[torch.Tensor, int, int]] = []

    def make(
        shape: Sequence[int] | int, dtype: torch.dtype = torch.float32, offset: int = 0
    ) -> torch.Tensor:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        n_bytes = math.prod(shape) * dtype.itemsize
        size = n_bytes + 2 * MARGIN_BYTES + offset + 64
        buffer = torch.full((size,), _SENTINEL, dtype=torch.uint8)
        begin = MARGIN_BYTES + (-buffer.data_ptr()) % 64 + offset
        guarded.append((buffer, begin, begin + n_bytes))
        return buffer[begin : begin + n_bytes].view(dtype).view(shape)

    yield make
    for buffer, begin, end in guarded:
        before = (buffer[:begin] != _SENTINEL).nonzero()
        after = (buffer[end:] != _SENTINEL).nonzero()
        assert before.numel() == 0, f"wrote {begin - int(before[0])} bytes before the tensor"
        assert after.numel() == 0, f"wrote {int(after[-1]) + 1} bytes past the tensor's end"


def pytest_configure(config: pytest.Config) -> None:
    # Of pytest-xdist's workers each has its share of the processors: tests that need more threads
    # ask for them.
    if hasattr(config, "workerinput"):
        workers: int = config.workerinput["workercount"]
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    config.pluginmanager.register(_GatherRan())
    # A shell starts its background jobs with SIGINT ignored, and their children inherit that: the
    # tests that interrupt a child of theirs would then wait for something that never comes.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _GatherRan:
    """Adds up what pytest-xdist's workers ran, in the process that writes the summary."""

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        _ran.update(getattr(node, "workeroutput", {}).get("ran", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["ran"] = dict(_ran)


def pytest_report_header() -> str:
    return f"torch {torch.__version__}, qlora_native from {qlora_native.__file__}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = ", ".join(f"{name} ({_ran[name]} tests)" for name in _ran) or "none"
    missing = [name for name in _BUILT if name not in _AVAILABLE]
    terminalreporter.write_sep("-", "instruction sets")
    terminalreporter.write_line(f"ran: {ran}")
    if _emulation is None:
        terminalreporter.write_line("not built: cuda-emulated (QLORA_EMULATION=ON)")
    if not _HAS_GPU:
        terminalreporter.write_line("not here: cuda (a GPU, under a CUDA build of torch)")
    if missing:
        terminalreporter.write_line(f"not on this processor: {', '.join(missing)}")
    terminalreporter.write_line(f"default here: {qlora_native.cpu_isa()}")
    terminalreporter.write_line(pytest_report_header())
