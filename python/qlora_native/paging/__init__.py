"""Memory that gives way: which pager, in which chunks, how much of it may stay (docs/paging.md)."""

from __future__ import annotations

from qlora_native.paging.arena import Arena
from qlora_native.paging.budget import parse_budget
from qlora_native.paging.pressure import is_out_of_memory, with_room

__all__ = ["Arena", "is_out_of_memory", "parse_budget", "with_room"]
