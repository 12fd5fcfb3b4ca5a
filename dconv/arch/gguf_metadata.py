"""The metadata of a GGUF file as a config is translated from it: typed, and none of them passed over."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from dconv.errors import Damaged, Refused
from dconv.sharding.parsed import is_list
from dconv.sharding.region import Index

#: Keys of every architecture that say nothing of the function, or what tensors say as well.
_IDLE: Final = frozenset({
    "vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "pooling_type", "classifier.output_labels",
})  # fmt: skip


@dataclass(frozen=True)
class Metadata:
    """What a GGUF says of its model.

    Attributes:
        arch: ``general.architecture``.
        values: all of its keys.
        shapes: of its tensors, by GGUF's names.
        numbers: reads a small tensor of fp32.
        where: the file.
        read: keys that have been asked for.
    """

    arch: str
    values: Mapping[str, Any]
    shapes: Mapping[str, Index]
    numbers: Callable[[str], Sequence[float]]
    where: str
    read: set[str] = field(default_factory=set[str])

    def get(self, key: str) -> Any:
        """The value of ``<arch>.<key>``; None where it is not there."""
        self.read.add(key)
        return self.values.get(f"{self.arch}.{key}")

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number; of a list with an entry a layer the one that all are.

        Raises:
            Refused: it is not there and has no default; layers that differ.
            Damaged: it is no whole number, or below 0.
        """
        found = self.get(key)
        if is_list(found) and found:
            if any(one != found[0] for one in found):
                raise self.refused(f"{self.arch}.{key}", "one number for all layers", f"{found!r:.80}")
            found = found[0]
        if found is None:
            found = default
        if found is None:
            raise self.lacks(key)
        if type(found) is not int or not 0 <= found < 2**31:
            raise self.damaged(key, "a whole number", found)
        return found

    def real(self, key: str, default: float | None = None) -> float:
        """A number; the shortest decimal that is this fp32, as in the config that it was made of.

        Raises:
            Refused: it is not there and has no default.
            Damaged: it is no finite number of fp32.
        """
        found = self.get(key)
        if found is None:
            found = default
        if found is None:
            raise self.lacks(key)
        if type(found) not in (int, float) or found != found or abs(found) > 3e38:
            raise self.damaged(key, "a number", found)
        return inverse(float(found), lambda value: value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false, ``default`` where it is not there.

        Raises:
            Damaged: it is neither.
        """
        found = self.get(key)
        if found is None:
            return default
        if type(found) is not bool:
            raise self.damaged(key, "true or false", found)
        return found

    def text(self, key: str) -> str:
        """A text; "" where it is not there.

        Raises:
            Damaged: it is something else.
        """
        found = self.get(key)
        if found is not None and not isinstance(found, str):
            raise self.damaged(key, "a text", found)
        return found or ""

    def fixed(self, key: str, *wanted: object) -> None:
        """A key that may be missing, and is one of these values otherwise.

        Raises:
            Refused: another value, by which the model would compute something else.
        """
        found = self.get(key)
        if found is not None and found not in wanted:
            raise self.refused(f"{self.arch}.{key}", " or ".join(map(str, wanted)), f"{found!r:.80}")

    def has(self, tensor: str) -> bool:
        """Whether the model has a tensor, by GGUF's name."""
        return tensor in self.shapes

    def rows(self, tensor: str, axis: int = 0) -> int:
        """The length of an axis of a tensor, the slowest being 0.

        Raises:
            Damaged: there is no such tensor or axis.
        """
        shape = self.shapes.get(tensor, ())
        if axis >= len(shape):
            raise Damaged(f"a tensor of a {self.arch} model is missing", where=f"{tensor} in {self.where}")
        return shape[axis]

    def layers_with(self, tensor: str, layers: int) -> list[bool]:
        """For each layer whether it has this tensor."""
        return [f"blk.{layer}.{tensor}" in self.shapes for layer in range(layers)]

    def token(self, name: str) -> int | None:
        """The id of a special token, by GGUF's name (``bos``, ``eos``, ``padding``); None where none is named."""
        found = self.values.get(f"tokenizer.ggml.{name}_token_id")
        return found if type(found) is int else None

    def check_all_read(self) -> None:
        """That no key was passed over by which the model might compute something else.

        Raises:
            Refused: some were.
        """
        prefix = f"{self.arch}."
        own = {key.removeprefix(prefix) for key in self.values if key.startswith(prefix)}
        if odd := sorted(own - self.read - _IDLE):
            raise self.refused(
                f"{prefix}{odd[0]}", f"keys of {self.arch} that are known here", ", ".join(prefix + key for key in odd)
            )

    def lacks(self, key: str) -> Refused:
        """What to raise for a key that config.json needs and that is not there."""
        return self.refused(f"{self.arch}.{key}", "it among the metadata", "nothing")

    def refused(self, where: str, expected: str, found: str) -> Refused:
        """What to raise where config.json cannot be told from what is there."""
        return Refused(
            "the metadata do not say what config.json needs, nothing was written",
            where=f"{where} in {self.where}",
            expected=expected,
            found=found,
            do="--hf-config DIR supplies the model's config.json",
        )

    def damaged(self, key: str, expected: str, found: object) -> Damaged:
        """What to raise for a value that the key cannot have."""
        return Damaged(
            "a value of the metadata that none is",
            where=f"{self.arch}.{key} in {self.where}",
            expected=expected,
            found=f"{found!r:.80}",
        )


def fp32(value: float) -> float:
    """The fp32 number nearest to this one."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def inverse(stored: float, made: Callable[[float], float], guess: float | None = None) -> float:
    """The shortest decimal near ``guess`` of which ``made`` makes the fp32 number that is stored."""
    near = stored if guess is None else guess
    for digits in range(1, 17):
        value = float(f"{near:.{digits}g}")
        if fp32(made(value)) == fp32(stored):
            return value
    return near
