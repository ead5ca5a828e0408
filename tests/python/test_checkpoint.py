"""Checkpoints: whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_native import files
from qlora_native.checkpoint import CheckpointError, CheckpointStore, find_fault


def state(step: int, size: int = 100) -> dict[str, Any]:
    return {"step": step, "parameters": {"w": torch.full((size,), float(step))}}


def save_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def store(folder: Path, *steps: int, keep: int = 3) -> CheckpointStore:
    made = CheckpointStore(folder, keep)
    for step in steps:
        made.write(step, state(step), save_adapter)
    return made


def newest(made: CheckpointStore) -> int:
    found = made.read_latest()
    assert found is not None
    assert torch.equal(
        found.state["parameters"]["w"], state(found.state["step"])["parameters"]["w"]
    )
    return int(found.state["step"])


def test_round_trip_and_the_newest_are_kept(tmp_path: Path) -> None:
    made = store(tmp_path, 10, 20, 30, 40, keep=2)
    assert [p.name for p in made.paths()] == ["step-000030", "step-000040"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000030", "step-000040"]
    assert newest(made) == 40
    names = {p.name for p in made.paths()[0].iterdir()}
    assert names == {"adapter_config.json", "manifest.json", "training_state.pt"}


def test_none_yet(tmp_path: Path) -> None:
    assert store(tmp_path / "none").read_latest() is None


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    made = store(tmp_path, 10, 10)
    assert newest(made) == 10


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text('{"a":'), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text("{}"), "does not list training_state.pt"),
        (lambda p: (p / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda p: os.truncate(p / "training_state.pt", 50), "has 50 bytes"),
        (lambda p: flip_a_bit(p / "training_state.pt"), "does not have the checksum"),
    ],
)
def test_a_corrupt_one_is_passed_over(tmp_path: Path, damage: Any, reason: str) -> None:
    made = store(tmp_path, 10, 20)
    damage(tmp_path / "step-000020")
    found = made.read_latest()
    assert found is not None and found.state["step"] == 10
    (said,) = found.passed_over
    assert said.startswith("step-000020: ") and reason in said


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_all_corrupt_is_an_error(tmp_path: Path) -> None:
    made = store(tmp_path, 10, 20)
    for path in made.paths():
        flip_a_bit(path / "training_state.pt")
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is corrupt \(step-000020: "):
        made.read_latest()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_earlier(tmp_path: Path, error: BaseException) -> None:
    made = store(tmp_path, 10)

    def failing(folder: Path) -> None:
        save_adapter(folder)
        raise error

    with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
        made.write(20, state(20), failing)
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
        assert "step-000010 is unharmed" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000010"]
    assert newest(made) == 10


def test_a_full_disk(tmp_path: Path) -> None:
    """A file may not grow past 64 KiB: the system's own error, in the middle of a write."""
    made = store(tmp_path, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write the checkpoint of step 20"):
            made.write(20, state(20, size=100_000), save_adapter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000010"]
    assert newest(made) == 10


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="there is no earlier one"):
        store(tmp_path / "file" / "checkpoints", 10)


KILLED = """
import sys, torch
from pathlib import Path
from qlora_native.checkpoint import CheckpointStore
from qlora_native import files
store = CheckpointStore(Path(sys.argv[1]), keep=2)
sync = files.sync_file
def sync_and_tell(path):
    sync(path)
    print(path.name, flush=True)
files.sync_file = sync_and_tell
step = 0
while True:
    step += 1
    store.write(step, {"step": step, "parameters": {"w": torch.full((200_000,), float(step))}})
    print("wrote", step, flush=True)
"""


@pytest.mark.parametrize("at", ["manifest.json", "training_state.pt", "wrote", "random"])
def test_a_kill_at_any_moment_leaves_a_good_one(tmp_path: Path, at: str) -> None:
    """kill -9 while files are being flushed, just after a rename, and at odd times between."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    wrote = 0
    for seen, line in enumerate(process.stdout):
        word, _, number = line.partition(" ")
        if word == "wrote":
            wrote = int(number)
        if wrote >= 3 and (line.startswith(at) or (at == "random" and seen > 13)):
            break
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()
    made = CheckpointStore(tmp_path, 2)
    found = made.read_latest()
    assert found is not None and not found.passed_over
    step = found.state["step"]
    assert step >= wrote
    assert (found.state["parameters"]["w"] == step).all()
    assert all(find_fault(path) is None for path in made.paths())
    made.write(step + 1, state(step + 1))
    assert not [p for p in tmp_path.iterdir() if p.name == f".step-{step + 1:06d}.partial"]


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    files.write_file(path, "one")
    files.write_file(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
