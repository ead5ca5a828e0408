"""Every documented bad argument: which exception comes, and that its message says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qlora_native
from cases import make_weight
from qlora_native import ops

W = make_weight(24, 40)  # 960 values, 15 blocks
PLAIN = make_weight(24, 40, double_quant=False)
X = torch.randn(3, 40)
LORA_A, LORA_B = torch.randn(4, 40), torch.randn(24, 4)
INT = torch.ones(3, 40, dtype=torch.int64)
BYTES = torch.zeros(64, dtype=torch.uint8)


def linear(x: Any = X, weight: Any = W.tensors, out_features: int = 24, **kwargs: Any) -> Any:
    return ops.linear_4bit(x, *weight, out_features, **kwargs)


def linear_out(out: torch.Tensor, x: torch.Tensor = X) -> None:
    ops.linear_4bit_out(x, *W.tensors, out)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BLOCKS_OF_256 = make_weight(24, 40, blocksize=256)


def grouped(x: torch.Tensor | None = None, offsets: torch.Tensor | None = None) -> torch.Tensor:
    x = torch.randn(3, 40) if x is None else x
    offsets = int32(1, 1, 3) if offsets is None else offsets
    return ops.grouped_linear_4bit(x, offsets, *W.tensors, 8)


def qlora(
    x: torch.Tensor = X,
    bias: torch.Tensor | None = None,
    lora_a: torch.Tensor = LORA_A,
    lora_b: torch.Tensor = LORA_B,
    **kwargs: Any,
) -> Any:
    return ops.qlora_linear(x, *W.tensors, 64, "nf4", bias, lora_a, lora_b, 1.0, **kwargs)


def qlora_backward(grad_out: torch.Tensor, u: torch.Tensor) -> Any:
    return ops.qlora_linear_backward(grad_out, X, u, *W.tensors, 64, "nf4", LORA_A, LORA_B, 1.0)


HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "step": 1}


def adamw(
    param: torch.Tensor | None = None,
    grad: torch.Tensor | None = None,
    exp_avg: torch.Tensor | None = None,
    exp_avg_sq: torch.Tensor | None = None,
    **changed: Any,
) -> None:
    param = torch.zeros(8) if param is None else param
    tensors = [torch.zeros(8) if t is None else t for t in (grad, exp_avg, exp_avg_sq)]
    ops.adamw_step([param], *([t] for t in tensors), **{**HYPER, **changed})


def adamw_8bit(**changed: Any) -> None:
    lists = {
        "params": [torch.zeros(300)],
        "grads": [torch.zeros(300)],
        "exp_avg": [torch.zeros(300, dtype=torch.uint8)],
        "exp_avg_sq": [torch.zeros(300, dtype=torch.uint8)],
        "exp_avg_absmax": [torch.zeros(2)],
        "exp_avg_sq_absmax": [torch.zeros(2)],
    }
    ops.adamw_8bit_step(**{**lists, **HYPER, **changed})


STORAGE = torch.zeros(4096, dtype=torch.uint8)

# name -> (call, exception, message without "qlora_native::")
CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # ---- quantize_4bit ----
    "blocksize not a power of two": (
        lambda: ops.quantize_4bit(X, 63),
        ValueError,
        "quantize_4bit: blocksize must be a power of two from 32 to 4096, got 63",
    ),
    "blocksize too small": (
        lambda: ops.quantize_4bit(X, 16),
        ValueError,
        "quantize_4bit: blocksize must be a power of two from 32 to 4096, got 16",
    ),
    "blocksize negative": (
        lambda: ops.quantize_8bit(X, -64),
        ValueError,
        "quantize_8bit: blocksize must be a power of two from 32 to 4096, got -64",
    ),
    "format unknown": (
        lambda: ops.quantize_4bit(X, 64, "nf5"),
        ValueError,
        "quantize_4bit: format must be one of 'nf4', 'fp4', got 'nf5'",
    ),
    "x of integers": (
        lambda: ops.quantize_4bit(INT),
        TypeError,
        "quantize_4bit: x must have dtype float32, float16 or bfloat16, got int64",
    ),
    "x not a tensor": (
        lambda: ops.quantize_4bit([1.0]),  # type: ignore[arg-type]
        TypeError,
        "quantize_4bit() Expected a value of type 'Tensor' for argument 'x' but instead found "
        "type 'list'.",
    ),
    "blocksize not an int": (
        lambda: ops.quantize_4bit(X, "64"),  # type: ignore[arg-type]
        TypeError,
        "quantize_4bit() Expected a value of type 'int' for argument 'blocksize' but instead "
        "found type 'str'.",
    ),
    "x sparse": (
        lambda: ops.quantize_4bit(X.to_sparse()),
        NotImplementedError,
        "quantize_4bit: all tensors must be dense CPU tensors, as this build has kernels for no "
        "other device, got one for torch's 'SparseCPU' backend",
    ),
    "packed too short": (
        lambda: ops.quantize_4bit_out(X, BYTES[:59], torch.zeros(2)),
        ValueError,
        "quantize_4bit.out: packed must hold ceil(n/2)=60 values, got shape [59]",
    ),
    "packed of floats": (
        lambda: ops.quantize_4bit_out(X, torch.zeros(60), torch.zeros(2)),
        TypeError,
        "quantize_4bit.out: packed must have dtype uint8, got float32",
    ),
    "absmax of another length": (
        lambda: ops.quantize_4bit_out(X, BYTES[:60], torch.zeros(3)),
        ValueError,
        "quantize_4bit.out: absmax must have shape [n_blocks=2], got [3]",
    ),
    "packed with gaps": (
        lambda: ops.quantize_4bit_out(X, STORAGE[:120:2], torch.zeros(2)),
        ValueError,
        "quantize_4bit.out: packed must be contiguous, as it is written in place, got shape [60] "
        "with strides [2]",
    ),
    "packed inside x": (
        lambda: ops.quantize_4bit_out(X, X.view(torch.uint8).view(-1)[4:64], torch.zeros(2)),
        ValueError,
        "quantize_4bit.out: packed must not share memory with x, got overlapping tensors",
    ),
    # ---- dequantize_4bit ----
    "shape that packed does not fill": (
        lambda: ops.dequantize_4bit(*W.tensors, (24, 41)),
        ValueError,
        "dequantize_4bit: packed must hold ceil(numel(shape)/2)=492 values, got shape [480]",
    ),
    "shape negative": (
        lambda: ops.dequantize_4bit(*W.tensors, (24, -40)),
        ValueError,
        "dequantize_4bit: shape must be 0 or more, got -40",
    ),
    "shape past 2^62": (
        lambda: ops.dequantize_4bit(*W.tensors, (1 << 40, 1 << 40)),
        ValueError,
        "dequantize_4bit: shape must stay below 2^62 values, got 1099511627776 x 1099511627776",
    ),
    "dtype double": (
        lambda: ops.dequantize_4bit(*W.tensors, (24, 40), dtype=torch.float64),
        TypeError,
        "dequantize_4bit: dtype must have dtype float32, float16 or bfloat16, got float64",
    ),
    "nested_absmax without nested_offset": (
        lambda: ops.dequantize_4bit(W.packed, W.absmax, W.nested_absmax, None, (24, 40)),
        ValueError,
        "dequantize_4bit: nested_offset must be given together with nested_absmax, got None",
    ),
    "nested_offset without nested_absmax": (
        lambda: ops.dequantize_4bit(W.packed, W.absmax, None, W.nested_offset, (24, 40)),
        ValueError,
        "dequantize_4bit: nested_absmax must be given together with nested_offset, got None",
    ),
    "codes as plain scales": (
        lambda: ops.dequantize_4bit(W.packed, W.absmax, None, None, (24, 40)),
        TypeError,
        "dequantize_4bit: absmax (without nested_absmax) must have dtype float32, got uint8",
    ),
    "plain scales as codes": (
        lambda: ops.dequantize_4bit(
            W.packed, PLAIN.absmax, W.nested_absmax, W.nested_offset, (24, 40)
        ),
        TypeError,
        "dequantize_4bit: absmax (with nested_absmax) must have dtype uint8, got float32",
    ),
    "nested_absmax of another length": (
        lambda: ops.dequantize_4bit(W.packed, W.absmax, torch.zeros(2), W.nested_offset, (24, 40)),
        ValueError,
        "dequantize_4bit: nested_absmax must have shape [ceil(n_blocks/256)=1], got [2]",
    ),
    "two offsets": (
        lambda: ops.dequantize_4bit(W.packed, W.absmax, W.nested_absmax, torch.zeros(2), (24, 40)),
        ValueError,
        "dequantize_4bit: nested_offset must hold n_offsets=1 values, got shape [2]",
    ),
    "out of doubles": (
        lambda: ops.dequantize_4bit_out(*W.tensors, torch.zeros(24, 40, dtype=torch.float64)),
        TypeError,
        "dequantize_4bit.out: out must have dtype float32, float16 or bfloat16, got float64",
    ),
    "out transposed": (
        lambda: ops.dequantize_4bit_out(*W.tensors, torch.zeros(40, 24).t()),
        ValueError,
        "dequantize_4bit.out: out must be contiguous, as it is written in place, got shape "
        "[24, 40] with strides [1, 24]",
    ),
    # ---- 8 bits ----
    "rounding unknown": (
        lambda: ops.quantize_8bit(X, rounding="up"),
        ValueError,
        "quantize_8bit: rounding must be one of 'nearest', 'bitsandbytes_cpu', got 'up'",
    ),
    "codes of another shape": (
        lambda: ops.quantize_8bit_out(X, BYTES, torch.zeros(1)),
        ValueError,
        "quantize_8bit.out: codes must have shape [3, 40], got [64]",
    ),
    "codes of floats": (
        lambda: ops.dequantize_8bit(X, torch.zeros(1)),
        TypeError,
        "dequantize_8bit: codes must have dtype uint8, got float32",
    ),
    "absmax too short for the codes": (
        lambda: ops.dequantize_8bit(BYTES, torch.zeros(1), 32),
        ValueError,
        "dequantize_8bit: absmax must have shape [n_blocks=2], got [1]",
    ),
    "out of another shape": (
        lambda: ops.dequantize_8bit_out(BYTES, torch.zeros(1), torch.zeros(8, 8)),
        ValueError,
        "dequantize_8bit.out: out must have shape [64], got [8, 8]",
    ),
    "absmax of two dimensions": (
        lambda: ops.quantize_scales(torch.zeros(2, 2)),
        ValueError,
        "quantize_scales: absmax must have shape [n_blocks=4], got [2, 2]",
    ),
    "absmax of halves": (
        lambda: ops.quantize_scales(torch.zeros(2, dtype=torch.float16)),
        TypeError,
        "quantize_scales: absmax must have dtype float32, got float16",
    ),
    "absmax_q8 of floats": (
        lambda: ops.dequantize_scales(torch.zeros(2), torch.zeros(1), torch.zeros(1)),
        TypeError,
        "dequantize_scales: absmax_q8 must have dtype uint8, got float32",
    ),
    # ---- linear_4bit ----
    "x a scalar": (
        lambda: linear(torch.tensor(1.0)),
        ValueError,
        "linear_4bit: x must have at least one dimension, got a scalar tensor",
    ),
    "x of doubles": (
        lambda: linear(X.double()),
        TypeError,
        "linear_4bit: x must have dtype float32, float16 or bfloat16, got float64",
    ),
    "x too wide for the weight": (
        lambda: linear(torch.randn(3, 41)),
        ValueError,
        "linear_4bit: packed must hold ceil(out_features*in_features/2)=492 values, got shape "
        "[480]",
    ),
    "out_features negative": (
        lambda: linear(out_features=-1),
        ValueError,
        "linear_4bit: out_features must be 0 or more, got -1",
    ),
    "out_features past 2^62": (
        lambda: linear(torch.randn(0, 40), out_features=1 << 60),
        ValueError,
        "linear_4bit: the weight [out_features, in_features] must stay below 2^62 values, got "
        "1152921504606846976 x 40",
    ),
    "absmax one short": (
        lambda: linear(weight=(PLAIN.packed, PLAIN.absmax[1:], None, None)),
        ValueError,
        "linear_4bit: absmax must have shape [n_blocks=15], got [14]",
    ),
    "bias of another dtype": (
        lambda: linear(bias=torch.zeros(24, dtype=torch.float16)),
        TypeError,
        "linear_4bit: bias (as x has it) must have dtype float32, got float16",
    ),
    "bias of another length": (
        lambda: linear(bias=torch.zeros(25)),
        ValueError,
        "linear_4bit: bias must have shape [out_features=24], got [25]",
    ),
    "out of another dtype": (
        lambda: linear_out(torch.zeros(3, 24, dtype=torch.bfloat16)),
        TypeError,
        "linear_4bit.out: out (as x has it) must have dtype float32, got bfloat16",
    ),
    "out with other rows": (
        lambda: linear_out(torch.zeros(4, 24)),
        ValueError,
        "linear_4bit.out: out must have shape [3, 24], got [4, 24]",
    ),
    "out with gaps": (
        lambda: linear_out(torch.zeros(3, 48)[:, ::2]),
        ValueError,
        "linear_4bit.out: out must be contiguous, as it is written in place, got shape [3, 24] "
        "with strides [48, 2]",
    ),
    "out inside x": (
        lambda: (lambda x: linear_out(x.view(-1)[:72].view(3, 24), x))(torch.zeros(3, 40)),
        ValueError,
        "linear_4bit.out: out must not share memory with x, got overlapping tensors",
    ),
    "grad_out too narrow": (
        lambda: ops.linear_4bit_backward_input(torch.randn(3, 20), *W.tensors, 40),
        ValueError,
        "linear_4bit_backward_input: packed must hold ceil(out_features*in_features/2)=400 "
        "values, got shape [480]",
    ),
    # ---- grouped_linear_4bit: three matrices of [8, 40] ----
    "offsets of another dtype": (
        lambda: grouped(offsets=torch.tensor([1, 2, 3])),
        TypeError,
        "grouped_linear_4bit: offsets must have dtype int32, got int64",
    ),
    "offsets that decrease": (
        lambda: grouped(offsets=int32(2, 1, 3)),
        ValueError,
        "grouped_linear_4bit: offsets must never decrease from 0, got [2, 1, 3]",
    ),
    "offsets that leave rows": (
        lambda: grouped(offsets=int32(1, 1, 2)),
        ValueError,
        "grouped_linear_4bit: offsets must end at the number of rows, 3, got [1, 1, 2]",
    ),
    "offsets of two dimensions": (
        lambda: grouped(offsets=int32(3, 3, 3).view(1, 3)),
        ValueError,
        "grouped_linear_4bit: offsets must have shape [n_groups], got [1, 3]",
    ),
    "offsets of another number of matrices": (
        lambda: grouped(offsets=int32(1, 3)),
        ValueError,
        "grouped_linear_4bit: packed must hold ceil(out_features*in_features/2)=320 values, got "
        "shape [480]",
    ),
    "grouped x of three dimensions": (
        lambda: grouped(x=torch.randn(1, 3, 40)),
        ValueError,
        "grouped_linear_4bit: x must have two dimensions, got [1, 3, 40]",
    ),
    "matrices that begin within a block": (
        lambda: ops.grouped_linear_4bit(
            torch.randn(3, 40), int32(1, 2, 3), *BLOCKS_OF_256.tensors, 8, 256
        ),
        ValueError,
        "grouped_linear_4bit: blocksize must divide out_features * in_features, so that each "
        "matrix begins with a block, got 256",
    ),
    "grouped grad_out too narrow": (
        lambda: ops.grouped_linear_4bit_backward_input(
            torch.randn(3, 7), int32(1, 2, 3), *W.tensors, 40
        ),
        ValueError,
        "grouped_linear_4bit_backward_input: packed must hold "
        "ceil(out_features*in_features/2)=420 values, got shape [480]",
    ),
    # ---- qlora_linear ----
    "lora_a flat": (
        lambda: qlora(lora_a=torch.randn(160)),
        ValueError,
        "qlora_linear: lora_a must have shape [r, in_features], got [160]",
    ),
    "lora_a for another input": (
        lambda: qlora(lora_a=torch.randn(4, 41)),
        ValueError,
        "qlora_linear: lora_a must have shape [r=4, in_features=40], got [4, 41]",
    ),
    "lora_b of another rank": (
        lambda: qlora(lora_b=torch.randn(24, 5)),
        ValueError,
        "qlora_linear: lora_b must have shape [out_features=24, r=4], got [24, 5]",
    ),
    "lora_b of another dtype": (
        lambda: qlora(lora_b=LORA_B.half()),
        TypeError,
        "qlora_linear: lora_b (as lora_a has it) must have dtype float32, got float16",
    ),
    "lora_a of doubles": (
        lambda: qlora(lora_a=LORA_A.double()),
        TypeError,
        "qlora_linear: lora_a must have dtype float32, float16 or bfloat16, got float64",
    ),
    "dropout_p of one": (
        lambda: qlora(dropout_p=1.0, dropout_seed=torch.tensor([1])),
        ValueError,
        "qlora_linear: dropout_p must be in [0, 1), got 1",
    ),
    "dropout_p not a number": (
        lambda: qlora(dropout_p=float("nan")),
        ValueError,
        "qlora_linear: dropout_p must be in [0, 1), got nan",
    ),
    "dropout without a seed": (
        lambda: qlora(dropout_p=0.1),
        ValueError,
        "qlora_linear: dropout_seed must be given where dropout_p is not 0, got None",
    ),
    "dropout_seed of floats": (
        lambda: qlora(dropout_p=0.1, dropout_seed=torch.tensor([1.0])),
        TypeError,
        "qlora_linear: dropout_seed must have dtype int64, got float32",
    ),
    "two dropout seeds": (
        lambda: qlora(dropout_p=0.1, dropout_seed=torch.tensor([1, 2])),
        ValueError,
        "qlora_linear: dropout_seed must hold n_seeds=1 values, got shape [2]",
    ),
    "grad_out of another shape": (
        lambda: qlora_backward(torch.randn(2, 24), torch.randn(3, 4)),
        ValueError,
        "qlora_linear_backward: grad_out must have shape [3, 24], got [2, 24]",
    ),
    "u of halves": (
        lambda: qlora_backward(torch.randn(3, 24), torch.randn(3, 4).half()),
        TypeError,
        "qlora_linear_backward: u must have dtype float32, got float16",
    ),
    # ---- optimizer ----
    "step 0": (
        lambda: adamw(step=0),
        ValueError,
        "adamw_step: step must be 1 or more, got 0",
    ),
    "lr negative": (
        lambda: adamw(lr=-1.0),
        ValueError,
        "adamw_step: lr must be finite and 0 or more, got -1",
    ),
    "lr infinite": (
        lambda: adamw(lr=float("inf")),
        ValueError,
        "adamw_step: lr must be finite and 0 or more, got inf",
    ),
    "beta1 of one": (
        lambda: adamw(beta1=1.0),
        ValueError,
        "adamw_step: beta1 must be in [0, 1), got 1",
    ),
    "eps negative": (
        lambda: adamw(eps=-1e-8),
        ValueError,
        "adamw_step: eps must be finite and 0 or more, got -1e-08",
    ),
    "one gradient too few": (
        lambda: ops.adamw_step([X], [], [X], [X], **HYPER),
        ValueError,
        "adamw_step: grads must have as many tensors as params, 1, got 0",
    ),
    "gradient of another shape": (
        lambda: adamw(grad=torch.zeros(9)),
        ValueError,
        "adamw_step: grads[0] must have shape [8], got [9]",
    ),
    "state of halves": (
        lambda: adamw(exp_avg=torch.zeros(8).half()),
        TypeError,
        "adamw_step: exp_avg[0] must have dtype float32, got float16",
    ),
    "parameter with gaps": (
        lambda: adamw(param=torch.zeros(16)[::2]),
        ValueError,
        "adamw_step: params[0] must be contiguous, as it is written in place, got shape [8] with "
        "strides [2]",
    ),
    "both moments in one place": (
        lambda: (lambda t: adamw(exp_avg=t, exp_avg_sq=t))(torch.zeros(8)),
        ValueError,
        "adamw_step: exp_avg_sq[0] must not share memory with exp_avg[0], got overlapping tensors",
    ),
    "grad_scale of doubles": (
        lambda: adamw(grad_scale=torch.ones(1, dtype=torch.float64)),
        TypeError,
        "adamw_step: grad_scale must have dtype float32, got float64",
    ),
    "found_inf of two values": (
        lambda: adamw(found_inf=torch.ones(2)),
        ValueError,
        "adamw_step: found_inf must hold n_flags=1 values, got shape [2]",
    ),
    "8-bit state of floats": (
        lambda: adamw_8bit(exp_avg=[torch.zeros(300)]),
        TypeError,
        "adamw_8bit_step: exp_avg[0] must have dtype uint8, got float32",
    ),
    "absmax of the state too short": (
        lambda: adamw_8bit(exp_avg_sq_absmax=[torch.zeros(1)]),
        ValueError,
        "adamw_8bit_step: exp_avg_sq_absmax[0] must have shape [2], got [1]",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_argument(name: str) -> None:
    call, exception, message = CASES[name]
    with pytest.raises(exception) as raised:
        call()
    assert type(raised.value) is exception
    assert str(raised.value) == f"qlora_native::{message}"


def test_the_op_itself_raises_runtime_error_with_the_same_message() -> None:
    with pytest.raises(RuntimeError, match="blocksize must be a power of two") as raised:
        torch.ops.qlora_native.quantize_4bit(X, 63, "nf4")
    assert type(raised.value) is RuntimeError


def test_core_names_what_it_knows() -> None:
    with pytest.raises(ValueError, match="format must be one of 'nf4', 'fp4', got 'int4'"):
        qlora_native.codebook("int4")
    with pytest.raises(ValueError, match=r"one that this processor runs \('scalar'.*got 'mmx'"):
        qlora_native.force_isa("mmx")


def test_a_refused_call_writes_nothing() -> None:
    param = torch.ones(8)
    with pytest.raises(ValueError, match="step"):
        adamw(param=param, grad=torch.ones(8), step=0)
    assert torch.equal(param, torch.ones(8))
