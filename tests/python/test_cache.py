"""The cache of quantized models: hit, miss, damage, and everything that must make another entry."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_llama
from qlora_native.files import default_cache_dir
from qlora_native.loading import load, load_model

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A folder of its own for each test, to change at will."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were read, in order: the source itself, or an entry of the cache."""
    read: list[Path] = []
    real = load.load_folder

    def spy(folder: Path, **settings: Any) -> Any:
        read.append(folder)
        return real(folder, **settings)

    monkeypatch.setattr(load, "load_folder", spy)
    return read


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir())


def test_the_second_load_reads_the_cache(folder: Path, tmp_path: Path, sources: list[Path]) -> None:
    cache = tmp_path / "cache"
    first, _ = load_model(folder, cache_dir=cache)
    second, tokenizer = load_model(folder, cache_dir=cache)
    assert sources == [folder, *entries(cache)]
    state = second.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())
    assert second.name_or_path == first.name_or_path == str(folder)
    assert tokenizer.chat_template == tiny_llama.CHAT_TEMPLATE
    assert second.lm_head.weight is second.model.embed_tokens.weight


def test_without_a_cache_folder_a_model_folder_is_not_cached(
    folder: Path, tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_NATIVE_CACHE", str(tmp_path / "cache"))
    load_model(folder)
    assert not (tmp_path / "cache").exists()
    assert sources == [folder]


@pytest.mark.parametrize(
    "settings",
    [{"format": "fp4"}, {"blocksize": 128}, {"double_quant": False}, {"dtype": torch.float16}],
)
def test_other_settings_are_another_entry(
    folder: Path, tmp_path: Path, sources: list[Path], settings: dict[str, Any]
) -> None:
    load_model(folder, cache_dir=tmp_path / "cache")
    load_model(folder, cache_dir=tmp_path / "cache", **settings)
    assert sources == [folder, folder]
    assert len(entries(tmp_path / "cache")) == 2


def touch(folder: Path) -> None:
    os.utime(folder / "model.safetensors", ns=(1, 1))


def grow(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize("change", [touch, grow])
def test_a_changed_source_replaces_its_entry(
    folder: Path, tmp_path: Path, sources: list[Path], change: Callable[[Path], None]
) -> None:
    load_model(folder, cache_dir=tmp_path / "cache")
    old = entries(tmp_path / "cache")
    change(folder)
    load_model(folder, cache_dir=tmp_path / "cache")
    assert sources == [folder, folder]
    assert len(entries(tmp_path / "cache")) == 1 and entries(tmp_path / "cache") != old


def flip_a_bit(entry: Path) -> None:
    path = entry / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(entry: Path) -> None:
    path = entry / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_file(entry: Path) -> None:
    (entry / "tokenizer.json").unlink()


def lose_the_record(entry: Path) -> None:
    (entry / "cache.json").unlink()


def garble_the_record(entry: Path) -> None:
    (entry / "cache.json").write_text("[]")


def be_anothers(entry: Path) -> None:
    record = json.loads((entry / "cache.json").read_text())
    record["made_from"]["source"] = "/elsewhere"
    (entry / "cache.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, truncate, lose_a_file, lose_the_record, garble_the_record, be_anothers],
)
def test_a_damaged_entry_is_noticed_and_made_anew(
    folder: Path, tmp_path: Path, sources: list[Path], damage: Callable[[Path], None]
) -> None:
    cache = tmp_path / "cache"
    load_model(folder, cache_dir=cache)
    [entry] = entries(cache)
    damage(entry)
    with pytest.warns(UserWarning, match="is damaged"):
        load_model(folder, cache_dir=cache)
    load_model(folder, cache_dir=cache)
    assert sources == [folder, folder, entry]


def test_a_cache_that_cannot_be_written_costs_a_warning_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file stands in the way")
    with pytest.warns(UserWarning, match="cannot be cached in .*QLORA_NATIVE_CACHE"):
        model, _ = load_model(folder, cache_dir=tmp_path / "cache")
    assert model.model.layers[0].mlp.up_proj.blocksize == 64


def test_a_full_disk_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_native.loading.safetensors_io.os.fsync", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        load_model(folder, cache_dir=tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLORA_NATIVE_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("QLORA_NATIVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "qlora_native"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "qlora_native"
