"""Live handoff, see `dconv.live.handoff`."""

from dconv.live.ranks import Ranks
from dconv.live.steps import handoff

__all__ = ["Ranks", "handoff"]
