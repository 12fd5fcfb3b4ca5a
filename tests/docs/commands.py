"""The commands of README.md and docs/, as they stand there: which blocks there are, what a reader would type, and what
is said to come of it. CONTRIBUTING.md ("Documentation") has the convention.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"

_FENCE: Final = re.compile(r"^(\s*)(`{3,})(.*)$")
_COMMENT: Final = re.compile(r"<!--\s*(models|long|cluster|not run|exit|file):?\s*(.*?)\s*-->")
#: What a line of a block that has no prompt begins with where it is a command.
_PROGRAMS: Final = re.compile(
    r"^(?:[A-Z_]+=\S+ )*(?:dconv|torchrun|srun|sbatch|accelerate|python3?|bash|ray|export|pip|cat|ls|cd|mkdir"
    r"|launch/\S+|slurm/\S+|\S*/bin/python|scripts/\S+)(?= )"
)
#: A comment of a block without a language: words behind two spaces, beyond all quotes.
_BESIDE: Final = re.compile(r"^((?:[^'\"]|'[^']*'|\"[^\"]*\")*?)\s{2,}(?!-)\S.*$", re.DOTALL)
#: An error as dconv prints it: the code that the command ends with.
_ERROR: Final = re.compile(
    r"^(?:error|usage|refused|damaged|storage|verification|tool|preempted) \((\d+)\)", re.MULTILINE
)


#: What a folded line of an answer begins with.
_FOLD: Final = " " * 13


@dataclass(frozen=True)
class Command:
    """What is typed, and what is said of it.

    Attributes:
        line: in its page, from 1.
        typed: lines that continue it included, comments beside it left out.
        said: the output; empty where the page has none.
        code: the exit code.
    """

    page: str
    line: int
    typed: str
    said: tuple[str, ...] = ()
    code: int = 0

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: behind the fence.
        file: a file of the reader's that the block is the content of; "" where it is none.
        excuse: why its commands are not run; "" where they are.
    """

    page: str
    line: int
    language: str
    text: str
    file: str = ""
    excuse: str = ""
    code: int | None = None

    @property
    def commands(self) -> tuple[Command, ...]:
        return tuple(_commands(self))


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        name: its path in the repository.
        models: that its commands find in their folder.
        long: why it runs with ``--long`` only; "" where it always does.
        cluster: what it runs on: ``slurm`` or ``ray``; "" for this machine.
    """

    name: str
    blocks: tuple[Block, ...]
    models: tuple[str, ...]
    long: str
    cluster: str
    text: str

    @property
    def commands(self) -> tuple[Command, ...]:
        return tuple(command for block in self.blocks for command in block.commands)

    @property
    def runs(self) -> bool:
        return any(not block.excuse and block.commands for block in self.blocks)


def pages() -> list[Page]:
    """README.md and every page of docs/."""
    return [read(path) for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))]


def read(path: Path) -> Page:
    """A page.

    Raises:
        ValueError: a block without an end.
    """
    name, text = path.relative_to(ROOT).as_posix(), path.read_text()
    blocks: list[Block] = []
    said: dict[str, str] = {}  # comments since the last block: they are about the next one
    whole: dict[str, str] = {}  # of the page: those before its first heading's text
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        for key, value in _COMMENT.findall(line):
            (whole if key in ("models", "long", "cluster") else said)[key] = value
        if found := _FENCE.match(line):
            indent, ticks, language = found.groups()
            body = []
            for _, inner in lines:
                if inner.strip() == ticks:
                    break
                body.append(inner.removeprefix(indent))
            else:
                raise ValueError(f"{name}:{number}: this block has no end")
            code = int(said["exit"]) if "exit" in said else None
            excuse = said.get("not run", "")
            blocks.append(Block(name, number, language.strip(), "\n".join(body), said.get("file", ""), excuse, code))
            said = {}
        elif line.strip() and not line.startswith("<!--"):
            said = {}
    models = tuple(word for word in re.split(r"[,\s]+", whole.get("models", "")) if word)
    return Page(name, tuple(blocks), models, whole.get("long", ""), whole.get("cluster", ""), text)


def _commands(block: Block) -> Iterator[Command]:
    """Those of a block: behind ``$ `` with what they print; without prompts, lines that begin with a program.

    A block of another language (Python, YAML, a text) has none unless it has prompts.
    """
    lines = block.text.splitlines()
    prompted = any(line.startswith("$ ") for line in lines)
    at = 0 if prompted or block.language in ("", "bash", "console") else len(lines)
    while at < len(lines):
        line, first = lines[at], at
        typed = line.removeprefix("$ ") if prompted else line
        at += 1
        if not (line.startswith("$ ") if prompted else _PROGRAMS.match(line)):
            continue
        while at < len(lines) and _open(typed):
            typed += "\n" + lines[at]
            at += 1
        said: list[str] = []
        while prompted and at < len(lines) and not lines[at].startswith("$ "):
            said.append(lines[at])
            at += 1
        while said and not said[-1].strip():
            said.pop()
        if not block.language and not prompted and " #" not in typed:
            typed = re.sub(r"\s*\\\n\s*", " ", typed)
            typed = beside[1] if (beside := _BESIDE.match(typed)) else typed
        error = _ERROR.search("\n".join(said))
        code = block.code if block.code is not None else int(error[1]) if error else 0
        yield Command(block.page, block.line + 1 + first, typed, tuple(said), code)


#: What differs from run to run, or from machine to machine.
_VARIES: Final = (
    (re.compile(r"in [\d.,]+ s \([\d.]+ GB/s\)"), "in … s (… GB/s)"),
    (re.compile(r"\b\d+\.\d+ s\b"), "… s"),
    (re.compile(r"peak memory a rank: \d+ MiB"), "peak memory a rank: … MiB"),
    (re.compile(r"plan( +)[0-9a-f]{12}"), r"plan\1…"),
    (re.compile(r"partial-[0-9a-f]{12}"), "partial-…"),
    (re.compile(r"^(digests .*) \([\d,]+ bytes\)", re.MULTILINE), r"\1 (… bytes)"),
    (re.compile(r"^continues .*$", re.MULTILINE), "continues    …"),
    (re.compile(r"within\s+±[\d.]+"), "within …"),
    (re.compile(r"layer by layer in [\d,]+ MB"), "layer by layer in … MB"),
    (re.compile(r"mean relative error [\d.e-]+"), "mean relative error …"),
    (re.compile(r"\b\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?"), "…"),
    (re.compile(r"(?<= )(?:torch|transformers|megatron-core|onnxruntime) \d+\.\d+[\w.+]*"), "…"),
    (re.compile(r"(?<![\w.…-])(?:/[\w.-]+)+/(?=[\w.-])"), "…/"),
)


def masked(printed: str) -> str:
    """What was printed as a page may have it: what varies is ``…``."""
    text = "\n".join(_lines(printed))
    for pattern, instead in _VARIES:
        text = pattern.sub(instead, text)
    return text


def _open(typed: str) -> bool:
    """Whether a command goes on in the next line."""
    if typed.endswith("\\"):
        return True
    try:
        shlex.split(typed, comments=True)
    except ValueError:
        return True
    return False


def words(typed: str) -> list[list[str]]:
    """The words of each program that a line starts, variables before it and what its output goes to left out.

    Raises:
        ValueError: quotes that do not end.
    """
    lexed = shlex.shlex(typed.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexed.whitespace_split, lexed.commenters = True, "#"
    parts: list[list[str]] = [[]]
    skip = False
    for word in lexed:
        if skip:
            skip = False
        elif word[0] in "&|;()" and set(word) <= set("&|;()"):
            parts.append([])
        elif word[0] in "<>":
            skip = True
            if parts[-1][-1:] == ["2"]:  # 2>FILE
                parts[-1].pop()
        elif not parts[-1] and re.fullmatch(r"[A-Z_]+=.*", word, re.DOTALL):
            continue
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def matches(said: Sequence[str], printed: str) -> bool:
    """Whether a page's output is what was printed.

    ``…`` in a line stands for any text of it, and alone for any lines. How wide a column of a table is, where a long
    line is folded, and how often a slow machine draws its progress, does not count.
    """
    pattern = ""
    for line in _unfolded(said):
        if line.strip() == "…":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*".join(re.escape(part) for part in _even(line).split("…")) + r"\n"
    given = "".join(f"{_even(line)}\n" for line in _unfolded(_lines(printed)))
    return re.fullmatch(pattern, given) is not None


def _lines(printed: str) -> list[str]:
    lines = printed.strip("\n").splitlines()
    return [line.rstrip() for line in lines if not line.startswith(("[#", "[-"))]


def _unfolded(lines: Sequence[str]) -> list[str]:
    """Lines with those joined to them that are set in below a word of 10 letters and its text."""
    joined: list[str] = []
    for line in lines:
        if joined and line.startswith(_FOLD) and line.strip() not in ("", "…"):
            joined[-1] = f"{joined[-1].rstrip()} {line.strip()}"
        else:
            joined.append(line)
    return joined


def _even(line: str) -> str:
    return re.sub(r"(?<=\S) {2,}", "  ", line.rstrip())
