"""FORMAT gguf: what each tensor is stored as (``--quant``), and a described model laid out in one file or several.

Types are chosen as llama.cpp does. Its converter writes f32, f16, bf16, q8_0, tq1_0 and tq2_0: norms, biases, routers
and all that has one axis are fp32 (``prepare_tensors`` of ``conversion/base.py``), and the ternary types leave the
embedding and the output in f16. The others are llama-quantize's (``src/llama-quant.cpp``): its mixes of K-quants are
`dconv.arch.gguf_mixes`. Under the older types its output layer, also where it is the embedding, is Q6_K there and Q8_0
here, the nearest above it: what they need is all here, whichever library is installed. Rows that are not whole blocks
are f16 in both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from dconv.arch.gguf import ARCHS
from dconv.arch.gguf_mixes import ALIASES, MIXES, types
from dconv.arch.gguf_written import Written, check, not_loaded, without_predictors, written
from dconv.arch.layouts import size
from dconv.checkpoint.gguf_header import raw_values, read_header
from dconv.checkpoint.gguf_target import Raw, lay_out
from dconv.checkpoint.gguf_vocabulary import vocabulary
from dconv.codec import ggml
from dconv.codec.gguf import BLOCKS, PLAIN
from dconv.coded.gguf_encode import Stored, Tensor, file_of, source_blocks, stored, tensors
from dconv.describe import Described
from dconv.errors import Refused, UsageError
from dconv.request import Request
from dconv.sharding.derived import real_files
from dconv.sharding.plan import Target

#: ``--quant`` -> the type or mix, and ``general.file_type`` (``enum llama_ftype``).
TYPES: Final[Mapping[str, tuple[str, int]]] = {
    "f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2),
    "q4_1": ("Q4_1", 3), "q5_0": ("Q5_0", 8), "q5_1": ("Q5_1", 9), "tq1_0": ("TQ1_0", 36), "tq2_0": ("TQ2_0", 37),
    "mxfp4": ("MXFP4", 38), **{mix.lower(): (mix, number) for mix, (_, number) in MIXES.items()},
}  # fmt: skip
_FILE_TYPE: Final[Mapping[str, int]] = dict(TYPES.values())
#: Those of which llama-quantize raises the output layer.
_RAISED: Final = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
_OUTPUT, _EMBEDDING = "output.weight", "token_embd.weight"
_FP32: Final = re.compile(r".*_norm\.weight|.*\.ffn_gate_inp(_shexp)?\.weight|.*(?<!\.weight)")
_QUANTISATION_VERSION: Final = 2
#: Of a GGUF's own metadata what is written anew.
_ANEW: Final = ("general.architecture", "general.file_type", "general.alignment", "general.quantization_version")
#: What a file's name ends with that says which of a set it is, and what else it says of how it is stored.
_SET: Final = re.compile(r"(-\d{5}-of-\d{5})?(\.gguf)?$")
_SUFFIX: Final = re.compile(r"(?i)([-._](F32|F16|BF16|T?I?Q\d\w*|MXFP4))?(-\d{5}-of-\d{5})?(\.gguf)?$")


def is_rounded(quant: str | None) -> bool:
    """Whether a type has blocks."""
    return quant is not None and TYPES.get(quant.lower(), ("F32", 0))[0] not in PLAIN


@dataclass(frozen=True)
class Export:
    """A model as it is written.

    Attributes:
        model: the same, with its tensors under GGUF's names.
        notes: what a person should know, one line each.
        words: the type of its weights; "" for a plain one.
    """

    model: Described
    target: Target
    notes: tuple[str, ...]
    words: str


def export(request: Request, model: Described) -> Export:
    """Lay out a model.

    Raises:
        UsageError: a type that there is not, or an OUT that is no directory's name.
        Refused: a family without an architecture in GGUF; a config, or a tokenizer, that llama.cpp cannot follow.
    """
    asked = _asked(request)
    config = without_predictors(model.config, model.facts)
    made = written(model.family, config)
    held, left_out = tensors(model.family, model.facts, model.logical, made.arch)
    check(model.family, config, made, {**{tensor.name: tensor.shape for tensor in held},
                                       **{name: (len(table),) for name, table in made.tables.items()}})  # fmt: skip
    of_gguf = model.source.format == "gguf" and request.hf_config is None
    kind, kinds = _kinds(asked, held, model, made.values)
    packed = [stored(tensor, kinds[tensor.name], model.logical, made.arch) for tensor in held]
    kept, words, notes = _vocabulary(request, model, made, of_gguf)
    file_type = _FILE_TYPE[kind] if kind else _file_type(model)
    values = {
        "general.architecture": made.arch,
        "general.type": "model",
        "general.name": _stem(request).replace("-", " "),
        "general.size_label": _size_label(packed, made),
        **kept,
        **{key: value for key, value in made.values.items() if key != "general.architecture"},
        "general.file_type": file_type,
        "general.quantization_version": _QUANTISATION_VERSION,
        **words,
    }
    logical = _logical(model, packed)
    target = lay_out(
        _SET.sub("", next(iter(model.source.files))) if kind is None else f"{_stem(request)}-{kind}",
        packed,
        made.tables,
        values,
        split=request.split_size,
        left_out={**logical.left_out, **left_out},
    )
    said = "" if kind is None or kind in PLAIN else f"GGUF {kind}"
    why = not_loaded(made)
    loads = (f"llama.cpp of 2026-10 does not load this file: {why}",) if why else ()
    more = (f"{len(left_out):,} tensors left out: {next(iter(left_out.values()))}",) if left_out else ()
    return Export(replace(model, logical=logical), target, (*loads, *_of_kinds(kind, packed), *more, *notes), said)


def _asked(request: Request) -> str | None:
    """The type that is asked for; None where nothing is.

    Raises:
        UsageError: there is no such, or two that contradict each other.
        Refused: one that llama.cpp's own tool chooses.
    """
    if request.out is not None and request.out.suffix == ".gguf":
        raise UsageError(
            "OUT is a directory, nothing was written",
            where=f"-o {request.out}",
            expected="its name: the file in it is named after the model and its type",
            do=f"-o {request.out.with_suffix('')}",
        )
    quant = request.quant.lower() if request.quant else None
    quant = ALIASES.get(quant or "", quant)
    if quant is None:
        return TYPES[request.dtype][0] if request.dtype else None
    if re.fullmatch(r"i?q\d\w*", quant) and quant not in TYPES:
        raise Refused(
            f"{quant} takes an importance matrix, nothing was written",
            where=f"--quant {request.quant}",
            expected="one of " + ", ".join(TYPES),
            do="--quant bf16 here, then llama-quantize --imatrix of llama.cpp",
        )
    if quant not in TYPES:
        raise UsageError(
            "gguf has no such type, nothing was written",
            where=f"--quant {request.quant}",
            expected="one of " + ", ".join(TYPES),
        )
    if request.dtype and TYPES.get(request.dtype) != TYPES[quant]:
        raise UsageError(
            "two types for the same weights, nothing was written",
            where=f"--dtype {request.dtype} beside --quant {quant}",
            expected="one of them",
        )
    return TYPES[quant][0]


def _kinds(
    asked: str | None, held: Sequence[Tensor], model: Described, said: Mapping[str, Any]
) -> tuple[str | None, dict[str, str]]:
    """The type or mix of the weights, None where each tensor keeps the blocks that it has, and that of each tensor.

    Args:
        asked: ``--quant``; None keeps blocks.
        held: the tensors to be written.
        model: the source.
        said: the metadata.
    """
    if asked in MIXES:
        weights = {tensor.name: tensor.shape for tensor in held if not _is_fp32(tensor.name, tensor.shape)}
        return asked, {**{tensor.name: "F32" for tensor in held}, **types(asked, weights, said)}
    dtypes = Counter[str]()
    for tensor in held:
        if len(tensor.shape) > 1:
            dtypes[tensor.spec.dtype] += tensor.spec.nbytes
    own = TYPES.get(max(dtypes, key=lambda dtype: dtypes[dtype], default="bf16"), TYPES["bf16"])[0]
    tied = all(tensor.name != _OUTPUT for tensor in held)
    kinds = {tensor.name: kind_of(tensor.name, tensor.shape, asked or own, tied=tied) for tensor in held}
    if asked is not None:
        return asked, kinds
    if model.source.format != "gguf":
        return own, kinds
    blocks = {tensor.name: kind for tensor in held if (kind := source_blocks(tensor, model.logical))}
    plain = {tensor.name: TYPES[tensor.spec.dtype][0] for tensor in held if tensor.spec.dtype in TYPES}
    return (None if blocks else own), {**kinds, **plain, **blocks}


def _is_fp32(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) <= 1 or _FP32.fullmatch(name) is not None


def kind_of(name: str, shape: tuple[int, ...], asked: str, *, tied: bool) -> str:
    """The type of one tensor, where a model is to be of a type; see the module.

    Args:
        name: GGUF's.
        shape: the tensor's, as logical tensors have it.
        asked: the type, by its name.
        tied: whether the embedding is the output layer, too.
    """
    if _is_fp32(name, shape):
        return "F32"
    kind = asked
    output = name == _OUTPUT or (tied and name == _EMBEDDING)
    if asked.startswith("TQ") and name in (_OUTPUT, _EMBEDDING):
        kind = "F16"
    elif (asked in _RAISED and output) or (asked == "MXFP4" and "_exps." not in name):
        kind = "Q8_0"
    return "F16" if shape[-1] % BLOCKS[kind][0] else kind


def _of_kinds(kind: str | None, packed: Sequence[Stored]) -> tuple[str, ...]:
    counts = Counter(tensor.kind for tensor in packed)
    kept = sum(tensor.kept for tensor in packed)
    listed = ", ".join(f"{count:,} {name}" for name, count in counts.most_common())
    notes = [f"tensors: {listed}" + (f"; of {kept:,} the blocks are the source's own" if kept else "")]
    if kind in _RAISED and counts["Q8_0"]:
        notes.append("the output layer is Q8_0: llama-quantize makes it Q6_K, which nothing here encodes")
    if any(tensor.kind in ggml.KINDS and not tensor.kept for tensor in packed):
        notes.append(f"scales of blocks are searched for by {ggml.library().said}: another build may choose others")
    size = BLOCKS[MIXES[kind][0] if kind in MIXES else kind or "F16"][0]
    if odd := sum(tensor.shape[-1] % size > 0 for tensor in packed if len(tensor.shape) > 1 and tensor.kind != "F32"):
        smaller = "of smaller blocks" if kind in MIXES else "F16"
        notes.append(f"{odd:,} tensors are {smaller}: their rows are not whole blocks of {size}")
    return tuple(notes)


def _logical(model: Described, packed: Sequence[Stored]) -> Any:
    old = model.logical
    derived = {**old.derived, **{file_of(it.spec.name): it.derived for it in packed if it.derived is not None}}
    files = {piece.file for it in packed for piece in (*it.pieces, *it.replicas)}
    behind = real_files(files, derived)
    return replace(
        old,
        specs={it.spec.name: it.spec for it in packed},
        pieces={it.spec.name: it.pieces for it in packed},
        replicas={it.spec.name: it.replicas for it in packed if it.replicas},
        derived=derived,
        files={name: stamp for name, stamp in old.files.items() if name in behind},
    )


def _vocabulary(
    request: Request, model: Described, made: Written, of_gguf: bool
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """What else is said of the model, the vocabulary, and notes; of a GGUF all of it as it has it."""
    if not of_gguf:
        where, rows = str(model.source.root), size(model.facts, "vocab")
        words, notes = vocabulary(model.source.side, model.config, rows, made.arch, request.gguf_pretokenizer, where)
        return {}, words, notes
    held = raw_values(model.source.root / next(iter(model.source.files)))
    others = (ARCHS.keys() - {made.arch}) | {"split"}  # what is not the model's, and what a set says of itself
    kept = {key: Raw(data) for key, data in held.items() if key not in _ANEW and key.partition(".")[0] not in others}
    words: dict[str, Any] = {key: kept.pop(key) for key in list(kept) if key.startswith("tokenizer.")}
    if request.gguf_pretokenizer is not None:
        words["tokenizer.ggml.pre"] = request.gguf_pretokenizer
    return kept, words, ()


def _file_type(model: Described) -> int:
    """What a GGUF says of its own types."""
    said = read_header(model.source.root / next(iter(model.source.files))).values.get("general.file_type")
    return said if type(said) is int and 0 <= said < 2**31 else _FILE_TYPE["F32"]


def _stem(request: Request) -> str:
    """The model's name, without what says how it is stored."""
    model = request.model.resolve()
    if request.fake_weight and model.name == "config.json":
        model = model.parent
    return _SUFFIX.sub("", model.name) or "model"


def _size_label(packed: Sequence[Stored], made: Written) -> str:
    """``8x7B``; source: ``get_total_parameter_count`` of the package gguf."""
    import gguf  # as `dconv.arch.gguf_names` did

    total = experts = shared = count = stacks = 0
    shapes = {it.spec.name: it.shape for it in packed} | {name: (len(t),) for name, t in made.tables.items()}
    for name, shape in shapes.items():
        weights = 1
        for length in shape:
            weights *= length
        total += weights
        if "_exps." in name and len(shape) >= 3:
            held = shape[-2 if ".bias" in name else -3]
            experts, count, stacks = experts + weights // held, count + held, stacks + 1
        else:
            shared += weights
    return gguf.size_label(total, shared, experts, count // stacks if stacks else 0)
