"""Shared by all tests: the longer matrices run with ``--long``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the longer matrices too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    skip = pytest.mark.skip(reason="a longer matrix; --long runs it")
    for item in items:
        if "long" in item.keywords:
            item.add_marker(skip)
