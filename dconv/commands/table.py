"""The words after ``dconv``: what each is for, and the module of this room that does it.

A command's module is imported when that command is asked for, so that ``dconv --help`` and a shell's completion do not
wait for numpy. Such a module has ``options``, which adds its arguments to a parser, and ``run``, which is given the
parser and the words after the command's, and returns the exit code.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NoReturn

from dconv import __version__

_EXITS: Final = """exit codes:
  0 done   1 diff found a difference   2 usage, or OUT exists
  3 refused before writing   4 damaged input   5 storage fault
  6 verification failed   7 a runtime is missing   75 preempted, run again"""


@dataclass(frozen=True, slots=True)
class Command:
    """One word after ``dconv``.

    Attributes:
        help: what it does, in a line.
        words: what follows it, options aside.
        examples: lines of them.
    """

    help: str
    words: str
    examples: str


COMMANDS: Final[dict[str, Command]] = {
    "convert": Command(
        "make a checkpoint of another format or layout",
        "MODEL FORMAT [-o OUT] ",
        """  # HuggingFace -> Megatron torch_dist; the other format, by four ranks
  dconv convert llama-8b megatron --tp 4 --pp 2
  dconv convert llama-8b megatron --tp 4 --megatron-format legacy --nproc 4
  # the newest iteration, back to HuggingFace, read again and compared
  dconv convert megatron-run hf --dtype bf16 --verify digest
  # calibrated; quantised for llama.cpp; block FP8
  dconv convert llama-8b gptq --calibration texts.jsonl -o llama-8b-w4
  dconv convert llama-8b gguf --quant q4_k_m
  dconv convert llama-8b fp8
  # and a page: plan, rates, precision, error by layer
  dconv convert llama-8b gguf --quant q8_0 --report
  # the same under other launchers
  torchrun --nproc-per-node 8 -m dconv.launch llama-8b megatron --tp 8
  dconv convert llama-8b megatron --tp 8 --launcher slurm --nodes 4 --nproc 8
  dconv convert llama-8b megatron --tp 8 --launcher ray --nproc 8""",
    ),
    "plan": Command(
        "show what convert would read and write, by whom; writes nothing",
        "MODEL FORMAT ",
        """  dconv plan llama-70b megatron --tp 8 --pp 8
  dconv plan llama-70b megatron --tp 8 --pp 8 --world 4 --json
  dconv plan llama-70b megatron --tp 8 --trace '*.layers.0.*.q_proj.weight'""",
    ),
    "diff": Command(
        "compare two checkpoints tensor by tensor, across formats and layouts",
        "A B ",
        """  # exit 0: bit-equal; 1: a difference, named
  dconv diff llama-8b llama-8b-megatron
  dconv diff run/iter_0001000 run/iter_0002000 --json""",
    ),
    "inspect": Command(
        "say what a checkpoint is, its precision, and what would be refused",
        "PATH ",
        """  dconv inspect llama-8b
  # the iteration that the tracker file names; bare mp_rank_* directories
  dconv inspect megatron-run --json
  dconv inspect shards --hf-config llama-8b
  # a page: layers by precision, scales, modules
  dconv inspect minimax-m2 --html m2.html
  # what FP8 means and costs here, and would cost of a plain model
  dconv inspect minimax-m2 --explain
  dconv inspect llama-8b --explain fp8
  # read all weights: which are zero, constant, NaN, cut out?
  dconv inspect llama-8b --lint""",
    ),
    "check": Command(
        "read a checkpoint back, compare it with its receipt, run it on the CPU",
        "PATH ",
        """  # digests, then a real megatron-core model
  dconv check llama-8b-megatron
  # headers, shapes and digests only
  dconv check llama-8b --no-run
  # layer by layer, in so much memory
  dconv check deepseek-v3 --max-memory 32GB""",
    ),
    "archs": Command(
        "list the model families, and what becomes of each",
        "",
        """  dconv archs
  dconv archs --json
  # families by source, FORMAT and compiler: a table to send around
  dconv archs --format md
  dconv archs --format html -o archs.html
  dconv archs --format pdf -o archs.pdf --overwrite""",
    ),
    "doctor": Command(
        "say which runtimes and hardware compilers are here, how to get the others",
        "",
        "  dconv doctor\n  dconv doctor --toolchain-python ~/rkllm/bin/python --json",
    ),
    "config": Command(
        "look at a file of options, change it; list the ready quantisations",
        "show|get|set|list-presets [FILE] [OPTION] [VALUE] ",
        """  # a file from a command line that works, and back
  dconv plan llama-8b megatron --tp 8 --save-config run.yaml
  dconv convert --config run.yaml
  # look at it, change it: comments in it stay
  dconv config show run.yaml
  dconv config set run.yaml tp 4
  dconv config get run.yaml tp
  # what --quantization-config takes by name
  dconv config list-presets""",
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
    ),
    "history": Command(
        "list past runs, show one, or run it again",
        "[show ID | rerun ID] ",
        """  # the last 20 runs; one of them: command, plan, digests, what went wrong
  dconv history
  dconv history show 12
  # the same command, in its directory; more options may follow
  dconv history rerun 12 --resume""",
    ),
    "suggest": Command(
        "propose a command from a sentence; runs nothing",
        "'WORDS' ",
        """  dconv suggest 'my 8B llama for vllm in 4 bit on 2 gpus'
  # a path that is there is looked at: what it does not permit is said
  dconv suggest 'run/iter_0001000 back to huggingface, make sure'
  dconv suggest 'pretrain llama-8b in megatron on two nodes of 8' --json
  dconv suggest 'llama-8b for ollama, q4_k_m'
  # a local model chooses where the words leave a choice
  dconv suggest 'something for my laptop' --with qwen3-0.6b""",
    ),
    "formats": Command("list the formats that are read and written", "", "  dconv formats\n  dconv formats --json"),
}


def run(name: str, words: Sequence[str]) -> int:
    """Run a command, given the words after its own; its exit code.

    Raises:
        DconvError: what the command meets.
        SystemExit: argparse's way out.
    """
    return _module(name).run(parser_of(name), words)


def parser_of(name: str) -> argparse.ArgumentParser:
    """A command's parser."""
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(
        f"dconv {name}",
        usage=f"dconv {name} {command.words}[options]",  # a list of all of them would hide what is wrong
        description=f"{command.help[0].upper()}{command.help[1:]}.",
        epilog=f"examples:\n{command.examples}\n\n{_EXITS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _module(name).options(parser)
    return parser


def complete() -> NoReturn:
    """Answer a shell that asks what may stand at its cursor, and end this process."""
    from dconv.assist import shells

    shells.answer(overview, {name: partial(parser_of, name) for name in COMMANDS})


class _Completion(argparse.Action):
    """``--install-completion`` and ``--show-completion``: do it, and leave, as ``--version`` does."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, values: object, option: object = None) -> None:
        from dconv.assist import shells
        from dconv.launch.process import say
        from dconv.launch.terminal import show

        shell = shells.shell_of(str(values or ""))
        if option == "--show-completion":
            say(shells.script(shell).rstrip())
        else:
            show(shells.install(shell).text())
        parser.exit()


def overview() -> argparse.ArgumentParser:
    """The parser of ``dconv`` alone, which knows what commands there are."""
    parser = argparse.ArgumentParser(
        "dconv",
        usage="dconv COMMAND [options]",
        description="Moves LLM checkpoints from where they were trained to where they will run.",
        epilog=f"dconv COMMAND --help explains one, with examples.\n\n{_EXITS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dconv {__version__}")
    for option, what in (("install", "complete dconv by the tab key"), ("show", "print the script that does")):
        parser.add_argument(f"--{option}-completion", action=_Completion, nargs="?", const="",
                            metavar="SHELL", help=f"{what}, in bash, zsh or fish ($SHELL)")  # fmt: skip
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help)
    return parser


def _module(name: str) -> Any:
    return importlib.import_module(f"dconv.commands.{name}")
