"""``dconv suggest``: a command from a sentence. Nothing is run, and nothing is fetched."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from dconv.assist.sentence import Suggestion, read
from dconv.commands.common import add_answer_options
from dconv.errors import UsageError
from dconv.launch.terminal import show, show_json
from dconv.report.table import Table

#: Sentences for somebody of whom nothing was understood.
_EXAMPLES: Final = (
    "my 8B llama for vllm in 4 bit on 2 gpus",
    "llama-8b for ollama, q4_k_m",
    "pretrain llama-8b in megatron on two nodes of 8",
    "run/iter_0001000 back to huggingface, make sure",
    "qwen3-4b for a snapdragon 8 elite",
)


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("sentence", nargs="+", metavar="WORDS", help="what is wanted, in a sentence")
    parser.add_argument("--with", dest="with_model", type=Path, metavar="DIR",
                        help="a HuggingFace model of this machine, which chooses where the words leave a choice: "
                             "between FORMATs only, on the CPU (off)")  # fmt: skip
    add_answer_options(parser)


def run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Do it.

    Raises:
        UsageError: nothing was understood.
        ToolMissing: ``--with`` without torch and transformers.
    """
    args = parser.parse_args(words)
    sentence = " ".join(args.sentence)
    chosen: list[str] = []

    def choose(candidates: Sequence[str]) -> str:
        from dconv.assist.choose import likeliest

        chosen.append(likeliest(args.with_model, sentence, candidates))
        return chosen[0]

    found = read(sentence, None if args.with_model is None else choose)
    if found is None:
        raise UsageError(
            "none of these words says what is wanted",
            where=f"{sentence[:200]!r}",
            expected="a FORMAT, a program or a chip, such as\n"
            + "\n".join(f"dconv suggest '{one}'" for one in _EXAMPLES),
            do="dconv formats  lists what there is",
        )
    said = [f"FORMAT {chosen[0]}: the likeliest to {args.with_model}"] if chosen else []
    if args.json:
        show_json({"command": found.command, **asdict(found), "chosen": chosen[0] if chosen else None})
    else:
        show(found.command, "", *_parts(found, said))
    return 0


def _parts(found: Suggestion, said: Sequence[str]) -> list[str | Table]:
    rows = [(one.words, one.why) for one in found.heard]
    rows += [("chosen", line) for line in said]
    rows += [(name, f"left open: {what}") for name, what in found.left]
    rows += [("but", line) for line in found.against]
    if found.unread:
        rows.append(("not read", " ".join(found.unread)))
    return [Table([(_plain(words), _plain(why)) for words, why in rows])] if rows else []


def _plain(text: str) -> str:
    """Without what a terminal would obey: the words are anybody's."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
