"""What ranks say to each other while they calibrate: sums, results and signs, over torch.distributed or alone."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dconv.errors import UsageError

if TYPE_CHECKING:
    import torch

#: One rank may have to read and compute much longer than another, and storage may stall.
_PATIENCE: Final = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This rank among those of a run. Every method is called by all of them, in the same order."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    def begin(self) -> None:
        """Meet the others, where the launcher's variables say.

        Raises:
            UsageError: they do not.
        """
        if self.world == 1:
            return
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UsageError(
                "ranks that calibrate talk to each other, and do not know where, nothing was written",
                where=f"{', '.join(missing)} of the environment",
                expected="an address that all ranks reach, as torchrun sets it",
                do="torchrun, or export them in the batch script",
            )
        import torch
        from torch import distributed

        if self.device.startswith("cuda"):
            torch.cuda.set_device(self.device)
        distributed.init_process_group(
            "nccl" if self.device.startswith("cuda") else "gloo",
            rank=self.rank,
            world_size=self.world,
            timeout=_PATIENCE,
        )

    def end(self) -> None:
        """Part."""
        if self.world > 1:
            from torch import distributed

            if distributed.is_initialized():
                distributed.destroy_process_group()

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Add up, in place."""
        if self.world > 1:
            from torch import distributed

            for tensor in tensors:
                distributed.all_reduce(tensor)

    def counts(self, numbers: list[int]) -> list[int]:
        """The sums of some whole numbers."""
        if self.world == 1:
            return numbers
        import torch

        held = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        self.sum([held])
        return held.tolist()

    def tell(self, tensor: torch.Tensor, source: int) -> None:
        """Give everyone the tensor of rank ``source``, in place."""
        if self.world > 1:
            from torch import distributed

            distributed.broadcast(tensor, source)

    def least(self, number: int) -> int:
        """The least of all."""
        if self.world == 1:
            return number
        import torch
        from torch import distributed

        held = torch.tensor([number], dtype=torch.int64, device=self.device)
        distributed.all_reduce(held, distributed.ReduceOp.MIN)
        return int(held)

    def any(self, sign: bool) -> bool:
        """Whether one of them says so."""
        return self.counts([int(sign)])[0] > 0

    def wait(self) -> None:
        """Until all are here."""
        self.counts([0])
