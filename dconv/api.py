"""The public functions, with the command line's names: ``import dconv; dconv.convert("llama", "megatron", tp=2)``."""

from __future__ import annotations

import argparse
import difflib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NoReturn

from dconv import checking
from dconv import trace as tracing
from dconv.checking import Checked
from dconv.compare import diff
from dconv.errors import Refused, UsageError
from dconv.examine import inspect
from dconv.launch.arguments import arguments_of, repeats
from dconv.launch.options import add_target_options, parse, to_request
from dconv.launch.reporting import check_report, reporting_of
from dconv.launch.run_options import add_run_options
from dconv.launch.values import byte_count
from dconv.pipeline import Job, Request, prepare, run
from dconv.request import QUANTISED
from dconv.sharding.coords import Coord, Parallel
from dconv.sharding.parsed import is_list_or_tuple
from dconv.sharding.rank import Outcome, Settings

__all__ = ["check", "convert", "diff", "handoff", "inspect", "plan"]

#: Options of ``convert`` that speak of a checkpoint on disk, of an earlier run, or to a terminal.
_NOT_LIVE: Final = {
    *("source_format", "rename", "submodel", "teacher", "teacher_only", "fake_weight", "fake_weight_config"),
    *("stage_dir", "config", "resume", "verify", "report", "json", "quiet"),
}


def plan(
    model: str | Path, format: str, out: str | Path | None = None, *, trace: str | Sequence[str] = (), **options: Any
) -> Job:
    """Describe and plan a conversion; reads headers only and writes nothing.

    Args:
        model: checkpoint directory, or a state dict's file.
        format: a FORMAT in any of its spellings, such as ``hf``, ``megatron``, ``gguf`` (`dconv.request.FORMATS`).
        out: output directory; ``./<model>-<format>`` by default.
        trace: a pattern, or several, of tensors whose way is wanted (`dconv.trace.trace`).
        options: those of ``dconv convert``, with ``_`` for ``-`` (``tp=2``, ``megatron_format="legacy"``,
            ``shard_size="5GB"``); ``config`` names a file with more of them, which these override.

    Returns:
        The job; ``job.plan`` has the copies, tasks, bytes and id, ``job.trace`` the ways.

    Raises:
        UsageError: an option that is not known, or a value that it cannot have; a trace of nothing.
        Refused: an unsupported model or layout.
        Damaged: a source that is not whole.
    """
    job = prepare(to_request(_parsed(model, format, out, options)), config_alone=True)
    return replace(job, trace=tracing.trace(job.plan, job.request.parallel, trace))


def check(path: str | Path, *, max_memory: int | str | None = None, **options: Any) -> Checked:
    """Read a checkpoint back, then run it in its own runtime: `dconv.checking.check`, which has the options.

    Args:
        path: a checkpoint's directory, or its file.
        max_memory: bytes that weights may take at a time, as a number or as on the command line (``"32GB"``); half of
            the memory that is free by default.
        options: what `dconv.checking.check` takes beside it.

    Raises:
        UsageError: a size that is none.
        DconvError: see there.
    """
    try:
        limit = None if max_memory is None else byte_count(max_memory)
    except argparse.ArgumentTypeError as fault:
        raise UsageError(f"max_memory: {fault}") from fault
    return checking.check(path, max_memory=limit, **options)


def convert(model: str | Path, format: str, out: str | Path | None = None, **options: Any) -> Outcome:
    """Convert in this process, alone; many ranks are ``dconv.launch``'s business.

    Args:
        model: see `plan`.
        format: see `plan`.
        out: the output's directory; ``./<model>-<format>`` where none is given.
        options: as for `plan`; also ``max_memory``, ``threads``, ``resume``, ``overwrite``, ``digest``, ``verify``
            (``"digest"`` or ``"logits"``), and ``report`` (True, or a path of a page to write).

    Raises:
        DconvError: as `plan`; a storage fault; VerifyFailed.
    """
    args = _parsed(model, format, out, options)
    job = prepare(to_request(args))
    if args.verify == "logits":
        from dconv import logits

        logits.require(job)
    check_report(job, args.report)
    reporting = reporting_of(job, args.report, 0, 1, time.time())
    outcome = run(job, reporting.settings(_settings(args)))

    def verified() -> dict[str, object] | None:
        if args.verify == "none":
            return None
        from dconv import verify

        return verify.told(args.verify, job, job.request.output)

    reporting.ended(verified, already=not outcome.committed)
    return outcome


