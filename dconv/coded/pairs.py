"""Which scale belongs to which weight, where both are told by the ends of their names."""

from __future__ import annotations

from collections.abc import Container, Mapping

from dconv.errors import Damaged, group_names
from dconv.sharding.tensor import Stored


def pairs_of(
    tensors: Mapping[str, Stored], ends: tuple[str, str], kind: str, dtypes: Container[str] | None = None
) -> list[str]:
    """What the names of codes and of their scales have in common, in order; each proved to have both.

    Args:
        tensors: as they are stored, by name.
        ends: of the names of codes, and of scales.
        kind: of codes, for a person.
        dtypes: of codes; None where the name alone tells.

    Raises:
        Damaged: codes without scales, or the reverse.
    """
    codes, scales = ({name.removesuffix(end): name for name in tensors if name.endswith(end)} for end in ends)
    if dtypes is not None:
        codes = {stem: name for stem, name in codes.items() if tensors[name].spec.dtype in dtypes}
    alone, idle = sorted(codes.keys() - scales.keys()), sorted(scales.keys() - codes.keys())
    if alone:
        raise Damaged(
            f"{len(alone)} of {len(codes)} {kind} weights have no scales, without which their codes mean nothing",
            where=group_names([codes[stem] for stem in alone]),
            expected=f"{alone[0]}{ends[1]} beside it",
            do="fetch the files again; a model that was cast without scales cannot be restored",
        )
    if idle:
        raise Damaged(
            f"{len(idle)} scales belong to no {kind} weight",
            where=group_names([scales[stem] for stem in idle]),
            expected=f"{idle[0]}{ends[0]} in codes",
            do="fetch the files again",
        )
    return sorted(codes)
