"""Which pager serves a device."""

from __future__ import annotations

import logging

import torch

from qlora_native._core import pagers, why_no_pager

_LOG = logging.getLogger("qlora_native.paging")

# The first that works is taken.
_PREFERRED = {"cpu": ("file",), "cuda": ("managed", "staged")}


def choose_pager(device: torch.device, wanted: str | None, n_bytes: int) -> tuple[str, str]:
    """The pager `wanted`, or the one that fits the device and so much state; and why.

    Raises:
        ValueError: it is not in this build, does not work on this device, or none does.
    """
    built = pagers()
    if wanted is not None and wanted not in built:
        names = ", ".join(map(repr, built))
        raise ValueError(f"pager must be None or one of {names}, got {wanted!r}")
    if wanted == "file" and device.type != "cpu":
        raise ValueError(f"pager='file' keeps state of parameters on a CPU, got one on {device}")
    reasons: list[str] = []
    for name in (wanted,) if wanted else _PREFERRED.get(device.type, ()):
        lacking = why_no_pager(name, device.index or 0) if name in built else "not in this build"
        if lacking is None and not wanted:
            lacking = _why_too_much(name, device, n_bytes)
        if lacking is None:
            why = "as asked" if wanted else "; ".join(reasons) or "the first choice there"
            _LOG.info("state of parameters on %s is paged by '%s': %s", device, name, why)
            return name, why
        reasons.append(f"not '{name}': {lacking}")
    raise ValueError(
        f"no pager serves parameters on {device}: {'; '.join(reasons) or 'no such device'}"
    )


def _why_too_much(name: str, device: torch.device, n_bytes: int) -> str | None:
    """Managed memory is not asked for beyond what the device has free."""
    if name != "managed" or device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    if n_bytes <= free:
        return None
    return f"{n_bytes} bytes of state, {free} are free on the device"
