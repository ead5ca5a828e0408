"""Stage: every way of the 4-bit product, and where the shipped table does not name the fastest.

The table that comes of it lies beside the report, as `qlora_native.tune` would keep it in the cache
directory; nothing is written there. Weights whose turn does not come in time are named.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from bench.gpu_acceptance import setting as settings
from bench.gpu_acceptance.setting import Setting
from bench.gpu_acceptance.timing import seconds
from bench.shapes import LLAMA3_8B

# A weight is begun only within this time; one takes some seconds.
_SECONDS = 30


def tune(setting: Setting, result: dict[str, Any], shape: tuple[int, int]) -> None:
    from qlora_native import tuned_ways, tuning

    arguments: dict[str, Any] = {}
    card = tuned_ways.Card("emulator", 90) if setting.emulate else tuned_ways.Card.of(0)
    if setting.emulate:
        from qlora_native import _emulation

        arguments = {
            "backend": _emulation, "rows": (2, 20),
            "timer": lambda calls: len(calls) * seconds(calls, setting.device),
        }  # fmt: skip
    measured = tuning.tune(
        [shape], device=setting.device, card=card, save=setting.folder, **arguments
    )
    result["table"] = tuned_ways.file_name(card)
    result["cases"] += len(measured)
    result["disagree"] += [asdict(m) for m in measured if m.disagrees]
    result["no_way"] += [asdict(m) for m in measured if m.way is None]


def main() -> None:
    setting = settings.of_stage(__doc__)
    settings.serve_by_cuda(setting)
    torch.manual_seed(0)
    begin = time.monotonic()
    result: dict[str, Any] = {"cases": 0, "disagree": [], "no_way": [], "not_reached": []}
    shapes = [(24, 64)] if setting.emulate else sorted(set(LLAMA3_8B.linears.values()))
    for shape in shapes:
        if time.monotonic() - begin > _SECONDS:
            result["not_reached"].append(shape)
        else:
            tune(setting, result, shape)
        settings.write_result(setting, "tune", result)
    raise SystemExit(bool(result["no_way"]))


if __name__ == "__main__":
    main()
