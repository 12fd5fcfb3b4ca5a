"""Shared by all tests: the longer matrices run with ``--long``; what a test leaves behind is tidied up after it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from dconv.export import megatron_cpu
from dconv.sharding import transient
from tests import processes

# what tests hand to ranks lies in modules that import these
megatron_cpu.PRELOADED += ["pytest", "hypothesis", "transformers.modeling_utils", "tests.oracles.function"]


#: The one folder that holds what this run, its workers and what they start put aside. Its name is short: the path of a
#: socket has at most 107 characters.
_ASIDE: Final = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return  # a worker has its run's, by the environment
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # a failed test's folder is kept, beside it
    config.stash[_ASIDE] = tempfile.mkdtemp(prefix="dc-")
    os.chmod(config.stash[_ASIDE], 0o711)  # noqa: S103  services of the tests' clusters run as other users
    os.environ["TMPDIR"] = tempfile.tempdir = config.stash[_ASIDE]


def pytest_unconfigure(config: pytest.Config) -> None:
    if _ASIDE in config.stash:
        shutil.rmtree(config.stash[_ASIDE], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the longer matrices too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    skip = pytest.mark.skip(reason="a longer matrix; --long runs it")
    for item in items:
        if "long" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """What a test tried, for the tables of docs/trust.md: ``counted("kills at a call", 312)``; see scripts/trust.py."""
    where = os.environ.get("DCONV_COUNTS")

    def add(what: str, count: int) -> None:
        if where:
            with open(where, "a") as file:
                file.write(json.dumps({"what": what, "count": count, "test": request.node.nodeid}) + "\n")

    return add


@pytest.fixture(autouse=True)
def _history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of tests are nobody's past runs."""
    monkeypatch.setenv("DCONV_HISTORY", "off")


@pytest.fixture(autouse=True)
def _no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that fails in a test fails for good, or not at the next try."""
    monkeypatch.setattr(transient, "_BACK_OFF", 0.0)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """`dconv.launch` takes the process's signals over, which pytest needs back."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _processes() -> Iterator[None]:
    """What a failed test leaves running would slow down, or spoil, those after it."""
    yield
    processes.kill_all()
