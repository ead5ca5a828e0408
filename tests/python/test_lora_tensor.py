"""The LoRA branch's skinny products on the tensor cores (cuda/kernels/lora_tensor.cuh), on the
emulator. Their planted faults are in test_qlora_faults.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from linear_cases import Case, assert_as_exact_as_plain, make_weight, rand
from qlora_native import ops, reference

emulation = pytest.importorskip(
    "qlora_native._emulation", reason="not a build with QLORA_EMULATION=ON"
)

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
SCALE = 1.75
SEED = torch.tensor([0x1234_5678_9ABC])
GRADIENTS = ("x", "a", "b", "bias")


@dataclass(frozen=True)
class Shape:
    m: int
    n: int
    k: int
    r: int
    p: float = 0.0
    adapters: torch.dtype = torch.float32


# Runs of the depth, more steps than the ring holds, tails of rows, columns and depth, two tiles of
# columns, each width of a tile.
SHAPES = {
    "less_than_a_step": Shape(m=5, n=24, k=32, r=4),
    "two_runs": Shape(m=600, n=24, k=136, r=16, p=0.25),
    "runs_of_k": Shape(m=9, n=24, k=1040, r=20),
    "two_tiles_of_columns": Shape(m=70, n=40, k=72, r=67),
    "adapters_of_16_bits": Shape(m=33, n=16, k=64, r=8, p=0.5, adapters=torch.bfloat16),
}


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    emulation.use(True)
    for direction in ("forward", "backward_input"):
        emulation.force_way(direction, "fma")  # what there is of tensor products is LoRA's
    yield
    for direction in ("forward", "backward_input"):
        emulation.force_way(direction, None)
    emulation.count(False)
    emulation.set_seed(0)
    emulation.set_architecture(80)
    emulation.use(False)


class Branch:
    """A layer's LoRA branch, its inputs, and what its products are exactly."""

    def __init__(self, shape: Shape, dtype: torch.dtype, gradient: float = 1.0) -> None:
        self.shape = shape
        self.weight = make_weight(Case(n=shape.n, k=shape.k, m=()))
        self.a = rand(shape.r, shape.k, seed=1, dtype=shape.adapters, std=0.1)
        self.b = rand(shape.n, shape.r, seed=2, dtype=shape.adapters, std=0.1)
        self.x = rand(shape.m, shape.k, seed=3, dtype=dtype)
        self.dy = rand(shape.m, shape.n, seed=4, dtype=dtype, std=gradient)
        self.dropped = reference.dropout(self.x.double(), int(SEED), shape.p)

    def forward(self) -> Tensor:
        """u [M, R]"""
        return ops.qlora_linear(
            self.x, *self.weight.parts, 64, "nf4", None, self.a, self.b, SCALE, self.shape.p, SEED
        )[1]

    def backward(self, *need: str) -> dict[str, Tensor]:
        u = self.dropped.float() @ self.a.float().T
        gradients = ops.qlora_linear_backward(
            self.dy, self.x, u, *self.weight.parts, 64, "nf4", self.a, self.b, SCALE, self.shape.p,
            SEED, *(name in need for name in GRADIENTS),
        )  # fmt: skip
        return dict(zip(GRADIENTS, gradients, strict=True))

    def assert_right(self, gradients: dict[str, Tensor]) -> None:
        """dA, dB and dbias, as exact as products in fp32."""
        a, b, dy = self.a.double(), self.b.double(), self.dy.double()
        u = (self.dropped.float() @ self.a.float().T).double()
        g, g_size = SCALE * dy @ b, SCALE * dy.abs() @ b.abs()
        plain_g = SCALE * self.dy.float() @ self.b.float()
        exact = {
            "a": (plain_g.T @ self.dropped.float(), g.T @ self.dropped,
                  g_size.T @ self.dropped.abs()),
            "b": (SCALE * self.dy.float().T @ u.float(), SCALE * dy.T @ u,
                  SCALE * dy.abs().T @ u.abs()),
            "bias": (self.dy.float().sum(0), dy.sum(0), dy.abs().sum(0)),
        }  # fmt: skip
        assert a.shape == gradients["a"].shape and b.shape == gradients["b"].shape
        for name, (plain, want, size) in exact.items():
            dtype = gradients[name].dtype
            assert_as_exact_as_plain(gradients[name], plain.to(dtype), want, size, name)


@DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_u(name: str, dtype: torch.dtype) -> None:
    branch = Branch(SHAPES[name], dtype)
    u = branch.forward()
    a = branch.a.double()
    plain = branch.dropped.float() @ branch.a.float().T
    assert_as_exact_as_plain(u, plain, branch.dropped @ a.T, branch.dropped.abs() @ a.abs().T, "u")


@DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    branch = Branch(SHAPES[name], dtype)
    branch.assert_right(branch.backward("a", "b", "bias"))


def test_small_gradients_in_fp16_keep_their_bits() -> None:
    """g is below what fp16 has, and below its steps: it must not go through that type."""
    branch = Branch(Shape(m=40, n=64, k=32, r=8), torch.float16, gradient=1e-4)
    branch.b *= 1e-4
    branch.assert_right(branch.backward("a", "b", "bias"))


def test_bits_depend_neither_on_the_order_of_threads_nor_on_what_is_asked_for() -> None:
    branch = Branch(SHAPES["two_runs"], torch.bfloat16)
    names = ("a", "b", "bias")
    want = branch.backward(*names)
    emulation.set_seed(1)
    for need in (names, *((name,) for name in names)):
        got = branch.backward(*need)
        assert all(torch.equal(got[name], want[name]) for name in need)


@pytest.mark.parametrize(
    ("k", "dtype", "architecture", "tensor_cores"),
    [
        pytest.param(32, torch.bfloat16, 80, True, id="the tensor cores'"),
        pytest.param(36, torch.bfloat16, 80, False, id="rows are no whole pieces"),
        pytest.param(32, torch.float32, 80, False, id="fp32"),
        pytest.param(32, torch.bfloat16, 75, False, id="sm_75"),
    ],
)
def test_which_activations_go_to_the_tensor_cores(
    k: int, dtype: torch.dtype, architecture: int, tensor_cores: bool
) -> None:
    branch = Branch(Shape(m=9, n=k, k=k, r=4), dtype)
    emulation.set_architecture(architecture)
    emulation.count(True)
    branch.forward()
    assert (emulation.counts()["tensor_flops"] > 0) == tensor_cores
    emulation.count(True)  # from zero
    branch.assert_right(branch.backward("a", "b", "bias"))
    assert (emulation.counts()["tensor_flops"] > 0) == tensor_cores
