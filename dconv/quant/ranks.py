"""What ranks say to each other while they calibrate: sums, results and signs, over torch.distributed or alone."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from dconv.errors import Preempted, UsageError
from dconv.net.untyped import listed

if TYPE_CHECKING:
    import torch

#: One rank may have to read and compute much longer than another, and storage may stall.
_PATIENCE: Final = datetime.timedelta(hours=2)
#: Until all have come; they are started together, and have only planned so far.
_MEETING: Final = datetime.timedelta(minutes=15)


class Told(Exception):
    """This rank was told to stop, in the midst of something that it need not finish."""


@dataclass(frozen=True)
class Ranks:
    """This rank among those of a run, or of a part of them. Every method is called by all, in the same order.

    Any of them raises `Preempted` where another rank has gone: what is finished is kept, and a new run goes on.

    Attributes:
        stop: set when this rank is to leave. It may be heard at any time, and is agreed upon with `leaving_together`;
            a part alone agrees on nothing.
        members: of a part, their numbers in the whole run.
        group: of a part, torch.distributed's.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    stop: threading.Event = field(default_factory=threading.Event)
    members: tuple[int, ...] = ()
    group: Any = None

    def begin(self) -> None:
        """Meet the others, where the launcher's variables say.

        Raises:
            UsageError: they do not.
            Preempted: some do not come.
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

        distributed = _distributed()

        if self.device.startswith("cuda"):
            torch.cuda.set_device(self.device)
        rendezvous = import_module("torch.distributed.rendezvous")
        with _met():
            store, _, _ = next(rendezvous.rendezvous("env://", self.rank, self.world, timeout=_MEETING))
            distributed.init_process_group(
                "nccl" if self.device.startswith("cuda") else "gloo",
                store=store,
                rank=self.rank,
                world_size=self.world,
                timeout=_PATIENCE,
            )

    def part(self, each: Sequence[Sequence[int]]) -> Ranks:
        """This rank among those of its part, where ``each`` parts all of them."""
        if self.world == 1:
            return self
        distributed = _distributed()
        with _met():
            groups = [distributed.new_group(list(members)) for members in each]  # all ranks make all of them
        members, group = next((tuple(m), g) for m, g in zip(each, groups, strict=True) if self.rank in m)
        return Ranks(members.index(self.rank), len(members), self.device, members=members, group=group)

    def end(self) -> None:
        """Leave the others. It is no error that there was no meeting."""
        if self.world > 1:
            distributed = _distributed()
            if distributed.is_initialized():
                distributed.destroy_process_group()

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Add up tensors, each with those of the other ranks, in place."""
        if self.world > 1:
            distributed = _distributed()
            with _met():
                for tensor in tensors:
                    distributed.all_reduce(tensor, group=self.group)

    def counts(self, numbers: list[int]) -> list[int]:
        """The sums over all ranks of some whole numbers, one by one."""
        if self.world == 1:
            return numbers
        import torch

        held = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        self.sum([held])
        return listed(held)

    def tell(self, tensor: torch.Tensor, source: int) -> None:
        """Give everyone the tensor of rank ``source``, in place."""
        if self.world > 1:
            distributed = _distributed()
            with _met():
                distributed.broadcast(tensor, self.members[source] if self.members else source, group=self.group)

    def all_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Everyone's tensor of one shape, [ranks, …]."""
        import torch

        if self.world == 1:
            return tensor[None]
        distributed = _distributed()
        out = torch.empty(self.world, *tensor.shape, dtype=tensor.dtype, device=tensor.device)
        with _met():
            distributed.all_gather(list(out.unbind()), tensor, group=self.group)
        return out

    def exchange(self, rows: torch.Tensor, sent: Sequence[int], coming: Sequence[int]) -> torch.Tensor:
        """Send rows to each, and have theirs, in the order of ranks.

        Args:
            rows: [rows, …], in the order of the ranks that they are for.
            sent: how many are for each rank.
            coming: how many each has for this one.
        """
        import torch

        distributed = _distributed()
        out = torch.empty(sum(coming), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        with _met():
            distributed.all_to_all_single(out, rows, list(coming), list(sent), group=self.group)
        return out

    def gather(self, said: Any) -> list[Any]:
        """What everyone has to say, in plain JSON."""
        if self.world == 1:
            return [said]
        distributed = _distributed()
        found: list[Any] = [None] * self.world
        with _met():
            distributed.all_gather_object(found, said, group=self.group)
        return found

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""
        if self.world == 1:
            return number
        import torch

        distributed = _distributed()
        held = torch.tensor([number], dtype=torch.int64, device=self.device)
        with _met():
            distributed.all_reduce(held, distributed.ReduceOp.MIN, group=self.group)
        return int(held)

    def any(self, sign: bool) -> bool:
        """Whether any rank has this sign."""
        return self.counts([int(sign)])[0] > 0

    def wait(self) -> None:
        """Come back when all ranks have called this."""
        self.counts([0])

    def hear(self) -> None:
        """Go on, unless this rank was told to stop.

        Raises:
            Told: it was.
        """
        if self.stop.is_set():
            raise Told

    @contextlib.contextmanager
    def leaving_together(self) -> Generator[None, None, None]:
        """Do something in which this rank may be told to stop; at its end all ranks go on, or all leave.

        What a rank that was told has not done is of no use, so that nothing of it may be told to others or kept before
        this ends.

        Raises:
            Preempted: some rank was told.
        """
        try:
            yield
        except Told:
            pass
        except Preempted:
            if not self.stop.is_set():  # no sign of this rank's own
                raise
        if self.any(self.stop.is_set()):
            raise Preempted(
                "stopped by a signal; the layers that are finished are kept",
                do="run the same command again (with --resume) to go on",
            )


def _distributed() -> Any:
    """What torch has for it, most of which has no annotations."""
    from torch import distributed

    return distributed


@contextlib.contextmanager
def _met() -> Generator[None, None, None]:
    """What torch raises where ranks do not come together is one of them gone, or kept from the others."""
    try:
        yield
    except RuntimeError as fault:
        raise Preempted(
            "another rank has ended, or cannot be reached any more; the layers that are finished are kept",
            found=str(fault).strip().partition("\n")[0][:300],
            do="see what the other ranks say; run the same command again (with --resume) to go on",
        ) from fault
