"""compressed-tensors (llm-compressor, vLLM) as a source: which stored tensors make a weight, by what its config says.

A module's codes are ``weight`` or ``weight_packed``; ``weight_scale`` and others beside it say what they mean. Source:
compressed-tensors 0.20.0, ``compressors/*/base.py``, for each format what it stores, and how it is decompressed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from dconv.coded import fp8
from dconv.coded.compressed_config import Args, Group, config_of
from dconv.coded.decoded import Decoded, dense
from dconv.errors import Damaged, Refused, group_names
from dconv.sharding.derived import Recipe
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.region import Index
from dconv.sharding.tensor import Stored

#: A module's tensors that its weight is made of.
_CODES: Final = ("weight", "weight_packed")
_BESIDE: Final = ("weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx", "weight_shape")
#: Of ``weight``: others are no codes.
_CODE_DTYPES: Final = (fp8.FP8, "f8_e5m2", "i8")
#: What else compressed-tensors stores, which says how activations and caches are rounded: a dense weight is without.
_ACTIVATIONS: Final = frozenset(
    f"{what}_{part}"
    for what in ("input", "output", "q", "k", "v", "kv")
    for part in ("scale", "zero_point", "global_scale")
)
_SCALES: Final = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Module:
    """A module whose weight is in codes.

    Attributes:
        parts: its stored tensors by the end of their names.
    """

    name: str
    group: Group
    parts: Mapping[str, Stored]

    @property
    def args(self) -> Args:
        return self.group.args

    def need(self, part: str, dtypes: tuple[str, ...], *shapes: Index) -> Stored:
        """A part, proved to be of one of these dtypes, and of one of the shapes where there are any.

        Raises:
            Damaged: it is not there, or is another.
        """
        found = self.parts.get(part)
        if found is None:
            raise Damaged(
                "a weight in codes lacks a part, without which its codes mean nothing",
                where=f"{self.name}.{part}",
                expected=f"it beside {', '.join(self.parts)}, as {self._said()} has it",
                do="fetch the files again",
            )
        spec = found.spec
        if spec.dtype not in dtypes or (shapes and spec.shape not in shapes):
            raise Damaged(
                "a part of a weight in codes is not what the config makes it",
                where=f"{spec.name} in {found.extents[0].file}",
                expected=f"{' or '.join(dtypes)} of {' or '.join(map(str, map(list, shapes))) or 'any shape'}"
                f" by {self._said()}",
                found=f"{spec.dtype}{list(spec.shape)}",
                do="the config belongs to other files",
            )
        return found

    def check_no_more(self, *parts: str) -> None:
        """
        Raises:
            Damaged: there are others than these.
        """
        more = sorted(self.parts.keys() - set(parts))
        if more:
            raise Damaged(
                "beside a weight in codes is a part that its format has no use for",
                where=f"{self.name}.{more[0]}",
                expected=f"{', '.join(parts)}, as {self._said()} has it",
            )

    def refuse(self, what: str) -> Refused:
        """An error that says that a group asks for something that is not known."""
        return Refused(f"{what}, nothing was written", where=f"config_groups.{self.group.name:.60}", found=self._said())

    def _said(self) -> str:
        args = self.args
        of = f" of {args.group}" if args.group else f" of {args.block[0]} x {args.block[1]}" if args.block else ""
        symmetric = "" if args.symmetric else ", with zero points"
        return f"{self.group.format}, {args.kind}{args.bits} by {args.strategy}{of}{symmetric}"


@dataclass(frozen=True)
class Made:
    """A weight and what computes it from ``inputs``; ``words`` for a person, ``bits`` read for an element."""

    shape: Index
    inputs: tuple[Stored, ...]
    recipe: Recipe
    words: str
    bits: float


def decode(found: Decoded, config: Mapping[str, object], dtype: str) -> None:
    """Decode every weight in codes, each proved to be whole, and every part to belong to one.

    Raises:
        Damaged: a part is missing, of another shape than the config says, or of no use; a weight that the config does
            not speak of.
        Refused: a format that is not known.
    """
    said = config["quantization_config"]
    groups = config_of(said if isinstance(said, Mapping) else {})
    tensors = found.tensors
    for name in [name for name in tensors if name.rpartition(".")[2] in _ACTIVATIONS]:
        del tensors[name]
        found.left_out[name] = "a scale of activations or of a cache, which dense weights have no use for"
    for name, parts in _modules(tensors).items():
        where = next(stored.spec.name for part, stored in parts.items() if part in _CODES)
        module = Module(name, groups.group_of(name, where), parts)
        made = _MAKERS[module.group.format](module, found)
        named = {stored.spec.name: stored for stored in made.inputs}
        whole = dense(made.shape, named, made.recipe, made.words, made.bits)
        found.put(f"{name}.weight", dtype, {stored.spec.name: stored for stored in parts.values()}, whole, made.words)


def _modules(tensors: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    """Modules whose weights are in codes, with their parts.

    Raises:
        Damaged: a part without codes, or codes twice.
    """
    found: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        module, _, part = name.rpartition(".")
        coded = part == "weight_packed" or (part == "weight" and stored.spec.dtype in _CODE_DTYPES)
        if coded or part in _BESIDE:
            found.setdefault(module, {})[part] = stored
    alone = sorted(f"{name}.{part}" for name, parts in found.items() if not parts.keys() & {*_CODES} for part in parts)
    if alone:
        raise Damaged(
            f"{len(alone)} tensors say what codes mean, and there are none beside them",
            where=group_names(alone),
            expected=f"{alone[0].rpartition('.')[0]}.weight or .weight_packed in codes",
            do="weights that are only rounded (quantization_status frozen) are plain without these tensors",
        )
    for name, parts in found.items():
        if "weight_packed" in parts and f"{name}.weight" in tensors:
            raise Damaged("a weight is stored twice, packed and not", where=f"{name}.weight, {name}.weight_packed")
    return found


def _float8(module: Module, found: Decoded) -> Made:
    """``float-quantized``: code × scale, of a tensor, a row, a group of columns or a block."""
    del found
    args = module.args
    weight = module.need("weight", (fp8.FP8,) if args.kind == "float" else ("i8",))
    if (args.kind, args.bits) != ("float", 8) or not args.symmetric:
        raise module.refuse("FP8 weights have codes of 8 bits without zero points")
    module.check_no_more("weight", "weight_scale")
    shape = _matrix(weight)
    block, shapes = _blocks(module, shape)
    scale = module.need("weight_scale", _SCALES, *shapes)
    words = f"e4m3 code x the scale of {_of(block, shape)}"
    bits = 8 + 8 * ITEMSIZE[scale.spec.dtype] / (block[0] * block[1])
    recipe = fp8.Decode(block, weight.spec.dtype)
    return Made(shape, (weight, as_grid(scale, fp8.scales_shape(shape, block))), recipe, words, bits)


def _matrix(codes: Stored) -> tuple[int, int]:
    if len(codes.spec.shape) != 2:
        raise Damaged(
            "codes are no matrix",
            where=f"{codes.spec.name} in {codes.extents[0].file}",
            expected="[out, in]",
            found=f"{list(codes.spec.shape)}",
        )
    return codes.spec.shape[0], codes.spec.shape[1]


def _blocks(module: Module, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[Index, ...]]:
    """Rows and columns that share a scale, and what the scales' shape may be.

    Raises:
        Damaged: groups that the columns are no multiple of.
    """
    (rows, columns), args = shape, module.args
    if args.strategy == "tensor":
        return shape, ((1,), (), (1, 1))
    if args.strategy == "channel":
        return (1, columns), ((rows, 1), (rows,))
    if args.block:
        return args.block, (fp8.scales_shape(shape, args.block),)
    if columns % args.group:
        raise Damaged(
            "a weight's columns are no multiple of its groups",
            where=module.name,
            expected=f"a multiple of {args.group}",
            found=str(columns),
        )
    return (1, args.group), ((rows, columns // args.group),)


def as_grid(scale: Stored, shape: Index) -> Stored:
    """Scales of as many rows and columns as there are blocks: one for all, or one for each row, may have fewer axes."""
    if scale.spec.shape == shape:
        return scale
    (extent,) = scale.extents
    strides = (extent.strides[0] if len(extent.strides) == 1 else 0, 0)
    region = replace(extent.region, start=(0,) * len(shape), shape=shape)
    return Stored(replace(scale.spec, shape=shape), (replace(extent, region=region, strides=strides),))


def _of(block: tuple[int, int], shape: tuple[int, int]) -> str:
    if block == shape:
        return "its tensor"
    if block[0] == 1:
        return "its row" if block[1] == shape[1] else f"its {block[1]} columns"
    return f"its {block[0]} x {block[1]} block"


_MAKERS: Final[dict[str, Callable[[Module, Decoded], Made]]] = {
    "float-quantized": _float8,
    "naive-quantized": _float8,
}
