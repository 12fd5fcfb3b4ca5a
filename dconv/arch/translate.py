"""What the engine asks of a config translation, and what a decoder's is put together from.

`Config` is the whole of a family's dictionary work: config.json in, Megatron's args out, and back. Decoders share one
implementation (`dconv.arch.decoder.DecoderConfig`) that is a list of `Aspect`s; a family of another kind may bring a
class of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, Protocol

from dconv.arch.layouts import Facts

CONFIG: Final = "config.json"
#: A config.json or Megatron's args with everything said that their defaults leave unsaid.
Said = Mapping[str, object]


class Config(Protocol):
    """How one family's config.json and Megatron's args say the same thing."""

    @property
    def model_type(self) -> str:
        """``model_type`` of its config.json."""
        ...

    @property
    def architecture(self) -> str:
        """The only entry of ``architectures``."""
        ...

    def facts(self, hf: Mapping[str, object]) -> dict[str, Any]:
        """Sizes and switches that shapes follow from.

        Raises:
            Damaged: a wrong type, not positive, or does not divide.
        """
        ...

    def to_args(self, hf: Mapping[str, object], strict: bool = True) -> dict[str, object]:
        """The args that describe this model to Megatron: plain values, no parallel sizes, no padding of the vocabulary.

        Args:
            hf: config.json.
            strict: refuse a config that args cannot say; else return the nearest args (`unsayable` tells what is lost).

        Raises:
            Damaged: see `facts`.
            Refused: ``strict``, and something would be lost.
        """
        ...

    def unsayable(self, hf: Mapping[str, object]) -> list[str]:
        """What the args cannot say of this config, one line each."""
        ...

    def needs(self, hf: Mapping[str, object]) -> list[str]:
        """What mainline megatron-core lacks to compute this model's function, in words; the args say all of it."""
        ...

    def to_hf(self, args: Mapping[str, object]) -> dict[str, object]:
        """A whole config.json from Megatron's args alone.

        Raises:
            Damaged: a missing or impossible value.
            Refused: the args are not this family's.
        """
        ...

    def matches_args(self, args: Mapping[str, object]) -> list[str]:
        """Reasons why these args are not this family; none if they are.

        Raises:
            Damaged: a value of the wrong type.
        """
        ...

    def check_pair(self, hf: Mapping[str, object], args: Mapping[str, object]) -> list[str]:
        """Where a config.json that was carried along disagrees with the args beside it; none if the two fit.

        Concerns what the function depends on; context length, dropout and dtype may differ.

        Raises:
            Damaged: a value of the wrong type on either side.
        """
        ...


class Aspect(Protocol):
    """One thing that decoders differ in, on both sides.

    A declaration: a frozen dataclass whose fields say how a family has it. ``said`` is config.json with the family's
    defaults in `facts`, `to_args` and `needs`; it is Megatron's args after `dconv.arch.args.read` in the others.
    """

    @property
    def owns(self) -> Collection[str]:
        """Args that this aspect judges; the decoder's own constants for them do not hold."""
        ...

    @property
    def compared(self) -> Mapping[str, str]:
        """Keys of config.json that a stale one is found by, with an arg that is behind each."""
        ...

    def facts(self, said: Said, /) -> Facts:
        """Its share of `Config.facts`."""
        ...

    def to_args(self, said: Said, facts: Facts, /) -> tuple[dict[str, object], list[str]]:
        """Args, and what they cannot say of ``said``; where something is unsayable, the nearest args."""
        ...

    def to_hf(self, said: Said, /) -> dict[str, object]:
        """Its keys of config.json for args that match."""
        ...

    def mismatches(self, said: Said, /) -> list[str]:
        """Why the args are not this family's."""
        ...

    def needs(self, said: Said, /) -> list[str]:
        """Its share of `Config.needs`."""
        ...
