"""How much memory a paged state may stay in: given, or what is free less a reserve."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from qlora_native.paging.control_group import memory_allowances

_PROC = Path("/proc")
_UNITS = {"": 1} | {
    f"{prefix}{infix}B": base**power
    for power, prefix in enumerate(("K", "M", "G", "T"), start=1)
    for infix, base in (("", 1000), ("i", 1024))
}
_UNITS["B"] = 1
# Left free for activations and all else by "auto": a part of all memory. On a GPU the step comes
# when torch's allocator already holds what the activations needed, and the rest is free.
_RESERVE = {"cpu": 8, "cuda": 32}


def parse_budget(value: int | str) -> int | None:
    """Bytes of "2GB", "512MiB" or a number; None of "auto".

    Raises:
        ValueError: it is neither.
    """
    if value == "auto":
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        unit = match and {name.lower(): n for name, n in _UNITS.items()}.get(match[2].lower())
        if match and unit:
            return int(float(match[1]) * unit)
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(
        f"device_budget must be 'auto', a number of bytes, or text like '2GB' or '512MiB', "
        f"got {value!r}"
    )


def is_budget(value: int | str) -> bool:
    """Whether parse_budget takes it."""
    try:
        parse_budget(value)
    except ValueError:
        return False
    return True


def free_for_state(device: torch.device, resident: int) -> int:
    """What "auto" lets the state of this device have now; `resident` bytes of it are there."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, free + resident - total // _RESERVE["cuda"])
    # Pages of a file count as available: the system can drop them.
    available, total = _host_memory()
    return max(0, available - total // _RESERVE["cpu"])


def _host_memory() -> tuple[int, int]:
    """Available and total bytes, by the machine or by the control group that allows least."""
    meminfo = dict(
        line.split(":", 1) for line in (_PROC / "meminfo").read_text().splitlines() if ":" in line
    )
    available, total = (int(meminfo[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    groups = memory_allowances(_PROC / "self")
    return (
        min([available, *(group.available for group in groups)]),
        min([total, *(group.total for group in groups)]),
    )
