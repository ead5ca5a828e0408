"""Every way of the CUDA backend to multiply by a 4-bit weight, each by itself.

On the emulator, and on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

import qlora_native
from linear_cases import (
    CASES,
    DTYPE_IDS,
    DTYPES,
    Case,
    assert_backward_input,
    assert_forward,
    make_weight,
    rand,
)
from on_device import OnDevice
from qlora_native import _core, ops

try:
    from qlora_native import _emulation as emulation
except ImportError:  # of a build without QLORA_EMULATION=ON
    emulation = None

_INFO = qlora_native.build_info()
_ON_GPU = ["cuda"] if "cuda_linear_ways" in _INFO and torch.cuda.is_available() else []
_BACKENDS = [emulation.name, *_ON_GPU] if emulation else _ON_GPU
if not _BACKENDS:
    pytest.skip("no emulator in this build, and no GPU", allow_module_level=True)
_FORWARD = emulation.ways("forward") if emulation else _INFO["cuda_linear_ways"]
_BACKWARD = emulation.ways("backward_input") if emulation else _INFO["cuda_backward_input_ways"]

pytestmark = pytest.mark.emulated
needs_emulator = pytest.mark.skipif(emulation is None, reason="a build without QLORA_EMULATION=ON")

# Rows and columns past a tile of 64, depths past a step and several steps, tails of each, blocks
# across rows; and what the tensor cores' ways take: whole pieces, past a tile of theirs and past
# the panels that they keep.
SHAPES = {
    "tiles": Case(n=70, k=136, m=(67,)),
    "odd_k": Case(n=23, k=77, m=(5,), blocksize=32),
    "blocks_across_rows": Case(n=19, k=96, m=(9,), blocksize=256),
    "several_panels": Case(n=200, k=328, m=(17,), double_quant=False),
    "whole_pieces": Case(n=264, k=96, m=(130,)),
    "whole_pieces_deep": Case(n=40, k=544, m=(9,)),
    "fp4": Case(n=11, k=39, m=(6,), format="fp4", blocksize=32),
    "one_value": CASES["one_value"],
    "no_rows": CASES["no_rows"],
    "no_columns": CASES["no_columns"],
}

ForceWay = Callable[[str, str], None]


@pytest.fixture
def emulated() -> Iterator[None]:
    emulation.use(True)
    emulation.set_architecture(90)  # which every way may serve
    yield
    emulation.set_architecture(80)
    for direction in ("forward", "backward_input"):
        emulation.force_way(direction, None)
    emulation.use(False)


def force_on_gpu(direction: str, way: str) -> None:
    forward, backward = (way, None) if direction == "forward" else (None, way)
    _core.force_cuda_linear(forward, backward)


@pytest.fixture(params=_BACKENDS)
def force_way(request: pytest.FixtureRequest) -> Iterator[ForceWay]:
    if request.param != "cuda":
        request.getfixturevalue("emulated")
        yield emulation.force_way
        return
    with OnDevice("cuda"):
        yield force_on_gpu
    _core.force_cuda_linear(None, None)


@contextmanager
def skip_what_it_refuses(way: str) -> Iterator[None]:
    """A way that serves some cases alone says so; which it must serve, its own tests say."""
    try:
        yield
    except RuntimeError as error:
        if "does not serve" not in str(error):
            raise
        pytest.skip(f"{way} does not serve this case")


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("way", _FORWARD)
def test_forward(force_way: ForceWay, way: str, name: str, dtype: torch.dtype) -> None:
    case = SHAPES[name]
    weight = make_weight(case)
    bias = rand(case.n, seed=1, dtype=dtype)
    force_way("forward", way)
    for m in case.m:
        x = rand(m, case.k, seed=2, dtype=dtype)
        with skip_what_it_refuses(way):
            y = ops.linear_4bit(x, *weight.parts, case.n, case.blocksize, case.format, bias)
        assert_forward(y, x, weight, bias, f"M={m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("way", _BACKWARD)
def test_backward_input(force_way: ForceWay, way: str, name: str, dtype: torch.dtype) -> None:
    case = SHAPES[name]
    weight = make_weight(case)
    force_way("backward_input", way)
    for m in case.m:
        grad_out = rand(m, case.n, seed=3, dtype=dtype)
        with skip_what_it_refuses(way):
            grad_x = ops.linear_4bit_backward_input(
                grad_out, *weight.parts, case.k, case.blocksize, case.format
            )
        assert_backward_input(grad_x, grad_out, weight, f"M={m}")


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("way", _FORWARD)
def test_a_view_that_begins_anywhere(force_way: ForceWay, way: str, offset: int) -> None:
    case = Case(n=24, k=64, m=(3,))
    weight = make_weight(case)
    packed = torch.zeros(weight.packed.numel() + offset, dtype=torch.uint8)[offset:]
    packed.copy_(weight.packed.flatten())
    x = torch.zeros(3 * case.k + offset)[offset:].view(3, case.k).copy_(rand(3, case.k, seed=4))
    force_way("forward", way)
    with skip_what_it_refuses(way):
        y = ops.linear_4bit(x, packed, *weight.parts[1:], case.n, case.blocksize, case.format, None)
    assert_forward(y, x, weight, None)


# The table that is shipped: by architecture, rows, and whether tiles fill the card.
@pytest.mark.parametrize(
    ("architecture", "m", "abundant", "forward", "backward"),
    [
        pytest.param(75, 20, False, "plain", "plain", id="sm_75"),
        pytest.param(80, 20, False, "few_rows", "tiles", id="few rows"),
        pytest.param(80, 100, False, "tiles", "tiles", id="sm_80"),
        pytest.param(80, 520, False, "plain", "plain", id="many rows"),
        pytest.param(90, 100, False, "wgmma", "wgmma", id="Hopper"),
        pytest.param(90, 520, False, "wgmma", "wgmma", id="Hopper, many rows"),
        pytest.param(90, 1030, False, "plain", "plain", id="Hopper, more rows"),
        pytest.param(90, 100, True, "tiles", "tiles", id="Hopper, too few tiles"),
        pytest.param(100, 100, False, "tiles", "tiles", id="Blackwell"),
    ],
)
@needs_emulator
def test_the_table(
    emulated: None, architecture: int, m: int, abundant: bool, forward: str, backward: str
) -> None:
    case = Case(n=8, k=32, m=(), blocksize=32)
    weight = make_weight(case)
    emulation.set_architecture(architecture)
    emulation.only_ends(1000 if abundant else 0)  # a card of very many multiprocessors
    x, grad = (rand(m, d, seed=5, dtype=torch.bfloat16) for d in (case.k, case.n))
    ops.linear_4bit(x, *weight.parts, case.n, case.blocksize, case.format, None)
    ops.linear_4bit_backward_input(grad, *weight.parts, case.k, case.blocksize, case.format)
    emulation.only_ends(0)
    assert emulation.last_way("forward") == forward
    assert emulation.last_way("backward_input") == backward


@needs_emulator
def test_a_way_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no such way: 'by hand'"):
        emulation.force_way("forward", "by hand")
    with pytest.raises(ValueError, match="direction must be"):
        emulation.force_way("sideways", None)
