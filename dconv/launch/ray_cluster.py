"""A Ray cluster as dconv needs it: reached or not, room for so many ranks, and places for them.

Ray is imported when it is asked for, and never before.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.files import LINKS
from dconv.errors import ToolMissing, UsageError
from dconv.launch.process import SIGNALS

#: Seconds for a cluster to take a connection. Ray itself tries for minutes, and then ends the process.
_PATIENCE: Final = 10.0
#: Seconds for the connection itself, where something listens: nodes name each other by addresses that may lead nowhere.
_CONNECTING: Final = 90.0
#: Between looks at whether places are ready.
_TICK: Final = 0.5


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank asks the cluster for."""

    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not self.cpus and not self.gpus:
            raise UsageError("a rank asks for nothing, nothing was written", where="--cpus-per-rank, --gpus-per-rank",
                             expected="cores, GPUs, or both")  # fmt: skip

    @property
    def bundle(self) -> dict[str, float]:
        """By Ray's names."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}

    @property
    def words(self) -> str:
        """For a person."""
        return ", ".join(f"{name} {amount:g}" for name, amount in self.bundle.items())

    def times(self, count: int) -> Share:
        """Of so many ranks in one place."""
        return Share(self.cpus * count, self.gpus * count)


def share_of(cpus: float | None, gpus: float | None) -> Share:
    """What options ask for; where nothing is said, one core.

    Raises:
        UsageError: a rank that asks for nothing.
    """
    return Share(1.0 if cpus is None else cpus, gpus or 0.0)


@contextlib.contextmanager
def reached(address: str | None, last_words: Callable[[ToolMissing], object]) -> Generator[Any]:
    """Ray, connected to the cluster. What is printed meanwhile goes nowhere; a result wants `sys.stdout` of before.

    Args:
        address: None is RAY_ADDRESS, else the cluster of this machine, else one that is started here for the while.
        last_words: called just before this process ends because Ray neither connects nor gives up.

    Raises:
        ToolMissing: Ray is not installed, or no cluster answers.
    """
    named = address or os.environ.get("RAY_ADDRESS", "")
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as fault:
        raise ToolMissing("ray is not installed, nothing was written", where="--launcher ray", found=str(fault),
                          do="pip install 'dconv[ray]', here and on the nodes of the cluster") from fault  # fmt: skip
    _knock(named)

    def end() -> None:
        last_words(_unreached(named or "this machine", f"no answer in {_CONNECTING:.0f} s"))
        os._exit(ToolMissing.exit_code)

    patience = threading.Timer(_CONNECTING, end)
    patience.daemon = True
    patience.start()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError) as fault:
        raise _unreached(named or "this machine", str(fault)) from fault
    finally:
        patience.cancel()
        for number, handler in handlers.items():  # Ray would end this process at once
            signal.signal(number, handler)
    try:
        # Ray prints pages of what a node or a worker that died has noted of itself.
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise where nobody listens; an address that is a name of Ray's is left to it."""
    found = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d{1,5})", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as fault:
        raise _unreached(address, str(fault)) from fault


def _unreached(address: str, found: str) -> ToolMissing:
    return ToolMissing(
        "the Ray cluster cannot be reached, nothing was written",
        where=address,
        found=found.strip().partition("\n")[0][:300],
        do="ray status --address HOST:PORT says whether it is up; --address or RAY_ADDRESS name another one",
    )


def handed_on(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a person has told this process of the source's links, which ranks on other machines have to know as well."""
    return {name: environment[name] for name in (LINKS,) if name in environment}


def addresses(ray: Any) -> Mapping[str, str]:
    """The addresses of the nodes that are up, by their ids."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def room(ray: Any, share: Share) -> int:
    """Ranks that the nodes which are up could hold if nothing else ran on them."""
    return sum(
        min(int(node["Resources"].get(name, 0) // amount) for name, amount in share.bundle.items())
        for node in ray.nodes()
        if node["Alive"]
    )


@contextlib.contextmanager
def places(ray: Any, share: Share, count: int, seconds: float, given_up: Callable[[], bool]) -> Generator[Any | None]:
    """A placement group for so many ranks, over as many nodes as there are; None where it is not ready in time.

    Args:
        ray: the module, connected.
        share: what a rank asks for.
        count: ranks.
        seconds: how long to wait.
        given_up: looked at while it waits.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([share.bundle] * count, strategy="SPREAD")
    try:
        until = time.monotonic() + seconds
        while not (ready := group.wait(_TICK)) and not given_up() and time.monotonic() < until:
            pass
        yield group if ready else None
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            remove_placement_group(group)
