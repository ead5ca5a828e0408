"""The demo from its first line to its summary, on a tiny model and a handful of dialogues."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import tiny_llama

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import qlora_native.loading
from qlora_native.adapter import load_adapter
from qlora_native.demo import __main__ as demo
from qlora_native.demo.corpus import Split

DIALOGUES = [(f"what is number {n}?", f"a model has {n} weights") for n in range(12)]


@pytest.fixture
def tiny_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's command with a tiny model and corpus; returns the model's folder."""
    folder = tiny_llama.save_folder(tmp_path / "model")
    real = qlora_native.loading.load_model
    monkeypatch.setattr(
        qlora_native.loading, "load_model", lambda source, **settings: real(folder, **settings)
    )
    split = Split(train=DIALOGUES[:9], held_out=DIALOGUES[9:])
    monkeypatch.setattr(demo, "load_split", lambda show: split)
    settings = dataclasses.replace(demo.SETTINGS, learning_rate=1e-2, dtype="float32", epochs=8)
    monkeypatch.setattr(demo, "SETTINGS", settings)
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_demo_learns_and_shows_it(
    tiny_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.main(["--threads", "1"])
    shown = capsys.readouterr().out
    for line in ("Before training", "After training", "held-out perplexity after", "lower)"):
        assert line in shown
    out = tmp_path / "runs" / "demo"
    for name in ("train.jsonl", "held_out.jsonl", "metrics.jsonl", "loss.png", "answers.md"):
        assert (out / name).stat().st_size > 0, name
    assert all(question in (out / "answers.md").read_text() for question in demo.QUESTIONS)
    model: Any = qlora_native.loading.load_model(tiny_demo)[0]
    load_adapter(model, out / "adapter")

    demo.main(["--threads", "1", "--steps", "1"])  # again, over the earlier one


def test_the_demo_pages_its_state(tiny_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["--threads", "1", "--steps", "2", "--paged"])
    assert "MiB paged (file), 0.0 MiB of it in memory" in capsys.readouterr().out


def test_another_runs_folder_is_left_alone(
    tiny_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        demo.main(["--output", "mine", "--steps", "1"])
    assert end.value.code == 2
    assert "holds an earlier run" in capsys.readouterr().err
