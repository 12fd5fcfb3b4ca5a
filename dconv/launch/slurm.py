"""``--launcher slurm``: submits the right script of ``slurm/``, and can wait for the job.

What would be refused is refused here, before there is a job: the plan needs headers alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dconv.errors import DconvError, Preempted, ToolMissing
from dconv.launch.display import Display
from dconv.launch.options import target, to_request
from dconv.launch.process import Stop, say
from dconv.launch.progress import Board
from dconv.launch.reporting import check_report
from dconv.launch.terminal import show_json
from dconv.pipeline import check_space, prepare
from dconv.request import CALIBRATED
from dconv.sharding.plan import Plan
from dconv.sharding.receipt import check_output, partial_folder, read_receipt

#: Seconds between two looks at a job: at first, how much longer each time, and at most. Controllers serve thousands.
_POLL: Final = 0.5
_SLOWER: Final = 1.3
_POLL_AT_MOST: Final = 15.0
#: Seconds without an answer of the controller after which it is not asked any more. A restart takes minutes.
_PATIENCE: Final = 1800.0
#: Seconds by which clocks of nodes may differ.
_CLOCKS: Final = 60.0
#: Bytes of a log in which the conversion's own error is looked for.
_TAIL: Final = 1 << 16
#: What SLURM calls the end of a job that may go on when it is submitted again.
_STOPPED: Final = ("CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "BOOT_FAIL", "REVOKED")


@dataclass(frozen=True)
class Submitted:
    """A job in the queue.

    Attributes:
        log: where it writes; None where SLURM does not say.
        plan: of the conversion; None where it ends at a hardware compiler, which plans by itself.
        began: seconds since the epoch.
    """

    number: str
    out: Path
    log: Path | None
    plan: Plan | None
    began: float


def submit(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Submit ``python -m dconv.launch`` with ``words``; returns the conversion's exit code where it is waited for.

    Raises:
        DconvError: what the conversion would be refused for, or how it ended.
        ToolMissing: there is no SLURM here, or it does not take the job.
    """
    out, plan, done = _planned(args)
    if done:
        _told(args, {"out": str(out), "already_done": True}, f"already done: {out}")
        return 0
    folder = scripts()
    command = _command(args, folder, words)
    began = time.time()
    ran = _ask(command, {**os.environ, **_variables(args, folder)})
    if ran.returncode:
        raise ToolMissing("SLURM did not take the job, nothing was written", where=" ".join(command[: -len(words)]),
                          found=ran.stderr.strip()[:1000],
                          do="sinfo shows partitions and limits; --partition, --account, --time, --sbatch")  # fmt: skip
    number = ran.stdout.strip().splitlines()[-1].partition(";")[0]  # behind a ; is the cluster's name
    log = _facts(number).get("StdOut")
    job = Submitted(number, out, Path(log) if log else None, plan, began)
    known = {"job": number, "out": str(out), "log": log, "plan": plan.id if plan else None}
    if not args.wait:
        _told(args, known, f"submitted: job {number}   log {log}\nsqueue -j {number} shows its state   ->  {out}")
        return 0
    if not args.json and not args.quiet:
        say(f"submitted: job {number}   log {log}", sys.stderr)
    _wait(args, job)
    _ended(job)
    _told(args, {**known, "done": True}, f"done: job {number}   log {log}   ->  {out}")
    return 0


def _told(args: argparse.Namespace, known: Mapping[str, object], sentence: str) -> None:
    if args.json:
        show_json(known)
    else:
        say(sentence)


def _planned(args: argparse.Namespace) -> tuple[Path, Plan | None, bool]:
    """Where the output goes, its plan, and whether it is there."""
    if target(args) is not None:
        from dconv.launch import compiling

        return compiling.prepare(args, finding=False).out, None, False  # the compiler may be on the nodes alone
    job = prepare(to_request(args))
    if args.verify == "logits":
        from dconv import logits

        logits.require(job)
    check_report(job, args.report)
    out = job.request.output
    done = check_output(job.plan, out, overwrite=args.overwrite, resume=args.resume, launched=float("inf"))
    if not done:
        check_space(job.plan, out)
    return out, job.plan, done


def scripts(package: Path = Path(__file__).parents[1], prefix: str = sys.prefix) -> Path:
    """The folder with the batch scripts: beside the package in a checkout, else where a wheel puts data.

    Raises:
        ToolMissing: there is none.
    """
    places = [package.parent / "slurm", Path(prefix, "share", "dconv", "slurm")]
    for folder in places:
        if (folder / "convert.sbatch").is_file():
            return folder
    raise ToolMissing("the scripts for SLURM are not here", expected="\n".join(map(str, places)),
                      do="install dconv's wheel anew, or work from a checkout")  # fmt: skip


def _command(args: argparse.Namespace, folder: Path, words: Sequence[str]) -> list[str]:
    script = "quantise" if args.format in CALIBRATED else "convert"
    gpus = os.environ.get("GPUS") if script == "quantise" else None
    asked = {"nodes": args.nodes, "partition": args.partition, "account": args.account, "time": args.time,
             "cpus-per-task": args.nproc * max(args.threads, 1), "gpus-per-node": gpus}  # fmt: skip
    return [
        "sbatch", "--parsable", "--export=ALL", *(f"--{name}={value}" for name, value in asked.items() if value),
        *args.sbatch, str(folder / f"{script}.sbatch"), *words,
    ]  # fmt: skip


