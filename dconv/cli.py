"""The ``dconv`` command: options in, one call, text or JSON out. Nothing is converted or decided here.

Each command's options and imports are made when that command is asked for, so that ``dconv --help`` and a shell's
completion do not wait for numpy.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dconv import __version__
from dconv.errors import DconvError, StorageFault, ToolMissing, storage_fault
from dconv.launch.process import say, tolerate

_EXITS: Final = """exit codes:
  0 done   1 diff found a difference   2 usage, or OUT exists   3 refused before writing
  4 damaged input   5 storage fault   6 verification failed   7 a runtime is missing   75 preempted, run again"""


@dataclass(frozen=True, slots=True)
class Command:
    """One word after ``dconv``.

    Attributes:
        words: what follows the command, options aside.
        options: adds its arguments to a parser.
        run: does it, given its parser and the words after it, and returns the exit code.
    """

    help: str
    words: str
    examples: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.ArgumentParser, Sequence[str]], int]


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show where an internal error happened")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _convert_options(parser: argparse.ArgumentParser) -> None:
    from dconv.commands import convert

    convert.options(parser)


def _convert(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from dconv.commands import convert

    return convert.run(parser, words)


def _plan_options(parser: argparse.ArgumentParser) -> None:
    from dconv.launch.options import add_target_options
    from dconv.launch.values import positive

    add_target_options(parser)
    parser.add_argument("--world", type=positive, metavar="N", help="show the shares of N ranks (default: one a shard)")
    parser.add_argument("--trace", action="append", default=[], metavar="PATTERN",
                        help="show the way of tensors from file to file; of either side's names")  # fmt: skip
    _add_json(parser)
    _add_debug(parser)


def _plan(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from dconv.examine import price
    from dconv.launch.options import parse, target, to_request
    from dconv.pipeline import prepare
    from dconv.report import plan as report
    from dconv.report.trace import text
    from dconv.trace import trace

    args = parse(parser, words)
    if target(args):
        from dconv.launch.compiling import planned

        say(json.dumps(planned(args)) if args.json else "\n".join(f"{k}: {v}" for k, v in planned(args).items()))
        return 0
    job = prepare(to_request(args), config_alone=True)
    job = replace(job, trace=trace(job.plan, job.request.parallel, args.trace))
    priced = price(job, args.world)
    traced = f"\n\n{text(job.trace)}" if job.trace else ""
    say(json.dumps(priced) if args.json else report.text(priced) + traced)
    return 0


def _diff_options(parser: argparse.ArgumentParser) -> None:
    from dconv.checkpoint.rename import SUBMODELS

    parser.add_argument("a", type=Path, metavar="A", help="a checkpoint, of any format and layout")
    parser.add_argument("b", type=Path, metavar="B", help="another one")
    parser.add_argument("--model-type", metavar="FAMILY", help="model family of both (normally detected)")
    parser.add_argument("--hf-config", type=Path, metavar="DIR", help="take config.json of both from DIR")
    parser.add_argument("--drop", action="append", default=[], metavar="PATTERN", help="leave matching tensors out")
    parser.add_argument("--rename", type=Path, metavar="FILE", help="house spellings, of the side that they fit")
    parser.add_argument("--submodel", choices=SUBMODELS, help="of the side that is a distillation checkpoint")
    _add_json(parser)
    _add_debug(parser)


def _diff(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from dconv.compare import diff

    args = parser.parse_args(words)
    options = {key: getattr(args, key) for key in ("model_type", "hf_config", "rename", "submodel")}
    found = diff(args.a, args.b, **options, drop=tuple(args.drop))
    say(json.dumps(found.to_dict()) if args.json else found.text())
    return 0 if found.equal else 1


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    _source_options(parser)
    parser.add_argument("--explain", nargs="?", const=True, default=False, metavar="SCHEME",
                        help="what scales mean and codes cost, measured; of a plain model, --explain fp8")  # fmt: skip
    parser.add_argument("--scale-rule", choices=("floor", "ceil", "even"),
                        help="beside --explain, how MX formats find their powers of two")  # fmt: skip
    parser.add_argument("--lint", action="store_true", help="read all weights, name those that look lost: zeros, NaN")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page: map of layers, scales, modules")


def _source_options(parser: argparse.ArgumentParser) -> None:
    from dconv.launch.options import add_model_options

    parser.add_argument("path", type=Path, metavar="PATH", help="checkpoint directory, or a state dict's file")
    add_model_options(parser)
    _add_json(parser)
    _add_debug(parser)


def _described(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "source_format": args.source_format,
        "model_type": args.model_type,
        "hf_config": args.hf_config,
        "drop": tuple(args.drop),
        "rename": args.rename,
        "submodel": args.submodel,
        "with_eagle": args.with_eagle,
    }


def _inspect(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from dconv.examine import inspect

    args = parser.parse_args(words)
    asked = {"explain": args.explain, "scale_rule": args.scale_rule, "lint": args.lint}
    report = inspect(args.path, **_described(args), **asked)
    if args.html:
        from dconv.report.page import write

        write(args.html, report.html())
    say(json.dumps(report.to_dict()) if args.json else report.text())
    return 0


def _check_options(parser: argparse.ArgumentParser) -> None:
    from dconv.launch.values import byte_count

    _source_options(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--no-run", action="store_true", help="read everything, but do not run the model")
    group.add_argument("--force-run", action="store_true", help="run it even if fp32 weights seem not to fit in memory")
    group.add_argument("--max-memory", type=byte_count, metavar="SIZE",
                       help="run it layer by layer where fp32 weights take more (half of what is free)")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="weights that look lost (zeros, NaN) are damage: exit 4")


def _check(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from dconv.checking import check

    args = parser.parse_args(words)
    from dconv.hw import manifest

    if manifest.is_here(args.path):
        return _check_hand_off(args)
    run = {"run": not args.no_run, "force": args.force_run, "max_memory": args.max_memory, "strict": args.strict}
    found = check(args.path, **_described(args), **run)
    say(json.dumps(found.to_dict()) if args.json else found.text())
    return 0 if found.run or args.no_run else ToolMissing.exit_code


def _check_hand_off(args: argparse.Namespace) -> int:
    from dconv.errors import Refused
    from dconv.hw.finish import rejudged
    from dconv.hw.manifest import read
    from dconv.hw.registry import adapter, target_of

    said = read(args.path)
    if target_of(said["target"]) is None:
        raise Refused("no compiler is called this", where=str(args.path), found=f"{said['target']!r:.80}")
    said = rejudged(adapter(said["target"]), args.path)
    how = f"whole      {said['kind']} for {said['platform']}, {len(said['files'])} files as they were written"
    say(json.dumps({"path": str(args.path), **said}) if args.json else how)
    return 0


def _archs(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from dconv.arch.about import lines, markdown
    from dconv.arch.registry import families

    args = parser.parse_args(words)
    known = list(families().values())
    if args.json:
        keys = ("family", "models", "layouts", "note", "shown")
        said = [dict(zip(keys, line, strict=True)) for line in lines(known)]
        architectures = {family.name: family.config.architecture for family in known}
        say(json.dumps([{**line, "architecture": architectures[line["family"]]} for line in said]))
    elif args.markdown:
        say(markdown(known).rstrip())
    else:
        table = [(name, models, sizes, shown) for name, models, sizes, _, shown in lines(known)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        said = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)
        say(f"{said}\n\nAll of them: HuggingFace to Megatron (torch_dist, legacy), back, and Megatron to Megatron.")
    return 0


def _formats(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from dconv import matrix
    from dconv.report.formats import known, lines

    args = parser.parse_args(words)
    if args.json:
        say(json.dumps(known()))
    elif args.markdown:
        say(matrix.markdown())
    else:
        say("\n".join(lines()))
    return 0


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--toolchain-python", type=Path, metavar="PYTHON", help="look for toolchains there, too")
    _list_options(parser)


def _doctor(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from dconv.report.doctor import examined, text

    args = parser.parse_args(words)
    said = examined(args.toolchain_python)
    say(json.dumps(said) if args.json else text(said))
    return 0


def _batch_options(parser: argparse.ArgumentParser) -> None:
    from dconv.commands import batch

    batch.options(parser)


def _batch(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from dconv.commands import batch

    return batch.run(parser, words)


def _history_options(parser: argparse.ArgumentParser) -> None:
    from dconv.commands import history

    history.options(parser)


def _history(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from dconv.commands import history

    return history.run(parser, words, lambda told: _convert(_parser("convert"), told))


def _arch_options(parser: argparse.ArgumentParser) -> None:
    _list_options(parser)
    parser.add_argument("--markdown", action="store_true", help="print the README's table")


def _list_options(parser: argparse.ArgumentParser) -> None:
    _add_json(parser)
    _add_debug(parser)


COMMANDS: Final[dict[str, Command]] = {
    "convert": Command(
        "make a checkpoint of another format or layout",
        "MODEL FORMAT [-o OUT] ",
        """  dconv convert llama-8b megatron --tp 4 --pp 2              HuggingFace -> Megatron torch_dist
  dconv convert llama-8b megatron --tp 4 --megatron-format legacy --nproc 4 -o out
  dconv convert megatron-run hf --dtype bf16 --verify digest  the newest iteration, back to HuggingFace
  dconv convert llama-8b gguf --quant q4_k_m --report        and a page: plan, rates, precision, error by layer
  dconv convert llama-8b megatron --tp 8 --launcher slurm --nodes 4 --nproc 8 --partition main --wait
  dconv convert llama-8b megatron --tp 8 --launcher ray --address auto --nproc 8
  torchrun --nproc-per-node 8 -m dconv.launch llama-8b megatron --tp 8    the same under a launcher""",
        _convert_options,
        _convert,
    ),
    "plan": Command(
        "show what convert would read and write, by whom; writes nothing",
        "MODEL FORMAT ",
        """  dconv plan llama-70b megatron --tp 8 --pp 8
  dconv plan llama-70b megatron --tp 8 --pp 8 --world 4 --json
  dconv plan llama-70b megatron --tp 8 --trace '*.layers.0.self_attn.q_proj.weight'""",
        _plan_options,
        _plan,
    ),
    "diff": Command(
        "compare two checkpoints tensor by tensor, across formats and layouts",
        "A B ",
        """  dconv diff llama-8b llama-8b-megatron         exit 0: bit-equal; 1: a difference, named
  dconv diff run/iter_0001000 run/iter_0002000 --json""",
        _diff_options,
        _diff,
    ),
    "inspect": Command(
        "say what a checkpoint is, its precision by module, and what is wrong or would be refused",
        "PATH ",
        """  dconv inspect llama-8b
  dconv inspect minimax-m2 --html m2.html           a page: layers by precision, scales, modules
  dconv inspect minimax-m2 --explain                what its FP8 means and costs; of a plain model, --explain fp8
  dconv inspect llama-8b --lint                     reads all weights: which are zero, constant, NaN, cut out
  dconv inspect megatron-run --json                 the iteration that the tracker file names
  dconv inspect shards/ --hf-config llama-8b        bare mp_rank_* directories""",
        _inspect_options,
        _inspect,
    ),
    "check": Command(
        "read a checkpoint back, compare it with its receipt, then run it on the CPU",
        "PATH ",
        """  dconv check llama-8b-megatron               digests, then a real megatron-core model
  dconv check llama-8b --no-run               headers, shapes and digests only
  dconv check deepseek-v3 --max-memory 32GB   layer by layer, in so much memory""",
        _check_options,
        _check,
    ),
    "archs": Command("list the model families", "", "  dconv archs", _arch_options, _archs),
    "doctor": Command(
        "say which runtimes and hardware compilers are here, and how to get the others",
        "",
        "  dconv doctor\n  dconv doctor --toolchain-python ~/rkllm/bin/python --json",
        _doctor_options,
        _doctor,
    ),
    "batch": Command(
        "run many conversions of one file, some at a time; run again, it goes on",
        "FILE ",
        """  dconv batch jobs.yaml --workers 2 --max-retries 3

  # jobs.yaml: options of convert, for all models or for one
  format: megatron
  tp: 4
  models:
    - llama-8b
    - {model: qwen3-30b, out: qwen-ep8, ep: 8, nproc: 8}
    - {model: run/iter_0001000, format: gguf, quant: q8_0, tp: 1}""",
        _batch_options,
        _batch,
    ),
    "history": Command(
        "list past runs, show one, or run it again",
        "[show ID | rerun ID] ",
        """  dconv history                          the last 20 runs
  dconv history show 12                  one of them: command, plan, digests, what went wrong
  dconv history rerun 12 --resume        the same command, in its directory; more options may follow""",
        _history_options,
        _history,
    ),
    "formats": Command("list the formats that are read and written", "", "  dconv formats", _arch_options, _formats),
}


def _parser(name: str) -> argparse.ArgumentParser:
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(
        f"dconv {name}",
        usage=f"dconv {name} {command.words}[options]",  # a list of all of them would hide what is wrong
        description=f"{command.help[0].upper()}{command.help[1:]}.",
        epilog=f"examples:\n{command.examples}\n\n{_EXITS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.options(parser)
    return parser


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dconv",
        description="Moves large-language-model checkpoints between where they were trained and where they will run.",
        epilog=f"dconv COMMAND --help explains one, with examples.\n\n{_EXITS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dconv {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see ``dconv --help``)."""
    tolerate()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or words[0] not in COMMANDS:
            _overview().parse_args(words)
            raise AssertionError("unreachable")
        return COMMANDS[words[0]].run(_parser(words[0]), words[1:])
    except SystemExit as left:  # argparse's way out: 0 after --help, 2 after a wrong option
        return left.code if isinstance(left.code, int) else 2
    except DconvError as error:
        return _told(error, words)
    except OSError as fault:
        return _told(storage_fault(fault), words)
    except MemoryError:
        return _told(StorageFault("out of memory"), words)
    except KeyboardInterrupt:
        say("interrupted", sys.stderr)
        return 130
    except Exception as fault:
        if "--debug" in words:
            traceback.print_exc()
        hint = "" if "--debug" in words else ", --debug shows where"
        say(f"internal error: {type(fault).__name__}: {fault}{hint}", sys.stderr)
        return 1


def _told(error: DconvError, words: Sequence[str]) -> int:
    if "--json" in words:
        say(json.dumps(error.to_dict()))
    else:
        say(error, sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
