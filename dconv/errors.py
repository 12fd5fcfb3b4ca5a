"""The closed set of errors a person can meet, each with its exit code and one printed form.

Form: what is wrong, then *where* (file, tensor), *expected*, *found*, and what to *do*. Names are grouped with
ranges (``model.layers.{0..47}.mlp``), never one line a tensor; see `group_names`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterable


class DconvError(Exception):
    """Base of every error that dconv raises on purpose.

    Args:
        what: one sentence, what is wrong.
        where: file, tensor or option at fault.
        expected: what a good input has.
        found: what this one has.
        do: what the person can do about it.
    """

    exit_code = 1
    label = "error"

    def __init__(self, what: str, *, where: str = "", expected: str = "", found: str = "", do: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.expected = expected
        self.found = found
        self.do = do

    def __str__(self) -> str:
        lines = [f"{self.label} ({self.exit_code})  {self.what}"]
        for key in ("where", "expected", "found", "do"):
            value = getattr(self, key)
            if value:
                indented = value.replace("\n", "\n" + " " * 13)
                lines.append(f"  {key:<10} {indented}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """The same fields for ``--json``."""
        fields = {key: getattr(self, key) for key in ("what", "where", "expected", "found", "do")}
        return {"error": self.label, "exit_code": self.exit_code, **{k: v for k, v in fields.items() if v}}

    def __reduce__(self) -> tuple[object, ...]:
        # keyword-only fields do not survive the default pickling of exceptions, which worker processes rely on
        return (_rebuild, (type(self), self.what, self.where, self.expected, self.found, self.do))


def _rebuild(kind: type[DconvError], what: str, where: str, expected: str, found: str, do: str) -> DconvError:
    return kind(what, where=where, expected=expected, found=found, do=do)


class UsageError(DconvError):
    """A wrong command line, or an output that exists."""

    exit_code = 2
    label = "usage"


class Refused(DconvError):
    """Unsupported, or a plan that does not cover: nothing was written."""

    exit_code = 3
    label = "refused"


class Damaged(DconvError):
    """Input that is broken or hostile."""

    exit_code = 4
    label = "damaged"


class StorageFault(DconvError):
    """The file system failed: full, unreadable, gone."""

    exit_code = 5
    label = "storage"


@contextlib.contextmanager
def storage_faults() -> Generator[None]:
    """What the operating system says of a file, in the words of dconv; also a decorator, ``@storage_faults()``.

    Raises:
        StorageFault: for an `OSError` that nobody had a better word for.
    """
    try:
        yield
    except OSError as fault:
        raise storage_fault(fault) from fault


def storage_fault(fault: OSError) -> StorageFault:
    """A storage fault of which nothing is known beside the operating system's words."""
    return StorageFault(f"the file system failed: {fault}")


class VerifyFailed(DconvError):
    """The output was read back and is not what it must be."""

    exit_code = 6
    label = "verification"


class ToolMissing(DconvError):
    """A compiler or runtime is missing or failed."""

    exit_code = 7
    label = "tool"


class Preempted(DconvError):
    """Asked to stop by a signal; run again to resume."""

    exit_code = 75
    label = "preempted"


def counted(count: int, one: str, many: str) -> str:
    """A number with its words: ``1 tensor is``, ``2,048 tensors are``."""
    return f"{count:,} {one if count == 1 else many}"


#: Longer ones are no layer's or expert's.
_NUMBER = re.compile(r"(?<!\d)\d{1,9}(?!\d)")


def group_names(names: Iterable[str], limit: int = 8) -> str:
    """Names folded by their numbers: ``a.0.x``, ``a.1.x`` become ``a.{0..1}.x``; at most ``limit`` lines."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for name in names:
        name = name.replace("\0", "?")
        groups.setdefault(_NUMBER.sub("\0", name), []).append(tuple(_NUMBER.findall(name)))
    lines: list[str] = []
    for template, members in groups.items():
        columns = [_ranges(set(column)) for column in zip(*members, strict=True)]
        filled = template
        for column in columns:
            filled = filled.replace("\0", column, 1)
        lines.append(filled)
    if len(lines) > limit:
        lines = [*lines[:limit], f"… and {len(lines) - limit} more patterns"]
    return "\n".join(lines)


def _ranges(texts: set[str]) -> str:
    """``{0..3,7}``; a single number, leading zeros kept, stays as it is."""
    ordered = sorted(texts, key=lambda text: (int(text), text))
    runs: list[list[str]] = []
    for text in ordered:
        if runs and int(text) == int(runs[-1][1]) + 1:
            runs[-1][1] = text
        else:
            runs.append([text, text])
    if len(ordered) == 1:
        return ordered[0]
    return "{" + ",".join(low if low == high else f"{low}..{high}" for low, high in runs) + "}"
