"""Processes whose state is paged: two in one directory at once; one that is killed in a step."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import paged_steps
from qlora_native import optim
from qlora_native.cli.__main__ import app
from qlora_native.metrics import read_metrics
from tiny import conversations, make_llama, make_tokenizer, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """To page in, on a disk; empty at the end."""
    folder = Path("/var/tmp") / f"qlora_native-{tmp_path.name}-{os.getpid()}"
    folder.mkdir()
    yield folder
    folder.rmdir()


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


# ---- two at once ---------------------------------------------------------------------------------


def test_two_in_one_directory(directory: Path) -> None:
    """In turns, so that both have state there all the time, until one is killed."""
    other = start(Path(__file__).with_name("paged_steps.py"), directory, 2)
    ours, theirs = paged_steps.parameters(), paged_steps.parameters()
    own = paged_steps.digests(paged_steps.paged(ours, str(directory)), ours, seed=1)
    plain = paged_steps.digests(optim.AdamW8bit(theirs), theirs, seed=1)
    assert other.stdin is not None and other.stdout is not None
    seen = []
    for _ in range(3):
        assert next(own) == next(plain)
        other.stdin.write("step\n")
        other.stdin.flush()
        seen.append(other.stdout.readline().strip())
        assert list(directory.iterdir()) == []
    other.kill()
    other.communicate()
    assert next(own) == next(plain)
    params = paged_steps.parameters()
    wanted = paged_steps.digests(optim.AdamW8bit(params), params, seed=2)
    assert seen == list(itertools.islice(wanted, 3))


# ---- killed in the middle of a step --------------------------------------------------------------

# In the fourth step, as chunk 10 of its state has been stepped: the parameters before it have taken
# that step, those behind it have not.
_KILLED = """
import dataclasses, os, signal, sys
from qlora_native.cli.__main__ import app
from qlora_native.optim.paged_state import PagedState
from qlora_native.paging import Arena

make, release, step = Arena.__init__, Arena.release, PagedState.step
steps = 0

def made(self, place, *rest):
    make(self, dataclasses.replace(place, chunk_bytes=1 << 12), *rest)
    print("chunks", len(self.chunks), flush=True)

def stepped(self, *arguments, **settings):
    global steps
    steps += 1
    return step(self, *arguments, **settings)

def released(self, i):
    release(self, i)
    if steps == 4 and i == 10:
        os.kill(os.getpid(), signal.SIGKILL)

Arena.__init__, Arena.release, PagedState.step = made, released, stepped
app(["train", *sys.argv[1:]])
"""


def test_killed_in_a_step_and_resumed(tmp_path: Path, directory: Path) -> None:
    """By the command line; to the bits of a run that was never stopped."""
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    common = [
        "--model", tmp_path / "model", "--data",
        write_jsonl(tmp_path / "chats.jsonl", conversations(60)),
        "--max-length", 96, "--batch-size", 2, "--r", 4, "--dtype", "float32", "--steps", 6,
        "--checkpoint-every", 2, "--dropout", 0.1, "--no-plot",
        "--optim", "paged_adamw8bit", "--optim-memory", "0", "--optim-paged-from", 0,
        "--optim-directory", directory,
    ]  # fmt: skip

    def run(output: str, *more: str) -> str:
        arguments = ["train", *map(str, common), "--output", str(tmp_path / output), *more]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return result.output

    killed = start("-c", _KILLED, *common, "--output", tmp_path / "killed")
    run("whole")
    shown, problems = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, problems
    chunks = int(shown.partition("chunks ")[2].split()[0])
    assert chunks > 11
    log = tmp_path / "killed" / "metrics.jsonl"
    assert [r["step"] for r in read_metrics(log) if "loss" in r] == [1, 2, 3]
    assert list(directory.iterdir()) == []

    assert "step-000002" in run("killed", "--resume")
    assert list(directory.iterdir()) == []
    assert figures(log) == figures(tmp_path / "whole" / "metrics.jsonl")
    ours, theirs = (
        tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("killed", "whole")
    )
    assert ours.read_bytes() == theirs.read_bytes()
    last, wanted = (
        torch.load(
            tmp_path / name / "checkpoints" / "step-000006" / "training_state.pt",
            weights_only=True,
        )["optimizer"]["state"]
        for name in ("killed", "whole")
    )
    assert last.keys() == wanted.keys() != set()
    for i, state in wanted.items():
        for key, value in state.items():
            same = torch.equal(last[i][key], value) if isinstance(value, torch.Tensor) else False
            assert same or last[i][key] == value


def figures(log: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(log) if "loss" in r]