def _variables(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """What the scripts are told: where they lie, how many ranks, and this interpreter's own torchrun.

    Raises:
        ToolMissing: there is no torchrun.
    """
    own = Path(sys.executable).with_name("torchrun")
    torchrun = os.environ.get("TORCHRUN") or (str(own) if own.is_file() else shutil.which("torchrun"))
    if not torchrun:
        raise ToolMissing("there is no torchrun, which starts the ranks of a node, nothing was written",
                          where=str(own), do="pip install torch, or TORCHRUN=/path/to/torchrun")  # fmt: skip
    return {"DCONV_SLURM": str(folder), "NPROC": str(args.nproc), "TORCHRUN": torchrun}


def _ask(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands.

    Raises:
        ToolMissing: it is not here.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
    except FileNotFoundError as fault:
        raise ToolMissing(f"there is no {command[0]}, nothing was written", where="PATH",
                          do="run it on a login node of a SLURM cluster; --launcher torchrun, ray or local "
                             "need none") from fault  # fmt: skip


def _facts(number: str) -> dict[str, str]:
    """What the controller knows of a job; nothing once it has forgotten it."""
    ran = _ask(["scontrol", "show", "job", number])
    lines = [line.strip() for line in ran.stdout.splitlines()]
    # a file's name, which may have spaces, has a line of its own
    words = [word for line in lines for word in ([line] if line.startswith("StdOut=") else line.split())]
    pairs = (word.partition("=") for word in words)
    return {name: value for name, _, value in pairs} if not ran.returncode else {}


# ---------------------------------------------------------------------------------------------------------- waiting


def _wait(args: argparse.Namespace, job: Submitted) -> None:
    """Until the job is in the queue no more, also over requeues; tells its state, and shows progress.

    Raises:
        Preempted: a signal came; the job goes on.
        ToolMissing: the controller has not answered for long.
    """
    stop = Stop()
    world = (args.nodes or 1) * args.nproc
    quiet = args.quiet or args.json
    pause, said, heard = _POLL, "", time.monotonic()
    with contextlib.ExitStack() as stack:
        while True:
            ran = _ask(["squeue", "--noheader", "--jobs", job.number, "--format", "%T %R"])
            gone = ran.returncode == 0 and not ran.stdout.strip()
            if gone or "Invalid job id" in ran.stderr:
                return
            if ran.returncode == 0:
                heard = time.monotonic()
                state, _, reason = ran.stdout.strip().splitlines()[0].partition(" ")
                if state != said:
                    said, pause = state, _POLL
                    stack.close()
                    if not quiet:
                        say(f"job {job.number}: {state.lower()} {reason}", sys.stderr)
                        if state == "RUNNING" and job.plan is not None:
                            stack.enter_context(_display(job, job.plan, world))
            elif time.monotonic() - heard > _PATIENCE:
                raise ToolMissing("SLURM's controller does not answer", found=ran.stderr.strip()[:1000],
                                  do=f"squeue -j {job.number} tells whether the job goes on")  # fmt: skip
            if stop.wait(pause):
                raise Preempted("no longer waited for: the job goes on", where=f"SLURM job {job.number}",
                                do=f"squeue -j {job.number} tells its state, scancel {job.number} ends it")  # fmt: skip
            pause = min(pause * _SLOWER, _POLL_AT_MOST)


def _display(job: Submitted, plan: Plan, world: int) -> Display:
    return Display(Board(partial_folder(job.out, plan), 0, job.began - _CLOCKS), plan.bytes_written, world)


def _ended(job: Submitted) -> None:
    """Return if the job made its output, by its exit code or else by the receipt.

    Raises:
        DconvError: the conversion failed; of the class that has its exit code.
    """
    facts = _facts(job.number)
    state, code = facts.get("JobState", ""), int(facts.get("ExitCode", "0:0").partition(":")[0] or 0)
    if state == "COMPLETED" or (not state and _is_made(job)):
        return
    where = f"SLURM job {job.number}, log {job.log}"
    again = "run the same command again (with --resume) to go on"
    if code in (kinds := {kind.exit_code: kind for kind in DconvError.__subclasses__()}):
        kind = kinds[code]
        raise kind("the conversion failed" if kind is not Preempted else "the job was stopped too often", where=where,
                   found=_own_words(job.log, lambda line: line.startswith(f"{kind.label} ({code})")),
                   do=again if kind is Preempted else "")  # fmt: skip
    if state.startswith(_STOPPED):
        raise Preempted(f"SLURM ended the job: {state}", where=where, do=again)
    raise ToolMissing("the job ended without a result", where=where,
                      found=f"{state or 'SLURM has forgotten it'}, exit code {facts.get('ExitCode', 'unknown')}",
                      do=f"see the log; {again}")  # fmt: skip


def _is_made(job: Submitted) -> bool:
    """Whether the output is there, and of this job; a compiler's has no receipt, but is made anew."""
    finished = (read_receipt(job.out) or {}).get("finished")
    if job.plan is None and job.out.exists():
        finished = job.out.stat().st_mtime
    return isinstance(finished, float) and finished >= job.began - _CLOCKS


def _own_words(log: Path | None, begins: Callable[[str], bool]) -> str:
    """The last error of its form in a log: its first line, and those that are indented below it."""
    if log is None:
        return ""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""  # another machine's disk
    starts = [number for number, line in enumerate(lines) if begins(line)]
    if not starts:
        return ""
    rest = iter(lines[starts[-1] + 1 :])
    found = [lines[starts[-1]]]
    for line in rest:
        if not line.startswith("  "):
            break
        found.append(line)
    return "\n".join(found)
