"""The ranks of a running job: how they meet, so that what one raises all raise, and which shard each holds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final, TypeVar

from dconv.errors import DconvError, StorageFault, ToolMissing, UsageError
from dconv.sharding.coords import Coord, Parallel

T = TypeVar("T")
S = TypeVar("S")
_STATE: Final = "megatron.core.parallel_state"


class Ranks:
    """The processes that call together.

    Args:
        group: a ``torch.distributed`` process group; None is all of them, or this process alone where there are none.
    """

    def __init__(self, group: object = None) -> None:
        self._group: Any = group
        self.rank, self.world = 0, 1
        dist = _distributed()
        if dist is not None:
            self.rank, self.world = dist.get_rank(self._group), dist.get_world_size(self._group)

    def together(self, work: Callable[[], tuple[T, S]]) -> tuple[T, list[S]]:
        """Do ``work``; its first result, and every rank's second.

        Raises:
            DconvError: what ``work`` raised here, else the first that it raised on another rank.
        """
        own: Any = None
        told: Any = None
        cause: Exception | None = None
        try:
            own, told = work()
        except Exception as error:  # nobody may be left waiting
            cause = error
        mine = None if cause is None else _portable(cause, self.rank)
        everyone = self._exchange((told, mine))
        if mine is not None and mine is not cause:
            raise mine from cause
        if mine is not None:
            raise mine
        for _, error in everyone:
            if error is not None:
                raise error
        return own, [told for told, _ in everyone]

    def _exchange(self, mine: tuple[Any, DconvError | None]) -> list[tuple[Any, DconvError | None]]:
        dist = _distributed()
        if self.world == 1 or dist is None:
            return [mine]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone


def _distributed() -> Any:
    """``torch.distributed`` where a process group runs."""
    import torch.distributed as dist

    return dist if dist.is_available() and dist.is_initialized() else None


def _portable(error: Exception, rank: int) -> DconvError:
    """An error as other ranks raise it."""
    if isinstance(error, DconvError):
        return error
    kind = StorageFault if isinstance(error, OSError | MemoryError) else ToolMissing
    return kind(f"rank {rank} failed, and with it the handoff", found=f"{type(error).__name__}: {error}"[:2000])


def standing(coord: Coord | None, parallel: Parallel | None, ranks: Ranks) -> tuple[Coord, Parallel]:
    """This rank's place and the job's sizes: as given, else Megatron's, else those of a process alone.

    Raises:
        UsageError: they do not say which shard this rank holds.
    """
    state = sys.modules.get(_STATE)
    place = None
    if coord is None and parallel is None and state is not None and state.model_parallel_is_initialized():
        parallel = Parallel(
            tp=state.get_tensor_model_parallel_world_size(),
            pp=state.get_pipeline_model_parallel_world_size(),
            ep=state.get_expert_model_parallel_world_size() or 1,
            etp=state.get_expert_tensor_parallel_world_size() or 1,
        )
        place = (
            state.get_pipeline_model_parallel_rank(),
            state.get_tensor_model_parallel_rank(),
            state.get_expert_model_parallel_rank() or 0,
            state.get_expert_tensor_parallel_rank() or 0,
        )
        coord = next((c for c in parallel.coords() if (c.pp, c.tp, c.ep, c.etp) == place), None)
    parallel = parallel or Parallel()
    coords = list(parallel.coords())
    if coord is None and place is None and ranks.world == parallel.world:
        return coords[ranks.rank], parallel
    if coord not in coords:
        raise UsageError(
            "nothing says which shard this rank holds, nothing was written",
            expected="Megatron's parallel state, or coord= and parallel= of the running job",
            found=f"{coord or place or 'no coord'}, {parallel.described}, {ranks.world} ranks",
        )
    return coord, parallel
