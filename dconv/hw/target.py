"""What a hand-off to a hardware compiler is made of: what was asked for, what is prepared, what is run, what came out.

An adapter is one compiler's knowledge, and nothing else: `dconv.launch.compiling` runs all of them in the same way. It
lays out a work folder that is complete without dconv: the artifacts that were converted for the compiler, small files
beside them, and ``compile.sh``, which a bundle hands over as it is and which is run here in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from dconv.describe import Described
from dconv.export.prompt import Kind
from dconv.request import Request

#: In the work folder: what compile.sh writes into, and what it is.
OUT = "out"
SCRIPT = "compile.sh"


@dataclass(frozen=True)
class Ask:
    """What a person said of the compiler.

    Attributes:
        platform: the chip; None where ``settings`` name it, or where the target has one.
        settings: keys of ``--quantization-config``, unchecked.
        where: how these were given, for errors.
        python: the interpreter that has the toolchain; None looks in ``.venvs`` and on PATH.
        environment: the process's variables.
        task: ``text-generation`` or ``image-text-to-text``; None reads the config.
        calibration: a file of samples; None for the text that ships.
        quant: ``--quant``: the precision.
        tp: ``--tp``, of a target that takes it.
    """

    platform: str | None
    settings: Mapping[str, object]
    where: str
    python: Path | None
    environment: Mapping[str, str]
    task: str | None = None
    calibration: str | None = None
    quant: str | None = None
    tp: int | None = None


@dataclass(frozen=True)
class Takes:
    """The models that a compiler is handed, as far as their family tells; `Adapter.plan` refuses the others.

    Attributes:
        kinds: of models.
        formats: FORMATs of the artifacts that it is handed.
        families: by name, muP scalars folded; none for all.
    """

    kinds: tuple[Kind, ...]
    formats: tuple[str, ...] = ("huggingface",)
    families: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """A conversion that makes one of the artifacts that a compiler takes.

    Attributes:
        role: its folder in the work folder.
        request: without ``out``.
    """

    role: str
    request: Request


@dataclass(frozen=True)
class Terms:
    """What was agreed on: all that is needed to judge what came out, long after.

    Attributes:
        platform: the chip, as the compiler spells it.
        settings: all of them, checked.
        facts: of the model and of what is expected: layers, number of parts; plain JSON.
    """

    platform: str
    settings: Mapping[str, object]
    facts: Mapping[str, object]


@dataclass(frozen=True)
class Handing:
    """A model and a compiler that go together.

    Attributes:
        terms: what was agreed on.
        steps: what is converted first.
        model: what is compiled.
        notes: what a person should know, one line each.
        memory: bytes that the compiler takes at its peak, about; 0 where nobody knows.
    """

    terms: Terms
    steps: tuple[Step, ...]
    model: Described
    notes: tuple[str, ...] = ()
    memory: int = 0


@dataclass(frozen=True)
class Tool:
    """A toolchain that was found.

    Attributes:
        words: its name and version.
        environment: what ``compile.sh`` is told of where it is.
        details: what it was recognised by, for the manifest.
    """

    words: str
    environment: Mapping[str, str]
    details: Mapping[str, object]


class Adapter(Protocol):
    """A hardware compiler."""

    @property
    def title(self) -> str:
        """What the compiler is called, for a person."""
        ...

    @property
    def platforms(self) -> Mapping[str, str]:
        """Chips as they are spelled, and what they are."""
        ...

    @property
    def install(self) -> str:
        """How to get the toolchain."""
        ...

    def plan(self, model: Described, request: Request, ask: Ask) -> Handing:
        """Check all that can be checked before any work.

        Args:
            model: what is to be compiled.
            request: how the model is read, with FORMAT hf; steps are made of it.
            ask: what a person said of the compiler.

        Raises:
            UsageError: an unknown chip or setting.
            Refused: a pair of chip and precision, or an architecture, that the compiler does not take.
        """
        ...

    def find(self, ask: Ask, terms: Terms | None = None) -> Tool:
        """The toolchain, recognised by its content.

        Args:
            ask: which interpreter and which variables are looked at.
            terms: what it is to compile; None for any.

        Raises:
            ToolMissing: it is not here, or half of it.
        """
        ...

    def lay_out(self, handing: Handing, work: Path, ask: Ask) -> None:
        """Write what lies beside the artifacts, ``compile.sh`` included. Artifacts are there already.

        Args:
            handing: of `plan`.
            work: the folder, in which each step's artifact is under its role.
            ask: what a person said of the compiler.
        """
        ...

    def judge(self, terms: Terms, out: Path, log: str) -> Mapping[str, object]:
        """The evidence that what the compiler wrote is what it should be.

        Args:
            terms: what was agreed on.
            out: the folder that it wrote into.
            log: all that it printed.

        Raises:
            VerifyFailed: a file that is empty, cut, of another kind, or missing.
        """
        ...


@runtime_checkable
class Choosing(Protocol):
    """An adapter that says beforehand which families it takes."""

    @property
    def takes(self) -> tuple[Takes, ...]:
        """Any one of these."""
        ...


@runtime_checkable
class Adopting(Protocol):
    """An adapter that knows what its compiler writes where another tool ran it."""

    def adopt(self, folder: Path, ask: Ask) -> Terms | None:
        """What such a folder is judged by; None where it is something else.

        Raises:
            UsageError: nobody says for which chip it is.
        """
        ...
