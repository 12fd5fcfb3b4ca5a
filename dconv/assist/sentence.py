"""A sentence becomes a command: which words were understood, as what, and what is left to say.

Nothing is guessed: a word that no rule of `dconv.assist.rules` knows is said to be left unread, and of two that
contradict each other the one that counts is named. Nothing is run, and nothing is fetched.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dconv.assist import rules
from dconv.assist.glance import COMPILERS, Glance, glance
from dconv.errors import DconvError
from dconv.request import CALIBRATED

MODEL: Final = "MODEL"
#: Before a word that names what is wanted, and what there is.
_WANTED: Final = re.compile(r"\b(to|into|for|as|in|with|on|onto|using|under|towards?|->|→|=>)( (a|an|the|my|our|use in))*\s*$")
_THERE: Final = re.compile(r"\b(from|of|out of)( (a|an|the|my|our))*\s*$")
_KEPT: Final = re.compile(r"^[ -]*(checkpoints?|runs?|weights|model|shards|directory|files?|state)\b")
#: Most words of a sentence; a longer one is a file that was pasted.
_LONGEST: Final = 2_000
_GPUS_OF_A_NODE: Final = 8
_NUMBER: Final = rf"(?P<n>\d{{1,4}}|{'|'.join(rules.NUMBER_WORDS)})"
#: Words that say nothing of a conversion.
_PLAIN: Final = frozenset(
    "a an and the my our your i we me it its this that is are be please can could would want need like how do does to "
    "into for from of on in at by with under as back so then convert converted make made turn run running get give "
    "put use using model models checkpoint checkpoints weights big small file files format formats new old will bit "
    "bits each all one quantise quantize quantised quantized quantisation quantization export serve serving inference "
    "deploy deployment gpu gpus node nodes machine board chip device computer laptop phone laptop or local locally server sure "
    "have has some there here training train card cards cluster parallel parallelism way ranks processes it's i'd "
    "again after afterwards nothing changed still also only moe dense llm language out write read compile per".split()
)


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


@dataclass
class _Reading:
    """A sentence while it is read: what is understood of it is blanked."""

    text: str
    heard: list[Heard] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    votes: list[Vote] = field(default_factory=list)
    options: dict[str, str | None] = field(default_factory=dict)
    codes: list[tuple[str, str]] = field(default_factory=list)
    readers: list[rules.Reader] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

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


def read(sentence: str, choose: Callable[[Sequence[str]], str] | None = None) -> Suggestion | None:
    """The command that a sentence asks for; None where nothing in it is understood.

    Args:
        choose: given the FORMATs that are equally meant (all, where none is), the one to take; None takes the first.
    """
    model, rest = _model(sentence[:_LONGEST])
    reading = _Reading(re.sub(r"\s+", " ", rest.lower()))
    _read_words(reading)
    known = _known(model, reading) if model is not None else None
    if model is None:
        reading.left.append((MODEL, "a directory, a state dict's file, a GGUF, or org/name on the hub"))
    format, candidates = _format(reading, known, choose)
    if format is None:
        return None
    _number_options(reading, format)
    _sizes(reading, format, known)
    _last_checks(reading, format, known)
    options = [word for name, value in reading.options.items() for word in (name, *([] if value is None else [value]))]
    unread = tuple(word for word in re.findall(r"[^\s\0,;:!?()\"']+", reading.text) if _is_word(word))
    words = ("convert", MODEL if model is None else str(model), format, *options)
    return Suggestion(
        words, tuple(reading.heard), tuple(reading.left), tuple(reading.against), unread, candidates
    )


def _is_word(word: str) -> bool:
    return word.strip(".-") not in _PLAIN and any(letter.isalnum() for letter in word)


def _model(sentence: str) -> tuple[Path | None, str]:
    """A path among the words that is there, and the others."""
    try:
        words = shlex.split(sentence)
    except ValueError:  # an apostrophe
        words = sentence.split()
    for word in words:
        said = word if Path(word).expanduser().exists() else word.rstrip(".,;:!?")
        path = Path(said).expanduser()
        if not said or not path.exists():
            continue
        if "/" in said or path.suffix in (".gguf", ".pt", ".bin", ".onnx", ".pth") or _is_model(path):
            return Path(said), sentence.replace(word, " ", 1)
    return None, sentence


def _is_model(path: Path) -> bool:
    """Whether a name that might be any word is that of a checkpoint."""
    try:
        glance(path)
    except DconvError:
        return False
    return True


def _known(model: Path, reading: _Reading) -> Glance | None:
    try:
        found = glance(model)
    except DconvError as error:
        reading.against.append(f"{model}: {error.what}")
        return None
    reading.heard.append(Heard(str(model), f"MODEL: {found.words}"))
    return found


def _read_words(reading: _Reading) -> None:
    """Take all words that a rule knows."""
    mup = re.search(r"minicpm.*(?<![\w.])llama(?![\w]|[. -]?cpp)|(?<!\w)mup(?!\w)", reading.text)
    # exact types of blocks are their own FORMAT
    for found in reading.take(r"i?q\d_[k\d](_[smlx]{1,2})?|iq\d_[nx][ls]|tq\d_0"):
        reading.votes.append(Vote(found[0], "gguf", "a type of GGUF", (2, 3), ("--quant", found[0])))
    _counts(reading)
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
    for _ in reading.take(r"\d+(\.\d+)?[bm](?= |$|\W)"):
        pass  # 8B: the checkpoint says it
    _families(reading)


def _families(reading: _Reading) -> None:
    from dconv.arch.registry import families

    names = sorted({*(name.split("_")[0] for name in families()), "llama", "deepseek", "minicpm", "qwen"}, key=len)
    for name in reversed(names):
        for found in reading.take(rf"{re.escape(name)}[-\w.]*"):
            reading.heard.append(Heard(found[0], "what the model is: found in the checkpoint itself"))


def _vote(reading: _Reading, means: rules.Means, found: re.Match[str]) -> None:
    before, after = reading.text[: found.start()], reading.text[found.end() :]
    if not means.format:
        reading.codes.append((found[0], "compressed-tensors"))
        return
    place = 1
    if _THERE.search(before) or _KEPT.match(after):
        place = 0
    elif means.weight > 1 and _WANTED.search(before):
        place = 2
    reading.votes.append(Vote(found[0], means.format, means.why, (place, means.weight), means.options))


def _chips_by_name(reading: _Reading) -> None:
    from dconv.hw.registry import adapter

    for target in COMPILERS:
        for chip in adapter(target).platforms:
            for found in reading.take(chip.lower() + (r"[an]?" if target == "ax" else "[sp]?")):
                why = f"a chip of {target}"
                reading.votes.append(Vote(found[0], target, why, (2, 3), ("--platform", chip)))


def _counts(reading: _Reading) -> None:
    """Numbers of nodes, of GPUs, and parallel sizes."""
    for found in reading.take(rf"{_NUMBER} (nodes|machines|hosts)"):
        reading.counts["nodes"] = _number(found["n"])
        reading.heard.append(Heard(found[0], f"{reading.counts['nodes']} nodes"))
    if "nodes" in reading.counts:
        for found in reading.take(rf"(of|with|x|each with|having) {_NUMBER}( gpus?| cards?)?( each)?"):
            reading.counts["each"] = _number(found["n"])
            reading.heard.append(Heard(found[0], f"{reading.counts['each']} GPUs a node"))
    for found in reading.take(rf"{_NUMBER}[ x]*(gpus?|cards|accelerators|[ahb]\d00s?|h20s?|npus?)"):
        reading.counts["each" if "nodes" in reading.counts else "gpus"] = _number(found["n"])
        reading.heard.append(Heard(found[0], f"{_number(found['n'])} GPUs"))
    for found in reading.take(rf"{_NUMBER} (ranks|processes|workers|procs)"):
        reading.option(("--nproc", str(_number(found["n"]))), found[0], "ranks")
    for name, words in rules.SIZES:
        for pattern in (rf"(?:{words})( size| degree)?[ =]*(of )?{_NUMBER}", rf"{_NUMBER}[- ](?:way|fold)[- ](?:{words})",
                        *([rf"{_NUMBER} (pipeline )?stages"] if name == "pp" else ())):  # fmt: skip
            for found in reading.take(pattern):
                reading.option((f"--{name}", str(_number(found["n"]))), found[0], f"{name} of Megatron's layout")
                reading.counts[name] = _number(found["n"])


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else rules.NUMBER_WORDS[text]


def _format(reading: _Reading, known: Glance | None, choose: Callable[[Sequence[str]], str] | None) -> tuple[str | None, tuple[str, ...]]:
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


def _say(reading: _Reading, format: str, wanted: Sequence[Vote], there: Sequence[Vote]) -> None:
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


def _number_options(reading: _Reading, format: str) -> None:
    """``--quant`` and its like, from the codes that were asked for."""
    have = rules.NUMBERS.get(format, {})
    for words, code in reading.codes:
        if code == "compressed-tensors":
            option = {"gptq": ("--quant", "pack-quantized"), "awq": ("--quant", "pack-quantized"),
                      "fp8": ("--quant-config", "compressed-tensors"), "mx": ("--quant-config", "compressed-tensors")}
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


def _sizes(reading: _Reading, format: str, known: Glance | None) -> None:
    """What numbers of GPUs and nodes come to."""
    counts = reading.counts
    nodes, each = counts.get("nodes", 1), counts.get("each", counts.get("gpus", 0))
    launcher = reading.options.get("--launcher")
    if format == "megatron" and nodes * each > 1:
        _megatron_layout(reading, nodes, each)
    if launcher == "slurm" and nodes > 1:
        reading.option(("--nodes", str(nodes)), f"{nodes} nodes", "of the job")
    elif nodes > 1 and launcher is None and format != "megatron":
        reading.against.append(f"{nodes} nodes: one machine is this command's; --launcher slurm or ray has more")
    ranks = each * (nodes if launcher == "ray" else 1)
    if ranks > 1 and "--nproc" not in reading.options and (launcher or format in CALIBRATED or format == "hf"):
        reading.option(("--nproc", str(ranks)), f"{ranks} GPUs", "a rank each")
    if known is not None and known.family is not None and format == "megatron":
        _held_to(reading, known)


def _megatron_layout(reading: _Reading, nodes: int, each: int) -> None:
    """All GPUs in tensor parallelism, up to a node's; the others in the pipeline."""
    total, said = nodes * each, reading.counts
    rest, left = divmod(total, said.get("tp", 1) * said.get("pp", 1))
    if left:
        reading.against.append(f"{total} GPUs do not divide by the sizes that are said")
        return
    words = f"{total} GPUs"
    if "tp" not in said:
        tp = max(size for size in range(1, min(rest, each, _GPUS_OF_A_NODE) + 1) if rest % size == 0)
        reading.option(("--tp", str(tp)), words, "tensor parallel within a node")
        rest //= tp
    if "pp" not in said and "ep" not in said and rest > 1:
        reading.option(("--pp", str(rest)), words, "the others in the pipeline")


def _held_to(reading: _Reading, known: Glance) -> None:
    """Say which sizes MODEL does not permit."""
    from dconv.assist.sizes import SIZES, permitted
    from dconv.commands.table import parser_of
    from dconv.launch.options import parse

    said = {name: reading.options[f"--{name}"] for name in SIZES if f"--{name}" in reading.options}
    words = [str(known.path), "megatron", *(word for name, n in said.items() for word in (f"--{name}", str(n)))]
    args = parse(parser_of("plan"), words)
    for name, number in said.items():
        fits = permitted(args, name, known)
        if int(str(number)) not in fits:
            those = ", ".join(map(str, fits[:16])) or "none beside the other sizes"
            reading.against.append(f"--{name} {number}: this model permits {those}")


def _last_checks(reading: _Reading, format: str, known: Glance | None) -> None:
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
