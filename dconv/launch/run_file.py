"""A run's options as a file: what ``--save-config`` writes, and ``dconv config`` shows and changes.

A value stands in the file as somebody types it (``256MiB``, ``Ettt|ttL``), under its option's name with underscores.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Final

from dconv.errors import StorageFault, UsageError
from dconv.launch.arguments import arguments_of, repeats
from dconv.launch.config_file import load, typed
from dconv.launch.options import every_option
from dconv.sharding.parsed import is_list

#: What says how to read or show a file, and is none of a run's.
_OURS: Final = ("help", "config", "save_config", "debug")


def names() -> dict[str, argparse.Action]:
    """Every option of a file, by its name there."""
    return {_name(action): action for action in arguments_of(every_option()) if action.dest not in _OURS}


def named(key: str) -> tuple[str, argparse.Action]:
    """An option by any of its spellings: its name in a file, and what argparse knows of it.

    Raises:
        UsageError: there is none.
    """
    known, spelled = names(), key.lstrip("-").replace("-", "_")
    for name, action in known.items():
        if spelled in (name, action.dest):
            return name, action
    import difflib

    close = difflib.get_close_matches(spelled, known, 1)
    do = f"did you mean {close[0]}?" if close else "dconv config show --all FILE lists them"
    raise UsageError(f"{key} is no option", where="dconv config", do=do)


def read(path: Path) -> dict[str, Any]:
    """The options of a file, as they stand there; null is left out.

    Raises:
        UsageError, Damaged: see `dconv.launch.config_file.read_config`.
    """
    values = load(path)
    typed(values, path, every_option())
    return {named(str(key))[0]: value for key, value in values.items() if value is not None}


def given(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """The options that a command line gives, as they were typed, and below them those of its ``--config``.

    Args:
        parser: the command's own, which is of no use to anybody afterwards.
        words: after the command's own.

    Raises:
        UsageError: see `read`.
    """
    for action in arguments_of(parser):
        action.default = argparse.SUPPRESS
        action.type = None
    said = vars(parser.parse_args(words))
    values = read(Path(said["config"])) if "config" in said else {}
    for name, action in names().items():
        if action.dest in said:
            value = said[action.dest]
            more = is_list(value) and name in values
            values[name] = [*_listed(values[name]), *value] if more else as_typed(action, value)
    return values


def as_typed(action: argparse.Action, value: Any) -> Any:
    """What a file has for text from a command line: whole numbers as such, where the option is no text."""
    text_only = action.type in (None, str, Path)
    return int(value) if not text_only and isinstance(value, str) and re.fullmatch(r"\d{1,18}", value) else value


def save(path: Path, parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Write the options of a command line; a file that says the same already is left as it is.

    Args:
        path: of the file to write.
        parser: see `given`.
        words: see `given`.

    Raises:
        UsageError: there is another file of that name.
        StorageFault: it cannot be written.
    """
    import yaml

    values = given(parser, words)
    text = "# dconv convert --config " + path.name + "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    with _writing(path):
        if path.exists() and path.read_bytes() != text.encode():
            raise UsageError("there is another file of that name, nothing was written", where=f"--save-config {path}")
        _write(path, text)


def change(path: Path, key: str, texts: Sequence[str]) -> Any:
    """Give an option of a file another value; the rest of the file, comments too, stays as it is.

    Args:
        path: of the file; made where it is not there.
        key: the option, in any spelling.
        texts: as typed; several for an option that may stand several times, ``null`` alone for "not given".

    Returns:
        the value that the file has now.

    Raises:
        UsageError: no such option, or a value that it cannot have.
        StorageFault: it cannot be written.
    """
    name, action = named(key)
    value = _value(action, texts)
    with _writing(path):
        there = path.exists() and path.stat().st_size > 0
    if there:
        read(path)  # what is wrong with it is said first
    with _writing(path):
        before = path.read_text("utf-8") if there else ""
    typed({name: value}, path, every_option())
    with _writing(path):
        _write(path, _changed(before, name, value))
    return value


def _value(action: argparse.Action, texts: Sequence[str]) -> Any:
    if list(texts) == ["null"]:
        return None
    if repeats(action):
        return list(texts)
    if len(texts) != 1:
        raise UsageError(f"{action.dest} has one value", where="dconv config set", found=" ".join(texts))
    switch = {"true": True, "false": False}
    return switch.get(texts[0].lower(), texts[0]) if action.nargs == 0 else as_typed(action, texts[0])


def _changed(text: str, name: str, value: Any) -> str:
    yaml: Any = importlib.import_module("yaml")
    root = yaml.compose(text, yaml.SafeLoader)
    if isinstance(root, yaml.MappingNode) and root.flow_style:  # JSON
        return json.dumps({**yaml.safe_load(text), name: value}, indent=2, ensure_ascii=False) + "\n"
    shown = yaml.safe_dump([value], default_flow_style=True, width=1 << 20, allow_unicode=True).strip()[1:-1]
    for left, right in root.value if isinstance(root, yaml.MappingNode) else ():
        if named(left.value)[0] == name:
            begin, end = left.end_mark.index, right.end_mark.index  # a block ends where the next line begins
            return f"{text[:begin]}: {shown}{chr(10) * text[begin:end].endswith(chr(10))}{text[end:]}"
    return f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}{name}: {shown}\n"


def _name(action: argparse.Action) -> str:
    return max(action.option_strings, key=len).lstrip("-").replace("-", "_") if action.option_strings else action.dest


def _listed(value: Any) -> list[Any]:
    return value if is_list(value) else [value]


@contextlib.contextmanager
def _writing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as fault:
        raise StorageFault(f"the config file cannot be read or written: {fault}", where=str(path)) from fault


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, "utf-8")
        if path.exists():
            aside.chmod(path.stat().st_mode)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