def handoff(
    models: object,
    to: str,
    out: str | Path,
    *,
    args: object = None,
    parallel: Parallel | None = None,
    coord: Coord | None = None,
    group: object = None,
    **options: Any,
) -> Outcome:
    """Write another format straight from the memory of a running Megatron job.

    Every rank calls it, and all return when the output is there. No weight goes over the network: a rank writes what it
    holds at its final place in the output, which must lie on a file system that all ranks share. The bytes are those
    that ``dconv.convert`` makes of the job's own checkpoint. What several ranks hold (norms, data-parallel copies) is
    compared by hashes. Beyond the model it takes ``max_memory`` bytes; tensors on a GPU are copied by tiles of a MiB at
    most.

    Args:
        models: this rank's module, its state dict (Megatron's local names, shapes as this rank holds them) or its
            ``sharded_state_dict()``, or a list of them, one a virtual chunk. Strides are free; the tensors may not
            change until the call returns. A sharded state dict says itself where all belongs: no ``parallel`` and
            ``coord`` are needed.
        to: as ``format`` of `plan`.
        out: output directory.
        args: Megatron's args, a Namespace or a mapping; those of rank 0 count. Without them ``hf_config`` is needed.
        parallel: the running job's sizes, where ``megatron.core.parallel_state`` does not run.
        coord: this rank's place in them; by rank number where there is no data parallelism.
        group: the ``torch.distributed`` process group of the job's ranks; all of them by default.
        options: those of ``dconv convert`` about the target (``tp``, ``dtype``, ``shard_size`` …), ``hf_config``,
            ``model_type``, ``drop``, ``replicas``, ``max_memory``, ``threads``, ``overwrite``, ``digest``.

    Returns:
        What this rank did; ``committed`` on rank 0.

    Raises:
        UsageError: an option that is not known or says nothing here; the output exists; no place in the job.
        Refused: as `convert`; a tensor that is no plain one; ranks that do not see the same config.
        Damaged: shards that do not make up the model; copies that differ.
        StorageFault: no room, or no file system that the ranks share.
        DconvError: any error of another rank. Then nothing is left, under no name.
    """
    from dconv import live

    ranks = live.Ranks(group)

    def asked() -> tuple[tuple[Request, Settings], None]:
        foreign = sorted(options.keys() & _NOT_LIVE)
        if foreign:
            raise UsageError("a handoff has no use for these options, nothing was written", where=", ".join(foreign))
        said = _parsed("memory", to, out, options)
        request = to_request(said)
        if request.format in QUANTISED:
            raise Refused(
                "a handoff writes plain weights, nothing was written",
                where=f"to={to!r}",
                found="blocks that share a scale may lie in several ranks' memory",
                do="hand it off as hf, and convert that;  dconv convert takes the job's own checkpoint, too",
            )
        return (request, _settings(said)), None

    (request, settings), _ = ranks.together(asked)
    return live.handoff(models, request, settings, ranks, args=args, coord=coord, parallel=parallel)


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(
        max_memory=args.max_memory,
        threads=args.threads,
        stage_dir=args.stage_dir,
        overwrite=args.overwrite,
        resume=args.resume,
        algorithm=args.digest,
    )


class _Parser(argparse.ArgumentParser):
    """One that raises where the command's own ends the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _parsed(model: str | Path, format: str, out: str | Path | None, options: dict[str, Any]) -> argparse.Namespace:
    """Options by keyword, read by the command line's own parser so that both know the same ones."""
    parser = _Parser("dconv", add_help=False, allow_abbrev=False)
    add_target_options(parser)
    add_run_options(parser)
    flags = {action.dest: action for action in arguments_of(parser) if action.option_strings}
    words: list[str] = []
    for name, value in ({"out": out} | options).items():
        action = flags.get(name)
        if action is None:
            close = difflib.get_close_matches(name, flags, 1)
            raise UsageError(f"{name} is no option", do=f"did you mean {close[0]}?" if close else "")
        if value is None or value is False:
            continue
        option = action.option_strings[-1]
        if action.nargs == "?" and value is True:
            words.append(option)
        elif action.nargs == 0:
            if value is not True:
                raise UsageError(f"{name} is True or False", found=f"{value!r:.80}")
            words.append(option)
        elif is_list_or_tuple(value) and repeats(action):
            words += [f"{option}={item}" for item in value]
        else:
            words.append(f"{option}={value}")
    return parse(parser, [*words, "--", str(model), str(format)])  # whatever they begin with, they are no options
