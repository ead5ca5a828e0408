"""The harness's cases under pytest-benchmark: pytest bench --benchmark-group-by=param:case."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from bench.harness import OURS, Case

CONTENDERS = (OURS, "bitsandbytes", "torch", "torch fused", "torchao")


def _cases() -> list[Case]:
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    modules = [importlib.import_module(f"bench.{name}") for name in names]
    return [case for module in modules if hasattr(module, "cases") for case in module.cases(False)]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", _cases(), ids=lambda case: case.name)
def test_case(benchmark, case: Case, contender: str) -> None:
    contenders = case.contenders()
    if contender not in contenders:
        pytest.skip(f"{contender} is no contender here")
    benchmark(contenders[contender])
