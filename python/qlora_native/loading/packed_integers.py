"""GPTQ's and AWQ's weights: integers with a scale and a zero point for each group of a column.

Both store W transposed, in int32 words, lowest bits first:

    W[n, k] = scales[g, n] * (q[k, n] - z[g, n])        g = the group of row k

    GPTQ  qweight [K*bits/32, N], words along k; qzeros [G, N*bits/32], words along n; z is what
          is stored plus 1 (checkpoint_format "gptq"; "gptq_v2" stores z itself); g = g_idx[k]
    AWQ   qweight [K, N/8] and qzeros [G, N/8], both along n, the eight values of a word in the
          order 0 2 4 6 1 3 5 7; g = k // group_size

Sources: Frantar et al., "GPTQ", 2022, and AutoGPTQ's pack; Lin et al., "AWQ", 2023, and AutoAWQ's
gemm layout.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_native.loading.checkpoint_index import CheckpointIndex
from qlora_native.loading.encoded import DecodedIndex, EncodedTensor
from qlora_native.loading.errors import CheckpointError
from qlora_native.loading.stored_form import GPTQ, StoredForm

_WORD = 32
# Where in AWQ's word the eight values of it are, in their own order.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def decode_index(index: CheckpointIndex, form: StoredForm) -> DecodedIndex:
    """The checkpoint with every `<module>.qweight` and its companions as `<module>.weight`."""
    settings = form.settings
    bits = int(settings.get("bits", settings.get("w_bit", 4)))
    names = set(index.names())
    encoded = {}
    for name in names:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        parts = {"qweight": name}
        for part in ("qzeros", "scales", "g_idx"):
            if f"{module}.{part}" in names:
                parts[part] = f"{module}.{part}"
            elif part != "g_idx":
                raise CheckpointError(
                    f"{index.file_of(name)} holds {name!r}, but no file of the folder holds "
                    f"{module}.{part!r}"
                )
        words, columns = index.entry(name).shape
        if form.method == GPTQ:
            shape = (columns, words * _WORD // bits)
            decode = partial(decode_gptq, bits=bits, settings=settings)
        else:
            shape = (columns * _WORD // bits, words)
            decode = partial(decode_awq, settings=settings)
        encoded[f"{module}.weight"] = EncodedTensor(shape, parts, decode)
    return DecodedIndex(index, encoded, ignored=set())


def decode_gptq(parts: dict[str, Tensor], bits: int, settings: dict[str, Any]) -> Tensor:
    """W [N, K], float32."""
    scales = parts["scales"].float()
    q = _unpack(parts["qweight"].t(), bits).t()
    zeros = _unpack(parts["qzeros"], bits)
    if settings.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) & (2**bits - 1)
    group = parts.get("g_idx")
    if group is None:
        group = _groups(q.shape[0], int(settings.get("group_size", -1)))
    group = group.long()
    return (scales[group] * (q - zeros[group])).t().contiguous()


def decode_awq(parts: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """W [N, K], float32."""
    places = torch.tensor(_AWQ_PLACES)
    q, zeros = (
        _unpack(parts[name], 4).view(-1, 8)[:, places].view(parts[name].shape[0], -1)
        for name in ("qweight", "qzeros")
    )
    size = int(settings.get("group_size", settings.get("q_group_size", 128)))
    group = _groups(q.shape[0], size)
    return (parts["scales"].float()[group] * (q - zeros[group])).t().contiguous()


def _groups(rows: int, size: int) -> Tensor:
    """The group of each row; all are one group where size is -1."""
    return torch.arange(rows) // (rows if size <= 0 else size)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """[rows, n] int32 words to their values, int32 [rows, n * 32 / bits]."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    values: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.flatten(1)
