"""What is said of codes beside config.json, and by some writers only there.

AutoGPTQ, GPTQModel and AutoAWQ write ``quantize_config.json``, ModelOpt ``hf_quant_config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dconv.errors import Refused
from dconv.sharding.parsed import is_mapping, mapping_or_empty

KEY: Final = "quantization_config"
#: ``quant_method`` of what AutoGPTQ and AutoAWQ began.
GPTQ, AWQ = "gptq", "awq"
#: GPTQModel's name for it, and ModelOpt's.
GPTQ_FILE, MODELOPT_FILE = "quantize_config.json", "hf_quant_config.json"
#: The files that there may be, each by the names that it has had: AutoAWQ's first one was another.
BESIDE: Final = ((GPTQ_FILE, "quant_config.json"), (MODELOPT_FILE,))
#: Spellings of one key, the usual one first.
_SAME: Final = (
    ("quant_method",),
    ("bits", "w_bit", "wbits"),
    ("group_size", "q_group_size"),
    ("checkpoint_format", "format", "version"),
    ("quant_algo",),
)


def with_beside(config: dict[str, object], said: Mapping[str, object], where: str) -> dict[str, object]:
    """A config with what a file beside it says of the codes; another method's config stays as it is.

    Raises:
        Refused: they say different things.
    """
    own = config.get(KEY)
    if KEY in config and not is_mapping(own):
        return config
    own = mapping_or_empty(own)
    if where.endswith(MODELOPT_FILE):
        from dconv.coded import modelopt_config  # seldom

        methods, older = modelopt_config.METHODS, own.get("quant_method") or modelopt_config.METHOD
        said = modelopt_config.flat(said)
    else:
        methods, older = (AWQ, GPTQ), AWQ if "w_bit" in said else GPTQ
    said = {"quant_method": older, **said}
    if own.get("quant_method", said["quant_method"]) not in methods:
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
