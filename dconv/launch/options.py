"""The options of convert, plan and the launch module: one list, also readable from ``--config run.yaml``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.rename import SUBMODELS
from dconv.errors import UsageError
from dconv.hw.registry import LAYOUTS, TWO_MEANINGS, adapters, target_of
from dconv.launch.config_file import read_config
from dconv.launch.run_options import add_launch_options, add_run_options
from dconv.launch.values import block_size, byte_count, dtype, lengths, positive, pp_layout, seconds, whole
from dconv.net.device import check as check_device
from dconv.request import (
    CALIBRATED,
    CODE_READERS,
    FORMATS,
    NEURON_RESCALES,
    NEURON_SCALES,
    REPLICAS,
    Request,
    spelled,
)
from dconv.sharding.coords import Parallel

#: The options that only a Megatron target has, with what stands for them where they are not given.
_LAYOUT: Final = {
    "tp": 1, "pp": 1, "vpp": 1, "ep": 1, "etp": None, "pp_layout": None,
    "first_stage_layers": None, "last_stage_layers": None, "count_embedding": False, "count_loss": False,
    "megatron_format": "torch_dist", "transformer_impl": "transformer_engine", "make_vocab_size_divisible_by": 128,
}  # fmt: skip
#: Seconds that a hardware compiler may take, where nothing is said: a day.
_DAY: Final = 24 * 3600.0
#: The options that only a hardware compiler has, likewise.
_COMPILER: Final = {
    "platform": None, "task": None, "toolchain_python": None, "toolchain_timeout": _DAY, "max_host_memory": None,
    "bundle": False,
}  # fmt: skip


def add_model_options(parser: argparse.ArgumentParser) -> Any:
    """How to read MODEL; returns argparse's group, for options that only some commands have."""
    group = parser.add_argument_group("source")
    group.add_argument("--from", dest="source_format", metavar="FORMAT", help="container of MODEL (normally detected)")
    group.add_argument("--model-type", metavar="FAMILY", help="model family (normally detected)")
    group.add_argument("--hf-config", type=Path, metavar="DIR", help="take config.json and tokenizer from DIR")
    group.add_argument("--drop", action="append", default=[], metavar="PATTERN", help="leave matching tensors out")
    group.add_argument("--rename", type=Path, metavar="FILE",
                       help="house spellings of MODEL's tensors: JSON or YAML of pattern: pattern, such as "
                            "'backbone.*': 'model.*'; * is any text, the first match counts; names that are written "
                            "stay FORMAT's own")  # fmt: skip
    group.add_argument("--submodel", choices=SUBMODELS,
                       help="which model of a distillation checkpoint is meant")  # fmt: skip
    group.add_argument(
        "--with-eagle", action="store_true", help="keep the tensors of an EAGLE head (left out otherwise)"
    )
    return group


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """What to make of it."""
    parser.add_argument(
        "model", nargs="?", type=Path, metavar="MODEL", help="checkpoint directory, or one .pt/.bin file"
    )
    parser.add_argument(
        "format",
        nargs="?",
        metavar="FORMAT",
        help="huggingface (hf), safetensors, fp8, mx, gptq, awq, megatron, gguf, mlx, onnx, torch_export, torchscript, "
        "neuron, pt, bmtrain; mtk, rk, qnn, ax for a hardware compiler",
    )
    parser.add_argument("-o", "--out", type=Path, metavar="OUT", help="output directory (./<model>-<format>)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON with any of these options")
    group = add_model_options(parser)
    group.add_argument("--fake-weight", action="store_true",
                       help="make the weights up: MODEL is a config.json, or a directory with one; zeros are holes in "
                            "files, so that any size takes seconds and no room")  # fmt: skip
    group.add_argument("--fake-weight-config", type=Path, metavar="FILE",
                       help="JSON or YAML: dimensions by config key, shapes by tensor name, and what to fill them with "
                            "(zeros, position, {constant: 0.5}, {normal: {std: 0.02, seed: 0}})")  # fmt: skip
    group.add_argument("--replicas", choices=REPLICAS, default=REPLICAS[0],
                       help="tensors that several ranks hold: refuse unless equal, or take the first")  # fmt: skip
    group = parser.add_argument_group("distillation (Megatron)")
    group.add_argument("--teacher", type=Path, metavar="DIR",
                       help="put MODEL, the student, and DIR, of any family, into one output")  # fmt: skip
    group.add_argument("--teacher-only", action="store_true", help="leave the student out of it")
    group = parser.add_argument_group("Megatron layout")
    for name, text in (
        ("tp", "tensor parallel size (of pt: files to cut it into; of neuron for a chip: cores to compile for)"),
        ("pp", "pipeline parallel size"),
        ("vpp", "virtual pipeline chunks a stage"),
        ("ep", "expert parallel size (of gptq and awq: ranks that divide a layer's experts while they calibrate)"),
    ):
        group.add_argument(f"--{name}", type=whole, metavar="N", help=text)
    group.add_argument("--etp", type=whole, metavar="N", help="expert tensor parallel size (as --tp)")
    group.add_argument("--pp-layout", type=pp_layout, metavar="LAYOUT",
                       help="layers by pipeline chunk: 3|4|4|2, or as Megatron spells it, Ettt|tttt|ttL")  # fmt: skip
    group.add_argument("--first-stage-layers", type=positive, metavar="N", help="layers of the first stage")
    group.add_argument("--last-stage-layers", type=positive, metavar="N", help="layers of the last stage")
    group.add_argument("--count-embedding", action="store_true", help="the embedding counts as a layer")
    group.add_argument("--count-loss", action="store_true", help="the loss counts as a layer")
    group.add_argument("--megatron-format", choices=("torch_dist", "legacy", "model_pt"),
                       help="torch_dist (default), one file a rank, or model.pt with metadata.json")  # fmt: skip
    group.add_argument("--transformer-impl", choices=("transformer_engine", "local"),
                       help="layer names in legacy files")  # fmt: skip
    group.add_argument("--make-vocab-size-divisible-by", type=positive, metavar="N",
                       help="the vocabulary is padded to a multiple of this times tp (128)")  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument("--dtype", type=dtype, metavar="DTYPE", help="bf16, f16 or f32 (default: as it is)")
    group.add_argument("--mup2llama", action="store_true",
                       help="fold muP scalars (MiniCPM, Granite) into the weights, so that a plain LLaMA computes the "
                            "same; MiniCPM-MoE becomes a Mixtral, MiniCPM3 stays one with scalars of 1")  # fmt: skip
    group.add_argument("--shard-size", type=byte_count, metavar="SIZE",
                       help="largest HuggingFace file (5GB), or of a GGUF's or graph's weights (one file)")  # fmt: skip
    group.add_argument("--quant", metavar="TYPE", help=Variants("variant of FORMAT"))
    group.add_argument(
        "--block-size", type=block_size, metavar="RxC", help="rows x columns that share a scale (128x128)"
    )
    group.add_argument("--scale-format", choices=("float", "ue8m0"), default="float",
                       help="scales as fp32 (default), or as powers of two")  # fmt: skip
    group.add_argument("--neuron-rescale", choices=NEURON_RESCALES,
                       help="divide FP8 codes by 2 (default), or by the ratio of the ranges")  # fmt: skip
    group.add_argument("--neuron-scale", choices=NEURON_SCALES,
                       help="scales as what multiplies (default), or as its reciprocal")  # fmt: skip
    group.add_argument("--gguf-pretokenizer", metavar="NAME",
                       help="how the tokenizer splits text, as llama.cpp calls it (default: found out)")  # fmt: skip
    group.add_argument("--opset", type=positive, metavar="N", help="ONNX's opset (default: the exporter's own, 20)")
    group.add_argument("--lengths", type=lengths, metavar="S[+P]",
                       help="an ONNX graph of batch 1 with numbers as axes, for compilers of NPUs: S tokens, behind P "
                            "in the cache")  # fmt: skip
    group.add_argument("--scale-rule", choices=("floor", "ceil", "even"),
                       help="how the largest of 32 becomes their power of two: rounded down (default, the MX "
                            "specification's), up so that nothing is cut off, or after half a step (default for "
                            "compressed-tensors, as it does)")  # fmt: skip
    group.add_argument(
        "--quantization-config",
        metavar="JSON",
        help="settings of a calibrated quantisation, and a table of what each weight gets (default, and overrides by "
        "pattern; of several kinds for FORMAT gptq): JSON, a JSON or YAML file, or a preset's name",
    )
    group.add_argument(
        "--calibration", metavar="DATA", help="text, JSONL, a dataset's folder, or token ids to calibrate on"
    )
    group.add_argument(
        "--strict", action="store_true", help="a pattern of --quantization-config that matches nothing is an error"
    )
    group.add_argument("--device", default="auto", metavar="DEVICE",
                       help="where calibration computes (auto: cuda where there is one, else cpu), and what "
                            "torch_export, torchscript are made for (auto: cpu): cpu, cuda, cuda:1, mps")  # fmt: skip
    group.add_argument("--quant-config", choices=CODE_READERS,
                       help="for whom codes are named: compressed-tensors for vLLM and llm-compressor; the default is "
                            "transformers for FP8 by block or tensor, quark for mxfp4")  # fmt: skip
    add_compiler_options(parser)


