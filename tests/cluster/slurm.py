"""A real SLURM on loopback: a controller and two nodes of four cores each, in a directory of its own.

Nothing of it is the system's: keys, ports, sockets, state and logs are under one temporary directory, and go with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.processes import LAUNCHERS, PATIENCE, ROOT

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
#: Seconds that a daemon has to leave before it is killed.
LEAVE = 10

#: cred_expire is also how long a requeued job waits (120 s otherwise; a job that is started earlier all the same finds
#: its credential revoked), and 6 is the least that is taken.
CONFIG = """
ClusterName=dconvtest
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
FirstJobId={first}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={top}/run/munge.sock,cred_expire=6
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPidFile={top}/run/slurmctld.pid
SlurmdPidFile={top}/run/slurmd.%n.pid
SlurmctldLogFile={top}/log/slurmctld.log
SlurmdLogFile={top}/log/slurmd.%n.log
SlurmctldDebug=debug
SlurmdDebug=debug
StateSaveLocation={top}/state
SlurmdSpoolDir={top}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=0,batch_sched_delay=0,sched_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SlurmdTimeout=30
InactiveLimit=0
MinJobAge=300
KillWait=5
SwitchType=switch/none
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 CoresPerSocket=4 RealMemory=4000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=4 CoresPerSocket=4 RealMemory=4000
PartitionName=main Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=grace Nodes=n[0-1] MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=n[0-1] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """The running cluster.

    Attributes:
        variables: what a process needs to use it, and ranks to find each other on loopback.
    """

    def __init__(self, top: Path) -> None:
        self.top = top
        self.variables = {
            "SLURM_CONF": str(top / "slurm.conf"), "HEAD_ADDR": "127.0.0.1", "LOCAL_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo", "DCONV_HISTORY": "off",
        }  # fmt: skip

    def call(self, *command: object, check: bool = True, **variables: str) -> str:
        """Run one of SLURM's commands; its standard output."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith((*LAUNCHERS, "SBATCH_"))}
        environment = {**kept, "PYTHONPATH": str(ROOT), **self.variables, **variables}
        ran = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=60)
        assert not check or ran.returncode == 0, (command, ran.stderr)
        return ran.stdout

    def submit(self, folder: Path, script: str, *words: object, options: tuple[str, ...] = (), **variables: str) -> str:
        """``sbatch`` a script of ours from ``folder``, where its logs lie; the job's number."""
        path = ROOT / "slurm" / f"{script}.sbatch"
        said = self.call("sbatch", "--parsable", "--chdir", folder, f"--output={folder}/job-%A-%a.log",
                         *options, path, *words, **variables)  # fmt: skip
        return said.strip()

    def facts(self, job: str) -> dict[str, str]:
        """What the controller says of a job, or of the first task of an array."""
        pairs = (word.partition("=") for word in self.call("scontrol", "show", "job", "-o", job).split())
        found: dict[str, str] = {}
        for name, _, value in pairs:
            found.setdefault(name, value)
        return found

    def until_ended(self, job: str) -> dict[str, str]:
        """Wait for the end of a job, over requeues; its facts."""
        self.until(lambda: not self.call("squeue", "-h", "-j", job, check=False).strip(), job)
        return self.facts(job)

    def until(self, condition: Callable[[], bool], job: str) -> None:
        """Poll until it is so; what the job wrote is shown where it never is."""
        limit = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < limit, self.facts(job)
            time.sleep(0.05)

    def log(self, folder: Path, job: str) -> str:
        """Everything that a job, or all tasks of an array, wrote."""
        return "\n".join(path.read_text() for path in sorted(folder.glob(f"job-{job}-*.log")))


def missing() -> str:
    """Why there can be no cluster here; "" where there can."""
    if lacking := [name for name in NEEDED if _which(name) is None]:
        return f"no {', '.join(lacking)}: bash scripts/cluster.sh installs SLURM"
    return "" if os.geteuid() == 0 else "SLURM's daemons run as root"


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Started when the first test asks for it."""
    if reason := missing():
        pytest.skip(reason)
    top = Path(tempfile.mkdtemp(prefix="dconv-slurm-"))  # short: a socket's path has at most 107 characters
    cluster = Slurm(top)
    try:
        _start(cluster)
        yield cluster
    finally:
        _stop(cluster)
        shutil.rmtree(top, ignore_errors=True)


def _start(cluster: Slurm) -> None:
    top = cluster.top
    top.chmod(0o755)
    for name in ("munge", "run", "log", "state", "spool/n0", "spool/n1"):
        (top / name).mkdir(parents=True)
    (top / "munge").chmod(0o700)
    (top / "run").chmod(0o755)
    key = top / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    # Ranks meet at a port by their job's number, and another cluster of these tests may be up on this machine.
    given = {"top": top, "host": socket.gethostname(), "ports": _free_ports(4), "first": os.getpid() * 64 % 9000 + 1}
    (top / "slurm.conf").write_text(CONFIG.format(**given))
    for command in (
        ["munged", f"--key-file={key}", f"--socket={top}/run/munge.sock", f"--pid-file={top}/run/munged.pid",
         f"--log-file={top}/log/munged.log", f"--seed-file={top}/munge/seed"],
        ["slurmctld", "-c", "-f", f"{top}/slurm.conf"],
        ["slurmd", "-N", "n0", "-f", f"{top}/slurm.conf"],
        ["slurmd", "-N", "n1", "-f", f"{top}/slurm.conf"],
    ):  # fmt: skip
        cluster.call(_which(command[0]) or command[0], *command[1:])
    limit = time.monotonic() + 60
    while "n[0-1]" not in cluster.call("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False) and (
        cluster.call("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", check=False).strip() != "2"
    ):
        assert time.monotonic() < limit, [path.read_text()[-2000:] for path in sorted((top / "log").iterdir())]
        time.sleep(0.1)


def _stop(cluster: Slurm) -> None:
    """End the jobs, the daemons, and what of the jobs outlived them."""
    with contextlib.suppress(OSError, AssertionError, subprocess.SubprocessError):
        cluster.call("scancel", "--user=root", check=False)
        limit = time.monotonic() + LEAVE
        while cluster.call("squeue", "-h", check=False).strip() and time.monotonic() < limit:
            time.sleep(0.1)
    pids = []
    for name in ("slurmd.n0", "slurmd.n1", "slurmctld", "munged"):
        with contextlib.suppress(OSError, ValueError):
            pids.append(int((cluster.top / "run" / f"{name}.pid").read_text()))
    pids += _strays(cluster.top)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        limit = time.monotonic() + LEAVE
        while any(_alive(pid) for pid in pids) and time.monotonic() < limit:
            time.sleep(0.05)


def _strays(top: Path) -> list[int]:
    """Processes of this cluster's jobs, by the configuration that they were started with."""
    marked = f"SLURM_CONF={top}/slurm.conf\0".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if marked in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def _alive(pid: int) -> bool:
    """Whether it runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def _free_ports(count: int) -> list[int]:
    """Ports that nobody had a moment ago, held together so that they differ."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
