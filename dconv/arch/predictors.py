"""Multi-token prediction as an aspect: layers after the last that predict tokens further on (DeepSeek-V3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dconv.arch.args import ARGS
from dconv.arch.fields import count
from dconv.arch.translate import CONFIG, Said
from dconv.errors import Damaged

#: What files call their number, first what is written.
KEYS: Final = ("num_nextn_predict_layers", "num_mtp_layers")
#: Far above every model, which has one or two; each has a layer's tensors, experts included, in the plan.
_MOST: Final = 1000


@dataclass(frozen=True)
class Predictors:
    """How many such layers there are."""

    @property
    def owns(self) -> tuple[str, ...]:
        """How many there are."""
        return ("mtp_num_layers",)

    @property
    def compared(self) -> Mapping[str, str]:
        """How many there are, under the name that is written."""
        return {KEYS[0]: "mtp_num_layers"}

    def facts(self, said: Said) -> dict[str, Any]:
        """``mtp``: how many there are.

        Raises:
            Damaged: it is no whole number, or more than any model has.
        """
        # an alias that a file gives stands before the default of the name that is written
        key = next((key for key in reversed(KEYS) if said.get(key) is not None), "")
        found = count(said, key, CONFIG) if key else 0
        if found > _MOST:
            raise Damaged(f"{key} is {found}", where=f"{CONFIG}: {key}", expected=f"at most {_MOST} token predictors")
        return {"mtp": found}

    def to_args(self, _said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """How many there are, null for none; nothing is lost."""
        return {"mtp_num_layers": facts["mtp"] or None}, []

    def to_hf(self, said: Said) -> dict[str, object]:
        """How many there are, under the name that is written."""
        return {KEYS[0]: count({"mtp_num_layers": 0, **said}, "mtp_num_layers", ARGS)}

    def mismatches(self, _said: Said) -> list[str]:
        """None: a model may have any number."""
        return []

    def needs(self, _said: Said) -> list[str]:
        """Nothing: mainline megatron-core computes it."""
        return []


def without(config: Mapping[str, object]) -> dict[str, object]:
    """The config of the same model without its predictors."""
    return {**config, **{key: 0 for key in KEYS if key in config or key == KEYS[0]}}