def add_compiler_options(parser: argparse.ArgumentParser) -> None:
    """A hardware compiler's."""
    group = parser.add_argument_group("hardware compiler (FORMAT mtk, rk, qnn, ax, neuron)")
    group.add_argument("--platform", metavar="CHIP", help="what is compiled for, such as RK3588 or trn2")
    group.add_argument("--task", choices=("text-generation", "image-text-to-text"),
                       help="what the model is for (normally read from the config)")  # fmt: skip
    group.add_argument("--toolchain-python", type=Path, metavar="PYTHON",
                       help="interpreter that has the vendor's toolchain (default: .venvs/<toolchain>)")  # fmt: skip
    group.add_argument("--toolchain-timeout", type=seconds, default=_DAY, metavar="SECONDS",
                       help="how long the compiler may take (a day)")  # fmt: skip
    group.add_argument("--max-host-memory", type=byte_count, metavar="SIZE",
                       help="memory that the compiler may take; it holds the whole model (what is free)")  # fmt: skip
    group.add_argument("--bundle", action="store_true",
                       help="do not compile: write what is compiled, with compile.sh, for elsewhere")  # fmt: skip


def every_option() -> argparse.ArgumentParser:
    """A parser of all that ``dconv convert`` takes, which is what a file may say."""
    parser = argparse.ArgumentParser("dconv convert", add_help=False, allow_abbrev=False)
    for add in (add_target_options, add_run_options, add_launch_options):
        add(parser)
    return parser


