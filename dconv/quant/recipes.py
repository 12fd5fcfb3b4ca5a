"""From what a table gives a weight, and a method's settings, to how its numbers are chosen."""

from __future__ import annotations

from dconv.quant.gptq import Recipe
from dconv.quant.grid import Numbers
from dconv.quant.kinds import ROW
from dconv.quant.mixed import Choice
from dconv.quant.settings import Awq, Gptq


def recipe_of(choice: Choice, settings: Gptq | Awq, *, v1: bool) -> Recipe:
    """How a weight is quantised.

    Args:
        choice: of whole numbers.
        v1: zero points are stored less one, so that none may be 0.
    """
    group = -1 if choice.group == ROW else choice.group
    if isinstance(settings, Awq):
        return Recipe(Numbers(choice.bits, not settings.zero_point), group)
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
