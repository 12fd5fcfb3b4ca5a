"""Where this process stands in a run: its rank among how many, by the variables of whoever started it."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dconv.errors import UsageError
from dconv.launch.history import Record
from dconv.launch.meeting import Machines, machines

#: When a launcher started this run's ranks, in seconds since the epoch: one that knows better than their parent's age.
LAUNCHED: Final = "DCONV_LAUNCHED"


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands in a run.

    Attributes:
        local: its number among the ranks of this machine.
        launched: when the ranks were started (seconds since the epoch); inf where it is alone.
        record: what is kept of the run.
        machines: that the ranks are on.
        again: the launcher starts them once more, since some were lost.
    """

    rank: int
    world: int
    local: int
    launched: float
    record: Record = field(default_factory=Record)
    machines: Machines = Machines(0, 1, "", speaks=True)
    again: bool = False


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place, from torchrun's variables, else SLURM's, else alone.

    Only ``srun`` sets SLURM_STEP_NUM_TASKS. A batch script has SLURM_PROCID 0 and SLURM_NTASKS, too, but is one
    process: taken for rank 0 of many it would do a part and call it a success.

    Raises:
        UsageError: variables that are no rank of a world.
    """
    for rank, world, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if rank in environment and world in environment:
            values = [environment[rank], environment[world], environment.get(local, environment[rank])]
            if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
                raise UsageError(
                    "the launcher's variables name no rank of a world",
                    where=f"{rank}, {world}, {local} of the environment",
                    expected=f"numbers, {rank} below {world}",
                    found=", ".join(values),
                )
            found = [int(value) for value in values]
            # The parent of a lone rank may be a shell of hours ago: what it made since is not of this run.
            launched = _launched(environment) if found[1] > 1 else math.inf
            here = machines(environment, found[1], found[2])
            again = environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
            return Place(found[0], found[1], found[2], launched, machines=here, again=again)
    return Place(0, 1, 0, math.inf)


def _launched(environment: Mapping[str, str]) -> float:
    with contextlib.suppress(KeyError, ValueError):
        return float(environment[LAUNCHED])
    return _parent_started()


def _parent_started() -> float:
    """When the launcher of this machine's ranks started, in seconds since the epoch (inf where it cannot be told)."""
    try:
        stat = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
        ticks = int(stat[19]) / os.sysconf("SC_CLK_TCK")
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + ticks
    except (OSError, ValueError, IndexError):
        return math.inf
