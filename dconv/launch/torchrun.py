"""``--launcher torchrun``: the ranks of this machine under torchrun, which starts them again when one is lost."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dconv.errors import Preempted, ToolMissing
from dconv.launch.process import EXIT_CODES, Stop, left_codes

#: A restart whose ranks come to torchrun's meeting too early costs another one: three bear with a rank that is lost.
RESTARTS: Final = 3


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Run ``python -m dconv.launch`` with ``words`` under torchrun; returns the conversion's exit code.

    Raises:
        ToolMissing: no torch, or torchrun could not start a rank.
    """
    if importlib.util.find_spec("torch") is None:
        raise ToolMissing("torchrun is a part of torch, which is not installed, nothing was written",
                          where="--launcher torchrun", do="--launcher local starts ranks without it")  # fmt: skip
    stop = Stop()  # before there are ranks, that a signal to this process must not leave behind
    restarts = RESTARTS if args.max_restarts is None else args.max_restarts
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.nproc),
        "--max-restarts", str(restarts), "-m", "dconv.launch", *words,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="dconv-") as folder:
        variables = {"OMP_NUM_THREADS": "1", **os.environ, EXIT_CODES: folder}  # torchrun's own default, said aloud
        # In a group of its own: a Ctrl-C of the terminal reaches it once, by this process. Told twice it leaves ranks.
        torchrun = subprocess.Popen(command, env=variables, process_group=0)
        threading.Thread(target=_tell, args=(stop, torchrun), daemon=True).start()
        code = torchrun.wait()
        return _outcome(code, left_codes(Path(folder), args.nproc), told=stop.is_set())


def _tell(stop: Stop, torchrun: subprocess.Popen[bytes]) -> None:
    """Pass a signal on: torchrun tells its ranks, waits for them, and starts none of them again."""
    stop.wait()
    torchrun.terminate()


def _outcome(code: int, left: Sequence[int | None], *, told: bool) -> int:
    """The conversion's exit code, from torchrun's own and what the ranks left, as of local ranks."""
    if code == 0:
        return 0
    failed = [one for one in left if one]
    other = next((one for one in failed if one != Preempted.exit_code), None)
    if other is not None:
        return other
    if told:
        return Preempted.exit_code
    if all(one is None for one in left):
        raise ToolMissing("torchrun ended, and no rank has said how", where="--launcher torchrun",
                          found=f"its exit code is {code}", do="see what it says above")  # fmt: skip
    return 128 + signal.SIGKILL if None in left else Preempted.exit_code
