"""Which public loader reads what a table asks for, or plainly that none does.

Sources: GPTQModel 7.7.0 (``dynamic`` for several widths, which vLLM reads, too); compressed-tensors 0.20.0,
``config/base.py`` for its formats and ``compressors/mxfp6`` for the one FP6 that it has; vLLM's ``quark_ocp_mx.py`` for
quark's. transformers loads through GPTQModel and compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from dconv.coded.compressed_config import METHOD, MIXED
from dconv.coded.places import FUSED_PARTS, experts_of, loaded_as
from dconv.quant.kinds import PLAIN, ROW
from dconv.quant.mixed import Choice
from dconv.quant.names import some

#: Widths of the format ``gptq``.
_GPTQ_BITS: Final = (2, 3, 4, 8)
#: Widths that vLLM's kernels for ``pack-quantized`` have.
_VLLM_BITS: Final = (4, 8)


@dataclass(frozen=True)
class Reader:
    """A way to store a table.

    Attributes:
        name: ``quant_method`` of the output's config.
        format: what that config calls the format.
        loads: which programs load it, for a person.
    """

    name: str
    format: str
    loads: str


@dataclass(frozen=True)
class Readers:
    """Who reads a table.

    Attributes:
        found: the plainest first.
        missing: where there is none, which types have which; "" else.
    """

    found: tuple[Reader, ...]
    missing: str = ""


def readers(choices: Mapping[str, Choice], *, symmetric: bool = True) -> Readers:
    """The public loaders that read a model with these choices.

    Args:
        choices: by name; at least one is not left as it is.
        symmetric: whether whole numbers have no zeros of their own.
    """
    kinds = set(map(_stored, (choice for choice in choices.values() if not choice.plain)))
    found = tuple(reader for make in _READERS if (reader := make(kinds, symmetric)))
    if found:
        return Readers(found)
    each = {
        kind.words: [made.name for make in _READERS if (made := make({kind}, symmetric))] for kind in _sorted(kinds)
    }
    lines = (f"{words}: {', '.join(names) or 'none'}" for words, names in each.items())
    return Readers((), "no public loader reads all of this in one checkpoint\n" + "\n".join(lines))


def _sorted(kinds: set[Choice]) -> list[Choice]:
    """In an order that does not depend on the run."""
    return sorted(kinds, key=lambda kind: kind.words)


def _stored(choice: Choice) -> Choice:
    return Choice(choice.wq, choice.group, choice.element, choice.aq)


def _gptq(kinds: set[Choice], symmetric: bool) -> Reader | None:
    del symmetric
    if not all(kind.integer and kind.bits in _GPTQ_BITS and kind.aq == PLAIN for kind in kinds):
        return None
    if len(kinds) == 1:
        return Reader("gptq", "gptq", "GPTQModel, transformers, vLLM")
    return Reader("gptq", "gptq", "GPTQModel and vLLM, with dynamic rules for the widths that differ")


def _awq(kinds: set[Choice], symmetric: bool) -> Reader | None:
    del symmetric
    fits = len(kinds) == 1 and all(kind.wq == "int4" and kind.aq == PLAIN for kind in kinds)
    return Reader("awq", "gemm", "AutoAWQ, GPTQModel, transformers, vLLM") if fits else None


def _compressed_format(kind: Choice) -> str:
    """The format of compressed-tensors that stores it; "" for none."""
    activations = {
        "int4": ("fp8",), "fp8": ("fp8",), "mxfp8": ("mxfp8",),
    }.get(kind.wq, ())  # fmt: skip
    if kind.aq not in (PLAIN, *activations):
        return ""
    if kind.integer:
        return "pack-quantized"
    if kind.wq == "mxfp6":
        return "mxfp6-pack-quantized" if kind.element == "e2m3" else ""
    return {
        "fp8": "float-quantized", "fp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized",
        "mxfp8": "mxfp8-quantized",
    }.get(kind.wq, "")  # fmt: skip


def _compressed(kinds: set[Choice], symmetric: bool) -> Reader | None:
    forms = {_compressed_format(kind) for kind in kinds}
    if "" in forms:
        return None
    form = forms.pop() if len(forms) == 1 else MIXED
    not_vllm = [kind.words for kind in _sorted(kinds) if kind.integer and kind.bits not in _VLLM_BITS]
    not_vllm += [kind.words for kind in _sorted(kinds) if kind.wq == "mxfp6"]
    zeros = not symmetric and any(kind.integer for kind in kinds)
    loads = f"transformers with compressed-tensors {'0.19 (0.20 does not load zeros)' if zeros else '0.20'}"
    if not_vllm:
        loads += f"; vLLM has no kernel there for {', '.join(not_vllm)}"
    else:
        loads += ", vLLM" + (" where no expert has zeros" if zeros else "")
    return Reader(METHOD, form, loads)


def _quark(kinds: set[Choice], symmetric: bool) -> Reader | None:
    del symmetric
    if not all(kind.wq in ("mxfp4", "mxfp6") and kind.aq == PLAIN for kind in kinds):
        return None
    return Reader("quark", "real_quantized", "vLLM with amd-quark, which emulates it")


def _fine_grained(kinds: set[Choice], symmetric: bool) -> Reader | None:
    del symmetric
    if not all(kind.wq == "fp8" and kind.aq == "fp8" and kind.group != ROW for kind in kinds):
        return None
    return Reader("fp8", "weight_block_size", "transformers, vLLM, SGLang")


_READERS: Final[tuple[Callable[[set[Choice], bool], Reader | None], ...]] = (
    _gptq, _awq, _fine_grained, _compressed, _quark,
)  # fmt: skip


def limits(choices: Mapping[str, Choice]) -> list[str]:
    """What of a table some loader that reads its types does not load after all; a line for a person each.

    Source: transformers 5.23 with compressed-tensors 0.20, run; see also `torn`.
    """
    experts = {_stored(choice) for name, choice in choices.items() if experts_of(name) and not choice.plain}
    plain = [choice.words for choice in _sorted(experts) if not choice.integer and not _has_experts(choice)]
    found = torn(choices)
    if len(experts) > 1:
        words = ", ".join(choice.words for choice in _sorted(experts))
        found.append(f"transformers 5.23 decodes the experts of all layers alike: not as {words}")
    elif plain:
        found.append(f"transformers 5.23 does not load experts in {', '.join(plain)} as they are")
    return found


def _has_experts(choice: Choice) -> bool:
    """Whether transformers loads experts in floating codes rightly: not in FP8 blocks, and without a global scale."""
    return choice.wq in ("mxfp4", "mxfp6") or (choice.wq == "fp8" and choice.group == ROW)


def torn(choices: Mapping[str, Choice]) -> list[str]:
    """What vLLM loads as one matrix and the choices make of different kinds, a line for a person each.

    These are queries, keys and values, or the ranks before them; gate and up; all experts of a layer. Such a checkpoint
    loads in transformers alone.
    """
    groups: dict[tuple[str, str], dict[Choice, list[str]]] = {}
    for name, choice in choices.items():
        module = name.removesuffix(".weight")
        before, _, last = module.rpartition(".")
        loaded = loaded_as(module)
        fused = next((parts for parts in FUSED_PARTS if last in parts), None)
        if loaded != module and loaded.endswith(".experts"):
            key = (loaded, "experts")
        elif fused:
            key = (before, "+".join(fused))
        else:
            continue
        groups.setdefault(key, {}).setdefault(_stored(choice), []).append(module)
    apart: dict[str, list[str]] = {}
    for (where, what), kinds in groups.items():
        if len(kinds) > 1:
            words = ", ".join(kind.words for kind in _sorted(set(kinds)))
            apart.setdefault(f"vLLM loads {what} as one and refuses them as {words}", []).append(where)
    return [f"{words}: {some(names)}" for words, names in apart.items()]
