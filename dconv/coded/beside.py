"""``quantize_config.json``: what AutoGPTQ, GPTQModel and AutoAWQ say beside config.json, and some only there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dconv.coded import awq, gptq_config
from dconv.errors import Refused

KEY: Final = "quantization_config"
#: GPTQModel's name for it, and AutoAWQ's first one.
BESIDE: Final = ("quantize_config.json", "quant_config.json")
#: Spellings of one key, the usual one first.
_SAME: Final = (
    ("quant_method",),
    ("bits", "w_bit", "wbits"),
    ("group_size", "q_group_size"),
    ("checkpoint_format", "format", "version"),
)


def with_beside(config: dict[str, object], said: Mapping[str, object], where: str) -> dict[str, object]:
    """A config with what a file beside it says of the codes; another method's config stays as it is.

    Raises:
        Refused: they say different things.
    """
    own = config.get(KEY)
    if KEY in config and not isinstance(own, Mapping):
        return config
    own = own if isinstance(own, Mapping) else {}
    older = {"quant_method": awq.METHOD if "w_bit" in said else gptq_config.METHOD}
    said = {**older, **said}
    if own.get("quant_method", said["quant_method"]) not in (awq.METHOD, gptq_config.METHOD):
        return config
    for names in _SAME:
        values = {str(value).lower() for one in (own, said) if (value := _first(one, names)) is not None}
        if len(values) > 1:
            raise Refused(
                "two configs do not agree on how the weights are quantised, nothing was written",
                where=f"{where}, beside config.json: {KEY}.{names[0]}",
                found=f"{' and '.join(sorted(values)):.80}",
                do="remove or correct the one that is not of these files",
            )
    return {**config, KEY: {**said, **own}}


def _first(said: Mapping[str, object], names: tuple[str, ...]) -> object:
    return next((said[name] for name in names if said.get(name) is not None), None)
