"""`qlora-native train`, end to end on a tiny model: results, errors in one line, Ctrl-C, resume."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qlora_native.cli.__main__ import app
from qlora_native.cli.train import parse_targets
from qlora_native.metrics import read_metrics
from tiny import conversations, make_llama, make_tokenizer, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = ["--max-length", "96", "--batch-size", "2", "--r", "4", "--dtype", "float32"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", conversations(60))


def run(*arguments: Any) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    return result.exit_code, result.output


def test_trains_and_leaves_everything(model_folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, shown = run(
        "--model", model_folder, "--data", data, "--output", out, *COMMON,
        "--steps", 12, "--learning-rate", "1e-2", "--checkpoint-every", 6, "--eval-every", 4,
    )  # fmt: skip
    assert code == 0, shown
    assert re.search(r"57 examples to train on, 3 held out", shown)
    before = float(re.search(r"perplexity before +([\d.]+) ±", shown)[1])  # type: ignore[index]
    after = float(re.search(r"perplexity after +([\d.]+) ±", shown)[1])  # type: ignore[index]
    assert after < before
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-000006", "step-000012"}
    records = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 4, 8, 12]
    described = json.loads((out / "run.json").read_text())
    assert described["settings"]["r"] == 4 and described["result"]["steps"] == 12

    from peft import PeftModel

    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(model_folder)
    PeftModel.from_pretrained(make_llama(), out / "adapter")  # PEFT reads it


def test_paged(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """By the short name of the option; the figures stand in the log and in the table."""
    common = ["--model", model_folder, "--data", data, *COMMON, "--optim", "paged_adamw8bit"]
    out = tmp_path / "out"
    code, shown = run(
        *common, "--output", out, "--steps", 2, "--optim-memory", "auto", "--optim-paged-from", 0,
        "--optim-directory", "/var/tmp",
    )  # fmt: skip
    assert code == 0, shown
    assert re.search(r"optimizer's state +[\d.]+ MiB paged \(file\)", shown)
    record = next(r for r in read_metrics(out / "metrics.jsonl") if "loss" in r)
    assert record["optim_resident"] == record["optim_bytes"] > 0
    code, shown = run(
        *common, "--output", tmp_path / "other", "--steps", 1, "--optim-paged-from", 0,
        "--optim-directory", tmp_path / "none",
    )  # fmt: skip
    assert code == 2
    assert f"no such file or folder: {tmp_path / 'none'}" in shown


def test_settings_from_yaml_and_flags(model_folder: Path, data: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"model: {model_folder}\ndata: [{data}]\noutput: {tmp_path / 'out'}\nsteps: 1\nr: 4\n"
        "learning_rate: 2e-3\nmax-length: 96\npacking: false\nheld_out: 4\ndtype: float32\n"
        "targets: q_proj,v_proj\nplot: false\ncheckpoint-every: 0\n"
    )
    code, shown = run("--config", settings, "--r", 2)
    assert code == 0, shown
    described = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert (described["r"], described["learning_rate"], described["packing"]) == (2, 2e-3, False)
    assert described["data"] == [str(data)] and "56 examples to train on, 4 held out" in shown
    assert not (tmp_path / "out" / "loss.png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "DATA"], "--model is missing"),
        (["--model", "MODEL"], "--data is missing"),
        (["--model", "MODEL", "--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--model", "no/such/folder", "--data", "DATA"], "no/such/folder"),
        (["--model", "MODEL", "--data", "DATA", "--r", "0"], "r must be at least 1, got 0"),
        (
            ["--model", "MODEL", "--data", "DATA", "--max-length", "999"],
            "max_length must be at most",
        ),
        (["--model", "MODEL", "--data", "DATA", "--targets", "q_prj"], "q_prj"),
        (["--model", "MODEL", "--data", "DATA", "--held-out", "99"], "no example to train on"),
        (["--model", "MODEL", "--data", "BAD"], "bad.jsonl:2: a record needs the keys"),
        (["--model", "MODEL", "--data", "DATA", "--config", "CONFIG"], "learning_rat"),
    ],
)
def test_mistakes_are_one_line(
    model_folder: Path, data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    bad, settings = tmp_path / "bad.jsonl", tmp_path / "settings.yaml"
    bad.write_text('{"text": "fine"}\n{"txt": "not"}\n')
    settings.write_text("learning_rat: 1e-4\n")
    names = {"MODEL": model_folder, "DATA": data, "BAD": bad, "CONFIG": settings}
    places = [names.get(argument, argument) for argument in arguments]
    short = [] if "--max-length" in arguments else ["--max-length", 96]
    code, shown = run(*places, "--output", tmp_path / "out", *short)
    assert code == 2, shown
    assert message in shown and "Traceback" not in shown
    assert len([line for line in shown.splitlines() if line.startswith("error: ")]) == 1


def test_an_earlier_run_is_not_overwritten_unasked(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    arguments = [
        "--model", model_folder, "--data", data, "--output", tmp_path / "out", *COMMON,
        "--steps", 1, "--no-plot", "--held-out", 2,
    ]  # fmt: skip
    assert run(*arguments)[0] == 0
    code, shown = run(*arguments)
    assert code == 2 and "holds an earlier run" in shown
    assert run(*arguments, "--overwrite")[0] == 0
    code, shown = run(*arguments, "--resume")
    assert code == 0 and "Going on from" in shown


def test_a_non_finite_loss_is_one_line(model_folder: Path, data: Path, tmp_path: Path) -> None:
    model = make_llama()
    model.model.norm.weight.data.fill_(torch.inf)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    code, shown = run(
        "--model", tmp_path / "model", "--data", data, "--output", tmp_path / "out", *COMMON
    )
    assert code == 2, shown
    assert re.search(r"error: the loss is nan at step 1, records chats\.jsonl:\d+", shown)


Command = Callable[..., list[str]]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def command(model_folder: Path, data: Path) -> Command:
    """command(output, *more) -> a command line."""

    def build(output: Path, *more: str) -> list[str]:
        return [
            sys.executable, "-m", "qlora_native.cli", "train", "--model", str(model_folder),
            "--data", str(data), "--output", str(output), *COMMON, "--steps", "40",
            "--checkpoint-every", "5", "--eval-every", "7", "--dropout", "0.1", "--no-plot", *more,
        ]  # fmt: skip

    return build


@pytest.fixture(scope="module")
def never_stopped(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("never-stopped")
    done = subprocess.run(command(output), env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_stopped_and_resumed_equals_never_stopped(
    command: Command, never_stopped: Path, tmp_path: Path, name: str
) -> None:
    """In a process of its own, which gets the signal in the middle of its steps."""
    log = tmp_path / "metrics.jsonl"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(tmp_path), env=ONE_THREAD, **pipes)
    while process.poll() is None and not (log.exists() and log.read_text().count('"loss"') >= 8):
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    shown, problems = process.communicate()
    if name == "SIGINT":
        assert process.returncode == 130, problems
        assert "SIGINT: finishing this step" in shown
        assert "Stopped by SIGINT" in shown and "Wrote" in shown
    assert 8 <= len([r for r in read_metrics(log) if "loss" in r]) < 40

    resumed = subprocess.run(command(tmp_path, "--resume"), env=ONE_THREAD, **pipes)
    assert resumed.returncode == 0, resumed.stderr
    assert "Going on from" in resumed.stdout
    assert metrics(log) == metrics(never_stopped / "metrics.jsonl")
    ours, theirs = (p / "adapter" / "adapter_model.safetensors" for p in (tmp_path, never_stopped))
    assert ours.read_bytes() == theirs.read_bytes()


def metrics(path: Path) -> list[tuple[int, float, float]]:
    return [
        (r["step"], r["loss"], r["grad_norm"]) if "loss" in r else (r["step"], r["eval_loss"], 0.0)
        for r in read_metrics(path)
    ]


def test_targets() -> None:
    assert parse_targets("all-linear") == "all-linear"
    assert parse_targets("q_proj, v_proj") == ["q_proj", "v_proj"]
    assert parse_targets(r".*layers\.0\..*") == r".*layers\.0\..*"
