"""FP8 weights with their scales: W = w * scale, the scale of the tensor, a row or a block.

A weight of dtype float8 has its scale under its own name with `_scale_inv` (DeepSeek's and
transformers' "fp8": blocks of weight_block_size; despite the name it is multiplied) or `_scale`
(fbgemm, compressed-tensors: the whole tensor, or a row each). Scales of activations are left out:
activations are not quantized here.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from qlora_native.loading.checkpoint_index import CheckpointIndex
from qlora_native.loading.encoded import DecodedIndex, EncodedTensor
from qlora_native.loading.errors import CheckpointError
from qlora_native.loading.stored_form import StoredForm

_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("_scale_inv", "_scale")
_OF_ACTIVATIONS = (
    ".input_scale", ".input_scale_ub", ".output_scale", ".activation_scale", ".k_scale", ".v_scale",
)  # fmt: skip


def decode_index(index: CheckpointIndex, form: StoredForm) -> DecodedIndex:
    """The checkpoint with every FP8 weight and its scale as one float tensor."""
    block = form.settings.get("weight_block_size")
    names = set(index.names())
    encoded = {}
    for name in names:
        entry = index.entry(name)
        if entry.dtype not in _DTYPES:
            continue
        scale = next((name + suffix for suffix in _SCALES if name + suffix in names), None)
        if scale is None:
            raise CheckpointError(
                f"{index.file_of(name)} holds {name!r} in {entry.dtype}, but no file of the folder "
                f"holds its scale, {name}_scale_inv or {name}_scale"
            )
        parts = {"weight": name, "scale": scale}
        encoded[name] = EncodedTensor(entry.shape, parts, partial(decode_fp8, block=block))
    return DecodedIndex(index, encoded, {n for n in names if n.endswith(_OF_ACTIVATIONS)})


def decode_fp8(parts: dict[str, Tensor], block: list[int] | None = None) -> Tensor:
    """weight * scale, float32, in the weight's shape [..., N, K].

    Args:
        parts: weight, and scale: one value, [N] or [N, 1], or one value for each block of
            [..., N, K]; uint8 and float8_e8m0fnu scales are exponents, 2^(e - 127).
        block: [rows, columns]; where None, N and K must be multiples of the scale's sizes.
    """
    weight, scale = parts["weight"].float(), parts["scale"]
    scale = (scale.float() - 127.0).exp2() if scale.dtype == torch.uint8 else scale.float()
    if scale.numel() == 1:
        return weight * scale.reshape(())
    if scale.dim() == 1:
        scale = scale.unsqueeze(-1)
    for axis in (-2, -1):
        size, count = weight.shape[axis], scale.shape[axis]
        if count in (1, size):
            continue
        length = block[axis] if block is not None else size // count
        if -(-size // length) != count or (block is None and size % count):
            raise ValueError(f"{count} scales for {size} values, in blocks of {length}")
        scale = scale.repeat_interleave(length, axis).narrow(axis, 0, size)
    return weight * scale
