"""One rank's life: plan, show progress, run, and let the rank that commits print the summary."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dconv.errors import DconvError, Preempted, Refused, StorageFault, UsageError, counted, storage_fault
from dconv.launch.display import Display
from dconv.launch.history import Record
from dconv.launch.history import place as history_place
from dconv.launch.options import target, to_request
from dconv.launch.place import Place
from dconv.launch.process import SIGNALS, Stop, Stopped, preempted, say, tell_torchrun
from dconv.launch.progress import NOTES, Board, peak_memory
from dconv.launch.reporting import check_report, reporting_of
from dconv.launch.terminal import show, show_json, tell
from dconv.pipeline import Job, prepare, run
from dconv.request import Request
from dconv.sharding.rank import Outcome, Settings
from dconv.sharding.receipt import is_result, partial_folder, read_receipt

#: Seconds that the rank which reports goes on planning after a launcher's signal. torchrun and SLURM kill after 30.
_GRACE: Final = 10.0
#: Seconds that a rank with nothing to report waits before it ends: its end makes a launcher stop the one that reports,
#: which may hardly have started.
_POLITE: Final = 5.0


def main(args: argparse.Namespace, where: Place, stop: Stop | None = None, request: Request | None = None) -> int:
    """Run one rank to its exit code; errors are printed in their one form.

    Args:
        args: the parsed options.
        where: this rank's place in the run.
        stop: made earlier in this process, if it was.
        request: a step of what ``args`` ask for; its summary is not printed.
    """
    try:
        handed = request is None and target(args) is not None
    except (DconvError, OSError) as fault:
        return failed(fault, args, where)
    if handed:
        from dconv.launch import compiling  # it runs this function for each of its steps

        return compiling.main(args, where, stop)
    began = time.monotonic()
    stop = stop or Stop()

    def last_words() -> None:
        if where.local == 0:  # every rank meets the same: one of each machine says it
            report(preempted(), args.json)

    # When one rank refuses, a launcher stops the others, and the one that reports must get to its own refusal.
    grace = _GRACE if where.local == 0 and where.world > 1 else 0.0
    try:
        with stop.planning(grace, last_words):
            job = planned(args, request)
    except Stopped:
        last_words()
        return Preempted.exit_code
    except DconvError as error:
        where.record.note(error=str(error))
        if where.local == 0:
            report(error, args.json)
        else:
            stop.wait(_POLITE)
        return error.exit_code
    except (OSError, MemoryError) as fault:
        return failed(fault, args, where)
    plan = job.plan
    where.record.note(
        plan=plan.id, family=job.family.name, bytes_read=plan.bytes_read, bytes_written=plan.bytes_written
    )
    try:
        return _run(job, args, where, began, stop, told=request is None)
    except DconvError as error:
        where.record.note(error=str(error))
        common = _is_common(error, job)
        if where.local == 0 or not common:
            report(error, args.json, None if common else where)
        else:
            stop.wait(_POLITE)
        return error.exit_code
    except (OSError, MemoryError) as fault:
        return failed(fault, args, where)


def planned(args: argparse.Namespace, request: Request | None = None) -> Job:
    """Plan what was asked for, with what ``--verify`` needs: reads headers only, writes nothing.

    Raises:
        DconvError: see `dconv.pipeline.prepare`.
    """
    job = prepare(request or to_request(args))
    if args.verify == "logits":
        from dconv import logits

        logits.require(job)
    if request is None:
        check_report(job, args.report)
    return job


def failed(fault: DconvError | OSError | MemoryError, args: argparse.Namespace, where: Place) -> int:
    """The exit code of a fault, which is printed; of one that all ranks meet, by one of each machine."""
    if isinstance(fault, DconvError):
        where.record.note(error=str(fault))
        if where.local == 0:
            report(fault, args.json)
        return fault.exit_code
    if isinstance(fault, OSError):
        error = storage_fault(fault)
    else:
        error = StorageFault("out of memory", do="a smaller --max-memory")
    where.record.note(error=str(error))
    report(error, args.json, where)
    return error.exit_code


def _is_common(error: DconvError, job: Job) -> bool:
    """Whether every rank meets this error: the output exists, no room or a stop before the first byte."""
    if isinstance(error, StorageFault) and is_result(job.plan, job.request.output):
        return False  # what came after the commit: the page of --report
    if isinstance(error, StorageFault | Preempted):
        return not partial_folder(job.request.output, job.plan).exists()
    return isinstance(error, UsageError | Refused)


def _run(job: Job, args: argparse.Namespace, where: Place, began: float, stop: Stop, *, told: bool = True) -> int:
    if stop.is_set():
        raise preempted()
    # File times come from a clock that may lag behind by a tick.
    since = where.launched if math.isfinite(where.launched) else time.time()
    board = Board(partial_folder(job.request.output, job.plan), where.rank, since - 0.1)
    notes: dict[int, dict[str, int]] = {}

    def told_of(line: str) -> None:
        if not args.quiet:
            say(f"[rank {where.rank}] {line}" if where.world > 1 else line, sys.stderr)

    settings = Settings(
        rank=where.rank,
        world=where.world,
        max_memory=args.max_memory,
        threads=args.threads,
        overwrite=args.overwrite,
        resume=args.resume,
        launched=where.launched,
        again=where.again,
        progress=board.note,
        committing=lambda: notes.update(board.read()),  # they go at the commit, and to all other ranks they are nothing
        stop=stop,
        algorithm=args.digest,
        steal=where.world > 1 and told,  # after a step the rank that ends it goes on alone, and moves what is there
        meet=lambda state: where.machines.meet(state, stop, told_of),
        told=told_of,
        stage_dir=args.stage_dir,
    )
    reporting = reporting_of(job, args.report if told else None, where.rank, where.world, since, began)
    with contextlib.ExitStack() as stack:
        shown = None
        if where.rank == 0 and not args.quiet and not args.json and NOTES not in os.environ:
            shown = stack.enter_context(Display(board, job.plan.bytes_written, where.world))
        outcome = run(job, reporting.settings(settings))
        if shown is not None and not outcome.complete:
            shown.linger(stop)
    if outcome.committed:
        seconds = time.monotonic() - began
        notes[where.rank] = {"peak": peak_memory()}  # of the conversion, not of what verifies it
        verified = reporting.ended(lambda: _verify(job, args.verify))
        if told:
            _summary(job, args, where, outcome, notes, seconds, verified, reporting.path)
    elif told and outcome.complete and where.rank == 0 and _was_there(job, since):
        verified = reporting.ended(lambda: _verify(job, args.verify), already=True)
        result = {"out": str(job.request.output), "plan": job.plan.id, "already_done": True, "verified": verified}
        result |= {"report": str(reporting.path)} if reporting.path else {}
        if args.json:
            show_json(result)
        elif not args.quiet:
            page = [f"report {reporting.path}"] if reporting.path else []
            show(f"already done: {job.request.output}", *_sentences(verified), *page)
    return 0


def recorded(words: Sequence[str], args: argparse.Namespace, ranks: int) -> Record:
    """The record of a run that begins here, where the options make sense and a history is kept."""
    record = Record(history_place())
    try:
        out = to_request(args).output
    except (DconvError, argparse.ArgumentTypeError):
        return Record()  # said by the run itself
    record.begin(words, args.model, args.format, out, ranks)
    return record


def _was_there(job: Job, since: float) -> bool:
    """Whether the output is of an earlier run, whose ranks have printed their summary."""
    finished = (read_receipt(job.request.output) or {}).get("finished")
    return isinstance(finished, float) and finished < since


def _verify(job: Job, mode: str) -> dict[str, object] | None:
    """What ``--verify`` found, by the rank that committed or found it done; the others have nothing to wait for.

    Raises:
        VerifyFailed: see `dconv.verify.told`; the output stays, and is not to be used.
    """
    if mode == "none":
        return None
    for number in SIGNALS:  # nothing is lost by ending at once now
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    from dconv import verify  # a rank that only moves bytes does not pay for it

    return verify.told(mode, job, job.request.output)


def _sentences(verified: dict[str, object] | None) -> list[str]:
    if verified is None:
        return []
    from dconv import verify

    return [verify.sentence(verified)]


def _summary(
    job: Job,
    args: argparse.Namespace,
    where: Place,
    outcome: Outcome,
    notes: dict[int, dict[str, int]],
    seconds: float,
    verified: dict[str, object] | None,
    page: Path | None,
) -> None:
    plan = job.plan
    peaks = {rank: note["peak"] for rank, note in sorted(notes.items())}
    numeric = sum(1 for copies in plan.copies if any(not c.op.exact for c in copies))
    result = {
        "out": str(job.request.output),
        "plan": plan.id,
        "family": job.family.name,
        "source": job.source.format,
        "ranks": where.world,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "seconds": round(seconds, 3),
        "peak_memory": peaks,
        "tensors": len(plan.target.tensors),
        "rounded": numeric,
        "left_out": plan.target.left_out or {},
        "needs": list(job.needs),
        "notes": list(job.notes),
        "verified": verified,
        **({"report": str(page)} if page else {}),
    }
    if args.json:
        show_json(result)
        return
    if args.quiet:
        return
    exact = "bit-exact" if not numeric else f"{counted(numeric, 'tensor', 'tensors')} rounded once, the rest bit-exact"
    if job.calibrating:
        from dconv.quant.report import summary

        exact = summary(job.calibrating.lines)
    lines = [
        f"wrote {plan.bytes_written / 1e9:.2f} GB in {seconds:.1f} s ({plan.bytes_written / 1e9 / seconds:.2f} GB/s) "
        f"with {where.world} rank{'s' * (where.world > 1)}, {exact}  ->  {job.request.output}",
        f"peak memory a rank: {max(peaks.values()) / 2**20:.0f} MiB   plan {plan.id}   receipt dconv.json",
    ]
    lines += [*job.notes, *_sentences(verified)]
    if outcome.kept:
        lines.append(f"kept {outcome.kept / 1e9:.2f} GB of an earlier run (checked)")
    lines += [f"left out: {name} ({reason})" for name, reason in list((plan.target.left_out or {}).items())[:8]]
    lines += [f"megatron-core lacks: {what}" for what in job.needs]
    lines += [f"report {page}"] * (page is not None)
    show(*lines)


def report(error: DconvError, as_json: bool, where: Place | None = None) -> None:
    """Print an error in its form, or as JSON on standard output; torchrun ends with it, too."""
    tell_torchrun(str(error))
    if as_json:
        show_json(error.to_dict())
        return
    prefix = f"[rank {where.rank}] " if where is not None and where.world > 1 else ""
    tell(error, prefix)
