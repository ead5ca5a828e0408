"""`pytest bench`: the command line and the markers of the microbenchmarks."""

from __future__ import annotations

import pytest

from bench import section

MARKERS = {
    **{name: f"cases of bench_{name}.py" for name in section.names()},
    "ours": "qlora_native itself",
    "peer": "what it is compared with",
    "full": "needs --full",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every case, and peers that compile")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    omitted = [item for item in items if item.get_closest_marker("full")]
    if omitted:
        config.hook.pytest_deselected(items=omitted)
        items[:] = [item for item in items if item not in set(omitted)]
