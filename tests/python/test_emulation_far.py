"""Tensors past 2^31 elements on the emulator: a few blocks of threads at either end, the rest of
the memory never touched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qlora_native import ops

emulation = pytest.importorskip(
    "qlora_native._emulation", reason="not a build with QLORA_EMULATION=ON"
)

TILE = 4096
ENDS = 2  # blocks, of a tile each
N = 2**31 + 5 * TILE + 320
NEAR = slice(0, ENDS * TILE)
FAR = slice((N // TILE - ENDS + 1) * TILE, N)


@pytest.fixture
def emulated() -> Iterator[None]:
    emulation.use(True)
    emulation.only_ends(ENDS)
    yield
    emulation.only_ends(0)
    emulation.use(False)


def sparse(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, of which the system gives those that are touched."""
    return torch.empty(n, dtype=dtype)


def values(dtype: torch.dtype) -> torch.Tensor:
    x = sparse(N, dtype)
    for part in (NEAR, FAR):
        x[part] = torch.randn(x[part].shape, generator=torch.Generator().manual_seed(part.start))
    return x


def part_of(part: slice, per: int) -> slice:
    return slice(part.start // per, -(-part.stop // per))


@pytest.mark.parametrize("part", [NEAR, FAR], ids=["near", "far"])
def test_4bit(emulated: None, part: slice) -> None:
    x = values(torch.bfloat16)
    packed, absmax = ops.quantize_4bit(x, 64)
    out = ops.dequantize_4bit(packed, absmax, None, None, (N,), dtype=torch.bfloat16)
    emulation.use(False)
    want_packed, want_absmax = ops.quantize_4bit(x[part].clone(), 64)
    want = ops.dequantize_4bit(
        want_packed, want_absmax, None, None, (x[part].numel(),), dtype=torch.bfloat16
    )
    assert torch.equal(packed[part_of(part, 2)], want_packed)
    assert torch.equal(absmax[part_of(part, 64)], want_absmax)
    assert torch.equal(out[part], want)


@pytest.mark.parametrize("part", [NEAR, FAR], ids=["near", "far"])
def test_8bit(emulated: None, part: slice) -> None:
    x = values(torch.float16)
    codes, absmax = ops.quantize_8bit(x, 256)
    out = ops.dequantize_8bit(codes, absmax, 256, dtype=torch.float16)
    emulation.use(False)
    want_codes, want_absmax = ops.quantize_8bit(x[part].clone(), 256)
    assert torch.equal(codes[part], want_codes)
    assert torch.equal(absmax[part_of(part, 256)], want_absmax)
    assert torch.equal(
        out[part], ops.dequantize_8bit(want_codes, want_absmax, 256, dtype=torch.float16)
    )


@pytest.mark.parametrize("part", [NEAR, FAR], ids=["near", "far"])
def test_adamw_8bit(emulated: None, part: slice) -> None:
    hyper = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.01,
        "step": 1,
        "maximize": False,
    }
    param = values(torch.bfloat16)
    state = [sparse(N, torch.uint8), sparse(N, torch.uint8)]
    state += [sparse(-(-N // 256), torch.float32) for _ in range(2)]
    for tensor in state[2:]:
        tensor.fill_(0)
    at = [part, part, part_of(part, 256), part_of(part, 256)]
    for codes in state[:2]:
        codes[NEAR] = 0
        codes[FAR] = 0
    want = [param[part].clone(), *(t[s].clone() for t, s in zip(state, at, strict=True))]
    grad = sparse(N, torch.bfloat16)
    for ends in (NEAR, FAR):
        grad[ends] = param[ends]
    ops.adamw_8bit_step([param], [grad], *[[t] for t in state], **hyper)
    emulation.use(False)
    ops.adamw_8bit_step([want[0]], [want[0].clone()], *[[t] for t in want[1:]], **hyper)
    assert torch.equal(param[part], want[0])
    for tensor, place, wanted in zip(state, at, want[1:], strict=True):
        assert torch.equal(tensor[place], wanted)


# A product whose weight and result's columns pass 2^31 elements and 2^25: columns of the result are
# its rows in the forward product, its columns in the gradient. Either end has two tiles of 128.
COLUMNS = 2**25 + 320
DEPTH = 64
ROWS = 3
ENDS_OF_COLUMNS = [
    pytest.param(slice(0, 256), id="near"),
    pytest.param(slice(2**25 + 128, COLUMNS), id="far"),
]


@pytest.fixture(params=["tiles", "wgmma"])
def way(request: pytest.FixtureRequest, emulated: None) -> Iterator[None]:
    emulation.set_architecture(90)
    for direction in ("forward", "backward_input"):
        emulation.force_way(direction, request.param)
    yield
    for direction in ("forward", "backward_input"):
        emulation.force_way(direction, None)
    emulation.set_architecture(80)


@pytest.mark.parametrize("part", ENDS_OF_COLUMNS)
def test_the_forward_product(way: None, part: slice) -> None:
    packed = sparse(COLUMNS * DEPTH // 2, torch.uint8).view(COLUMNS, DEPTH // 2)
    absmax = sparse(COLUMNS * DEPTH // 64, torch.float32).view(COLUMNS, DEPTH // 64)
    for end in (slice(0, 512), slice(2**25, COLUMNS)):
        packed[end].random_(256)
        absmax[end].uniform_(0.5, 1)
    x = torch.randn(ROWS, DEPTH).bfloat16()
    y = ops.linear_4bit(x, packed.flatten(), absmax.flatten(), None, None, COLUMNS)
    emulation.only_ends(0)
    parts = packed[part].flatten(), absmax[part].flatten(), None, None
    assert torch.equal(y[:, part], ops.linear_4bit(x, *parts, part.stop - part.start))


@pytest.mark.parametrize("part", ENDS_OF_COLUMNS)
def test_the_gradient_of_the_input(way: None, part: slice) -> None:
    packed = sparse(COLUMNS * DEPTH // 2, torch.uint8).view(DEPTH, COLUMNS // 2)
    absmax = sparse(COLUMNS * DEPTH // 64, torch.float32).view(DEPTH, COLUMNS // 64)
    for end in (slice(0, 512), slice(2**25, COLUMNS)):
        packed[:, part_of(end, 2)].random_(256)
        absmax[:, part_of(end, 64)].uniform_(0.5, 1)
    grad = torch.randn(ROWS, DEPTH).bfloat16()
    grad_x = ops.linear_4bit_backward_input(
        grad, packed.flatten(), absmax.flatten(), None, None, COLUMNS
    )
    emulation.only_ends(0)
    parts = packed[:, part_of(part, 2)].flatten(), absmax[:, part_of(part, 64)].flatten()
    want = ops.linear_4bit_backward_input(grad, *parts, None, None, part.stop - part.start)
    assert torch.equal(grad_x[:, part], want)
