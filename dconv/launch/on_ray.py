"""``--launcher ray``: an actor for each rank, and a driver that outlives them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dconv.launch.history import Record


def run(args: argparse.Namespace, words: Sequence[str], record: Record) -> int:
    """Run ``python -m dconv.launch`` with ``words`` on a Ray cluster; returns the conversion's exit code."""
    raise NotImplementedError
