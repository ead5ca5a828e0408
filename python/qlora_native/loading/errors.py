"""The one exception of this package: it says what is wrong with which file, and the remedy."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A model's files are missing, damaged, or of a kind that cannot be loaded.

    The message names the file, the tensor where there is one, and the remedy.
    """


def near_misses(name: str, known: list[str]) -> str:
    """` (did you mean …?)`, or nothing when no known name is close."""
    import difflib

    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f" (did you mean {', '.join(repr(match) for match in close)}?)" if close else ""
