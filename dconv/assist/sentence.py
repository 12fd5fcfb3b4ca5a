"""A sentence becomes a command: which words were understood, as what, and what is left to say.

Nothing is guessed: a word that no rule of `dconv.assist.rules` knows is said to be left unread, and of two that
contradict each other the one that counts is named. Nothing is run, and nothing is fetched.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dconv.assist import amounts, rules
from dconv.assist.glance import COMPILERS, Glance, glance
from dconv.assist.reading import Heard, Reading, Vote
from dconv.errors import DconvError
from dconv.gguf import TYPES

MODEL: Final = "MODEL"
#: Characters that are read of a sentence; a longer one is a file that was pasted.
_LONGEST: Final = 2_000


@dataclass(frozen=True)
class Suggestion:
    """A command, and where it comes from.

    Attributes:
        words: the command's, without ``dconv``.
        heard: words that were understood.
        left: what the command leaves open, with what may stand there.
        against: what contradicts, one sentence each.
        unread: words that no rule knows.
        candidates: FORMATs that were equally meant; the command is the first's.
    """

    words: tuple[str, ...]
    heard: tuple[Heard, ...]
    left: tuple[tuple[str, str], ...]
    against: tuple[str, ...]
    unread: tuple[str, ...]
    candidates: tuple[str, ...]

    @property
    def command(self) -> str:
        """As a shell takes it."""
        return shlex.join(["dconv", *self.words])


def read(sentence: str, choose: Callable[[Sequence[str]], str] | None = None) -> Suggestion | None:
    """The command that a sentence asks for; None where nothing in it is understood.

    Args:
        sentence: a person's words.
        choose: given the FORMATs that are equally meant (all, where none is), the one to take; None takes the first.
    """
    model, rest = _model(sentence[:_LONGEST])
    reading = Reading(re.sub(r"\s+", " ", rest.lower()))
    _read_words(reading)
    known = _known(model, reading) if model is not None else None
    if model is None:
        reading.left.append((MODEL, "a directory, a state dict's file, a GGUF, or org/name on the hub"))
    format, candidates = _format(reading, known, choose)
    if format is None:
        return None
    _number_options(reading, format)
    amounts.apply(reading, format, known)
    _last_checks(reading, format)
    options = [word for name, value in reading.options.items() for word in (name, *([] if value is None else [value]))]
    unread = tuple(word for word in re.findall(r"[^\s\0,;:!?()\"']+", reading.text) if _is_word(word))
    words = ("convert", MODEL if model is None else str(model), format, *options)
    return Suggestion(words, tuple(reading.heard), tuple(reading.left), tuple(reading.against), unread, candidates)


def _is_word(word: str) -> bool:
    return word.strip(".-") not in rules.PLAIN and any(letter.isalnum() for letter in word)


def _model(sentence: str) -> tuple[Path | None, str]:
    """A path among the words that is there, and the others."""
    try:
        words = shlex.split(sentence)
    except ValueError:  # an apostrophe
        words = sentence.split()
    for word in words:
        said = word if _is_there(word) else word.rstrip(".,;:!?")
        if not _is_there(said) or not said.isprintable() or said.startswith("-"):
            continue
        path = Path(said).expanduser()
        if "/" in said or path.suffix in (".gguf", ".pt", ".bin", ".onnx", ".pth") or _is_model(path):
            return path, re.sub(rf"(?<!\S)(['\"]?){re.escape(word)}\1(?!\S)", " ", sentence, count=1)
    return None, sentence


def _is_there(word: str) -> bool:
    try:
        return bool(word) and Path(word).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, nobody's home, a NUL
        return False


def _is_model(path: Path) -> bool:
    """Whether a name that might be any word is that of a checkpoint."""
    try:
        glance(path)
    except (DconvError, OSError):
        return False
    return True


def _known(model: Path, reading: Reading) -> Glance | None:
    try:
        found = glance(model)
    except DconvError as error:
        reading.against.append(f"{model}: {error.what}")
        return None
    reading.heard.append(Heard(str(model), f"MODEL: {found.words}"))
    return found


def _read_words(reading: Reading) -> None:
    """Take all words that a rule knows."""
    mup = re.search(r"minicpm.*(?<![\w.])llama(?![\w]|[. -]?cpp)|(?<!\w)mup(?!\w)", reading.text)
    # exact types of blocks are their own FORMAT
    for found in reading.take("|".join(sorted((name for name in TYPES if "_" in name), key=len, reverse=True))):
        reading.votes.append(Vote(found[0], "gguf", "a type of GGUF", (2, 3), ("--quant", found[0])))
    amounts.count(reading)
    _chips_by_name(reading)
    for means in rules.FORMATS:
        for found in reading.take(means.words):
            _vote(reading, means, found)
    for reader in rules.READERS:
        for found in reading.take(reader.words):
            reading.readers.append(reader)
            reading.heard.append(Heard(found[0], f"{reader.name} reads {', '.join(reader.formats)}"))
    for pattern, code in rules.CODES:
        for found in reading.take(pattern):
            if code not in (said for _, said in reading.codes):
                reading.codes.append((found[0], code))
    for pattern, option, why in rules.OPTIONS:
        for found in reading.take(pattern):
            reading.option(option, found[0], why)
    if mup:
        reading.option(("--mup2llama",), "minicpm as llama" if "llama" in mup[0] else mup[0],
                       "muP scalars go into the weights")  # fmt: skip
    for found in reading.take(r"\d+(\.\d+)?[bm]"):
        reading.heard.append(Heard(found[0], "how large the model is: found in the checkpoint itself"))
    _families(reading)


def _families(reading: Reading) -> None:
    from dconv.arch.registry import families

    names = sorted({*(name.split("_")[0] for name in families()), "llama", "deepseek", "minicpm", "qwen"}, key=len)
    for name in reversed(names):
        for found in reading.take(rf"{re.escape(name)}[-\w.]*"):
            reading.heard.append(Heard(found[0], "what the model is: found in the checkpoint itself"))


def _vote(reading: Reading, means: rules.Means, found: re.Match[str]) -> None:
    before, after = reading.text[: found.start()], reading.text[found.end() :]
    if not means.format:
        reading.codes.append((found[0], "compressed-tensors"))
        return
    place = 1
    if rules.THERE.search(before) or rules.KEPT.match(after):
        place = 0
    elif means.weight > 1 and rules.WANTED.search(before):
        place = 2
    reading.votes.append(Vote(found[0], means.format, means.why, (place, means.weight), means.options))


def _chips_by_name(reading: Reading) -> None:
    from dconv.hw.registry import adapter

    for target in COMPILERS:
        for chip in adapter(target).platforms:
            for found in reading.take(chip.lower() + (r"[an]?" if target == "ax" else "[sp]?")):
                why = f"a chip of {target}"
                reading.votes.append(Vote(found[0], target, why, (2, 3), ("--platform", chip)))


def _format(
    reading: Reading, known: Glance | None, choose: Callable[[Sequence[str]], str] | None
) -> tuple[str | None, tuple[str, ...]]:
    """The FORMAT that is meant, and those that are equally meant."""
    wanted = [vote for vote in reading.votes if vote.strength[0] > 0]
    there = [vote for vote in reading.votes if vote.strength[0] == 0]
    asked = [code for _, code in reading.codes if code != "compressed-tensors"]
    if not wanted and there and not (reading.readers or asked or reading.options):
        wanted, there = there, []
    top = max((vote.strength for vote in wanted), default=None)
    level = None if top is None else (top[0], min(top[1], 2))  # a name and a program count the same
    equal = [vote for vote in wanted if level is not None and (vote.strength[0], min(vote.strength[1], 2)) == level]
    best = list(dict.fromkeys(vote.format for vote in equal))
    if reading.readers and (not best or best == ["hf"]):
        wanted, best = [vote for vote in wanted if vote.format == "hf" and best], [_read_by(reading.readers[0], asked)]
    if not best and (asked or reading.codes):
        best = [rules.USUAL[asked[0]]] if asked else ["gptq"]
    elif best == ["hf"] and asked and rules.USUAL[asked[0]] not in ("hf", "gguf"):
        best = [rules.USUAL[asked[0]]]
    if not best and "--mup2llama" in reading.options:
        best = ["hf"]
    if not best and any(name in reading.options for name in ("--tp", "--pp", "--ep", "--megatron-format")):
        best = ["megatron"]
    candidates = tuple(best)
    if choose is not None and len(best) != 1:
        from dconv.matrix import outputs

        pool = best or [one for one in (*outputs(), *COMPILERS) if known is None or one in known.formats()]
        best = [choose(list(dict.fromkeys(pool)))]
    if not best:
        return None, ()
    format = best[0]
    _say(reading, format, wanted, there)
    if len(candidates) > 1:
        others = ", ".join(one for one in candidates if one != format)
        reading.against.append(f"{others}: another FORMAT, which takes a command of its own")
    for reader in reading.readers:
        if format not in reader.formats:
            reading.against.append(f"{reader.name} does not read {format}; it reads {', '.join(reader.formats)}")
    if known is not None and {"hf": "huggingface"}.get(format, format) not in known.formats():
        name = known.family.name if known.family else known.kind
        reading.against.append(f"{format} has no form for {name}; of this MODEL: {', '.join(known.formats())}")
    return format, candidates


def _read_by(reader: rules.Reader, asked: Sequence[str]) -> str:
    usual = rules.USUAL[asked[0]] if asked else "hf"
    return usual if usual in reader.formats else "hf"


def _say(reading: Reading, format: str, wanted: Sequence[Vote], there: Sequence[Vote]) -> None:
    """Which words spoke for the FORMAT, with their options, and what became of the others."""
    mine = [vote for vote in wanted if vote.format == format]
    # a chip that is named counts more than its maker
    mine.sort(key=lambda vote: rules.CHIP in vote.options)
    for vote in mine:
        reading.heard.append(Heard(vote.words, f"{vote.why}: {format}"))
        if vote.options and (rules.CHIP not in vote.options or vote.options[0] not in reading.options):
            reading.option(vote.options, vote.words, "with it")
    if reading.options.get("--platform") == rules.CHIP:
        from dconv.hw.registry import adapter

        reading.left.append((rules.CHIP, f"one of {', '.join(adapter(format).platforms)}"))
    if not mine:
        words = [said for said, _ in reading.codes] or ["the options"]
        reading.heard.append(Heard(", ".join(words), f"FORMAT {format}"))
    for vote in (*there, *(vote for vote in wanted if vote.format != format)):
        what = "taken for what MODEL is" if vote.strength[0] == 0 or vote.strength[1] == 3 else "counts less"
        reading.heard.append(Heard(vote.words, what))


def _number_options(reading: Reading, format: str) -> None:
    """``--quant`` and its like, from the codes that were asked for."""
    have = rules.NUMBERS.get(format, {})
    for words, code in reading.codes:
        if code == "compressed-tensors":
            option = {
                "gptq": ("--quant", "pack-quantized"),
                "awq": ("--quant", "pack-quantized"),
                "fp8": ("--quant-config", "compressed-tensors"),
                "mx": ("--quant-config", "compressed-tensors"),
            }
            if format in option:
                reading.option(option[format], words, "codes are named for vLLM and llm-compressor")
            else:
                reading.against.append(f"{words}: {format} has no such names")
        elif code not in have:
            reading.against.append(f"{words}: {format} has no such numbers; it has {', '.join(have) or 'its own'}")
        elif have[code]:
            if have[code][0] in reading.options:
                continue
            reading.option(have[code], words, f"of {format}")
        elif words not in (heard.words for heard in reading.heard):
            reading.heard.append(Heard(words, f"as {format} has it without an option"))


def _last_checks(reading: Reading, format: str) -> None:
    """Options that a FORMAT has no use for are said, and left out."""
    megatron = ("--tp", "--pp", "--vpp", "--ep", "--etp", "--megatron-format")
    allowed = {"megatron": megatron, "pt": ("--tp",), "neuron": ("--tp",), "gptq": ("--ep",), "awq": ("--ep",)}
    drop = [name for name in megatron if name in reading.options and name not in allowed.get(format, ())]
    drop += [name for name in ("--verify",) if name in reading.options and format in COMPILERS]
    drop += [name for name in ("--bundle",) if name in reading.options and format not in COMPILERS]
    if format == "gguf" and reading.options.get("--verify") == "logits" and "--quant" in reading.options:
        reading.options["--verify"] = "digest"
        reading.against.append("logits: weights in blocks have no bound that logits keep; --verify digest instead")
    for name in drop:
        reading.against.append(f"{name} {reading.options.pop(name) or ''}".rstrip() + f": {format} has no use for it")
    reading.heard[:] = [one for one in reading.heard if not any(one.why.endswith(f": {name}") for name in drop)]
