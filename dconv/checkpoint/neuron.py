"""Directories of AWS Neuron's names (NxD Inference), read and written: HuggingFace's files with other tensors in them.

What lies where is the family's table (`dconv.arch.neuron`), in both directions. Neuron's e4m3 codes are at most 240 and
there the same bytes as HuggingFace's, so that a directory is read as HuggingFace's names with ``weight_scale_inv``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from dconv.arch import registry
from dconv.arch.neuron import Held, lay_out, loaded_from, scale_of
from dconv.checkpoint import huggingface, huggingface_target
from dconv.checkpoint.files import stamps
from dconv.checkpoint.rename import AS_STORED, Renaming
from dconv.checkpoint.source import Side, Source, shape_error, side_files
from dconv.coded.fp8 import SUFFIX, block_of
from dconv.coded.neuron import with_scales
from dconv.errors import Damaged, Refused
from dconv.sharding.layout import pieces
from dconv.sharding.plan import Target
from dconv.sharding.tensor import Extent, Slot, Stored, TensorSpec

#: Ends of names that the vendor's loader makes, and may have written.
_RANKS: Final = ("rank_util.rank", "spmd_rank.rank")


def open_source(folder: Path, *, rename: Renaming = AS_STORED) -> Source:
    """Describe a directory of Neuron's names as HuggingFace's.

    Raises:
        Damaged: as `dconv.checkpoint.huggingface.open_source`; a tensor of another shape than its config says, or one
            that is there under Neuron's and HuggingFace's names at once.
        Refused: no config.json, or a family whose names are not known.
    """
    before = stamps(folder, (".safetensors",))
    config = huggingface.read_config(folder)
    if config is None:
        raise Refused(
            "a Neuron checkpoint says what it is in its config.json alone, nothing was written",
            where=str(folder),
            expected="the model's config.json beside its files",
        )
    family = registry.detect(config, None)
    held = {one.name: one for one in lay_out(family, family.facts(config))}
    left_out: dict[str, str] = {}
    shard = huggingface.renamed(folder, huggingface.shards_of(folder)[0], rename)
    named: huggingface.Shard = {file: {} for file in shard}
    made_of: dict[str, str] = {}
    block = block_of(config)
    for file, tensors in shard.items():
        for name, tensor in tensors.items():
            if name.endswith(_RANKS):
                left_out[name] = "parallel ranks, which the loader makes"
                continue
            found = _named(name, tensor, held, block)
            for theirs in found:
                if made_of.setdefault(theirs, name) != name:
                    raise _twice(theirs, made_of[theirs], name, folder)
            named[file].update(found)
    source = huggingface.source_of(folder, [named], before, config, side_files(folder), "neuron")
    return replace(source, left_out={**source.left_out, **left_out})


def _twice(theirs: str, one: str, other: str, folder: Path) -> Damaged:
    return Damaged(
        "two tensors of a Neuron checkpoint are one of HuggingFace's, nothing was written",
        where=f"{one} and {other} in {folder}",
        expected="one of the two",
        found=f"{theirs} twice",
    )


def _named(name: str, tensor: Stored, held: Mapping[str, Held], block: tuple[int, int] | None) -> dict[str, Stored]:
    """HuggingFace's tensors in a stored one; itself where the table does not have it."""
    ours = loaded_from(name)
    if ours in held:
        return _parts(held[ours], tensor)
    weight = ours.removesuffix(".scale") + ".weight"
    if ours == scale_of(weight) and weight in held:
        return _scales(held[weight], tensor, block)
    return {name: tensor}


def _parts(held: Held, tensor: Stored) -> dict[str, Stored]:
    """HuggingFace's tensors in one of Neuron's."""
    if tensor.spec.shape != held.shape:
        raise shape_error(tensor.spec.name, tensor.extents[0].file, held.shape, tensor.spec.shape)
    specs = {spec.name: spec for specs in held.sources for spec in specs}
    found: dict[str, Stored] = {}
    for piece in pieces(held.slots, tensor.extents, tensor.spec.dtype):
        spec = TensorSpec(piece.tensor, specs[piece.tensor].shape, piece.dtype)
        found[spec.name] = Stored(spec, (Extent(piece.region, piece.file, piece.offset, piece.strides),))
    return found


def _scales(held: Held, tensor: Stored, block: tuple[int, int] | None) -> dict[str, Stored]:
    """The scales of HuggingFace's tensors in Neuron's ``.scale``: of blocks where it is a stack, else of rows."""
    if not held.stacked:
        name = held.sources[0][0].name + SUFFIX
        return {name: Stored(TensorSpec(name, tensor.spec.shape, tensor.spec.dtype), tensor.extents)}
    if block is None:
        raise Damaged(
            "experts with scales, and a config that does not say of which blocks",
            where=tensor.spec.name,
            expected="weight_block_size in quantization_config of config.json",
        )
    return _parts(held.scales(block, lambda name: name + SUFFIX), tensor)


def lay_out_target(
    held: Iterable[Held],
    specs: Mapping[str, TensorSpec],
    *,
    config: Mapping[str, object] | None,
    side: Side,
    shard_size: int,
    left_out: dict[str, str],
) -> Target:
    """A directory of Neuron's names to be written. It has an index in any case: some loaders read nothing without one.

    Args:
        held: Neuron's tensors, scales among them, in the order to write them.
        specs: HuggingFace's tensors as they are to be written, scales among them.
        config: config.json's content; None copies the one among ``side`` as it is.
        side: files that travel with the model, by name.
        shard_size: bytes of tensors in a weight file, at most (one tensor at least).
        left_out: stored tensors that are not written, each with the reason.

    Raises:
        Refused: experts of one layer in several dtypes.
    """
    tensors: list[tuple[TensorSpec, tuple[Slot, ...]]] = []
    for one in with_scales(held, specs):
        dtypes = {specs[spec.name].dtype for each in one.sources for spec in each}
        if len(dtypes) > 1:
            raise Refused(
                "experts of several dtypes have no place in one tensor, nothing was written",
                where=one.name,
                found=", ".join(sorted(dtypes)),
                do="--dtype gives all one",
            )
        tensors.append((TensorSpec(one.name, one.shape, dtypes.pop()), one.slots))
    return huggingface_target.lay_out_slots(
        tensors, config=config, side=side, shard_size=shard_size, left_out=left_out, indexed=True
    )
