"""The tuner of the CUDA product's ways, on the emulator and by a clock that the tests set."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_cases import Case, make_weight, rand
from qlora_native import _core, ops, tuned_ways, tuning
from qlora_native.files import default_cache_dir
from qlora_native.nn import Linear4bit
from qlora_native.tuned_ways import Card, Measured

emulation = pytest.importorskip("qlora_native._emulation", reason="QLORA_EMULATION=ON was not set")

N, K = 24, 64
CARD = Card("A card, of no make (40 GB)", 80)
CASE = Case(n=N, k=K, m=())


@pytest.fixture
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("QLORA_NATIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QLORA_CUDA_TUNING", raising=False)
    emulation.use(True)
    yield emulation
    tuned_ways.take_into_use(emulation, 0, "", [])
    for direction in tuned_ways.DIRECTIONS:
        emulation.force_way(direction, None)
    emulation.use(False)


class Clock:
    """Seconds of a call by its way, read from the backend after the call; a missing way fails."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def __call__(self, calls: Sequence[Callable[[], object]]) -> float:
        for call in calls:
            call()
        way = emulation.last_way("forward")
        if way not in self.seconds:
            raise RuntimeError(f"{way} broke\nand more")
        return self.seconds[way] * len(calls)


def tune(clock: Callable[..., float], **kwargs: Any) -> list[Measured]:
    arguments: dict[str, Any] = {"rows": (4, 20), "report": None, "card": CARD, "device": "cpu"}
    arguments |= {"timer": clock, "backend": emulation, "dtype": torch.float32} | kwargs
    shapes = arguments.pop("shapes", [(N, K)])
    return tuning.tune(shapes, **arguments)


def way_taken(m: int, dtype: torch.dtype = torch.float32, direction: str = "forward") -> str:
    parts = make_weight(CASE).parts
    if direction == "forward":
        ops.linear_4bit(rand(m, K, seed=1, dtype=dtype), *parts, N, CASE.blocksize)
    else:
        grad = rand(m, N, seed=1, dtype=dtype)
        ops.linear_4bit_backward_input(grad, *parts, K, CASE.blocksize)
    return emulation.last_way(direction)


def row(way: str, most_m: int = 8, **changed: Any) -> tuned_ways.Row:
    values = {"direction": "forward", "dtype": "float32", "double_quant": CASE.double_quant}
    values |= {"n": N, "k": K, "blocksize": CASE.blocksize, "most_m": most_m, "way": way} | changed
    return tuple(values.values())  # type: ignore[return-value]


# ---- the choice in the backend -------------------------------------------------------------------


def test_a_measured_choice_comes_before_the_table(emulated: Any) -> None:
    assert way_taken(3) == "fma" and way_taken(40) == "plain"  # the shipped table
    emulated.set_choices(0, [row("plain", 4), row("fma", 64), row("plain", 8)])
    assert [way_taken(m) for m in (1, 4, 5, 8, 9, 64)] == ["plain"] * 4 + ["fma"] * 2
    assert way_taken(65) == "plain"  # past the last class: the shipped table
    emulated.set_choices(0, [])
    assert way_taken(3) == "fma" and way_taken(40) == "plain"


def test_the_kernels_that_run_are_those_of_the_choice(emulated: Any) -> None:
    def stored() -> int:
        emulated.count(True)
        way_taken(3)
        bytes_stored = int(emulated.counts()["stored_bytes"])
        emulated.count(False)
        return bytes_stored

    panel = 4 * N * K  # which the plain way writes; the product of it is torch's
    assert 4 * 3 * N <= stored() < panel
    emulated.set_choices(0, [row("plain")])
    assert stored() >= panel


OTHERS = {"direction": "backward_input", "dtype": "float16", "n": N + 1, "k": K + 1, "most_m": 2}
OTHERS |= {"double_quant": not CASE.double_quant, "blocksize": 2 * CASE.blocksize}


