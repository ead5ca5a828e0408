"""What `import qlora_native` costs and leaves alone, seen from a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

import qlora_native
from qlora_native import _load

ALLOWED_SECONDS = 0.2  # above `import torch`
HEAVY = ["transformers", "peft", "accelerate", "bitsandbytes", "gguf", "matplotlib", "typer"]

PROBE = """
import json, os, sys, threading, time
import torch
modules, tasks = set(sys.modules), len(os.listdir("/proc/self/task"))
started = time.perf_counter()
import qlora_native
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "new_modules": sorted(set(sys.modules) - modules),
    "new_tasks": len(os.listdir("/proc/self/task")) - tasks,
    "python_threads": threading.active_count(),
    "isa": qlora_native.cpu_isa(),
}))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    return dict(json.loads(run(PROBE).stdout))


def test_import_is_quick_above_torch(probe: dict[str, Any]) -> None:
    # A second try where the first one shared its cores with something else.
    seconds = probe["seconds"]
    if seconds > ALLOWED_SECONDS:
        seconds = json.loads(run(PROBE).stdout)["seconds"]
    assert seconds <= ALLOWED_SECONDS


def test_import_brings_no_heavy_package(probe: dict[str, Any]) -> None:
    assert not [m for m in probe["new_modules"] if m.partition(".")[0] in HEAVY]


def test_import_starts_no_thread(probe: dict[str, Any]) -> None:
    assert (probe["new_tasks"], probe["python_threads"]) == (0, 1)


def test_every_exported_name_is_there() -> None:
    assert not [name for name in qlora_native.__all__ if not hasattr(qlora_native, name)]
    assert set(qlora_native.__all__) <= set(dir(qlora_native))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        qlora_native.quantise  # noqa: B018


def test_an_old_torch_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", "2.9.1")
    with pytest.raises(ImportError, match=r"needs torch >= 2\.10, got torch 2\.9\.1"):
        _load.load()


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(qlora_native, "_core")
    monkeypatch.setitem(sys.modules, "qlora_native._core", None)
    with pytest.raises(ImportError, match="pip install --no-build-isolation"):
        _load.load()


def test_a_forced_isa_is_used_and_one_that_does_not_run_is_named() -> None:
    result = run(PROBE, QLORA_FORCE_ISA="mmx")
    assert "QLORA_FORCE_ISA=mmx does not run here; using" in result.stderr
    assert json.loads(run(PROBE, QLORA_FORCE_ISA="scalar").stdout)["isa"] == "scalar"
