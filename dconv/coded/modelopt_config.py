"""What NVIDIA's ModelOpt says of a checkpoint: which algorithm each module's weight is coded by.

It is said twice, in config.json's ``quantization_config`` and in ``hf_quant_config.json`` beside it, older checkpoints
have the latter alone. Sources: ModelOpt 0.47.0, ``torch/export/quant_utils.py`` and ``convert_hf_config.py``;
``modelopt.py`` of vLLM, which reads both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Final

from dconv.coded.patterns import check_length
from dconv.errors import Damaged, Refused
from dconv.sharding.parsed import is_list, is_mapping, is_texts

METHOD: Final = "modelopt"
#: What vLLM and SGLang call it where they were told which algorithm.
METHODS: Final = (METHOD, "modelopt_fp4", "modelopt_fp8", "modelopt_mxfp8", "modelopt_mixed")
MIXED: Final = "MIXED_PRECISION"
_WHERE: Final = "config.json: quantization_config"
_NO_ALGORITHM: Final = ("", "NONE", "NO_QUANT")
_WILD: Final = frozenset("*?[")
#: A config may be hostile, and comparing takes time: more entries are no model's.
_MOST: Final = 100_000
#: Of expressions with a wildcard elsewhere than at their end, of which ModelOpt writes none.
_MOST_WILD: Final = 1000


@dataclass(frozen=True, slots=True)
class Form:
    """How a module's weight is coded: ModelOpt's name for it, and columns that share a scale; 0 where none are said."""

    algo: str
    group: int = 0


@dataclass(frozen=True)
class Config:
    """What the config says.

    Attributes:
        everywhere: of all that is not left out; None where only ``layers`` or nothing is coded.
        layers: of single modules, and of all modules in them.
        left_out: whole names, or ``*`` for anything.
    """

    everywhere: Form | None
    layers: Mapping[str, Form]
    left_out: tuple[str, ...]

    @cached_property
    def by_kind(self) -> tuple[frozenset[str], tuple[str, ...], tuple[str, ...]]:
        """Entries by their kind: names, beginnings, and other expressions."""
        plain = frozenset(entry for entry in self.left_out if _WILD.isdisjoint(entry))
        begins = tuple(text[:-1] for text in self.left_out if text.endswith("*") and _WILD.isdisjoint(text[:-1]))
        known = plain | {f"{text}*" for text in begins}
        return plain, begins, tuple(entry for entry in self.left_out if entry not in known)

    def leaves_out(self, module: str) -> bool:
        """Whether the config leaves a module out, by its name or by an expression."""
        plain, begins, others = self.by_kind
        return module in plain or module.startswith(begins) or any(fnmatchcase(module, text) for text in others)

    def form_of(self, module: str, where: str) -> Form:
        """How the weight of a module is coded that is stored in codes.

        Args:
            module: the module's name, without ``.weight``.
            where: a stored tensor that shows that it is.

        Raises:
            Damaged: the config leaves it out, or says nothing of it.
        """
        check_length(module, where)
        if self.leaves_out(module):
            raise Damaged(
                "a weight is stored in codes that the config leaves out",
                where=where,
                found=f"{_WHERE}.ignore, which is hf_quant_config.json's exclude_modules, has {module}",
                do="the config belongs to other files",
            )
        within = module
        while within:
            if within in self.layers:
                return self.layers[within]
            within = within.rpartition(".")[0]
        if self.everywhere is None:
            raise Damaged(
                "a weight is stored in codes that the config does not speak of",
                where=where,
                expected=f"{_WHERE}.quant_algo, or {module} in quantized_layers",
                do="the config belongs to other files",
            )
        return self.everywhere


def flat(said: Mapping[str, object]) -> dict[str, object]:
    """``hf_quant_config.json`` in the spelling of ``quantization_config``."""
    inner = said.get("quantization")
    if not is_mapping(inner):
        return dict(said)
    outer = {key: value for key, value in said.items() if key != "quantization"}
    spelled = {"ignore" if key == "exclude_modules" else str(key): value for key, value in inner.items()}
    return {**outer, **spelled}


def config_of(said: Mapping[str, object], known: Collection[str]) -> Config:
    """``quantization_config``, read.

    Args:
        said: the section, or ``hf_quant_config.json``.
        known: algorithms that can be decoded.

    Raises:
        Damaged: it is not of the form that ModelOpt writes.
        Refused: an algorithm that is not known.
    """
    said = flat(said)
    if said.get("nvfp4_embed"):
        raise Refused(
            "the embedding is in codes that one more scale belongs to, input_scale, nothing was written",
            where=f"{_WHERE}.nvfp4_embed",
        )
    ignore, layers = said.get("ignore") or list[str](), said.get("quantized_layers") or dict[str, Any]()
    if not is_list(ignore) or len(ignore) > _MOST or not is_texts(ignore):
        raise _odd("ignore", f"a list of at most {_MOST:,} names", ignore)
    if not is_mapping(layers) or len(layers) > _MOST:
        raise _odd("quantized_layers", f"a table of at most {_MOST:,} modules", layers)
    algo = _algorithm(said, "")
    mixed = algo == MIXED
    if mixed and not layers:
        raise _odd("quantized_layers", "a table of modules, as MIXED_PRECISION has it", layers)
    everywhere = None if mixed or algo in _NO_ALGORITHM else _form(said, "", known)
    forms = {str(name): _form(one, f"quantized_layers.{name!s:.80}", known) for name, one in layers.items()}
    found = Config(everywhere, forms if mixed else {}, tuple(ignore))
    for text in ignore:
        check_length(text, f"{_WHERE}.ignore")
    if len(found.by_kind[2]) > _MOST_WILD:
        raise _odd("ignore", f"at most {_MOST_WILD:,} expressions with a wildcard inside", ignore)
    return found


def _form(said: object, at: str, known: Collection[str]) -> Form:
    if not is_mapping(said):
        raise _odd(at, "a table", said)
    algo, group = _algorithm(said, at), said.get("group_size") or 0
    where = f"{_WHERE}.{at}.quant_algo" if at else f"{_WHERE}.quant_algo"
    if algo not in known:
        raise Refused(
            "weights are coded by an algorithm that this version does not decode, nothing was written",
            where=where,
            found=f"{algo:.80}",
            expected=", ".join(known),
        )
    if type(group) is not int or not 0 <= group < 1 << 31:
        raise _odd(f"{at}.group_size" if at else "group_size", "a positive whole number", group)
    if said.get("has_zero_point"):
        raise Refused(
            "codes have zero points, which ModelOpt stores none of, nothing was written",
            where=where.replace("quant_algo", "has_zero_point"),
        )
    return Form(algo, group)


def _algorithm(said: Mapping[str, object], at: str) -> str:
    """In capitals: ModelOpt writes what it has no public name for in small letters."""
    algo = said.get("quant_algo")
    if algo is not None and not isinstance(algo, str):
        raise _odd(f"{at}.quant_algo" if at else "quant_algo", "a name", algo)
    return (algo or "").upper()


def _odd(at: str, expected: str, found: object) -> Damaged:
    return Damaged(
        "the quantization config is not of the form that ModelOpt writes",
        where=f"{_WHERE}.{at}",
        expected=expected,
        found=f"{found!r:.80}",
    )
