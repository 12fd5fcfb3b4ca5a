"""``dconv config``: look at a file of options, change it, and list the ready quantisations."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from dconv.commands.common import add_answer_options
from dconv.errors import UsageError
from dconv.launch.terminal import show, show_json
from dconv.report.table import Table
from dconv.sharding.parsed import is_list

_VERBS: Final = {
    "show": "show FILE [--all]",
    "get": "get FILE OPTION",
    "set": "set FILE OPTION VALUE",
    "list-presets": "list-presets",
}


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("verb", choices=tuple(_VERBS), help="what to do")
    parser.add_argument("words", nargs="*", metavar="WORD", help="FILE, OPTION and VALUE (null takes it away)")
    parser.add_argument("--all", action="store_true", help="show every option, with what it is when not given")
    add_answer_options(parser)


def run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Do it.

    Raises:
        DconvError: see `dconv.launch.run_file`.
    """
    args = parser.parse_intermixed_args(words)
    least, most = {"show": (1, 1), "get": (2, 2), "set": (3, None), "list-presets": (0, 0)}[args.verb]
    if len(args.words) < least or (most is not None and len(args.words) > most):
        raise UsageError("words are missing, or too many", expected=f"dconv config {_VERBS[args.verb]}")
    if args.verb == "list-presets":
        return _presets(as_json=args.json)
    path = Path(args.words[0])
    if args.verb == "show":
        return _show(path, whole=args.all, as_json=args.json)
    if args.verb == "get":
        return _get(path, args.words[1], as_json=args.json)
    from dconv.launch.run_file import change, named

    name, value = named(args.words[1])[0], change(path, args.words[1], args.words[2:])
    if args.json:
        show_json({name: value})
    else:
        show(f"{name}: {_shown(value)}  ->  {path}")
    return 0


def _show(path: Path, *, whole: bool, as_json: bool) -> int:
    from dconv.launch.run_file import names, read

    values, known = read(path), names()
    if as_json:
        defaults = {name: _default(action) for name, action in known.items()} if whole else {}
        show_json({**defaults, **values})
        return 0
    rows = [(name, _shown(values[name]), "given" if whole else "") for name in known if name in values]
    if whole:
        rows += [(name, _shown(_default(action)), "") for name, action in known.items() if name not in values]
    show(Table(rows) if rows else f"{path} gives no option")
    return 0


def _get(path: Path, key: str, *, as_json: bool) -> int:
    from dconv.launch.run_file import named, read

    name, action = named(key)
    values = read(path)
    value = values.get(name, _default(action))
    if as_json:
        show_json({"option": name, "value": value, "given": name in values})
    else:
        show(_shown(value))
    return 0


def _presets(*, as_json: bool) -> int:
    from importlib.resources import files

    from dconv.quant.parse import presets

    folder = files("dconv.quant") / "presets"
    said = {name: json.loads((folder / f"{name}.json").read_text("utf-8")) for name in presets()}
    if as_json:
        show_json(said)
    else:
        show(Table([(name, one.get("comment", "")) for name, one in said.items()]))
        show("", "dconv convert MODEL gptq --quantization-config NAME; a file with the same keys does as well")
    return 0


def _default(action: argparse.Action) -> Any:
    value: Any = action.default
    return value if value is None or is_list(value) or isinstance(value, bool | int | float | str) else str(value)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if is_list(value):
        return ", ".join(map(str, value)) or "-"
    return str(value).lower() if isinstance(value, bool) else str(value)