@pytest.mark.parametrize("other", OTHERS)
def test_a_choice_holds_for_its_case_alone(emulated: Any, other: str) -> None:
    emulated.set_choices(0, [row("plain", **{other: OTHERS[other]})])
    assert way_taken(3) == "fma"


def test_a_choice_of_another_device_is_kept_and_does_not_count(emulated: Any) -> None:
    emulated.set_choices(1, [row("plain")])
    assert way_taken(3) == "fma"
    emulated.set_choices(0, [row("plain")])
    emulated.set_choices(1, [])
    assert way_taken(3) == "plain"


def test_a_forced_way_comes_before_a_measured_choice(emulated: Any) -> None:
    emulated.set_choices(0, [row("plain")])
    emulated.force_way("forward", "fma")
    assert way_taken(3) == "fma"


def test_a_measured_way_that_does_not_serve_leaves_it_to_the_table(emulated: Any) -> None:
    emulated.set_choices(0, [row("few_rows", 200, dtype="float16")])
    assert way_taken(3, torch.float16) == "few_rows"
    assert way_taken(100, torch.float16) not in ("few_rows", None)


def test_the_input_gradient_has_choices_of_its_own(emulated: Any) -> None:
    emulated.set_choices(0, [row("plain", direction="backward_input")])
    assert way_taken(3, direction="backward_input") == "plain"


def test_rows_that_make_no_sense_set_nothing(emulated: Any) -> None:
    emulated.set_choices(0, [row("plain")])
    for bad in ({"direction": "up"}, {"dtype": "int8"}, {"way": "by hand"}):
        with pytest.raises(ValueError, match=r"direction must|dtype must|a way that is not"):
            emulated.set_choices(0, [row("fma"), row(**{"way": "fma", **bad})])
    assert way_taken(3) == "plain"


# ---- measuring -----------------------------------------------------------------------------------


def test_the_fastest_way_is_chosen_used_and_saved(emulated: Any) -> None:
    # Its clock reads the forward's way, so the input gradient's measurements are all alike.
    measured = tune(Clock({"fma": 2e-6, "plain": 1e-6}))
    assert [(m.direction, m.most_m) for m in measured] == [
        (d, m) for d in tuned_ways.DIRECTIONS for m in (4, 20)
    ]
    first = measured[0]
    assert first.way == "plain" and first.shipped == "fma" and first.disagrees
    assert first.seconds == {"fma": 2e-6, "plain": 1e-6}
    assert way_taken(3) == "plain"
    file = default_cache_dir() / tuned_ways.file_name(CARD)
    assert tuned_ways.read(file, CARD) == measured
    assert str(file) in tuned_ways.describe() and "(4 cases)" in tuned_ways.describe()


def test_a_way_that_fails_is_left_out_and_named(emulated: Any) -> None:
    told: list[str] = []
    measured = tune(Clock({"plain": 1.0}), report=told.append)[0]
    assert measured.way == "plain" and set(measured.seconds) == {"plain"}
    assert measured.failed["fma"] == "RuntimeError: fma broke"
    assert "does not serve" in measured.failed["few_rows"]  # fp32
    assert told[0] == tuning.HEAD and "fma failed" in told[1] and "(shipped: fma)" in told[1]


def test_where_every_way_fails_the_table_decides(emulated: Any) -> None:
    assert all(m.way is None for m in tune(Clock({}))[:2])
    assert way_taken(3) == "fma"


def test_a_tie_goes_to_the_shipped_way() -> None:
    assert tuning.fastest({"a": 1.0, "b": 1.0}, "b") == "b"
    assert tuning.fastest({"a": 1.0, "b": 1.009}, "b") == "b"
    assert tuning.fastest({"a": 1.0, "b": 1.02}, "b") == "a"
    assert tuning.fastest({"a": 3.0, "c": 2.0}, "b") == "c"
    assert tuning.fastest({}, "b") is None