class Variants(str):
    """A help text that names all variants, for which their modules are imported once somebody reads it."""

    def __mod__(self, values: object) -> str:
        return f"{self}: {_variants()}"

    __slots__ = ()


def _variants() -> str:
    from dconv.coded.nbits_encode import VARIANTS as ONNX_VARIANTS
    from dconv.gguf import TYPES
    from dconv.mlx import VARIANTS as MLX_VARIANTS
    from dconv.neuron import QUANT
    from dconv.quantise import VARIANTS

    known = [f"{format} {', '.join(known)}" for format, known in {**VARIANTS, "gguf": TYPES}.items()]
    return "; ".join([*known, f"mlx {', '.join(MLX_VARIANTS)} (groups of 64; 4bit_g32, 4bit_g128)",
                      f"onnx {', '.join(ONNX_VARIANTS)}", f"neuron {QUANT}"])  # fmt: skip


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse with ``--config``: the line overrides the values of the file, and its ``--drop`` adds to them.

    Raises:
        UsageError: an option, in the file or on the line, that is not known; MODEL or FORMAT missing.
    """
    args = parser.parse_args(argv)
    if getattr(args, "config", None) is not None:
        # One file serves plan, convert and the ranks of any launcher: what is another's option is checked, not used.
        parser.set_defaults(**read_config(args.config, parser, every_option()))
        args = parser.parse_args(argv)
    for name in ("model", "format"):
        if hasattr(args, name) and getattr(args, name) is None:
            raise UsageError(
                f"{name.upper()} is missing", expected=parser.format_usage().removeprefix("usage:").strip()
            )
    return args


def target(args: argparse.Namespace) -> str | None:
    """The hardware compiler that parsed options mean; None where they mean a conversion alone.

    A FORMAT of two meanings is a compiler's where a chip is named, or MODEL is what was handed to it before.

    Raises:
        DconvError: see `dconv.hw.settings.read`.
    """
    name = target_of(args.format)
    if name not in TWO_MEANINGS:
        return name
    from dconv.hw import manifest, settings

    if args.platform is not None or manifest.is_here(Path(args.model)):
        return name
    return target_of(args.format, named=settings.PLATFORM in settings.read(args.quantization_config)[0])


def to_request(args: argparse.Namespace) -> Request:
    """The request that parsed options describe.

    Raises:
        UsageError: layout options that contradict each other, or that FORMAT has no use for.
        Refused: a layout that no world of ranks has.
    """
    if args.teacher_only and args.teacher is None:
        raise UsageError("--teacher-only without a teacher", where="--teacher-only", expected="--teacher DIR beside it")
    _check_fake(args)
    check_device(args.device)
    compiler = target(args)
    engine = "huggingface" if compiler else FORMATS.get(args.format, "megatron")
    if compiler and getattr(args, "report", None):
        raise UsageError(
            "a hand-off to a compiler has no report, nothing was written",
            where="--report",
            do="leave it out: manifest.json says what was made",
        )
    known = {"megatron": tuple(_LAYOUT), "pt": ("tp",)}.get(engine, ())
    known = LAYOUTS.get(compiler, ()) if compiler else known
    known = ("ep",) if args.format in CALIBRATED else known
    given = [name for name, otherwise in _LAYOUT.items() if getattr(args, name) not in (None, otherwise)]
    given = [name for name in given if name not in known]
    if given:
        raise UsageError(
            f"{args.format} has no such layout, nothing was written",
            where=", ".join(map(spelled, given)),
            expected="these options with FORMAT megatron only (--tp also with pt and neuron --platform, --ep with "
            "gptq, awq): they say how the output is cut, not the source",
            do="leave them out",
        )
    compilers = [name for name, otherwise in _COMPILER.items() if getattr(args, name) != otherwise]
    if compilers and compiler is None and args.format in FORMATS:
        raise UsageError(
            f"{args.format} is no hardware compiler's, nothing was written",
            where=", ".join(map(spelled, compilers)),
            expected=f"these options with FORMAT {', '.join(adapters())}"
            + (" (--platform names a chip)" if args.format in TWO_MEANINGS else ""),
            do="leave them out",
        )
    sized = ("huggingface", "neuron", "gguf", "mlx", "onnx")
    if args.shard_size is not None and FORMATS.get(args.format, "huggingface") not in sized:
        raise UsageError(
            f"{args.format} has no files of a size that one chooses, nothing was written",
            where="--shard-size",
            expected=f"this option with FORMAT {', '.join(sized)} only",
            do="leave it out",
        )
    if args.opset is not None and engine != "onnx":
        raise UsageError(
            f"{args.format} has no opset, nothing was written", where="--opset", expected="this option with FORMAT onnx"
        )
    if args.lengths is not None and engine != "onnx":
        raise UsageError(
            f"{args.format} has no lengths that one chooses, nothing was written",
            where="--lengths",
            expected="this option with FORMAT onnx",
        )
    if args.gguf_pretokenizer is not None and engine != "gguf":
        raise UsageError(
            f"{args.format} has no name for how text is split, nothing was written",
            where="--gguf-pretokenizer",
            expected="this option with FORMAT gguf",
        )
    if engine == "gguf" and getattr(args, "verify", "none") == "logits" and _is_rounded(args.quant):
        raise UsageError(
            "weights in blocks have no bound that logits keep, nothing was written",
            where=f"--verify logits beside --quant {args.quant}",
            expected="f32, f16 or bf16",
            do="--verify digest reads the output back",
        )
    said = layout_of(args)
    return Request(
        model=args.model,
        format=args.format,
        out=args.out,
        source_format=args.source_format,
        model_type=args.model_type,
        hf_config=args.hf_config,
        parallel=parallel_of(args),
        megatron_format=said["megatron_format"],
        transformer_impl=said["transformer_impl"],
        divisor=said["make_vocab_size_divisible_by"],
        dtype=args.dtype,
        shard_size=args.shard_size,
        drop=tuple(args.drop),
        replicas=args.replicas,
        rename=args.rename,
        submodel=args.submodel,
        teacher=args.teacher,
        teacher_only=args.teacher_only,
        with_eagle=args.with_eagle,
        mup2llama=args.mup2llama,
        quant=args.quant,
        block_size=args.block_size,
        scale_format=args.scale_format,
        neuron_rescale=args.neuron_rescale,
        neuron_scale=args.neuron_scale,
        scale_rule=args.scale_rule,
        quant_config=args.quant_config,
        quantization_config=args.quantization_config,
        calibration=args.calibration,
        strict=args.strict,
        device=args.device,
        gguf_pretokenizer=args.gguf_pretokenizer,
        opset=args.opset,
        lengths=args.lengths,
        fake_weight=args.fake_weight,
        fake_weight_config=args.fake_weight_config,
    )


def _is_rounded(quant: str | None) -> bool:
    from dconv.gguf import is_rounded

    return is_rounded(quant)


def parallel_of(args: argparse.Namespace) -> Parallel:
    """The parallel sizes that parsed options say.

    Raises:
        UsageError: layout options that contradict each other.
        Refused: a layout that no world of ranks has.
    """
    said = layout_of(args)
    return Parallel(
        tp=said["tp"],
        ep=said["ep"],
        etp=said["tp"] if args.etp is None else args.etp,
        first=said["first_stage_layers"],
        last=said["last_stage_layers"],
        count_embedding=said["count_embedding"],
        count_loss=said["count_loss"],
        **_pipeline(args.pp, args.vpp, args.pp_layout),
    )


def layout_of(args: argparse.Namespace) -> dict[str, Any]:
    """The layout options, with what stands for those that are not given."""
    return {**_LAYOUT, **{name: value for name in _LAYOUT if (value := getattr(args, name)) is not None}}


def _check_fake(args: argparse.Namespace) -> None:
    """Made-up weights are of a config alone: what says how to read weights does not go with them."""
    if not args.fake_weight:
        if args.fake_weight_config is not None:
            raise UsageError("--fake-weight-config without --fake-weight", where=str(args.fake_weight_config))
        return
    if target(args) is not None:
        raise UsageError(
            "a hardware compiler is handed weights that are there, nothing was written",
            where="--fake-weight",
            do=f"dconv convert {args.model} hf --fake-weight -o DIR, and then DIR",
        )
    reading = ("source_format", "drop", "rename", "submodel", "with_eagle", "teacher")
    given = [spelled(name) for name in reading if getattr(args, name)]
    if getattr(args, "verify", "none") == "logits":
        given.append("--verify logits")
    if given:
        raise UsageError(
            "made-up weights are read from nowhere, nothing was written",
            where=", ".join(given),
            expected="without --fake-weight",
            do="--verify digest reads the output back" if given == ["--verify logits"] else "leave it out",
        )


def _pipeline(pp: int | None, vpp: int | None, flat: tuple[int, ...] | None) -> dict[str, Any]:
    """``pp``, ``vpp`` and ``stages``, where sizes that are not given follow from the layout's chunks."""
    if flat is None or 0 in (pp, vpp):
        return {"pp": 1 if pp is None else pp, "vpp": 1 if vpp is None else vpp}
    chunks = len(flat)
    stages = pp or max(chunks // (vpp or 1), 1)
    each = vpp or max(chunks // stages, 1)
    if stages * each != chunks or (stages == 1 and each > 1):
        sizes = ((f"--pp {pp}", pp), (f"--vpp {vpp}", vpp))
        raise UsageError(
            f"--pp-layout has {chunks} chunks, which {' '.join(text for text, size in sizes if size)} does not have",
            expected="pp x vpp chunks",
            do="leave --pp and --vpp out for one chunk a stage, or give the two that make up the layout",
        )
    return {
        "pp": stages,
        "vpp": each,
        "stages": tuple(tuple(flat[v * stages + p] for v in range(each)) for p in range(stages)),
    }
