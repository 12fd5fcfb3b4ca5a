"""What the pages have in common: the frame with its style, escaping, and how one is written."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from dconv.errors import StorageFault, UsageError
from dconv.sharding.finish import require_parent

#: Letters of a name that are shown; a hostile header has names of megabytes.
_NAME: Final = 300
_HERE: Final = Path(__file__).parent


def framed(template: str, parts: Mapping[str, str], *, title: str, command: str, report: Mapping[str, Any]) -> str:
    """A page: a template of this folder, filled, in the frame that all pages share.

    Args:
        template: a file's name.
        parts: HTML by the template's words.
        command: that makes such pages; it marks them.
        report: what a program reads of it.
        title: of the page.
    """
    around = {"title": said(title), "generator": said(command), "body": filled(template, parts), "json": _json(report)}
    return filled("frame.html", around)


def filled(template: str, parts: Mapping[str, str]) -> str:
    """A template of this folder with its words replaced; what is put in is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], (_HERE / template).read_text("utf-8"))


def said(text: object) -> str:
    """Text as HTML that shows it."""
    words = str(text)
    return html.escape(words if len(words) <= 20 * _NAME else words[: 20 * _NAME] + "…")


def named(text: str) -> str:
    """A name, cut where it is longer than any."""
    return text if len(text) <= _NAME else text[:_NAME] + "…"


def printable(text: str) -> str:
    """Text of which nothing turns round what stands beside it, or hides."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def listed(facts: Iterable[tuple[str, str]]) -> str:
    """Labels with something to say and their values; a line without a label goes on with what is before it."""
    merged: list[tuple[str, str]] = []
    for label, value in facts:
        if not label and merged:
            merged[-1] = (merged[-1][0], f"{merged[-1][1]}\n{value}")
        elif value:
            merged.append((label, value))
    return "".join(f"<dt>{said(label)}</dt><dd>{said(value)}</dd>" for label, value in merged)


def _json(report: Mapping[str, Any]) -> str:
    return json.dumps(report).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def check_place(path: Path, *, option: str, command: str) -> None:
    """That a page can be written at ``path``, tried before there is one.

    Raises:
        UsageError: there is something else of that name.
        StorageFault: it cannot be written there.
    """
    aside = _aside(path)
    try:
        _require_page(path, option, command)
        aside.touch(exist_ok=True)
        aside.unlink(missing_ok=True)
    except OSError as fault:
        raise StorageFault(
            f"cannot write the page: {fault.strerror}, nothing was written",
            where=f"{option} {path}",
            do="name a file in a directory that is there and may be written to",
        ) from fault


def write(path: Path, text: str, *, option: str, command: str) -> None:
    """Write a page; only another page of the same command is replaced.

    Raises:
        UsageError: there is something else of that name.
        StorageFault: it cannot be written.
    """
    aside = _aside(path)
    try:
        _require_page(path, option, command)
        aside.write_text(text, "utf-8", errors="backslashreplace")
        os.replace(aside, path)
    except OSError as fault:
        aside.unlink(missing_ok=True)
        raise StorageFault(f"cannot write the page: {fault.strerror}", where=str(path)) from fault


def require_place(path: Path, mark: bytes, *, overwrite: bool) -> None:
    """That a file may be written at ``path``.

    Args:
        path: of the file.
        mark: what all files of its kind have in them.
        overwrite: whether another of its kind is replaced.

    Raises:
        UsageError: there is something of that name.
        StorageFault: what is there cannot be read, or there is no such directory.
    """
    try:
        require_parent(path)
        if not os.path.lexists(path):
            return
        ours = path.is_file() and not path.is_symlink() and mark in path.read_bytes()
    except OSError as fault:
        raise StorageFault(f"cannot look at the output: {fault.strerror}", where=str(path)) from fault
    if not (overwrite and ours):
        raise UsageError(
            "the output exists, nothing was written",
            where=str(path),
            found="an older one" if ours else "something that this command did not make",
            do="name another -o" + (", or --overwrite replaces it once the new one is whole" if ours else ""),
        )


def write_whole(path: Path, data: bytes, mark: bytes, *, overwrite: bool) -> None:
    """Write a file: all of it, or it is as before; see `require_place`.

    Raises:
        UsageError, StorageFault: see `require_place`; it cannot be written.
    """
    aside = _aside(path)
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        require_place(path, mark, overwrite=overwrite)  # it may have come meanwhile
        os.replace(aside, path)
    except OSError as fault:
        raise StorageFault(f"cannot write the output: {fault.strerror}", where=str(path)) from fault
    finally:
        aside.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _require_page(path: Path, option: str, command: str) -> None:
    if os.path.lexists(path) and not _is_page(path, command):
        raise UsageError(
            f"{option} names a file that is no page of {command}, nothing was written",
            where=str(path),
            do="name another file",
        )


def _is_page(path: Path, command: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return f'<meta name="generator" content="{command}">'.encode() in file.read(500)
