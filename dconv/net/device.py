"""Where torch computes: what a person asks for (``--device``), or the best that this machine has."""

from __future__ import annotations

import os
import re
from typing import Final

from dconv.errors import UsageError

AUTO: Final = "auto"
#: What ``--device`` takes; of several GPUs one is named by its number, ``cuda:1``.
DEVICES: Final = "cpu, cuda, cuda:1, mps"
_NAMES: Final = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")


def check(asked: str) -> None:
    """Refuse what is no name of a device.

    Raises:
        UsageError: it is none of auto, cpu, mps, cuda and ``cuda:`` with a number.
    """
    if not is_name(asked):
        raise UsageError(
            "there is no such device, nothing was written", where=f"--device {asked:.80}", expected=f"auto, {DEVICES}"
        )


def is_name(said: str) -> bool:
    """Whether it is what ``--device`` takes."""
    return _NAMES.fullmatch(said) is not None


def is_here(device: str) -> bool:
    """Whether torch can compute on a device."""
    import torch

    kind, _, number = device.partition(":")
    if kind == "cuda":
        return torch.cuda.is_available() and int(number or 0) < torch.cuda.device_count()
    return kind != "mps" or torch.backends.mps.is_available()


def computing(asked: str) -> tuple[str, tuple[str, ...]]:
    """The device to compute fp64 sums on, and what to say of it: one that cannot be is the CPU instead.

    Of several GPUs each rank of a machine has one, unless it is named.
    """
    check(asked)
    if asked == AUTO:
        if not is_here("cuda"):
            return "cpu", ()
        return _mine(), ("computed on cuda, which was found here (--device cpu leaves it out)",)
    if asked == "mps":
        return "cpu", ("--device mps has no float64: computed on the CPU instead",)
    if not is_here(asked):
        return "cpu", (f"--device {asked} is not here: computed on the CPU instead",)
    return _mine() if asked == "cuda" else asked, ()


def _mine() -> str:
    """The GPU of this rank, by its number among the ranks of this machine."""
    import torch

    here = next((os.environ[name] for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in os.environ), "0")
    return f"cuda:{int(here) % torch.cuda.device_count()}" if here.isdecimal() else "cuda"


def placed(asked: str) -> tuple[str, tuple[str, ...]]:
    """The device that a graph is written for, and what to say of it. Nothing is computed: it need not be here.

    With ``auto`` it is the CPU, whatever wrote it: outputs are the same on every machine.
    """
    check(asked)
    if asked == AUTO:
        return "cpu", ()
    return asked, () if is_here(asked) else (
        f"written for {asked}, which is not here: it cannot be tried on this machine",
    )
