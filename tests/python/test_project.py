"""The project's own files agree with each other: README, Makefile, CI, pinned versions."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def text(name: str) -> str:
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    return path.read_text()


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", text("Makefile"), re.MULTILINE))


def commands(markdown: str) -> list[str]:
    """The lines of a page's shell blocks, without their comments."""
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in commands(text("README.md"))
    ran = re.findall(r"^step '[^']*' (.*)$", text(".ci/run"), re.MULTILINE)
    assert "make test" in ran


def test_the_readme_names_only_targets_that_exist() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        used = re.findall(r"\bmake ([a-z][a-z-]*)\b", "\n".join(commands(text(page))))
        assert set(used) <= make_targets(), page


def test_the_readme_s_command_lines_parse() -> None:
    typer = pytest.importorskip("typer")
    from qlora_native.cli.__main__ import app

    lines = [c for c in commands(text("README.md")) if c.startswith("qlora-native ")]
    assert len(lines) >= 6
    for line in lines:
        name, *words = shlex.split(line)[1:]
        typer.main.get_command(app).commands[name].make_context(name, words)


def test_the_readme_installs_torch_first_and_without_isolation() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        installs = [c for c in commands(text(page)) if "pip install" in c]
        ours = [
            i for i, c in enumerate(installs) if re.search(r"install .*['\"]?\.(\[|$|['\"])", c)
        ]
        assert ours, page
        first_torch = next(i for i, c in enumerate(installs) if "torch" in c)
        assert first_torch < ours[0], page
        assert "--no-build-isolation" in installs[ours[0]], page


def test_the_torch_that_make_installs_is_the_one_the_pages_name() -> None:
    (pinned,) = re.findall(r"^TORCH \?= (\S+)$", text("Makefile"), re.MULTILINE)
    for page in ("README.md", "CONTRIBUTING.md"):
        assert pinned in text(page), page


def test_pre_commit_uses_the_versions_of_the_dev_extra() -> None:
    pins = dict(re.findall(r'"([\w-]+)==([\w.]+)"', text("pyproject.toml")))
    hooks = re.findall(
        r'additional_dependencies: \["([\w-]+)==([\w.]+)"\]', text(".pre-commit-config.yaml")
    )
    assert {name for name, _ in hooks} == {"clang-format", "ruff"}
    for name, version in hooks:
        assert pins[name] == version


def test_every_extra_that_the_pages_name_exists() -> None:
    extras = set(re.findall(r"^(\w+) = \[", text("pyproject.toml").split("optional-dep")[1], re.M))
    for page in ("README.md", "CONTRIBUTING.md"):
        for group in re.findall(r"'\.\[([\w,]+)\]'", text(page)):
            assert set(group.split(",")) <= extras, page


def test_the_readme_has_the_report_s_figures() -> None:
    text("docs/benchmarks.json")
    command = [sys.executable, "-m", "bench.readme", "--check"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
