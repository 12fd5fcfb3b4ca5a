"""What a target is, and what it lets pass."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dconv.errors import DconvError
from fuzz.mutators import Mutator

_ROOT: Final = Path(__file__).resolve().parent.parent
#: What a person is shown of a refusal; a file has no say in how much that is.
_MOST_LINES, _MOST_SAID = 40, 20_000


@dataclass(frozen=True)
class Target:
    """A parser to be fed.

    Attributes:
        reads: modules below ``dconv/`` whose words are worth trying.
        form: makes the mutator that keeps an input's form, of these words; None has libFuzzer's alone.
        most: bytes of an input.
    """

    name: str
    run: Callable[[bytes], None]
    reads: tuple[str, ...]
    form: Callable[[list[str]], Mutator] | None
    most: int

    def words(self) -> list[str]:
        """Texts that the parser itself has: keys, kinds, names."""
        return sorted({word for pattern in self.reads for word in _words(pattern)})

    def mutator(self) -> Mutator | None:
        return self.form(self.words()) if self.form else None


#: By name.
TARGETS: Final[dict[str, Target]] = {}


def target(
    *reads: str, form: Callable[[list[str]], Mutator] | None = None, most: int = 8192
) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    def kept(parse: Callable[[bytes], None]) -> Callable[[bytes], None]:
        @functools.wraps(parse)
        def run(data: bytes) -> None:
            try:
                parse(data)
            except DconvError as refusal:
                _check_said(refusal)

        TARGETS[parse.__name__] = Target(parse.__name__, run, reads, form, most)
        return run

    return kept


def _check_said(refusal: DconvError) -> None:
    said = str(refusal)
    json.dumps(refusal.to_dict())
    if said.count("\n") >= _MOST_LINES or len(said) > _MOST_SAID:
        raise AssertionError(f"a refusal of {len(said)} characters in {said.count(chr(10)) + 1} lines: {said[:400]!r}")


@functools.cache
def _words(pattern: str) -> frozenset[str]:
    found = set[str]()
    for path in (_ROOT / "dconv").glob(pattern):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and 0 < len(node.value) < 60:
                found.add(node.value)
    return frozenset(word for word in found if " " not in word or "_" in word)


def mapping(data: bytes) -> dict[str, Any]:
    """An input that is JSON by its form; what is none is nobody's file."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def part(said: dict[str, Any], key: str) -> dict[str, Any]:
    value = said.get(key)
    return value if isinstance(value, dict) else {}


def items(said: dict[str, Any], key: str) -> list[Any]:
    value = said.get(key)
    return value if isinstance(value, list) else []


def as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
