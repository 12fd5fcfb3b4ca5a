"""The public functions, with the command line's names: ``import dconv; dconv.convert("llama", "megatron", tp=2)``."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any, NoReturn

from dconv.compare import diff
from dconv.errors import UsageError
from dconv.examine import check, inspect
from dconv.launch.options import add_run_options, add_target_options, parse, to_request
from dconv.pipeline import Job, prepare, run
from dconv.sharding.commit import Outcome, Settings

__all__ = ["check", "convert", "diff", "inspect", "plan"]


def plan(model: str | Path, format: str, out: str | Path | None = None, **options: Any) -> Job:
    """Describe and plan a conversion; reads headers only and writes nothing.

    Args:
        model: checkpoint directory, or a state dict's file.
        format: ``huggingface`` (``hf``), ``safetensors``, ``megatron``, ``pt``, ``bmtrain``.
        out: output directory; ``./<model>-<format>`` by default.
        options: those of ``dconv convert``, with ``_`` for ``-`` (``tp=2``, ``megatron_format="legacy"``,
            ``shard_size="5GB"``); ``config`` names a file with more of them, which these override.

    Returns:
        The job; ``job.plan`` has the copies, tasks, bytes and id.

    Raises:
        UsageError: an option that is not known, or a value that it cannot have.
        Refused: an unsupported model or layout.
        Damaged: a source that is not whole.
    """
    return prepare(to_request(_parsed(model, format, out, options)), config_alone=True)


def convert(model: str | Path, format: str, out: str | Path | None = None, **options: Any) -> Outcome:
    """Convert in this process, alone; many ranks are ``dconv.launch``'s business.

    Args:
        model, format, out, options: as for `plan`; also ``max_memory``, ``threads``, ``resume``, ``overwrite``,
            ``digest``, and ``verify`` (``"digest"`` or ``"logits"``).

    Raises:
        DconvError: as `plan`; a storage fault; VerifyFailed.
    """
    args = _parsed(model, format, out, options)
    job = prepare(to_request(args))
    outcome = run(
        job,
        Settings(
            max_memory=args.max_memory,
            threads=args.threads,
            overwrite=args.overwrite,
            resume=args.resume,
            algorithm=args.digest,
        ),
    )
    if args.verify != "none":
        from dconv import verify

        verify.told(args.verify, job, job.request.output)
    return outcome


class _Parser(argparse.ArgumentParser):
    """One that raises where the command's own ends the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _parsed(model: str | Path, format: str, out: str | Path | None, options: dict[str, Any]) -> argparse.Namespace:
    """Options by keyword, read by the command line's own parser so that both know the same ones."""
    parser = _Parser("dconv", add_help=False, allow_abbrev=False)
    add_target_options(parser)
    add_run_options(parser)
    flags = {action.dest: action for action in parser._actions if action.option_strings}
    words: list[str] = []
    for name, value in ({"out": out} | options).items():
        action = flags.get(name)
        if action is None:
            close = difflib.get_close_matches(name, flags, 1)
            raise UsageError(f"{name} is no option", do=f"did you mean {close[0]}?" if close else "")
        if value is None or value is False:
            continue
        option = action.option_strings[-1]
        if action.nargs == 0:
            if value is not True:
                raise UsageError(f"{name} is True or False", found=f"{value!r:.80}")
            words.append(option)
        elif isinstance(value, list | tuple) and isinstance(action, argparse._AppendAction):
            words += [f"{option}={item}" for item in value]
        else:
            words.append(f"{option}={value}")
    return parse(parser, [*words, "--", str(model), str(format)])  # whatever they begin with, they are no options
