"""Which tensors of a plan keep every value, and what happens to those of the others: a plan's precision map."""

from __future__ import annotations

from typing import Any, Final

from dconv.errors import group_names
from dconv.sharding.ops import Cast, Derive, Move, Op, Scale
from dconv.sharding.plan import Plan

#: Largest relative error of one rounding of a normal number: 2 to this power (half a unit in the last place).
_ROUNDOFF: Final = {"f64": -53, "f32": -24, "f16": -11, "bf16": -8}


def numeric(plan: Plan) -> dict[Op, list[str]]:
    """Logical tensors by the op that changes their values; those that are in no list are written bit by bit."""
    found: dict[Op, dict[str, None]] = {}
    for tensor, copies in zip(plan.target.tensors, plan.copies, strict=True):
        one = len({copy.op for copy in copies}) == 1
        for copy in copies[:1] if one else copies:
            if not copy.op.exact:
                # q, k and v in one tensor may differ in their ops
                slots = (s for s in tensor.slots if one or s.stored.intersect(copy.region) is not None)
                found.setdefault(copy.op, {}).update(dict.fromkeys(slot.tensor for slot in slots))
    return {op: list(names) for op, names in found.items()}


def precision(plan: Plan) -> list[dict[str, Any]]:
    """`numeric` for a report: ``op`` in words with its error, ``count``, and ``tensors`` by folded names."""
    return [
        {"op": words(op), "count": len(names), "tensors": group_names(names).split("\n")}
        for op, names in numeric(plan).items()
    ]


def words(op: Op) -> str:
    """What an op does to a value, with its error."""
    match op:
        case Move():
            return "the same bytes"
        case Cast(source, target) if op.exact:
            return f"{source} widened to {target}, exact"
        case Cast(source, target):
            return f"{source} rounded once to {target} (relative error up to 2^{_ROUNDOFF[target]})"
        case Scale(source, target, factor):
            return (
                f"{source} x {factor:.6g} in f64, rounded once to {target} (relative error up to 2^{_ROUNDOFF[target]})"
            )
        case Derive(how, target, factor):
            times = f" x {factor:.6g}" if factor != 1.0 else ""
            rounded = f", rounded once to {target} (relative error up to 2^{_ROUNDOFF[target]})" if how.floats else ""
            return f"{how.words}{times}{rounded}"
        case _:
            return "exact"
