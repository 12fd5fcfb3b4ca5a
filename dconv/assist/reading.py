"""A sentence while it is read: what is understood of it, and what was left."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dconv.assist import rules


@dataclass(frozen=True, slots=True)
class Heard:
    """Words, and what they were taken for."""

    words: str
    why: str


@dataclass(frozen=True)
class Vote:
    """A FORMAT that words speak for; the one with the greatest ``strength`` is meant."""

    words: str
    format: str
    why: str
    strength: tuple[int, int]
    options: tuple[str, ...] = ()


@dataclass
class Reading:
    """A sentence while it is read: what is understood of it is blanked."""

    text: str
    heard: list[Heard] = field(default_factory=list[Heard])
    against: list[str] = field(default_factory=list[str])
    left: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    votes: list[Vote] = field(default_factory=list[Vote])
    options: dict[str, str | None] = field(default_factory=dict[str, str | None])
    codes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    readers: list[rules.Reader] = field(default_factory=list[rules.Reader])
    counts: dict[str, int] = field(default_factory=dict[str, int])

    def take(self, pattern: str) -> Iterable[re.Match[str]]:
        """Each place that fits and is not part of a word; it is not read again."""
        whole = re.compile(rf"(?<![\w.#])(?:{pattern})(?![\w])")
        while found := whole.search(self.text):
            if not found[0]:
                return
            yield found
            self.text = self.text[: found.start()] + "\0" * len(found[0]) + self.text[found.end() :]

    def option(self, words: Sequence[str], heard: str, why: str) -> None:
        """An option, unless another value of it was said before."""
        name, value = words[0], words[1] if len(words) > 1 else None
        if name in self.options and self.options[name] != value:
            self.against.append(f"{heard}: {name} {self.options[name]} was said before, and is kept")
            return
        self.options[name] = value
        self.heard.append(Heard(heard, f"{why}: {' '.join(words)}"))
