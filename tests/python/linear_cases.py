"""What the linear tests share: quantized weights by name, and the bound on their results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_native import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPE_IDS = [str(d).removeprefix("torch.") for d in DTYPES]


@dataclass(frozen=True)
class Case:
    """A weight [n, k], how it is quantized, and the rows of x that meet it."""

    n: int
    k: int
    m: tuple[int, ...]
    blocksize: int = 64
    format: str = "nf4"
    double_quant: bool = True


CASES = {
    "model": Case(n=192, k=576, m=(1, 3, 17, 130)),
    "every_small_m": Case(n=70, k=256, m=(0, 1, 2, 3, 4, 5, 6, 7, 13, 15, 29)),
    "deep": Case(n=33, k=2048 + 32, m=(1, 4, 64)),
    "row_past_l1": Case(n=3, k=6144 + 64, m=(1,)),
    "tails": Case(n=45, k=112, m=(1, 2, 5, 17), blocksize=32),
    "wider_than_a_block": Case(n=300, k=64, m=(1, 6, 64)),
    "blocks_across_rows": Case(n=19, k=96, m=(1, 4, 9), blocksize=256),
    "one_block_larger_than_k": Case(n=9, k=48, m=(1, 3, 8), blocksize=4096),
    "k_not_whole_vectors": Case(n=21, k=100, m=(1, 2, 7, 20)),
    "odd_k": Case(n=23, k=77, m=(1, 3, 5, 16), blocksize=32),
    "odd_everything": Case(n=7, k=5, m=(1, 5, 9), double_quant=False),
    "one_value": Case(n=1, k=1, m=(1, 5), double_quant=False),
    "fp4": Case(n=50, k=320, m=(1, 4, 19), format="fp4"),
    "fp4_odd_k": Case(n=11, k=39, m=(2, 6), format="fp4", blocksize=32),
    "single_quantized": Case(n=64, k=256, m=(1, 4, 31), blocksize=128, double_quant=False),
    "few_rows": Case(n=39, k=1280 + 64, m=(1, 2, 3, 4, 5, 6, 7, 8, 9)),
    "few_rows_single_quantized": Case(
        n=11, k=256 + 32, m=(1, 2, 3, 4, 5, 6, 7, 8), blocksize=32, double_quant=False
    ),
    "few_rows_fp4": Case(n=70, k=192, m=(1, 2, 5, 8), format="fp4", blocksize=128),
    "words_past_a_vector": Case(n=10, k=128 + 16, m=(1, 2, 3, 4, 5, 8)),
    "few_rows_odd_k": Case(n=13, k=301, m=(1, 2, 3, 4, 5, 8)),
    "no_rows": Case(n=0, k=64, m=(1, 8), double_quant=False),
    "no_columns": Case(n=5, k=0, m=(1, 8), double_quant=False),
}
NAMES = list(CASES)


@dataclass
class Weight:
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    blocksize: int
    format: str
    exact: Tensor  # float64 [n, k], what the codes stand for

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.packed, self.absmax, self.nested_absmax, self.nested_offset

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """What dequantizing to that dtype gives."""
        return self.exact.to(torch.float32).to(dtype)


def make_weight(case: Case, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(case.n, case.k, generator=generator) * 0.05
    packed, absmax = reference.quantize_4bit(dense, case.blocksize, case.format)
    scales, nested_absmax, nested_offset = absmax, None, None
    if case.double_quant:
        absmax, nested_absmax, nested_offset = reference.quantize_scales(scales)
        scales = reference.dequantize_scales(absmax, nested_absmax, nested_offset)
    exact = reference.dequantize_4bit(packed, scales, (case.n, case.k), case.blocksize, case.format)
    return Weight(packed, absmax, nested_absmax, nested_offset, case.blocksize, case.format, exact)


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * std).to(dtype)


def assert_as_exact_as_plain(
    actual: Tensor, plain: Tensor, exact: Tensor, magnitude: Tensor, name: str = "result"
) -> None:
    """Error against float64 at most twice the plain torch path's in the same dtype.

    On a few elements the plain path may be exact by luck, so an error of half a unit of the
    output's dtype, and of fp32's in the sum of magnitudes [same shape], is always allowed.
    """
    assert actual.dtype == plain.dtype
    assert actual.shape == exact.shape
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    error = (actual.to(torch.float64) - exact).abs()
    plain_error = (plain.to(torch.float64) - exact).abs()
    rounding = 0.5 * torch.finfo(actual.dtype).eps * exact.abs()
    summation = torch.finfo(torch.float32).eps * magnitude
    allowed = torch.maximum(2.0 * plain_error.max(), (rounding + summation).max())
    worst = int(error.argmax())
    assert error.max() <= allowed, (
        f"{name} is off by {error.max():.3g} at flat index {worst} "
        f"(plain path {plain_error.max():.3g}, allowed {allowed:.3g})"
    )
    rms, plain_rms = error.square().mean().sqrt(), plain_error.square().mean().sqrt()
    floor = (rounding + summation).square().mean().sqrt()
    assert rms <= torch.maximum(2.0 * plain_rms, floor), (
        f"{name}: rms error {rms:.3g}, plain path {plain_rms:.3g}"
    )


def assert_forward(
    y: Tensor, x: Tensor, weight: Weight, bias: Tensor | None, message: str = ""
) -> None:
    """y = x W^T + bias, as exact as torch makes it of a W rounded to x's dtype."""
    plain = x @ weight.rounded(x.dtype).T
    exact = x.double() @ weight.exact.T
    magnitude = x.double().abs() @ weight.exact.abs().T
    if bias is not None:
        plain = torch.addmm(bias, x, weight.rounded(x.dtype).T)
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    assert_as_exact_as_plain(y, plain, exact, magnitude, message)


def assert_backward_input(
    grad_x: Tensor, grad_out: Tensor, weight: Weight, message: str = ""
) -> None:
    """grad_x = grad_out W, likewise."""
    assert_as_exact_as_plain(
        grad_x,
        grad_out @ weight.rounded(grad_out.dtype),
        grad_out.double() @ weight.exact,
        grad_out.double().abs() @ weight.exact.abs(),
        message,
    )
