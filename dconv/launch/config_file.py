"""``--config run.yaml``: the command line's options from a file, held to the same types."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dconv.errors import UsageError


def read_config(path: Path, parser: argparse.ArgumentParser, whole: argparse.ArgumentParser) -> dict[str, object]:
    """The values that a YAML or JSON file gives to the options of ``parser``, by their ``dest``.

    Args:
        whole: knows the options of all commands; a value for one that ``parser`` lacks is checked and left out.

    Raises:
        UsageError: no such file, an option that is not known, or a value that it cannot have.
    """
    mine = {action.dest for action in parser._actions}
    return {name: value for name, value in typed(_load(path), path, parser, whole).items() if name in mine}


def typed(values: Mapping[Any, Any], path: Path, *parsers: argparse.ArgumentParser) -> dict[str, object]:
    """Values of options as these have them, by their ``dest``; what is null is left out.

    Args:
        path: of the file that they stand in, for errors.
        parsers: that know the options; an earlier one counts more.

    Raises:
        UsageError: an option that is not known, or a value that it cannot have.
    """
    actions: dict[str, argparse.Action] = {}
    for parser in parsers:
        actions = {**_actions(parser), **actions}
    found: dict[str, object] = {}
    for key, value in values.items():
        action = actions.get(str(key)) or actions.get(str(key).replace("_", "-"))
        if action is None:
            import difflib

            close = difflib.get_close_matches(str(key), actions, 1)
            raise UsageError(
                f"{key} is no option", where=str(path), do=f"did you mean {close[0]}?" if close else "see --help"
            )
        if value is not None:  # null is how YAML says "not given"
            found[action.dest] = _typed(action, value, path)
    return found


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:  # argparse offers no public way to look its options up
        actions[action.dest] = action
        actions.update({option.lstrip("-"): action for option in action.option_strings})
    return actions


def _typed(action: argparse.Action, value: Any, path: Path) -> object:
    """A value as the option has it: true or false, text, or what its converter makes of text and whole numbers.

    Options that may stand several times on a line take one text or a list of them.
    """

    def wrong(why: str) -> UsageError:
        return UsageError(f"{action.dest} {why}", where=str(path), found=f"{value!r:.80}")

    if action.nargs == 0:
        if not isinstance(value, bool):
            raise wrong("is true or false")
        return value
    if isinstance(action, argparse._AppendAction):
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise wrong("is text, or a list of texts")
        return texts
    convert: Callable[[str], object] = action.type if callable(action.type) else str
    text_only = convert in (str, Path)
    if isinstance(value, bool) or not isinstance(value, str if text_only else str | int | float):
        raise wrong("is text" if text_only else "is text or a number")
    try:
        made = convert(str(value))
    except (argparse.ArgumentTypeError, ValueError, OverflowError) as fault:
        raise UsageError(f"{action.dest}: {fault}", where=str(path)) from fault
    if action.choices is not None and made not in action.choices:
        raise UsageError(f"{action.dest} cannot be {value!r}", where=str(path), expected=", ".join(action.choices))
    return made


def _load(path: Path) -> dict[Any, Any]:
    import yaml  # a rank without --config does not pay for it

    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as fault:
        raise UsageError(f"cannot read the config file: {fault}", where=str(path)) from fault
    if not isinstance(values, dict):
        raise UsageError("the config file is no mapping of options", where=str(path))
    return values
