"""What argparse knows of a parser's arguments, for which it has no public names."""

from __future__ import annotations

import argparse


def arguments_of(parser: argparse.ArgumentParser) -> tuple[argparse.Action, ...]:
    """All arguments of a parser, in the order in which they were added."""
    return tuple(parser._actions)


def repeats(action: argparse.Action) -> bool:
    """Whether an option may stand several times on a line."""
    return isinstance(action, argparse._AppendAction)  # pyright: ignore[reportPrivateUsage] - it has no public name
