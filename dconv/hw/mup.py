"""muP and hardware compilers: scalars are folded into the weights once, so that no compiler applies them again."""

from __future__ import annotations

from dataclasses import replace

from dconv.checkpoint.fold import nothing_to_fold
from dconv.describe import Described
from dconv.request import Request


def folded(model: Described, request: Request) -> tuple[Request, str, tuple[str, ...]]:
    """The conversion of a model for a compiler, what is recorded of its muP scalars, and what to say of them.

    Raises:
        Refused: scalars that cannot be folded.
    """
    if nothing_to_fold(model.family, model.config):
        return replace(request, mup2llama=False), "none", ()
    said = "muP scalars are folded into the weights: what is compiled is a plain model, and has none in its config"
    return replace(request, mup2llama=True), "folded", (said,)
