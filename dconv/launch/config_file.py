"""``--config run.yaml``: the command line's options from a file, held to the same types."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dconv.checkpoint.small_config import check_tag
from dconv.errors import Damaged, UsageError
from dconv.launch.arguments import arguments_of, repeats
from dconv.sharding.parsed import is_dict, is_list, is_list_or_tuple, is_texts

if TYPE_CHECKING:
    import yaml

#: Nobody writes longer ones by hand: a batch of 10,000 models is a megabyte.
_MAX_BYTES: Final = 16 << 20
_MOST_VALUES: Final = 1_000_000


def read_config(path: Path, parser: argparse.ArgumentParser, whole: argparse.ArgumentParser) -> dict[str, object]:
    """The values that a YAML or JSON file gives to the options of ``parser``, by their ``dest``.

    Args:
        path: of the file.
        parser: whose options are wanted.
        whole: knows the options of all commands; a value for one that ``parser`` lacks is checked and left out.

    Raises:
        UsageError: no such file, an option that is not known or given twice, or a value that it cannot have; another
            file of options.
        Damaged: a file that is larger or deeper than any, or asks for objects.
    """
    mine = {action.dest for action in arguments_of(parser)}
    found = typed(load(path), path, parser, whole)
    if "config" in found:
        raise UsageError("a config file names no other one", where=f"config in {path}", do="put the options into one")
    return {name: value for name, value in found.items() if name in mine}


def typed(values: Mapping[Any, Any], path: Path, *parsers: argparse.ArgumentParser) -> dict[str, object]:
    """Values of options as these have them, by their ``dest``; what is null is left out.

    Args:
        values: by an option's name or ``dest``.
        path: of the file that they stand in, for errors.
        parsers: that know the options; an earlier one counts more.

    Raises:
        UsageError: an option that is not known, or given twice, or a value that it cannot have.
    """
    actions = _by_name(parsers)
    found = by_dest(values, path, *parsers)
    # null is how YAML says "not given"
    return {dest: _typed(actions[dest], value, path) for dest, value in found.items() if value is not None}


def by_dest(values: Mapping[Any, Any], path: Path, *parsers: argparse.ArgumentParser) -> dict[str, Any]:
    """The same as they stand in the file, null among them; see `typed`.

    Raises:
        UsageError: an option that is not known, or given twice.
    """
    actions = _by_name(parsers)
    found: dict[str, Any] = {}
    for key, value in values.items():
        action = actions.get(str(key)) or actions.get(str(key).replace("_", "-"))
        if action is None:
            import difflib

            close = difflib.get_close_matches(str(key), actions, 1)
            raise UsageError(
                f"{key} is no option", where=str(path), do=f"did you mean {close[0]}?" if close else "see --help"
            )
        if action.dest in found:
            raise UsageError(f"{key} is given twice, by another name as well", where=str(path))
        found[action.dest] = value
    return found


def _by_name(parsers: Sequence[argparse.ArgumentParser]) -> dict[str, argparse.Action]:
    actions: dict[str, argparse.Action] = {}
    for parser in reversed(parsers):  # an earlier one counts more
        for action in arguments_of(parser):
            actions[action.dest] = action
            actions.update({option.lstrip("-"): action for option in action.option_strings})
    return actions


def _typed(action: argparse.Action, value: Any, path: Path) -> object:
    """A value as the option has it: true or false, text, or what its converter makes of text and whole numbers.

    Options that may stand several times on a line take one text or a list of them; those whose value may be left out
    also true or false.
    """

    def wrong(why: str) -> UsageError:
        return UsageError(f"{action.dest} {why}", where=str(path), found=f"{value!r:.80}")

    if action.nargs == 0:
        if not isinstance(value, bool):
            raise wrong("is true or false")
        return value
    if action.nargs == "?" and isinstance(value, bool):
        return action.const if value else action.default
    if repeats(action):
        texts = [value] if isinstance(value, str) else value
        if not is_texts(texts):
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


def load(path: Path) -> dict[Any, Any]:
    """What a YAML or JSON file says, nothing of it checked but its size and that it is a mapping with no key twice.

    Raises:
        UsageError, Damaged: see `read_config`.
    """
    import yaml  # a rank without --config does not pay for it

    try:
        if path.is_file() and path.stat().st_size > _MAX_BYTES:
            raise Damaged("the config file is implausibly large", where=str(path), expected=f"{_MAX_BYTES:,} bytes")
        loader: Any = yaml.SafeLoader(path.read_text("utf-8"))
        node = loader.get_single_node()
        if node is not None:
            _check(node, path)
        values = None if node is None else loader.construct_document(node)
    except RecursionError as fault:
        raise Damaged("the config file is implausibly deep", where=str(path)) from fault
    except (OSError, ValueError, yaml.YAMLError) as fault:
        raise UsageError(f"cannot read the config file: {fault}", where=str(path)) from fault
    if not is_dict(values):
        raise UsageError("the config file is no mapping of options", where=str(path))
    return values


def _check(top: yaml.Node, path: Path) -> None:
    """That a config file stands for as many values as somebody may have written, and for values alone.

    Raises:
        UsageError: a key that stands in one mapping twice.
        Damaged: tags that make objects; aliases that stand for more values than anybody writes, or for themselves.
    """
    left, waiting = _MOST_VALUES, [top]
    while waiting:
        node = waiting.pop()
        check_tag(node, path)
        left -= 1
        if left < 0:
            raise Damaged("aliases in the config file stand for more than anybody writes", where=str(path))
        children: Any = node.value  # entries of a sequence, or pairs of a mapping
        keys: set[str] = set()
        for child in children if is_list(children) else ():
            waiting += child if is_list_or_tuple(child) else (child,)
            key: Any = child[0].value if is_list_or_tuple(child) else None
            if isinstance(key, str) and key in keys:  # the last one would count, and nobody would know
                raise UsageError(f"{key:.80} stands there twice", where=str(path), do="leave one of the two out")
            keys.update([key] if isinstance(key, str) else ())
