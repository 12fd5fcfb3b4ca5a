"""``--launcher torchrun``: the ranks of this machine under torchrun, which starts them again when one is lost."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Run ``python -m dconv.launch`` with ``words`` under torchrun; returns the conversion's exit code."""
    raise NotImplementedError
