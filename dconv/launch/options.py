"""The options of convert, plan and the launch module: one list, also readable from ``--config run.yaml``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from dconv.errors import UsageError
from dconv.pipeline import REPLICAS, Request
from dconv.sharding.coords import Parallel
from dconv.sharding.digest import ALGORITHMS
from dconv.sharding.dtypes import OPTION

_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
                 "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def byte_count(text: str | int) -> int:
    """``256MiB``, ``5GB``, ``1048576`` → bytes.

    Raises:
        argparse.ArgumentTypeError: it is no such thing.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 256MiB or 5GB")
    count = int(float(match[1]) * unit)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 256MiB or 5GB")
    return count


def dtype(text: str) -> str:
    if text not in OPTION:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(OPTION)}")
    return OPTION[text]


def pp_layout(text: str) -> tuple[int, ...]:
    """Layer counts of the pipeline's chunks in the order the model runs through them.

    Chunks are parted by ``|``; each is a number (``3|4|4|2``) or in Megatron's letters with its repetitions
    (``Ettt|(tttt|)*2ttL``). Source of the letters: ``megatron/core/transformer/pipeline_parallel_layer_layout.py``.
    """
    spelled = str(text).replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"([EtL|])\*(\d+)"):
        spelled = re.sub(pattern, lambda found: found[1] * min(int(found[2]), 10_000), spelled)
    chunks = spelled.split("|")
    if all(chunk.isdecimal() for chunk in chunks):
        return tuple(int(chunk) for chunk in chunks)
    letters = "".join(chunks)
    if letters[:1] != "E" or letters[-1:] != "L" or set(letters[1:-1]) - {"t"}:
        raise argparse.ArgumentTypeError(f"{text!r} is no pipeline layout such as 3|4|4|2 or Ettt|tttt|ttL")
    return tuple(chunk.count("t") for chunk in chunks)


def add_model_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """How to read MODEL; returns the group for options that only some commands have."""
    group = parser.add_argument_group("source")
    group.add_argument("--from", dest="source_format", metavar="FORMAT", help="container of MODEL (normally detected)")
    group.add_argument("--model-type", metavar="FAMILY", help="model family (normally detected)")
    group.add_argument("--hf-config", type=Path, metavar="DIR", help="take config.json and tokenizer from DIR")
    group.add_argument("--drop", action="append", default=[], metavar="PATTERN", help="leave matching tensors out")
    return group


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """What to make of it."""
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="checkpoint directory")
    parser.add_argument("format", nargs="?", metavar="FORMAT", help="huggingface (hf), safetensors, megatron")
    parser.add_argument("-o", "--out", type=Path, metavar="OUT", help="output directory (./<model>-<format>)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON with any of these options")
    group = add_model_options(parser)
    group.add_argument("--replicas", choices=REPLICAS, default=REPLICAS[0],
                       help="tensors that several ranks hold: refuse unless equal, or take the first")  # fmt: skip
    group = parser.add_argument_group("Megatron layout")
    for name, text in (
        ("tp", "tensor parallel size"),
        ("pp", "pipeline parallel size"),
        ("vpp", "virtual pipeline chunks a stage"),
        ("ep", "expert parallel size"),
    ):
        group.add_argument(f"--{name}", type=int, default=1, metavar="N", help=text)
    group.add_argument("--etp", type=int, metavar="N", help="expert tensor parallel size (as --tp)")
    group.add_argument("--pp-layout", type=pp_layout, metavar="LAYOUT",
                       help="layers by pipeline chunk: 3|4|4|2, or as Megatron spells it, Ettt|tttt|ttL")  # fmt: skip
    group.add_argument("--first-stage-layers", type=int, metavar="N", help="layers of the first stage")
    group.add_argument("--last-stage-layers", type=int, metavar="N", help="layers of the last stage")
    group.add_argument("--count-embedding", action="store_true", help="the embedding counts as a layer")
    group.add_argument("--count-loss", action="store_true", help="the loss counts as a layer")
    group.add_argument("--megatron-format", choices=("torch_dist", "legacy"), default="torch_dist")
    group.add_argument("--transformer-impl", choices=("transformer_engine", "local"), default="transformer_engine",
                       help="layer names in legacy files")  # fmt: skip
    group.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="N")
    group = parser.add_argument_group("output")
    group.add_argument("--dtype", type=dtype, metavar="DTYPE", help="bf16, f16 or f32 (default: as it is)")
    group.add_argument("--shard-size", type=byte_count, default=byte_count("5GB"), metavar="SIZE",
                       help="largest HuggingFace file (5GB)")  # fmt: skip


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """How to run it; none of these changes an output byte."""
    group = parser.add_argument_group("run")
    group.add_argument("--max-memory", type=byte_count, default=byte_count("256MiB"), metavar="SIZE",
                       help="bytes that one rank's buffers may take (256MiB)")  # fmt: skip
    group.add_argument("--threads", type=int, default=1, metavar="N", help="threads a rank (1)")
    group.add_argument("--resume", action="store_true", help="go on after a kill; done already counts as success")
    group.add_argument("--overwrite", action="store_true", help="replace an OUT of dconv once the new one is whole")
    group.add_argument("--digest", choices=sorted(ALGORITHMS), default="xxh3", help="digest kept in the receipt")
    group.add_argument("--verify", choices=("none", "digest", "logits"), default="none",
                       help="read the output back, or compare logits with the source")  # fmt: skip
    group.add_argument("--json", action="store_true", help="print the result as JSON")
    group.add_argument("--quiet", action="store_true", help="no progress")


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Who runs it: ``dconv convert``'s own; a rank under another launcher has no say in them."""
    group = parser.add_argument_group("launch")
    group.add_argument("--nproc", type=positive, default=1, metavar="N", help="ranks to start on this machine (1)")
    group.add_argument("--launcher", choices=("local",), default="local",
                       help="who starts them; under torchrun or srun: python -m dconv.launch")  # fmt: skip
    group.add_argument("--debug", action="store_true", help="show where an internal error happened")


