"""``--launcher slurm``: submits the right script of ``slurm/``, and can wait for the job."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def submit(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Submit ``python -m dconv.launch`` with ``words``; returns the conversion's exit code where it is waited for."""
    raise NotImplementedError
