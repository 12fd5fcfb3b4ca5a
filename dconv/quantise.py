"""The codes that a FORMAT's weights are stored in (``--quant``), and a described model in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from dconv.codec.minifloat import E2M1, E2M3, E3M2, Minifloat
from dconv.coded.awq_encode import AWQ
from dconv.coded.compressed_config import METHOD
from dconv.coded.compressed_encode import CompressedFP8
from dconv.coded.compressed_packed_encode import FORMAT as PACK_QUANTIZED
from dconv.coded.compressed_packed_encode import Packed
from dconv.coded.decode import KEY
from dconv.coded.encode import Scheme, encode, linears, stacked
from dconv.coded.fp8_encode import BlockFP8
from dconv.coded.gpt_oss import GptOss
from dconv.coded.gptq_encode import GPTQ
from dconv.coded.micro_encode import MicroMX, MicroNV
from dconv.coded.mixed_encode import Mixed
from dconv.coded.quark_encode import Quark
from dconv.coded.repack import Packer, Repack
from dconv.describe import Described
from dconv.errors import Refused, UsageError
from dconv.quant.kinds import PLAIN, ROW
from dconv.quant.mixed import Choice
from dconv.quant.readers import Reader, readers
from dconv.request import Request, spelled


@dataclass(frozen=True)
class Variant:
    """One of a FORMAT's variants.

    Attributes:
        words: for a person.
        worst: largest error of a weight, as a part of the largest magnitude that shares its scale.
        options: options that it takes beside ``--quant``.
        scheme: made of a request.
        stacked: the same for families whose experts are one tensor for all; None where it has no form for those.
            For the first of ``readers`` only.
        readers: what ``--quant-config`` may say, the default first.
        repacks: it takes whole numbers that the source has, and chooses none.
    """

    words: str
    worst: float
    options: frozenset[str]
    scheme: Callable[[Request], Scheme]
    stacked: Callable[[Request], Scheme] | None = None
    readers: tuple[str, ...] = ()
    repacks: bool = False


@dataclass(frozen=True)
class Schemes:
    """What a request asks for: the scheme of linear layers, and that of experts that are one tensor for all.

    Attributes:
        wanted: the weights that a table names; None for all linear layers.
        worst: of these weights, those in floating codes, by name (`Variant.worst`).
        reader: who reads what a table makes.
    """

    linears: Scheme
    stacked: Scheme | None = None
    wanted: frozenset[str] | None = None
    worst: Mapping[str, float] = field(default_factory=dict[str, float])
    reader: Reader | None = None


def _repacked(words: str, packer: Packer) -> Variant:
    return Variant(words, 0.0, frozenset(), lambda _: Repack(packer), repacks=True)


_PACKED: Final = _repacked("whole numbers that the source has, as compressed-tensors packs them", Packed())


_BLOCK: Final = (128, 128)
_RULE: Final = frozenset({"scale_rule"})


def _fp8(strategy: str, request: Request) -> Scheme:
    """FP8 by blocks or whole tensors, for the reader that the request names.

    Raises:
        UsageError: scales that this reader does not take.
    """
    block = request.block_size or _BLOCK
    if request.quant_config == METHOD:
        if request.scale_format == "ue8m0":
            raise UsageError(
                "compressed-tensors stores no powers of two for FP8 blocks, nothing was written",
                where="--scale-format ue8m0 beside --quant-config compressed-tensors",
                expected="--scale-format float",
            )
        return CompressedFP8(strategy, block)
    return BlockFP8(block if strategy == "block" else None, request.scale_format == "ue8m0")


def _mx(fmt: Minifloat, request: Request) -> Scheme:
    if request.quant_config == METHOD:
        return MicroMX(fmt.bits, request.scale_rule or "even")
    return Quark(fmt, request.scale_rule or "floor")


#: FORMAT -> its variants by ``--quant``, the default first.
VARIANTS: Final[Mapping[str, Mapping[str, Variant]]] = {
    "fp8": {
        "fp8_block": Variant(
            "e4m3 with a scale for each block, as DeepSeek-V3",
            2**-4,
            frozenset({"block_size", "scale_format"}),
            lambda request: _fp8("block", request),
            readers=("transformers", METHOD),
        ),
        "fp8_tensor": Variant(
            "e4m3 with a scale for each tensor",
            2**-4,
            frozenset(),
            lambda request: _fp8("tensor", request),
            readers=("transformers", METHOD),
        ),
        "fp8_channel": Variant(
            "e4m3 with a scale for each row, as compressed-tensors' FP8_DYNAMIC",
            2**-4,
            frozenset(),
            lambda _: CompressedFP8("channel"),
            readers=(METHOD,),
        ),
    },
    "mx": {
        "mxfp4": Variant(
            "e2m1, 32 with a power of two; as gpt-oss for itself, else as quark",
            2**-2,
            _RULE,
            lambda request: _mx(E2M1, request),
            lambda request: GptOss(request.scale_rule or "floor"),
            readers=("quark", METHOD),
        ),
        "mxfp6_e2m3": Variant(
            "e2m3, 32 with a power of two, as quark",
            2**-4,
            _RULE,
            lambda request: _mx(E2M3, request),
            readers=("quark", METHOD),
        ),
        "mxfp6_e3m2": Variant(
            "e3m2, 32 with a power of two, as quark",
            2**-3,
            _RULE,
            lambda request: _mx(E3M2, request),
        ),
        "mxfp8": Variant(
            "e4m3, 32 with a power of two, as compressed-tensors",
            2**-3,
            _RULE,
            lambda request: MicroMX(8, request.scale_rule or "even"),
            readers=(METHOD,),
        ),
        "nvfp4": Variant(
            "e2m1, 16 with an e4m3 scale and one for all, as compressed-tensors",
            2**-2,
            frozenset(),
            lambda _: MicroNV(),
            readers=(METHOD,),
        ),
    },
    "gptq": {
        "gptq": _repacked("whole numbers that the source has, zeros stored less one", GPTQ("v1")),
        "gptq_v2": _repacked("the same, zeros stored as they are", GPTQ("v2")),
        PACK_QUANTIZED: _PACKED,
    },
    "awq": {
        "awq": _repacked("whole numbers of 4 bits that the source has, version gemm", AWQ()),
        PACK_QUANTIZED: _PACKED,
    },
}
#: FORMATs whose ``--quant`` is read elsewhere: their tensors are not HuggingFace's.
BY_ITSELF: Final = ("gguf", "mlx", "onnx", "neuron", "hf2neuron")
#: Options that only variants have, with what stands for them where they are not given.
OPTIONS: Final = {"block_size": None, "scale_format": "float", "scale_rule": None, "quant_config": None}


def scheme_of(request: Request) -> Schemes | None:
    """The schemes that a request asks for; None where its FORMAT is plain.

    Raises:
        UsageError: FORMAT has no such variant, or the variant no such option.
    """
    variants = VARIANTS.get(request.format, {})
    given = {name for name, otherwise in OPTIONS.items() if getattr(request, name) != otherwise}
    if not variants:
        own = request.quant is not None and request.format not in BY_ITSELF
        named = [*(["--quant"] if own else []), *map(spelled, sorted(given))]
        if named:
            raise UsageError(
                f"{request.format} is not quantised, nothing was written",
                where=", ".join(named),
                expected=f"FORMAT {' or '.join(VARIANTS)}",
            )
        return None
    name = request.quant or next(iter(variants))
    variant = variants.get(name)
    if variant is None:
        raise UsageError(
            f"{request.format} has no such variant, nothing was written",
            where=f"--quant {name}",
            expected="\n".join(f"{key}  {known.words}" for key, known in variants.items()),
        )
    takes = variant.options | ({"quant_config"} if variant.readers else set[str]())
    if idle := sorted(given - takes):
        raise UsageError(
            f"{name} takes no such option, nothing was written",
            where=", ".join(map(spelled, idle)),
            expected=", ".join(map(spelled, sorted(takes))) or "none beside --quant",
        )
    if request.quant_config is not None and request.quant_config not in variant.readers:
        raise UsageError(
            f"{name} is not written for this reader, nothing was written",
            where=f"--quant-config {request.quant_config}",
            expected=" or ".join(variant.readers),
        )
    own = request.quant_config in (None, *variant.readers[:1])
    return Schemes(variant.scheme(request), variant.stacked(request) if variant.stacked and own else None)


def schemes_of(choices: Mapping[str, Choice], request: Request, *, symmetric: bool) -> Schemes:
    """How what a table gives each weight is stored: as ``--quant`` says, else as its plainest reader reads it.

    Args:
        choices: by the weight's name; at least one is not left as it is.
        symmetric: whether whole numbers have no zeros of their own.
        request: what is asked for.

    Raises:
        Refused: no public loader reads all of it in one checkpoint, or not in the format that was asked for.
    """
    coded = {name: choice for name, choice in choices.items() if not choice.plain}
    known = readers(coded, symmetric=symmetric)
    asked = {"gptq": "gptq", "gptq_v2": "gptq", PACK_QUANTIZED: METHOD}.get(request.quant or "")
    reader = next((it for it in known.found if it.name == asked or (asked is None and it.name != "awq")), None)
    if reader is None:
        if not known.found:
            first, _, each = known.missing.partition("\n")
            raise Refused(
                f"{first}, nothing was written",
                where="--quantization-config",
                found=each,
                expected="types that have a reader in common, bf16 among them",
                do="mxfp6 with the element e2m3 is compressed-tensors', as whole numbers are" if "e3m2" in each else "",
            )
        raise Refused(
            f"--quant {request.quant} does not store what the table says, nothing was written",
            where="--quantization-config",
            expected="\n".join(f"{it.name} ({it.format}), read by {it.loads}" for it in known.found),
            found=", ".join(sorted({choice.words for choice in coded.values()})),
            do=f"--quant {PACK_QUANTIZED}" if any(it.name == METHOD for it in known.found) else "leave --quant out",
        )
    by_kind: dict[Choice, set[str]] = {}
    for name, choice in coded.items():
        by_kind.setdefault(replace(choice, why=""), set()).add(name)
    kinds = [(_scheme(choice, request, reader), frozenset(names)) for choice, names in by_kind.items()]
    first, _ = kinds[0]
    one = first if all(scheme == first for scheme, _ in kinds) else Mixed(kinds)
    worst: dict[str, float] = {}
    for choice, names in by_kind.items():
        if not choice.integer:
            form, quant = _variant(choice)
            worst |= dict.fromkeys(names, VARIANTS[form][quant].worst)
    return Schemes(one, wanted=frozenset(coded), worst=worst, reader=reader)


def _variant(choice: Choice) -> tuple[str, str]:
    """The FORMAT, and its variant, that stores a type of floating codes alone."""
    if choice.wq == "fp8":
        return "fp8", "fp8_channel" if choice.group == ROW else "fp8_block"
    return "mx", {"fp4": "nvfp4", "mxfp6": f"mxfp6_{choice.element}"}.get(choice.wq, choice.wq)


def _scheme(choice: Choice, request: Request, reader: Reader) -> Scheme:
    """How one of a table's types is stored for a reader."""
    rounded = choice.aq != PLAIN
    if choice.integer:
        gptq = GPTQ("v2" if request.quant == "gptq_v2" else "v1")
        return Repack(Packed(rounded) if reader.name == METHOD else gptq)
    form, quant = _variant(choice)
    for_whom = METHOD if reader.name == METHOD else None
    scheme = VARIANTS[form][quant].scheme(replace(request, format=form, quant=quant, quant_config=for_whom))
    return replace(scheme, activations=rounded) if isinstance(scheme, CompressedFP8 | MicroMX) else scheme


