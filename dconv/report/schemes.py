"""How a source's weights are coded: each scheme by the parts of its first weight, and what must not be got wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dconv.report.meanings import Meaning
from dconv.report.sample import Weight
from dconv.report.whole import Parts
from dconv.sharding.derived import Derived
from dconv.sharding.region import Index


@dataclass(frozen=True)
class StoredPart:
    """One of the tensors that a weight is made of; ``words`` is "" where only its place is known."""

    name: str
    dtype: str
    shape: Index
    words: str

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"tensor": self.name, "dtype": self.dtype, "shape": list(self.shape), "words": self.words}


@dataclass(frozen=True)
class Scheme:
    """Weights that are coded alike: ``words`` as the plan says it, ``tensors`` of them, ``parts`` of the first."""

    words: str
    tensors: int
    parts: tuple[StoredPart, ...]
    sentences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        parts = [part.to_dict() for part in self.parts]
        return {"words": self.words, "tensors": self.tensors, "parts": parts, "sentences": list(self.sentences)}


def schemes_of(
    words: Mapping[str, str],
    coded: Sequence[tuple[Weight, Derived]],
    meanings: Mapping[str, Meaning | None],
    wholes: Mapping[str, Parts | None],
) -> Iterable[Scheme]:
    """What each way of coding is, told by the first weight that is in it.

    Args:
        words: for each weight its scheme, as the plan says it.
        wholes: of the weights in whole numbers what they are made of.
        coded: each weight, and what it is decoded from.
        meanings: of their codes, by weight.
    """
    counts = Counter(words[weight.name] for weight, _ in coded)
    seen: set[str] = set()
    for weight, derived in coded:
        said = words[weight.name]
        if said in seen:
            continue
        seen.add(said)
        meaning, whole = meanings[weight.name], wholes[weight.name]
        if whole:
            arrays, sentences = list(whole.stored()), whole.sentences
        else:
            told = meaning.parts if meaning else ()
            arrays = [(array, told[i] if i < len(told) else "") for i, array in enumerate(derived.inputs)]
            sentences = meaning.sentences if meaning else ()
        parts = (StoredPart(array.pieces[0].tensor, array.dtype, array.shape, text) for array, text in arrays)
        yield Scheme(said, counts[said], tuple(parts), sentences)
