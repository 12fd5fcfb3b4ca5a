"""``--quant``: the scheme that a FORMAT's weights are stored in, and a described model whose weights are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from dconv.coded.compressed_config import METHOD
from dconv.coded.compressed_encode import CompressedFP8
from dconv.coded.decode import KEY
from dconv.coded.encode import Scheme, encode
from dconv.coded.fp8_encode import BlockFP8
from dconv.coded.micro_encode import MicroMX, MicroNV
from dconv.describe import Described
from dconv.errors import UsageError
from dconv.request import Request


@dataclass(frozen=True)
class Variant:
    """One of a FORMAT's variants.

    Attributes:
        words: for a person.
        worst: largest error of a weight, as a part of the largest magnitude that shares its scale.
        options: options that it takes beside ``--quant``.
        scheme: made of a request.
    """

    words: str
    worst: float
    options: frozenset[str]
    scheme: Callable[[Request], Scheme]


_BLOCK: Final = (128, 128)


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


#: FORMAT -> its variants by ``--quant``, the default first.
VARIANTS: Final[Mapping[str, Mapping[str, Variant]]] = {
    "fp8": {
        "fp8_block": Variant(
            "e4m3 with a scale for each block, as DeepSeek-V3",
            2**-4,
            frozenset({"block_size", "scale_format", "quant_config"}),
            lambda request: _fp8("block", request),
        ),
        "fp8_tensor": Variant(
            "e4m3 with a scale for each tensor",
            2**-4,
            frozenset({"quant_config"}),
            lambda request: _fp8("tensor", request),
        ),
        "fp8_channel": Variant(
            "e4m3 with a scale for each row, as compressed-tensors' FP8_DYNAMIC",
            2**-4,
            frozenset(),
            lambda _: CompressedFP8("channel"),
        ),
    },
    "mx": {
        "mxfp4": Variant(
            "e2m1 with a power of two for each 32 columns, as compressed-tensors' MXFP4A16",
            2**-2,
            frozenset({"scale_rule"}),
            lambda request: MicroMX(4, request.scale_rule),
        ),
        "mxfp8": Variant(
            "e4m3 with a power of two for each 32 columns, as compressed-tensors' MXFP8",
            2**-3,
            frozenset({"scale_rule"}),
            lambda request: MicroMX(8, request.scale_rule),
        ),
        "nvfp4": Variant(
            "e2m1 with e4m3 for each 16 columns, as compressed-tensors' NVFP4A16",
            2**-2,
            frozenset(),
            lambda _: MicroNV(),
        ),
    },
}
#: Options that only variants have, with what stands for them where they are not given.
OPTIONS: Final = {"block_size": None, "scale_format": "float", "quant_config": "transformers", "scale_rule": "even"}


def scheme_of(request: Request) -> Scheme | None:
    """The scheme that a request asks for; None where its FORMAT is plain.

    Raises:
        UsageError: FORMAT has no such variant, or the variant no such option.
    """
    variants = VARIANTS.get(request.format, {})
    given = {name for name, otherwise in OPTIONS.items() if getattr(request, name) != otherwise}
    if not variants:
        named = [*(["--quant"] if request.quant else []), *map(_spelled, sorted(given))]
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
    if idle := sorted(given - variant.options):
        raise UsageError(
            f"{name} takes no such option, nothing was written",
            where=", ".join(map(_spelled, idle)),
            expected=", ".join(map(_spelled, sorted(variant.options))) or "none beside --quant",
        )
    return variant.scheme(request)


def _spelled(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def quantised(model: Described, scheme: Scheme) -> tuple[Described, tuple[str, ...]]:
    """The model with its linear layers in a scheme's codes, and what to say of it.

    Raises:
        Refused: see `dconv.coded.encode.encode`.
    """
    made = encode(model.family, model.facts, model.logical, scheme)
    side = {name: path for name, path in model.source.side.items() if name != "config.json"}
    new = replace(
        model,
        source=replace(model.source, side=side),
        config={**model.config, KEY: made.config},
        logical=made.logical,
        fixed=made.fixed,
    )
    counts = ", ".join(
        f"{count:,} {what}"
        for count, what in ((made.made, "encoded"), (made.kept, "kept as the source has them"))
        if count
    )
    return new, (f"linear layers in {scheme.words}: {counts}",)
