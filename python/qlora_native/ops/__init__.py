"""The ops: typed wrappers over `torch.ops.qlora_native.*`, one each, in the order of the schemas.

Names of sizes: M tokens (the product of x's leading dimensions), N out_features, K in_features,
R LoRA rank, n values, n_blocks = ceil(n / blocksize).

A 4-bit weight [N, K] travels as its parts:

    packed         uint8, ceil(N*K/2) bytes in any shape; two codes a byte, the first one high
    absmax         float32 [n_blocks]; uint8 [n_blocks] where the scales are double-quantized, with
    nested_absmax  float32 [ceil(n_blocks/256)], else None
    nested_offset  float32, one value, else None

blocksize is a power of two from 32 to 4096; format is "nf4" or "fp4"; floating tensors are float32,
float16 or bfloat16. Inputs that are not contiguous are copied; outputs must be contiguous and must
not share memory with inputs. Every size may be 0.

All of them raise ValueError for a wrong value, shape or device, TypeError for a wrong dtype or type
(each message names the argument, what is wanted and what came), NotImplementedError for a device
without kernels, and RuntimeError where the kernel itself fails. The sources are in cpp/torch
(checks), cpp/cpu (kernels).
"""

from __future__ import annotations

from qlora_native.ops.grouped import grouped_linear_4bit, grouped_linear_4bit_backward_input
from qlora_native.ops.linear import (
    linear_4bit,
    linear_4bit_backward_input,
    linear_4bit_out,
    qlora_linear,
    qlora_linear_backward,
)
from qlora_native.ops.quantization import (
    dequantize_4bit,
    dequantize_4bit_out,
    dequantize_8bit,
    dequantize_8bit_out,
    dequantize_scales,
    quantize_4bit,
    quantize_4bit_out,
    quantize_8bit,
    quantize_8bit_out,
    quantize_scales,
)
from qlora_native.ops.step import (
    adamw_8bit_step,
    adamw_step,
    lion_8bit_step,
    lion_step,
    sgd_8bit_step,
    sgd_step,
)

__all__ = [
    "adamw_8bit_step",
    "adamw_step",
    "dequantize_4bit",
    "dequantize_4bit_out",
    "dequantize_8bit",
    "dequantize_8bit_out",
    "dequantize_scales",
    "grouped_linear_4bit",
    "grouped_linear_4bit_backward_input",
    "linear_4bit",
    "linear_4bit_backward_input",
    "linear_4bit_out",
    "lion_8bit_step",
    "lion_step",
    "qlora_linear",
    "qlora_linear_backward",
    "quantize_4bit",
    "quantize_4bit_out",
    "quantize_8bit",
    "quantize_8bit_out",
    "quantize_scales",
    "sgd_8bit_step",
    "sgd_step",
]
