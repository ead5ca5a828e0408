"""A changed weight back into 4 bits, and the change kept: stochastic rounding on the old scales.

An adapter moves most values by far less than the distance of two 4-bit values, and a value that was
dequantized stands exactly on one. Rounded to nearest, nearly all fall back to where they were and
the adapter is gone. Here a value between two neighbours takes the upper one with the probability
that makes its expectation the value itself (Gupta et al., 2015): each weight gets noise, a product
over many of them keeps the change. The scales stay the base's, so that what did not change stays as
it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_native import _core, ops
from qlora_native.quant_state import QuantState

_CHUNK = 1 << 20  # values at a time, a multiple of every blocksize


class SeededGenerators(dict[torch.device, torch.Generator]):
    """One generator for each device that is asked for, seeded with 0."""

    def __missing__(self, device: torch.device) -> torch.Generator:
        self[device] = torch.Generator(device).manual_seed(0)
        return self[device]


@torch.no_grad()
def requantize_4bit(weight: Tensor, state: QuantState, generator: torch.Generator) -> Tensor:
    """Codes for `weight` on the scales of `state`, rounded stochastically.

    Args:
        weight: floating, of state.shape. What lies beyond its block's scale is clipped to it.
        state: of the weight before the change.
        generator: on the weight's device; the same seed gives the same codes.

    Returns:
        packed uint8 [ceil(n/2), 1].
    """
    if weight.shape != state.shape:
        raise ValueError(f"weight must have shape {list(state.shape)}, got {list(weight.shape)}")
    if state.nested_absmax is not None and state.nested_offset is not None:
        scales = ops.dequantize_scales(state.absmax, state.nested_absmax, state.nested_offset)
    else:
        scales = state.absmax
    book = torch.tensor(_core.codebook(state.format), dtype=torch.float32, device=weight.device)
    values, code_of = book.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    # The first code of each value: FP4 has two zeros.
    codes = torch.stack([(code_of == i).nonzero()[0, 0] for i in range(len(values))])
    codes = codes.to(torch.uint8)

    flat = weight.reshape(-1)
    packed = torch.empty(state.packed_shape, dtype=torch.uint8, device=weight.device).view(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        part = flat[begin : begin + _CHUNK].float()
        first_block = begin // state.blocksize
        n_blocks = -(-part.numel() // state.blocksize)
        scale = scales[first_block : first_block + n_blocks].repeat_interleave(state.blocksize)
        normed = (part / scale[: part.numel()]).nan_to_num(nan=0.0).clamp(-1.0, 1.0)
        lower = (torch.bucketize(normed, values, right=True) - 1).clamp(0, len(values) - 2)
        share = (normed - values[lower]) / (values[lower + 1] - values[lower])
        chance = torch.rand(share.shape, generator=generator, device=share.device)
        chosen = codes[lower + (chance < share)]
        if chosen.numel() % 2:
            chosen = torch.cat([chosen, codes[(values == 0).nonzero()[0]]])
        packed[begin // 2 : begin // 2 + chosen.numel() // 2] = chosen[0::2] << 4 | chosen[1::2]
    return packed.view(state.packed_shape)
