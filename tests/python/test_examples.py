"""The scripts of examples/, each on a tiny model: they learn, save, and go on where they were."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qlora_native import load_adapter, load_model
from tiny_llama import make_model, save_folder

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# script -> the package that it is about
SCRIPTS = {
    "accelerate_loop": "accelerate",
    "lightning_module": "lightning",
    "trainer": "peft",
    "trl_dpo": "trl",
    "trl_sft": "trl",
}
# This one restores the order of its data too, and goes on as if it had not stopped. trl's train an
# adapter in bf16, and peft makes it fp32 when the trainer loads it again.
EXACT = ("trainer",)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What these libraries keep in the process: environment variables and accelerate's state."""
    pytest.importorskip("transformers")
    state = pytest.importorskip("accelerate.state")
    monkeypatch.syspath_prepend(EXAMPLES)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    state.AcceleratorState._reset_state(reset_partial_state=True)
    sys.modules.pop("sums", None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "model", make_model(tie=False, initializer_range=0.1))


def run(name: str, capsys: pytest.CaptureFixture[str], *arguments: object) -> list[float]:
    """The evaluation losses that the script prints."""
    script = EXAMPLES / f"{name}.py"
    before = sys.argv
    sys.argv = [str(script), *map(str, arguments)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before
    return [
        float(loss)
        for loss in re.findall(r"^evaluation loss (\S+) after", capsys.readouterr().out, re.M)
    ]


def test_every_script_is_tested() -> None:
    assert sorted(SCRIPTS) == sorted(
        path.stem for path in EXAMPLES.glob("*.py") if path.stem != "sums"
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_learns_saves_and_resumes(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec(SCRIPTS[name]) is None:
        pytest.skip(f"{SCRIPTS[name]} is not installed")
    at_first, after_3 = run(name, capsys, model, tmp_path / "out", "--steps", 3)
    *_, after_6 = run(name, capsys, model, tmp_path / "out", "--steps", 6, "--resume")
    assert at_first > after_3 > after_6
    if name in EXACT:
        assert run(name, capsys, model, tmp_path / "whole", "--steps", 6)[-1] == after_6

    base, _ = load_model(model)
    load_adapter(base, tmp_path / "out" / "adapter")
    assert torch.isfinite(base(input_ids=torch.arange(9)[None]).logits).all()


def test_the_trainer_takes_both_kinds_of_checkpointing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    losses = [
        run("trainer", capsys, model, tmp_path / f"out{len(kind)}", "--steps", 2, *kind)
        for kind in ([], ["--reentrant"])
    ]
    assert losses[0] == losses[1]
