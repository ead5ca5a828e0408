"""The command line end to end on a tiny model: what it prints, writes, refuses and exits with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_llama

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("yaml")

from qlora_native.adapter import load_adapter, save_adapter
from qlora_native.cli.__main__ import main
from qlora_native.linear import Linear4bit
from qlora_native.loading import load_model
from qlora_native.model import add_lora, lora_layers

COMMANDS = ("train", "generate", "eval", "quantize", "merge", "info")


@dataclass
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Calls the command line within this process."""
    monkeypatch.setenv("COLUMNS", "200")
    # Set, then deleted, so that what --debug sets is undone as well.
    monkeypatch.setenv("QLORA_NATIVE_DEBUG", "")
    monkeypatch.delenv("QLORA_NATIVE_DEBUG")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny model has no work for two

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
            code: Any = 0
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return Outcome(int(code or 0), captured.out, captured.err)

    yield call
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in (("what is a model?", "a model has weights"), ("the fox?", "the quick fox"))
    ]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats * 4))
    return path


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes something."""
    loaded, _ = load_model(model)
    add_lora(loaded, r=4)
    torch.manual_seed(1)
    for _, layer in lora_layers(loaded):
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(loaded, folder, base_model_name=str(model))
    return folder


# ---- help ---------------------------------------------------------------------------------------


def test_help_names_every_command(run: Run) -> None:
    outcome = run("--help")
    assert outcome.code == 0
    assert all(command in outcome.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(run: Run, command: str) -> None:
    outcome = run(command, "--help")
    assert outcome.code == 0
    assert "Example" in outcome.out or command == "generate"
    assert "--config" in outcome.out


def test_the_module_runs_and_help_imports_no_transformers() -> None:
    code = (
        "import sys; from qlora_native.cli.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---- commands -----------------------------------------------------------------------------------


def test_info_shows_the_build(run: Run) -> None:
    outcome = run("info")
    assert outcome.code == 0
    for word in ("instruction set", torch.__version__, "transformers", "chatterbot-corpus"):
        assert word in outcome.out


def test_info_tells_a_models_size_from_its_config(run: Run, model: Path) -> None:
    (model / "model.safetensors").rename(model / "away")
    try:
        outcome = run("info", model, "--dtype", "float32")
    finally:
        (model / "away").rename(model / "model.safetensors")
    assert outcome.code == 0, outcome.err
    parameters = sum(p.numel() for p in tiny_llama.make_model().parameters())
    assert f"{parameters:,}" in outcome.out
    assert "LlamaForCausalLM" in outcome.out and "in nf4" in outcome.out


def test_quantize_writes_a_folder_and_reports(run: Run, model: Path, tmp_path: Path) -> None:
    outcome = run("quantize", model, tmp_path / "q", "--format", "fp4", "--blocksize", 128)
    assert outcome.code == 0, outcome.err
    assert "bits a weight" in outcome.out and "relative error" in outcome.out
    loaded, _ = load_model(tmp_path / "q")
    layer = next(m for m in loaded.modules() if isinstance(m, Linear4bit))
    assert (layer.format, layer.blocksize) == ("fp4", 128)
    again = run("quantize", tmp_path / "q", tmp_path / "q2")
    assert again.code == 2 and "it is quantized already" in again.err


def test_generate_streams_an_answer(run: Run, model: Path, adapter: Path) -> None:
    words = ("generate", model, "what is a model?", "--max-new-tokens", 12, "--dtype", "float32")
    base = run(*words)
    assert base.code == 0, base.err
    assert run(*words).out == base.out
    adapted = run(*words, "--adapter", adapter)
    assert adapted.code == 0 and adapted.out != base.out
    raw = run(*words, "--raw")
    assert raw.code == 0 and raw.out != base.out


def test_sampling_follows_its_seed(run: Run, model: Path) -> None:
    words = ("generate", model, "what?", "--max-new-tokens", 20, "--temperature", 1.5)
    first, second = run(*words, "--seed", 1).out, run(*words, "--seed", 2).out
    assert run(*words, "--seed", 1).out == first != second


def test_generate_reads_standard_input(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text("what is a model?")
    words = ("generate", model, "--max-new-tokens", 8)
    with (tmp_path / "prompt").open() as prompt:
        monkeypatch.setattr(sys, "stdin", prompt)
        piped = run(*words)
    assert piped.out == run("generate", model, "what is a model?", "--max-new-tokens", 8).out


def test_eval_prints_perplexity_with_its_error(run: Run, model: Path, records: Path) -> None:
    outcome = run("eval", model, records, "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("perplexity ") and " ± " in outcome.out
    values = json.loads(run("eval", model, records, "--dtype", "float32", "--json").out)
    assert values["examples"] == 8 and values["perplexity_stderr"] >= 0
    assert 100 < values["perplexity"] < 1000  # an untrained model: about its vocabulary of 320


@pytest.mark.parametrize("stored_as", ["float32", "4bit"])
def test_merge_writes_a_model_folder(
    run: Run, model: Path, adapter: Path, tmp_path: Path, stored_as: str
) -> None:
    outcome = run("merge", model, adapter, tmp_path / "m", "--as", stored_as, "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    assert "KL divergence" in outcome.out and "14 linears" in outcome.out
    merged, _ = load_model(tmp_path / "m", quantize=False)
    assert any(isinstance(m, Linear4bit) for m in merged.modules()) == (stored_as == "4bit")
    if stored_as == "float32":
        adapted, _ = load_model(model)
        load_adapter(adapted, adapter)
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, adapted(ids).logits)


def test_train_then_use_its_adapter(run: Run, model: Path, records: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    outcome = run(
        *("train", "--model", model, "--data", records, "--output", out, "--steps", 4),
        *("--max-length", 64, "--held-out", 1, "--learning-rate", 0.01, "--dtype", "float32"),
    )
    assert outcome.code == 0, outcome.err
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl", "run.json", "loss.png"):
        assert (out / name).is_file(), name
    before = json.loads(run("eval", model, records, "--json").out)["perplexity"]
    after = json.loads(run("eval", model, records, "--json", "--adapter", out / "adapter").out)
    assert after["perplexity"] < before


# ---- settings from a file -----------------------------------------------------------------------


def test_a_config_file_gives_options_and_flags_win(
    run: Run, model: Path, records: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "eval.yaml"
    settings.write_text("max-length: 16\ntrain_on: all\nas-json: true\n")
    by_file = json.loads(run("eval", model, records, "--config", settings).out)
    by_flags = json.loads(
        run("eval", model, records, "--max-length", 16, "--train-on", "all", "--json").out
    )
    assert by_file == by_flags
    longer = run("eval", model, records, "--config", settings, "--max-length", 64)
    assert json.loads(longer.out)["tokens"] > by_file["tokens"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-lenght: 3", "unknown setting 'max-lenght' (did you mean 'max-length'?)"),
        ("zzz: 3", "unknown setting 'zzz'; known are adapter, "),
        ("- a\n- b", "must hold `setting: value` lines, got list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_bad_config_file_is_refused(
    run: Run, model: Path, records: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    outcome = run("eval", model, records, "--config", tmp_path / "c.yaml")
    assert outcome.code == 2
    assert_one_line(outcome.err, message)
    assert str(tmp_path / "c.yaml") in outcome.err


# ---- what goes wrong ----------------------------------------------------------------------------


def assert_one_line(err: str, message: str) -> None:
    """The last line is the error; nothing but notes stands before it, and no traceback."""
    lines = err.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1], err
    assert "Traceback" not in err


def broken(model: Path, to: Path, change: Callable[[Path], object]) -> Path:
    to.mkdir()
    for file in model.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    change(to / "model.safetensors")
    return to


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def test_missing_and_damaged_models(run: Run, model: Path, tmp_path: Path) -> None:
    outcome = run("generate", tmp_path / "nowhere", "hello")
    assert outcome.code == 2
    assert_one_line(outcome.err, "nowhere")
    for number, (change, message) in enumerate(
        (
            (truncate, "model.safetensors is truncated: tensor '"),
            (lambda file: file.write_bytes(b"garbage!" * 99), "not a complete safetensors file"),
            (Path.unlink, "holds no model.safetensors"),
        )
    ):
        folder = broken(model, tmp_path / str(number), change)
        outcome = run("generate", folder, "hello")
        assert outcome.code == 2
        assert_one_line(outcome.err, message)


def test_missing_and_bad_data(run: Run, model: Path, tmp_path: Path) -> None:
    outcome = run("eval", model, tmp_path / "none.jsonl")
    assert outcome.code == 2
    assert_one_line(outcome.err, "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    outcome = run("eval", model, tmp_path / "bad.jsonl")
    assert outcome.code == 2
    assert_one_line(outcome.err, "bad.jsonl:2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", -1), "temperature must be at least 0, got -1.0"),
        (("--top-p", 0), "top_p must be above 0 and at most 1, got 0.0"),
        (("--max-new-tokens", 0), "max_new_tokens must be at least 1, got 0"),
        (("--raw", "--system", "you"), "--system has no meaning with --raw"),
        (("--adapter", "nowhere"), "nowhere"),
    ],
)
def test_bad_settings_are_named(run: Run, model: Path, options: Any, message: str) -> None:
    outcome = run("generate", model, "hello", *options)
    assert outcome.code == 2
    assert_one_line(outcome.err, message)


def test_unknown_options_and_commands(run: Run, model: Path) -> None:
    assert run("generate", model, "hello", "--tempreture", 1).code == 2
    assert run("quantise").code == 2
    outcome = run("quantize", model, "out", "--format", "nf5")
    assert outcome.code == 2
    assert_one_line(outcome.err, "nf5")


def test_a_prompt_longer_than_the_context(run: Run, model: Path) -> None:
    outcome = run("generate", model, "x" * 5000)
    assert outcome.code == 2
    assert_one_line(outcome.err, "the model's context 512: shorten the prompt")


def test_output_that_is_something_else_is_kept(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    outcome = run("quantize", model, tmp_path)
    assert outcome.code == 2
    assert_one_line(outcome.err, "exists and is no model folder")
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "/x/y"), 2, "the disk is full while writing /x/y"),
        (PermissionError(13, "Permission denied", "/x"), 2, "no permission for /x"),
        (MemoryError(), 2, "out of memory (MemoryError): use a smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), 2, "out of memory"),
        (ModuleNotFoundError("no", name="gguf"), 2, "pip install 'qlora-native[hf]'"),
        (TypeError("oops"), 1, "TypeError: oops (this looks like a defect"),
    ],
)
def test_what_a_library_raises_becomes_one_line(
    run: Run,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    message: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("qlora_native.loading.load.load_folder", fail)
    outcome = run("generate", model, "hello")
    assert outcome.code == code
    assert_one_line(outcome.err, message)
    debugging = run("generate", model, "hello", "--debug")
    assert debugging.code == code and "Traceback" in debugging.err


def test_ctrl_c_ends_quietly(model: Path) -> None:
    words = ("generate", str(model), "hello", "--max-new-tokens", "400", "--temperature", "2")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)  # it has begun to answer
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err


# Text that comes as slowly as from a real model, so that the signal meets it.
SLOWLY = """
import sys, time
import qlora_native.cli.generate as command
real = command.generate_text
def slowly(model, tokenizer, ids, sampling, show):
    def wait(text):
        show(text)
        time.sleep(0.2)
    return real(model, tokenizer, ids, sampling, wait)
command.generate_text = slowly
from qlora_native.cli.__main__ import main
main(sys.argv[1:])
"""
