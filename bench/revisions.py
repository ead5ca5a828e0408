"""Builds the package as it is at a commit, beside the working tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _run(command: list[str], folder: Path) -> None:
    """Raises RuntimeError with the end of its output where it fails."""
    # ccache then knows a file again that it compiled in another temporary folder.
    env = {**os.environ, "CCACHE_BASEDIR": str(folder), "CCACHE_NOHASHDIR": "1"}
    run = subprocess.run(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stdout[-3000:]}")


def resolve(revision: str) -> str:
    """The commit's abbreviated hash.

    Raises:
        ValueError: there is no such commit.
    """
    command = ["git", "rev-parse", "--short", "--verify", "--quiet", f"{revision}^{{commit}}"]
    run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if run.returncode != 0:
        raise ValueError(f"no such commit: {revision}")
    return run.stdout.strip()


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """The commit's files in that folder, which git knows of until the end."""
    _run(["git", "worktree", "add", "--detach", "--force", str(folder), commit], ROOT)
    try:
        yield folder
    finally:
        _run(["git", "worktree", "remove", "--force", str(folder)], ROOT)


def build(folder: Path) -> Path:
    """Compiles a worktree; returns what belongs on PYTHONPATH. ccache is used where it is."""
    python = folder / "python"
    configure = [
        "cmake", "-S", ".", "-B", "build", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_INSTALL_PREFIX={python}",
    ]  # fmt: skip
    if shutil.which("ccache"):
        configure.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    _run(configure, folder)
    _run(["cmake", "--build", "build"], folder)
    _run(["cmake", "--install", "build"], folder)
    return python
