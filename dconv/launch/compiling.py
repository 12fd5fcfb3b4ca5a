"""A conversion that ends at a hardware compiler: all ranks prepare what it takes, and the last of them runs it."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Generator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dconv.describe import described
from dconv.errors import DconvError, Refused, ToolMissing, UsageError
from dconv.export.runtimes import available_memory
from dconv.hw import finish, manifest, settings
from dconv.hw.registry import adapter
from dconv.hw.target import Adapter, Adopting, Ask, Handing, Step, Terms, Tool
from dconv.launch import worker
from dconv.launch.options import target, to_request
from dconv.launch.process import Stop, Stopped, preempted, say
from dconv.launch.terminal import show, show_json
from dconv.pipeline import prepare as plan_conversion
from dconv.quant import documents
from dconv.request import Request
from dconv.sharding.coords import Parallel
from dconv.sharding.receipt import RECEIPT, read_receipt

#: What ``--model-type`` said where tasks had no option of their own.
_OLDER: Final = {"text-generation": "text-generation", "image-classification": "image-text-to-text"}
#: Lines of a compiler that tell how far it is.
_PROGRESS: Final = re.compile(r"dconv-progress (\d+)/(\d+) ?(.*)")


@dataclass(frozen=True)
class Compilation:
    """What is to be done.

    Attributes:
        handing: None where the source is a hand-off's folder already.
        tool: None where nothing is compiled here.
        work: the folder that artifacts are prepared in; the same for the same request, so that a run goes on.
        adopted: what is known of a source that another tool compiled.
    """

    target: str
    adapter: Adapter
    ask: Ask
    source: Path
    out: Path
    work: Path
    handing: Handing | None
    tool: Tool | None
    adopted: Terms | None = None


def prepare(args: argparse.Namespace, *, finding: bool = True) -> Compilation:
    """Check all that can be checked before any work.

    Args:
        args: the parsed options.
        finding: look for the toolchain.

    Raises:
        DconvError: see `dconv.hw.target.Adapter`.
        Refused: the compiler needs more memory than there is.
        ToolMissing: the compiler is not here, and no bundle was asked for.
    """
    name = str(target(args))
    found = adapter(name)
    request, task = _tasked(to_request(args), args.task)
    given, where = settings.read(request.quantization_config)
    ask = Ask(
        args.platform, given, where, args.toolchain_python, os.environ, task, request.calibration, request.quant,
        args.tp,
    )  # fmt: skip
    out = request.output
    if manifest.is_here(request.model):
        said = manifest.read(request.model)
        if said["target"] != name:
            raise Refused("this was handed to another compiler, nothing was written", where=str(request.model),
                          expected=name, found=said["target"],
                          do=f"FORMAT {said['target']}, or its own source")  # fmt: skip
        return Compilation(name, found, ask, request.model, out, _work(out, "again"), None, None)
    if isinstance(found, Adopting) and (adopted := found.adopt(request.model, ask)) is not None:
        return Compilation(name, found, ask, request.model, out, _work(out, "again"), None, None, adopted)
    base = replace(request, format="huggingface", out=None, quant=None, quantization_config=None, calibration=None,
                   parallel=Parallel())  # fmt: skip
    handing = found.plan(described(base), base, ask)
    tool = found.find(ask, handing.terms) if finding and not args.bundle else None
    if tool is not None:
        _require_memory(handing, args.max_host_memory, tool)
    plain = repr([(step.role, step.request) for step in handing.steps])
    said = json.dumps([name, handing.terms.platform, handing.terms.settings, plain], sort_keys=True, default=str)
    work = _work(out, hashlib.sha256(said.encode()).hexdigest()[:12])
    return Compilation(name, found, ask, request.model, out, work, handing, tool)


def _tasked(request: Request, task: str | None) -> tuple[Request, str | None]:
    """The request and its task, which an older command line called ``--model-type``.

    Raises:
        UsageError: two tasks.
    """
    older = _OLDER.get(request.model_type or "")
    if older is None:
        return request, task
    if task not in (None, older):
        raise UsageError("two tasks are named, nothing was written", where=f"--task {task}",
                         found=f"--model-type {request.model_type}")  # fmt: skip
    return replace(request, model_type=None), older


def _work(out: Path, name: str) -> Path:
    return out.with_name(f"{out.name}.compile-{name}")


def _require_memory(handing: Handing, most: int | None, tool: Tool) -> None:
    free = available_memory() if most is None else most
    if handing.memory > free:
        raise Refused(
            f"{tool.words} holds the whole model, nothing was written",
            expected=f"about {handing.memory / 1e9:.1f} GB of memory",
            found=f"{free / 1e9:.1f} GB" + (" are free" if most is None else " are allowed"),
            do="--bundle, to compile where there is more; or --max-host-memory SIZE, if it is known to need less",
        )


def main(args: argparse.Namespace, where: worker.Place, stop: Stop | None = None) -> int:
    """Run one rank to its exit code; see `dconv.launch.worker.main`."""
    stop = stop or Stop()
    try:
        with stop.planning(0.0, lambda: None):
            job = prepare(args)
            if args.resume and job.handing and _is_done(job, job.handing):
                return _told(args, where, manifest.read(job.out), "already done")
            if job.handing and _is_done_by_others(job, job.handing, where):
                return 0
            finish.require_place(job.out, args.overwrite)
            if job.handing and len(job.handing.steps) > 1:  # what a later one refuses, none before it has worked for
                for step in job.handing.steps:
                    plan_conversion(_inside(job, step))
    except Stopped:
        return worker.failed(preempted(), args, where)
    except (DconvError, OSError) as error:
        return worker.failed(error, args, where)
    if job.handing is None:
        return _again(args, where, job, stop)
    try:
        job.work.mkdir(exist_ok=True)
    except OSError as fault:
        return worker.failed(fault, args, where)
    for step in job.handing.steps:
        inner = copy(args)
        inner.resume, inner.overwrite = True, False
        code = worker.main(inner, where, stop, _inside(job, step))
        if code:
            with contextlib.suppress(OSError):
                job.work.rmdir()  # a refusal leaves nothing
            return code
    try:
        if _is_done_by_others(job, job.handing, where):  # this rank came late, and had nothing to do
            shutil.rmtree(job.work, ignore_errors=True)
            return 0
        if not _is_prepared(job, job.handing):
            return 0  # the rank that finishes last goes on
        with _alone(job.work.with_name(f"{job.work.name}.lock")) as mine:
            # Who gets the lock after another has finished no longer sees what was prepared.
            ready = mine and _is_prepared(job, job.handing)
            return _finish(args, where, job, job.handing, stop) if ready else 0
    except (DconvError, OSError) as error:
        return worker.failed(error, args, replace(where, local=0))


def _is_prepared(job: Compilation, handing: Handing) -> bool:
    return all((job.work / step.role / RECEIPT).is_file() for step in handing.steps)


def _is_done(job: Compilation, handing: Handing) -> bool:
    """Whether the output is of the same request, of the same source and of the same calibration."""
    if not manifest.is_here(job.out):
        return False
    said = manifest.read(job.out)
    kind = "bundle" if job.tool is None else "compiled"
    asked = (kind, job.target, handing.terms.platform, dict(handing.terms.settings))
    if (said["kind"], said["target"], said["platform"], said["settings"]) != asked:
        return False
    plans = {step.role: plan_conversion(_inside(job, step)).plan.id for step in handing.steps}
    return said.get("source") == _source(job, handing, plans)


def _source(job: Compilation, handing: Handing, plans: Mapping[str, object]) -> dict[str, object]:
    """What is handed over, for the manifest.

    Args:
        job: what is to be done.
        handing: what the compiler is handed.
        plans: the plan of each artifact, by its role.
    """
    calibration = job.ask.calibration
    return {
        "path": str(job.source.resolve()),
        "format": handing.model.source.format,
        "family": handing.model.family.name,
        "artifacts": {role: {"plan": plan} for role, plan in plans.items()},
        **({"calibration": list(documents.read(calibration).files)} if calibration is not None else {}),
    }


def _inside(job: Compilation, step: Step) -> Request:
    """The request of one step, whose output is in the work folder."""
    return replace(step.request, out=job.work / step.role)


def _is_done_by_others(job: Compilation, handing: Handing, where: worker.Place) -> bool:
    """Whether other ranks of this run have made the output."""
    if where.world == 1 or not _is_done(job, handing):
        return False
    return (job.out / manifest.NAME).stat().st_mtime > where.launched - 0.1  # a file's clock may lag by a tick


def _finish(args: argparse.Namespace, where: worker.Place, job: Compilation, handing: Handing, stop: Stop) -> int:
    plans = {step.role: (read_receipt(job.work / step.role) or {}).get("plan") for step in handing.steps}
    source = _source(job, handing, plans)
    how = _how(args, job, stop, source)
    if job.tool is None:
        said = finish.bundled(job.adapter, handing, job.ask, how)
    else:
        said = finish.compiled(job.adapter, handing, job.tool, job.ask, how)
    return _told(args, replace(where, local=0), said, said["kind"], handing.notes)


def _again(args: argparse.Namespace, where: worker.Place, job: Compilation, stop: Stop) -> int:
    if where.rank:
        return 0
    try:
        how = _how(args, job, stop, {"path": str(job.source.resolve())})
        said = finish.again(job.adapter, job.source, how, job.adopted)
    except (DconvError, OSError) as error:
        return worker.failed(error, args, where)
    return _told(args, where, said, f"{said['kind']} before, and {'not by dconv' if job.adopted else 'whole'}")


def _how(args: argparse.Namespace, job: Compilation, stop: Stop, source: dict[str, object]) -> finish.Finish:
    def told(line: str) -> None:
        if args.quiet or args.json:
            return
        found = _PROGRESS.search(line)
        done = f"{found[1]}/{found[2]}  {found[3]}" if found else line
        say(f"{job.target}  {done}", sys.stderr)

    return finish.Finish(
        job.target, job.out, job.work, source, args.toolchain_timeout, args.overwrite, told, stop.is_set
    )


def _told(
    args: argparse.Namespace, where: worker.Place, said: dict[str, Any], how: str, notes: tuple[str, ...] = ()
) -> int:
    """The summary, by one of the ranks."""
    if where.local:
        return 0
    out = to_request(args).output
    if args.json:
        show_json({"out": str(out), **said, "notes": list(notes)})
    elif not args.quiet:
        size = sum(one["bytes"] for one in said["files"].values())
        by = said.get("toolchain", {}).get("words", "")
        said_of = f"{how}{f' by {by}' if by else ''} for {said['platform']}"
        lines = [f"{said_of}: {len(said['files'])} files, {size / 1e9:.2f} GB  ->  {out}"]
        lines += [f"{key}: {value}" for key, value in said.get("evidence", {}).items()]
        lines += notes
        if said["kind"] == "bundle":
            lines.append(f"compile it where the toolchain is: bash {out / 'compile.sh'}")
        show(*lines)
    return 0


@contextlib.contextmanager
def _alone(lock: Path) -> Generator[bool]:
    """Whether this process is the one that goes on; it holds a file beside the work, which is renamed."""
    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            lock.unlink(missing_ok=True)


def planned(args: argparse.Namespace) -> dict[str, Any]:
    """For ``dconv plan``: what would be handed over, and whether the compiler is here."""
    job = prepare(args, finding=False)
    said: dict[str, Any] = {"target": job.target, "out": str(job.out)}
    if job.handing is None:
        return {**said, "again": str(job.source)}
    said |= {
        "platform": job.handing.terms.platform,
        "settings": dict(job.handing.terms.settings),
        "artifacts": {step.role: step.request.format for step in job.handing.steps},
        "compiler_memory": job.handing.memory,
        "notes": list(job.handing.notes),
    }
    try:
        said["toolchain"] = job.adapter.find(job.ask, job.handing.terms).words
    except ToolMissing as lacking:
        said["toolchain"], said["lacks"] = None, lacking.found or lacking.what
    return said
