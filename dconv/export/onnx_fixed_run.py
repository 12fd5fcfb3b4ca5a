"""A graph of given lengths asked as one of any: texts in rows of one, filled up with what its mask hides.

What is unused of a text lies behind it, what is unused of the cache before what is there: so tokens are as far apart in
the cache as in the text, which sliding windows count by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dconv.errors import Refused
from dconv.export.prompt import Prompt

_PAST: Final = "past_key_values."
_PRESENT: Final = "present."
#: Outputs with a place for each token.
_BY_TOKEN: Final = ("logits", "last_hidden_state")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of a graph: tokens of a text, and of the past that it has inputs for."""

    sequence: int
    past: int

    @classmethod
    def of(cls, session: Any) -> Lengths | None:
        """What a session's inputs say; None of a graph whose axes have names.

        Args:
            session: ``onnxruntime.InferenceSession``.
        """
        shapes = {one.name: one.shape for one in session.get_inputs()}
        if not all(isinstance(axis, int) for axis in shapes["input_ids"]):
            return None
        past = next((shape[2] for name, shape in shapes.items() if name.startswith(_PAST)), 0)
        return cls(shapes["input_ids"][1], past)

    @property
    def total(self) -> int:
        """Tokens of the longest text."""
        return self.sequence + self.past

    def cut(self, prompt: Prompt) -> Prompt:
        """As much of a prompt as the graph reads, from its beginning."""
        return replace(prompt, tokens=prompt.tokens[:, : self.total], types=_cut(prompt.types, self.total),
                       replies=_cut(prompt.replies, self.sequence))  # fmt: skip

    def filled(self, prompt: Prompt) -> Prompt:
        """One text of as many tokens as the graph has places for new ones."""

        def repeated(values: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
            return None if values is None else np.resize(values[0], (1, self.sequence))

        tokens = np.resize(prompt.tokens[0], (1, self.sequence))
        return replace(prompt, tokens=tokens, types=repeated(prompt.types), replies=repeated(prompt.replies))

    def require(self, before: int, length: int) -> None:
        """Raise where a text does not fit, read in pieces or not.

        Args:
            before: tokens of the past.
            length: tokens behind these.

        Raises:
            Refused: with how long it may be.
        """
        if before + length > self.total or before > self.past:
            raise Refused(
                "a graph of given lengths reads no longer text",
                expected=f"{self.sequence} tokens behind {self.past}",
                found=f"{length} behind {before}",
            )

    def run(self, session: Any, given: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """What a graph of any lengths would answer.

        Args:
            session: of the graph (``onnxruntime.InferenceSession``).
            given: what such a one takes, ``past_key_values.N`` as long as the past is; no more new tokens than places.

        Raises:
            Refused: see `require`.
        """
        tokens = given["input_ids"]
        before = next((held.shape[2] for name, held in given.items() if name.startswith(_PAST)), 0)
        batch, length = tokens.shape
        self.require(before, length)
        shapes = {one.name: tuple(one.shape) for one in session.get_inputs()}
        names = [one.name for one in session.get_outputs()]
        rows: list[list[NDArray[Any]]] = []
        for row in range(batch):
            filled = {
                name: self._filled(name, held[row : row + 1], shapes[name], before) for name, held in given.items()
            }
            made = zip(names, session.run(None, filled), strict=True)
            rows.append([self._part(name, one, before, length) for name, one in made])
        return [np.concatenate(held) for held in zip(*rows, strict=True)]

    def _filled(self, name: str, held: NDArray[Any], shape: tuple[int, ...], before: int) -> NDArray[Any]:
        """Zeros around what is there."""
        whole = np.zeros(shape, held.dtype)
        if name.startswith(_PAST):
            whole[:, :, self.past - before :] = held
        else:
            at = self.past - before if name == "attention_mask" else 0
            whole[:, at : at + held.shape[1]] = held
        return whole

    def _part(self, name: str, made: NDArray[Any], before: int, length: int) -> NDArray[Any]:
        if name.startswith(_PRESENT):
            return made[:, :, self.past - before : self.past + length]
        return made[:, :length] if name in _BY_TOKEN else made


def _cut(values: NDArray[np.int64] | None, length: int) -> NDArray[np.int64] | None:
    return None if values is None else values[:, :length]
