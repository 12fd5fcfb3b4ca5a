"""From what a table gives a weight, and a method's settings, to how its numbers are chosen."""

from __future__ import annotations

from dconv.quant.gptq import Recipe
from dconv.quant.grid import Numbers
from dconv.quant.kinds import ROW
from dconv.quant.mixed import Choice
from dconv.quant.settings import Awq, Gptq
from dconv.sharding.dtypes import TO_TORCH


def recipe_of(choice: Choice, settings: Gptq | Awq, *, v1: bool, dtype: str) -> Recipe:
    """How a weight is quantised.

    Args:
        choice: of whole numbers.
        settings: the method's.
        v1: zero points are stored less one, so that none may be 0.
        dtype: dconv's name of the model's own. AWQ's readers have scales in it, whatever the file has; and
            all that bf16 has but the very small is in fp16, too.
    """
    group = -1 if choice.group == ROW else choice.group
    if isinstance(settings, Awq):
        stored = TO_TORCH[dtype] if dtype == "bf16" else "float16"
        return Recipe(Numbers(choice.bits, not settings.zero_point, stored), group)
    return Recipe(
        Numbers(choice.bits, settings.sym, least_zero=int(v1)),
        group,
        settings.desc_act,
        settings.act_group_aware and not settings.desc_act,
        settings.static_groups,
        settings.mse,
        settings.damp_percent,
        settings.damp_auto_increment,
    )
