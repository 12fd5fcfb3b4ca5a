"""JSON and YAML files that a person writes for an option: one mapping, read so that nothing in it is lost or run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dconv.checkpoint.files import parse_json, read_small
from dconv.errors import Damaged, UsageError
from dconv.sharding.parsed import is_list

if TYPE_CHECKING:
    import yaml

#: Nobody writes longer ones by hand.
_MAX_BYTES: Final = 1 << 20
#: What YAML's core has.
_TAGS: Final = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge")
)


def read_mapping(path: Path, option: str, *, expected: str = "", texts: bool = False) -> dict[Any, Any]:
    """The mapping that a file holds: JSON where its name says so, else YAML.

    Args:
        path: the file.
        option: the option that names the file.
        expected: what the file should hold, for errors.
        texts: leave YAML's keys and values the texts that they are (a name may look like a number), and None for what
            is no text. Otherwise they are of the types that YAML gives them.

    Raises:
        UsageError: no such file, one that is too long, no mapping, YAML that is none, has a key twice, or, without
            ``texts``, aliases (few bytes may stand for many).
        Damaged: JSON that is none, or has a key twice; YAML with a tag of its own, or deeper than any.
    """
    if not path.is_file():
        raise UsageError(f"{option} names no file", where=str(path), expected=expected)
    what = f"the file of {option}"
    data = read_small(path, what=what)
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{what} is implausibly large", where=str(path), found=f"{len(data)} bytes")
    if path.suffix == ".json":
        return parse_json(data, where=str(path), what=what)
    import yaml  # a rank without such a file does not pay for it

    try:
        loader: Any = yaml.SafeLoader(data)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{what} is no mapping", where=str(path), expected=expected)
        _check(node, path, what, aliases=texts)
        if texts:
            return {_text(key): _text(value) for key, value in node.value}
        return loader.construct_document(node)
    except RecursionError as fault:
        raise Damaged(f"{what} is implausibly deep", where=str(path)) from fault
    except (ValueError, yaml.YAMLError) as fault:
        raise UsageError(f"{what} is no YAML", where=str(path), found=str(fault)[:200]) from fault


def _text(node: yaml.Node) -> str | None:
    return node.value if isinstance(node.value, str) else None  # else its children


def check_tag(node: yaml.Node, path: Path) -> None:
    """That a node of a YAML file asks for nothing but a value.

    Raises:
        Damaged: a tag beyond YAML's own types, such as those by which Python objects are made.
    """
    if node.tag not in _TAGS:
        raise Damaged(
            "a YAML file with a tag that asks for more than values",
            where=str(path),
            expected="plain maps, lists, texts and numbers",
            found=node.tag[:120],
            do="do not load this file with an unsafe loader either: loading would run what the tag names",
        )


def _check(top: yaml.MappingNode, path: Path, what: str, *, aliases: bool) -> None:
    """Refuse keys that stand there twice, and, but for ``aliases``, nodes that do."""
    seen: set[int] = set()
    waiting: list[yaml.Node] = [top]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            if not aliases:
                raise UsageError(f"{what} has YAML aliases", where=str(path), do="write the values out")
            continue
        seen.add(id(node))
        check_tag(node, path)
        children: list[yaml.Node | tuple[yaml.Node, yaml.Node]] = node.value if is_list(node.value) else []
        keys: set[tuple[str, str]] = set()
        for child in children:
            if not isinstance(child, tuple):
                waiting.append(child)
                continue
            key, value = child
            text = _text(key)
            if text is not None and (key.tag, text) in keys:
                raise UsageError(f"a key of {what} stands there twice", where=f"{text!r:.200} in {path}")
            keys.add((key.tag, text or ""))
            waiting += key, value