def test_a_model_gives_its_shapes_once(emulated: Any) -> None:
    model = torch.nn.Sequential(*(Linear4bit(K, N, bias=False) for _ in range(2)))
    model.append(Linear4bit(N, N, bias=False, double_quant=False, blocksize=32))
    measured = tune(Clock({"fma": 1.0, "plain": 2.0}), shapes=(), model=model, rows=(2,))
    assert [(m.n, m.k, m.blocksize, m.double_quant) for m in measured[::2]] == [
        (N, K, 64, True), (N, N, 32, False),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="shapes must name a weight"):
        tune(Clock({}), shapes=())


def test_what_was_forced_and_in_use_is_so_again_after_a_failure(
    emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(calls: object) -> float:
        raise KeyboardInterrupt

    tuned_ways.take_into_use(emulated, 0, "a file", [row("plain")])
    with pytest.raises(KeyboardInterrupt):
        tune(interrupted)
    assert way_taken(3) == "plain" and "a file" in tuned_ways.describe()
    monkeypatch.setenv("QLORA_CUDA_FORWARD", "fma")
    with pytest.raises(KeyboardInterrupt):
        tune(interrupted)
    assert way_taken(3) == "fma"


@pytest.mark.skipif("cuda_compiler" in _core.build_info(), reason="this build has CUDA")
def test_a_build_without_cuda_says_so() -> None:
    with pytest.raises(RuntimeError, match="a build with CUDA kernels"):
        tuning.tune([(N, K)])
    assert not tuned_ways.when_cuda_starts()


# ---- the file ------------------------------------------------------------------------------------


def saved(seconds: dict[str, float]) -> Path:
    tune(Clock(seconds))
    return default_cache_dir() / tuned_ways.file_name(CARD)


def test_a_later_process_loads_the_file(emulated: Any) -> None:
    saved({"fma": 2.0, "plain": 1.0})
    tuned_ways.take_into_use(emulated, 0, "", [])
    assert way_taken(3) == "fma" and tuned_ways.describe().startswith("none loaded")
    tuned_ways.load(emulated, 0, CARD)
    assert way_taken(3) == "plain"


def test_a_card_without_a_file_warns_of_nothing(emulated: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned_ways.load(emulated, 0, CARD)
    assert tuned_ways.in_use(0) is None


def _other(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def damaged(text: str) -> str:
        record = json.loads(text)
        change(record)
        return json.dumps(record)

    return damaged


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: "\x00\xff",
        _other(lambda r: r.update(layout=0)),
        _other(lambda r: r.update(version="0.0.1")),
        _other(lambda r: r.update(card="another")),
        _other(lambda r: r.update(architecture=90)),
        _other(lambda r: r.pop("measured")),
        _other(lambda r: r["measured"][0].pop("way")),
        _other(lambda r: r["measured"][0].update(n="24")),
        _other(lambda r: r["measured"][0].update(most_m=True)),
        _other(lambda r: r["measured"][0].update(way="by hand")),
        _other(lambda r: r["measured"][0].update(dtype="int8")),
        _other(lambda r: r["measured"][0].update(n=1 << 70)),
    ],
    ids=["empty", "half", "list", "bytes", "layout", "version", "card", "architecture", "no_list",
         "no_way", "text", "bool", "unknown_way", "unknown_dtype", "huge"],
)  # fmt: skip
def test_a_file_that_is_no_good_is_ignored_with_one_warning(
    emulated: Any, damage: Callable[[str], str]
) -> None:
    file = saved({"fma": 2.0, "plain": 1.0})
    file.write_text(damage(file.read_text()))
    tuned_ways.take_into_use(emulated, 0, "", [])
    with pytest.warns(UserWarning, match="is ignored") as warned:
        tuned_ways.load(emulated, 0, CARD)
    assert len(warned) == 1 and str(file) in str(warned[0].message)
    assert way_taken(3) == "fma" and tuned_ways.in_use(0) is None


def test_other_cases_of_the_file_are_kept(emulated: Any) -> None:
    file = saved({"fma": 2.0, "plain": 1.0})
    tune(Clock({"fma": 1.0, "plain": 2.0}), rows=(20, 32))
    found = [m for m in tuned_ways.read(file, CARD) if m.direction == "forward"]
    assert {m.most_m: m.way for m in found} == {4: "plain", 20: "fma", 32: "fma"}


def test_a_crash_while_writing_leaves_the_old_file(
    emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved({"fma": 2.0, "plain": 1.0})
    before = file.read_bytes()

    def crash(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.warns(UserWarning, match="cannot be saved: no space"):
        tune(Clock({"fma": 1.0, "plain": 2.0}))
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]
    assert way_taken(3) == "fma"  # used in this process all the same
    assert "measured in this process" in tuned_ways.describe()


def test_nothing_is_written_where_nothing_is_to_be_saved(emulated: Any) -> None:
    tune(Clock({"fma": 2.0, "plain": 1.0}), save=False)
    assert way_taken(3) == "plain" and not default_cache_dir().exists()


def test_the_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QLORA_NATIVE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "qlora_native"
    monkeypatch.setenv("QLORA_NATIVE_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"
    names = {tuned_ways.file_name(card) for card in (CARD, replace(CARD, architecture=90))}
    assert len(names) == 2 and all("/" not in name and " " not in name for name in names)


# ---- the switch, and when it is loaded -----------------------------------------------------------


def test_the_switch_turns_it_off(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CUDA_TUNING", "0")
    file = saved({"fma": 2.0, "plain": 1.0})
    assert file.exists() and way_taken(3) == "fma"
    assert tuned_ways.describe().startswith("off by QLORA_CUDA_TUNING=0")


def test_torch_loads_it_when_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a build with CUDA under a torch with CUDA."""
    calls: list[object] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "_lazy_call", calls.append)
    info = {**_core.build_info(), "cuda_compiler": "nvcc"}
    monkeypatch.setattr(_core, "build_info", lambda: dict(info))
    monkeypatch.delenv("QLORA_CUDA_TUNING", raising=False)
    assert tuned_ways.when_cuda_starts() and calls == [tuned_ways.load_for_all]
    assert tuned_ways.build_info()["cuda_tuning"] == "none loaded: the shipped table"
    monkeypatch.setenv("QLORA_CUDA_TUNING", "0")
    assert not tuned_ways.when_cuda_starts() and len(calls) == 1


class Core:
    """What a build with CUDA has in `_core`."""

    def __init__(self) -> None:
        self.forced: tuple[str | None, str | None] = (None, None)
        self.choices: dict[int, list[tuned_ways.Row]] = {}

    def force_cuda_linear(self, forward: str | None, backward_input: str | None) -> None:
        self.forced = forward, backward_input

    def set_cuda_linear_choices(self, device: int, rows: list[tuned_ways.Row]) -> None:
        self.choices[device] = rows


@pytest.fixture
def two_cards(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Core]:
    core = Core()
    monkeypatch.setattr(tuned_ways, "_core", core)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, device))
    yield core
    tuned_ways.take_into_use(emulated, 1, "", [])


def test_each_card_has_its_own_file(emulated: Any, two_cards: Core) -> None:
    measured = tune(Clock({"fma": 2.0, "plain": 1.0}), card=Card("card 1", 81))
    tuned_ways.load_for_all()
    assert two_cards.choices == {1: tuned_ways.rows_of(measured)}
    assert "device 1: " in tuned_ways.describe()


def test_what_goes_wrong_does_not_keep_cuda_from_starting(
    two_cards: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(tuned_ways, "default_cache_dir", no_home)
    with pytest.warns(UserWarning, match="loads no tuned table of ways: no home"):
        tuned_ways.load_for_all()
    assert not two_cards.choices


def test_forcing_one_direction_leaves_the_other(two_cards: Core) -> None:
    backend = tuned_ways.CudaBackend()
    backend.force_way("forward", "fma")
    backend.force_way("backward_input", "plain")
    assert two_cards.forced == ("fma", "plain")
    backend.force_way("forward", None)
    assert two_cards.forced == (None, "plain")
