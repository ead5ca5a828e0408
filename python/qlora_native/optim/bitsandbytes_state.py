"""What bitsandbytes' optimizers save, in the names that ours have.

    step, state1[, state2]                                     32-bit
    step, state1, absmax1, qmap1[, state2, absmax2, qmap2]     8-bit, blocks of 256 values

Since 0.49 its state_dict() keeps all but the step in one more dict, to hide it from FSDP. Paged
optimizers save the same. state1 is the first moment, in codes of the signed dynamic map (qmap1);
state2 the second, in those of the unsigned one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qlora_native._core import dynamic_map

_WRAPPED = "__bnb_optimizer_quant_state__"


def from_bitsandbytes(
    saved: dict[str, Any], moments: Sequence[str], absmax: Sequence[str], counters: Sequence[str]
) -> dict[str, Any]:
    """One parameter's state in our names; as it is where it is not bitsandbytes'.

    Args:
        saved: state_dict()["state"][i].
        moments, absmax, counters: the keys that the rule has.

    Raises:
        ValueError: the codes are of another map than the dynamic one.
    """
    flat = {key: value for key, value in saved.items() if key != _WRAPPED}
    flat |= saved.get(_WRAPPED, {})
    if "state1" not in flat:
        return saved
    result = {key: flat.pop(key) for key in counters if key in flat}
    flat.pop("step", None)  # of a rule that counts no steps
    for i, (moment, scale) in enumerate(zip(moments, absmax, strict=True), start=1):
        result |= {
            ours: flat.pop(theirs)
            for ours, theirs in ((moment, f"state{i}"), (scale, f"absmax{i}"))
            if flat.get(theirs) is not None
        }
        quant_map = flat.pop(f"qmap{i}", None)
        if quant_map is not None and not _is_dynamic(quant_map, signed=i == 1):
            raise ValueError(f"qmap{i} must be bitsandbytes' dynamic map, got another")
    # A rule with one moment has the entries of the second, all None.
    return result | {key: value for key, value in flat.items() if value is not None}


def _is_dynamic(quant_map: torch.Tensor, *, signed: bool) -> bool:
    return torch.equal(quant_map.cpu().float(), torch.tensor(dynamic_map(signed)))