def quantised(model: Described, schemes: Schemes) -> tuple[Described, tuple[str, ...], str]:
    """The model with its linear layers in a scheme's codes, what to say of it, and the scheme in words.

    Raises:
        Refused: see `dconv.coded.encode.encode`, ``linears`` and `dconv.coded.repack.Repack.of`.
    """
    of = model.family, model.facts, model.logical
    experts = stacked(*of) if schemes.stacked else set[str]()
    scheme = schemes.stacked if schemes.stacked and experts else schemes.linears
    if isinstance(scheme, Repack):
        scheme = scheme.of(model.logical)
        made = encode(*of, scheme, set(scheme.numbers))
    else:
        scheme = scheme.of(model.logical) if isinstance(scheme, Mixed) else scheme
        made = encode(*of, scheme, set(schemes.wanted or experts or linears(*of)))
    side = {name: path for name, path in model.source.side.items() if name != "config.json"}
    left_out = {what: "written anew" if what.startswith(KEY) else why for what, why in made.logical.left_out.items()}
    new = replace(
        model,
        source=replace(model.source, side=side),
        config={**model.config, KEY: made.config},
        logical=replace(made.logical, left_out=left_out),
        fixed=made.fixed,
    )
    same = "kept as the source has them"
    counts = ", ".join(
        f"{count:,} {what}"
        for count, what in (
            (made.made, "encoded"),
            (made.kept, same),
            (made.whole, "to be calibrated" if model.logical.held else same),
        )
        if count
    )
    what = "experts" if experts else "linear layers"
    packer = scheme.packer if isinstance(scheme, Repack) else scheme if isinstance(scheme, Mixed) else None
    note = packer.note(made.config) if packer else ""
    return new, (f"{what} in {scheme.words}: {counts}", *([note] if note else [])), scheme.words
