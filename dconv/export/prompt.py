"""What a model is asked, and how: one question for every runtime, so that answers can be compared.

A family's table tells how its models are asked: by what Megatron calls the blocks that it has rows for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from dconv.arch.family import TOWER, Family
from dconv.arch.layouts import Facts, size

Kind = Literal["decoder", "hybrid", "encoder", "encoder-decoder", "sighted"]

#: fp32 answers of a model: of words [batch, sequence, vocabulary] first, then of what other heads it has.
Answers = tuple[NDArray[np.float32], ...]

#: What a model with a tokenizer goes on with, greedily and for so many tokens.
SENTENCE: Final = "The capital of France is"
NEW_TOKENS: Final = 12
_LENGTH: Final = 16


@dataclass(frozen=True)
class Prompt:
    """A question, the same every time.

    Attributes:
        kind: how the model is asked. ``hybrid`` decoders have layers of Mamba, ``sighted`` ones see an image first.
        tokens: int64 [batch, sequence].
        types: of an encoder the token types, int64 [batch, sequence].
        replies: what an encoder-decoder has said so far, int64 [batch, sequence].
        image: float32 [1, channels, height, width], for the first token's place.
        patches: places that the image takes among the tokens.
    """

    kind: Kind
    tokens: NDArray[np.int64]
    types: NDArray[np.int64] | None = None
    replies: NDArray[np.int64] | None = None
    image: NDArray[np.float32] | None = None
    patches: int = 0

    def with_places(self) -> NDArray[np.int64]:
        """The tokens with a place for each patch of the image, as transformers wants them."""
        first = np.repeat(self.tokens[:, :1], self.patches or 1, axis=1)
        return np.concatenate([first, self.tokens[:, 1:]], axis=1)


def kind_of(family: Family) -> Kind:
    """How models of a family are asked; see `prompt_for` of those whose tower travels beside Megatron's model."""
    names = [row.megatron for row in family.rows]
    blocks = {name.split(".layers.")[0] for name in names}
    if family.sees:
        return "sighted"
    if "encoder" in blocks:
        return "encoder-decoder" if "decoder" in blocks else "encoder"
    return "hybrid" if any(".mixer." in name for name in names) else "decoder"


def prompt_for(family: Family, facts: Facts, config: Mapping[str, object]) -> Prompt:
    """Random tokens, of an image random pixels, within what the model knows: the same at each call.

    A model whose tower travels beside Megatron's is asked with words alone.

    Args:
        family: which says how it is asked.
        facts: of `dconv.arch.family.Family.facts`.
        config: config.json, for the place of an image.
    """
    draw = np.random.default_rng(0)
    kind, vocabulary = kind_of(family), size(facts, "vocab")
    if kind == "sighted":
        if any(row.megatron.startswith(TOWER) for row in family.rows):
            return _sighted(draw, vocabulary, facts, config)
        kind = "decoder"  # what every runtime has of it
    tokens = draw.integers(0, vocabulary, (2, _LENGTH), np.int64)
    types = replies = None
    if kind == "encoder":
        types = np.broadcast_to(np.arange(_LENGTH) >= _LENGTH // 3, tokens.shape).astype(np.int64)
    if kind == "encoder-decoder":
        replies = draw.integers(0, vocabulary, (2, _LENGTH - 5), np.int64)
    return Prompt(kind, tokens, types, replies)


def _sighted(draw: np.random.Generator, vocabulary: int, facts: Facts, config: Mapping[str, object]) -> Prompt:
    here = config.get("image_token_index", config.get("image_token_id"))
    mark = here if isinstance(here, int) else 0
    words = draw.integers(0, vocabulary - 1, (1, _LENGTH), np.int64)
    words[words == mark] = vocabulary - 1 if mark != vocabulary - 1 else 0
    places = size(facts, "vision_tokens") - 1  # the table's position embedding has one for the class token
    side = round(places**0.5) * size(facts, "patch")
    image = draw.standard_normal((1, size(facts, "vision_channels"), side, side), np.float32)
    whole = config.get("vision_feature_select_strategy") == "full"
    return Prompt("sighted", np.concatenate([[[mark]], words], 1), image=image, patches=places + whole)
