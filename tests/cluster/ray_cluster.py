"""A real Ray cluster: two nodes of two cores each, on loopback, in a process of its own.

Ray rewrites 127.0.0.1 to another address of the machine unless the variable below is set before it is imported, which
also keeps its servers from listening elsewhere. What this process imports and sets must not reach pytest's own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from tests import processes

#: For everything that talks to the cluster, and for the cluster itself.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "GLOO_SOCKET_IFNAME": "lo"}
#: Ranks that read this from a folder of `RayCluster.control`; product code has no such hook. Each notes its process
#: and its parent, and waits before its third task, and each further one, as long as a file says so and it is not told
#: to stop.
HOOK = """
import os, time
if "RANK" in os.environ and "DCONV_NOTES" in os.environ:
    folder = os.environ["RAY_TEST_CONTROL"]
    rank = os.environ["RANK"]
    with open(f"{folder}/rank.{rank}.new", "w") as file:
        file.write(f"{os.getpid()} {os.getppid()}")
    os.rename(f"{folder}/rank.{rank}.new", f"{folder}/rank.{rank}")
    from dconv.launch.process import Stop
    from dconv.sharding.execute import Worker
    stops, done = [], 0
    real_init, real_do = Stop.__init__, Worker.do
    def init(self):
        real_init(self)
        stops.append(self)
    def do(self, task):
        global done
        done += 1
        if done > 2 and os.path.exists(f"{folder}/hold.{rank}"):
            open(f"{folder}/held.{rank}", "w").close()
            while os.path.exists(f"{folder}/hold.{rank}") and not any(stop.is_set() for stop in stops):
                time.sleep(0.02)
        return real_do(self, task)
    Stop.__init__, Worker.do = init, do
"""


@dataclass
class RayCluster:
    """The cluster, as tests see it.

    Attributes:
        control: a folder that `HOOK` looks into.
    """

    address: str
    control: Path
    process: subprocess.Popen[str]

    def driver(self, *words: object, command: str = "convert", **variables: str) -> subprocess.Popen[str]:
        """``dconv convert WORDS --launcher ray``."""
        line = [sys.executable, "-m", "dconv", command, *map(str, words), "--launcher", "ray"]
        return processes.start(*line, **LOOPBACK, RAY_ADDRESS=self.address, **variables)

    def call(self, *words: object, command: str = "convert", **variables: str) -> tuple[int, str, str]:
        """`driver`, until it has ended."""
        return processes.ended(self.driver(*words, command=command, **variables))

    def hold(self, *ranks: int) -> None:
        """Let these ranks wait in the midst of their work."""
        for path in self.control.iterdir():
            path.unlink()
        for rank in ranks:
            (self.control / f"hold.{rank}").touch()

    def until_held(self, driver: subprocess.Popen[str], *ranks: int) -> None:
        """Until these ranks are in the midst of their work."""
        until(lambda: all((self.control / f"held.{rank}").exists() for rank in ranks), driver)

    def release(self) -> None:
        """Let all go on."""
        for path in self.control.glob("hold.*"):
            path.unlink()

    def rank(self, number: int) -> tuple[int, int]:
        """A rank's process, and its actor's."""
        child, actor = (self.control / f"rank.{number}").read_text().split()
        return int(child), int(actor)

    def tell(self, what: str) -> None:
        """``remove`` the second node, as if its power had gone, or ``add`` it again."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        assert _answer(self.process.stdout) == {"did": what}


def until(condition: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    """Poll until it is so; the driver has not to end meanwhile."""
    limit = time.monotonic() + processes.PATIENCE
    while not condition():
        assert time.monotonic() < limit
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _answer(stream: IO[str]) -> dict[str, Any]:
    for line in stream:  # Ray prints what it likes before
        if line.startswith("{"):
            return json.loads(line)
    raise AssertionError("the cluster has ended")


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """One for all tests of this process."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    folder = tmp_path_factory.mktemp("ray")
    (folder / "control").mkdir()
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    kept = {key: value for key, value in os.environ.items() if not key.startswith((*processes.LAUNCHERS, "RAY_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.ray_cluster"],
        env={**kept, **LOOPBACK, "PYTHONPATH": os.pathsep.join([str(folder / "hook"), str(processes.ROOT)]),
             "RAY_TEST_CONTROL": str(folder / "control"), "OMP_NUM_THREADS": "1", "DCONV_HISTORY": "off"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(folder / "log").open("w"), text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield RayCluster(_answer(process.stdout)["address"], folder / "control", process)
    finally:
        others = list(processes._descendants(process.pid))
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            process.communicate(timeout=20)  # closes its input, at which it ends
        process.kill()
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Start the cluster, say where, and do what is asked on standard input until that ends."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "node_ip_address": "127.0.0.1", "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    second = cluster.add_node(**node)
    print(json.dumps({"address": cluster.address}), flush=True)
    for line in sys.stdin:
        if line.strip() == "remove":
            cluster.remove_node(second, allow_graceful=False)
        else:
            second = cluster.add_node(**node)
        print(json.dumps({"did": line.strip()}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
