"""Do all machines of a run work in one folder? Asked once, before the first byte, of the file system itself.

Each machine writes a word of its own into its place of one file, and the words that it reads in the others' places. A
machine that finds its own word in every place knows that all see what it writes, in the same file, at the same time:
what a conversion by several machines rests on. Words are new in every run: what an earlier one left says nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from dconv.errors import Preempted, StorageFault, UsageError
from dconv.launch.values import seconds
from dconv.sharding.parsed import is_list, mapping_or_empty
from dconv.sharding.stealing import QUICK

#: Seconds. Caches of a network file system hold for a minute; the others may plan longer than this machine.
_PATIENCE: Final = 120.0
#: Changes that, for file systems that are slower.
_VARIABLE: Final = "DCONV_MEETING_SECONDS"
#: Machines write to different blocks of any file system.
_BLOCK: Final = 65536
_LONGEST_WAIT: Final = 0.5
_FILE: Final = "meeting"


@dataclass(frozen=True)
class Machines:
    """This machine among those of a run.

    Attributes:
        node, nodes: its number, and how many there are.
        word: the same for all ranks of this machine, and another one in each run.
        speaks: whether this rank writes for its machine.
        patience: seconds to wait for the others.
    """

    node: int
    nodes: int
    word: str
    speaks: bool
    patience: float = _PATIENCE

    def meet(self, state: Path, stop: threading.Event | None = None, told: Callable[[str], None] = print) -> None:
        """Return once all machines see each other's words in a folder.

        Raises:
            StorageFault: they do not; it is no file system that all share.
            Preempted: ``stop`` was set.
        """
        if self.nodes == 1:
            return
        began = time.monotonic()
        wait, said, met = QUICK, False, [False] * self.nodes
        while not all(met):
            try:
                met = self._look(state / _FILE)
            except OSError as fault:
                raise StorageFault(f"machines cannot meet: {fault.strerror}", where=str(state / _FILE)) from fault
            waited = time.monotonic() - began
            absent = ", ".join(str(node) for node, here in enumerate(met) if not here)
            if all(met):
                break
            if waited > self.patience:
                raise StorageFault(
                    "not all machines of this run see the same output folder, nothing was written",
                    where=str(state.parent),
                    expected=f"a file system that all {self.nodes} machines share, and one source in one state",
                    found=f"nothing of machine {absent} in {waited:.0f} s",
                    do=f"-o on a shared file system; {_VARIABLE} waits longer",
                )
            if waited > self.patience / 10 and not said and self.speaks:
                said = True
                told(f"waiting to see machine {absent} of {self.nodes} in {state.parent}")
            wait = min(2 * wait, _LONGEST_WAIT)
            if stop is not None and stop.wait(wait):
                raise Preempted("stopped by a signal, nothing was written", do="run the same command again")
            if stop is None:
                time.sleep(wait)

    def _look(self, path: Path) -> list[bool]:
        """Write what is seen, and say by which machines this one is seen."""
        size = -(-(64 + 24 * self.nodes) // _BLOCK) * _BLOCK
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)  # anew each time: so that caches are asked
        try:
            places = [_read(os.pread(fd, size, node * size)) for node in range(self.nodes)]
            words = [place.get("word") for place in places]
            words[self.node] = self.word
            mine = {"word": self.word, "seen": words}
            if self.speaks and places[self.node] != mine:
                os.pwrite(fd, json.dumps(mine).encode().ljust(size), self.node * size)
                os.fsync(fd)
                places[self.node] = mine
        finally:
            os.close(fd)
        return [
            is_list(seen := place.get("seen")) and len(seen) == self.nodes and seen[self.node] == self.word
            for place in places
        ]  # fmt: skip


def _read(data: bytes) -> Mapping[str, object]:
    try:
        found = json.loads(data.rstrip(b"\0 ") or b"{}")
    except ValueError:  # half written
        return {}
    return mapping_or_empty(found)


def machines(environment: Mapping[str, str], world: int, local: int) -> Machines:
    """This process's machine, by the variables of torchrun (also dconv's own, for Ray), else of SLURM.

    Raises:
        UsageError: variables that are no number of a machine, or of seconds.
    """
    for number, count in (("GROUP_RANK", "GROUP_WORLD_SIZE"), ("SLURM_NODEID", "SLURM_STEP_NUM_NODES")):
        if "RANK" in environment and number.startswith("SLURM"):
            continue
        if number in environment and count in environment:
            values = environment[number], environment[count]
            if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
                raise UsageError("the launcher's variables name no machine of a run", where=f"{number}, {count}",
                                 found=", ".join(values))  # fmt: skip
            nodes = int(values[1]) if world > 1 else 1
            return Machines(int(values[0]), nodes, _word(environment), local == 0, _patience(environment))
    return Machines(0, 1, "", local == 0)


def _patience(environment: Mapping[str, str]) -> float:
    said = environment.get(_VARIABLE) or str(_PATIENCE)
    try:
        return seconds(said)
    except argparse.ArgumentTypeError as fault:
        raise UsageError(str(fault), where=f"{_VARIABLE} of the environment") from fault


def _word(environment: Mapping[str, str]) -> str:
    """The launcher's process on this machine: all its ranks have it, and no other run."""
    said = environment.get("DCONV_RUN")
    if not said:
        parent = os.getppid()
        stat = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()
        said = f"{Path('/proc/sys/kernel/random/boot_id').read_text()} {parent} {stat[19]}"
    return xxhash.xxh3_64_hexdigest(said.encode())
