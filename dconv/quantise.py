"""``--quant``: the scheme that a FORMAT's weights are stored in, and a described model whose weights are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from dconv.coded.decode import KEY
from dconv.coded.encode import Scheme, encode
from dconv.coded.fp8_encode import BlockFP8
from dconv.coded.repack import AWQ, GPTQ, weights_of
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
        repacks: it takes whole numbers that the source has, and chooses none.
    """

    words: str
    worst: float
    options: frozenset[str]
    scheme: Callable[[Request], Scheme]
    repacks: bool = False


def _repacked(words: str, scheme: Scheme) -> Variant:
    return Variant(words, 0.0, frozenset(), lambda _: scheme, repacks=True)


_BLOCK: Final = (128, 128)
#: FORMAT -> its variants by ``--quant``, the default first.
VARIANTS: Final[Mapping[str, Mapping[str, Variant]]] = {
    "fp8": {
        "fp8_block": Variant(
            "e4m3 with a scale for each block, as DeepSeek-V3",
            2**-4,
            frozenset({"block_size", "scale_format"}),
            lambda request: BlockFP8(request.block_size or _BLOCK, request.scale_format == "ue8m0"),
        ),
        "fp8_tensor": Variant(
            "e4m3 with a scale for each tensor", 2**-4, frozenset(), lambda _: BlockFP8(None, power_of_two=False)
        ),
    },
    "gptq": {
        "gptq": _repacked("the whole numbers of a GPTQ or AWQ source, zeros stored less one", GPTQ("v1")),
        "gptq_v2": _repacked("the same, zeros stored as they are", GPTQ("v2")),
    },
    "awq": {"awq": _repacked("the whole numbers of a GPTQ or AWQ source of 4 bits, version gemm", AWQ())},
}
#: Options that only variants have, with what stands for them where they are not given.
OPTIONS: Final = {"block_size": None, "scale_format": "float"}


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
        Refused: see `dconv.coded.encode.encode` and `dconv.coded.repack.weights_of`.
    """
    repacked = weights_of(model.logical, scheme.words) if isinstance(scheme, GPTQ | AWQ) else None
    made = encode(model.family, model.facts, model.logical, scheme, repacked)
    side = {name: path for name, path in model.source.side.items() if name != "config.json"}
    left_out = {what: "written anew" if what.startswith(KEY) else why for what, why in made.logical.left_out.items()}
    new = replace(
        model,
        source=replace(model.source, side=side),
        config={**model.config, KEY: made.config},
        logical=replace(made.logical, left_out=left_out),
        fixed=made.fixed,
    )
    counts = ", ".join(
        f"{count:,} {what}"
        for count, what in ((made.made, "encoded"), (made.kept, "kept as the source has them"))
        if count
    )
    note = scheme.note(made.config) if isinstance(scheme, GPTQ) else ""
    return new, (f"linear layers in {scheme.words}: {counts}", *([note] if note else []))