def positive(text: str | int) -> int:
    """A count of 1 or more.

    Raises:
        argparse.ArgumentTypeError: it is no such thing.
    """
    if not str(text).isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count of 1 or more")
    return int(text)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse with ``--config``: the file's values are defaults that the command line overrides.

    Raises:
        UsageError: an option, in the file or on the line, that is not known; MODEL or FORMAT missing.
    """
    args = parser.parse_args(argv)
    if getattr(args, "config", None) is not None:
        _apply_file(parser, args.config)
        args = parser.parse_args(argv)
    for name in ("model", "format"):
        if hasattr(args, name) and getattr(args, name) is None:
            raise UsageError(f"{name.upper()} is missing", expected=parser.format_usage().strip())
    return args


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:  # argparse offers no public way to look its options up
        actions[action.dest] = action
        actions.update({option.lstrip("-"): action for option in action.option_strings})
    return actions


def _apply_file(parser: argparse.ArgumentParser, path: Path) -> None:
    values = _load(path)
    # One file serves plan, convert and the ranks of any launcher: what is another's option is checked, and not used.
    whole = argparse.ArgumentParser(add_help=False)
    for add in (add_target_options, add_run_options, add_launch_options):
        add(whole)
    actions = {**_actions(whole), **_actions(parser)}
    mine = {action.dest for action in parser._actions}
    defaults: dict[str, object] = {}
    for key, value in values.items():
        action = actions.get(str(key)) or actions.get(str(key).replace("_", "-"))
        if action is None:
            import difflib

            close = difflib.get_close_matches(str(key), actions, 1)
            raise UsageError(
                f"{key} is no option", where=str(path), do=f"did you mean {close[0]}?" if close else "see --help"
            )
        typed = _typed(action, value, path)
        if action.dest in mine:
            defaults[action.dest] = typed
    parser.set_defaults(**defaults)


def _typed(action: argparse.Action, value: Any, path: Path) -> object:
    convert: Callable[[Any], object] | None = action.type if callable(action.type) else None
    try:
        typed = convert(value) if convert is not None and value is not None else value
    except (argparse.ArgumentTypeError, TypeError, ValueError) as fault:
        raise UsageError(f"{action.dest}: {fault}", where=str(path)) from fault
    if action.choices is not None and typed not in action.choices:
        raise UsageError(f"{action.dest} cannot be {value!r}", where=str(path), expected=", ".join(action.choices))
    if action.nargs == 0 and not isinstance(typed, bool):
        raise UsageError(f"{action.dest} is true or false", where=str(path), found=repr(value))
    return typed


def _load(path: Path) -> dict[Any, Any]:
    import yaml  # a rank without --config does not pay for it

    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as fault:
        raise UsageError(f"cannot read the config file: {fault}", where=str(path)) from fault
    if not isinstance(values, dict):
        raise UsageError("the config file is no mapping of options", where=str(path))
    return values


def to_request(args: argparse.Namespace) -> Request:
    """The request that parsed options describe."""
    flat = args.pp_layout
    pp = len(flat) if flat and args.pp == 1 else args.pp
    if flat and len(flat) % pp:
        raise UsageError(
            f"--pp-layout has {len(flat)} chunks, which do not divide by --pp {pp}",
            do="--pp must divide the number of chunks; leave it out for one chunk a stage",
        )
    vpp = len(flat) // pp if flat else args.vpp
    parallel = Parallel(
        tp=args.tp,
        pp=pp,
        vpp=vpp,
        ep=args.ep,
        etp=args.tp if args.etp is None else args.etp,
        first=args.first_stage_layers,
        last=args.last_stage_layers,
        count_embedding=args.count_embedding,
        count_loss=args.count_loss,
        stages=tuple(tuple(flat[v * pp + p] for v in range(vpp)) for p in range(pp)) if flat else None,
    )
    return Request(
        model=args.model,
        format=args.format,
        out=args.out,
        source_format=args.source_format,
        model_type=args.model_type,
        hf_config=args.hf_config,
        parallel=parallel,
        megatron_format=args.megatron_format,
        transformer_impl=args.transformer_impl,
        divisor=args.make_vocab_size_divisible_by,
        dtype=args.dtype,
        shard_size=args.shard_size,
        drop=tuple(args.drop),
        replicas=args.replicas,
    )
