"""MLX directories, read and written: HuggingFace's files with MLX's tensors in them, plain or in affine codes.

What lies where is the family's table (`dconv.arch.mlx`), in both directions; a directory is read as the HuggingFace
tensors that its own are made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from dconv.arch import registry
from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.arch.mlx import Held, lay_out
from dconv.checkpoint import huggingface, huggingface_target, signs
from dconv.checkpoint.files import stamps
from dconv.checkpoint.rename import AS_STORED, Renaming
from dconv.checkpoint.source import Located, Side, Source, expected_specs, shape_error, side_files
from dconv.coded import mlx
from dconv.coded.decode import KEY
from dconv.coded.decoded import Decoded
from dconv.errors import DconvError, Refused
from dconv.sharding.derived import Derived, steps
from dconv.sharding.layout import pieces
from dconv.sharding.plan import Target
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical, Piece, Slot, Stored, TensorSpec


def open_source(folder: Path, *, rename: Renaming = AS_STORED) -> Source:
    """Describe an MLX directory as HuggingFace's tensors.

    Raises:
        Damaged: as `dconv.checkpoint.huggingface.open_source`; codes that do not fit.
        Refused: no config.json, a family that mlx-lm lacks, or codes of another kind.
    """
    before = stamps(folder, (".safetensors",))
    config = huggingface.read_config(folder)
    if config is None:
        raise Refused(
            "an MLX checkpoint says what it is in its config.json alone, nothing was written",
            where=str(folder),
            expected="the model's config.json beside its files",
        )
    plain = {key: value for key, value in config.items() if key not in (KEY, mlx.KEY)}
    family = registry.detect(plain, None)
    held = {one.name: one for one in lay_out(family, family.facts(plain))}
    shard = huggingface.renamed(folder, huggingface.shards_of(folder)[0], rename)
    stored = {name: at for part in shard.values() for name, at in part.items()}
    found = Decoded(dict(stored), lambda _: (_ for _ in ()).throw(ValueError("no number is asked for")))
    fault: DconvError | None = None
    try:
        mlx.decode(found, config, {name: one.shape for name, one in held.items()})
    except DconvError as error:
        fault = error
    source = huggingface.source_of(folder, [shard], before, plain, side_files(folder), signs.MLX)
    shapes, coded = _as_huggingface(found, held)
    return replace(
        source,
        locate=partial(_locate, found.tensors),
        left_out={**source.left_out, **({f"{mlx.KEY} of config.json": "the weights are decoded"} if coded else {})},
        side={name: path for name, path in source.side.items() if name != "config.json"} if coded else source.side,
        shapes=shapes,
        tensors={},
        derived=found.derived,
        coded=coded,
        fault=fault,
    )


def _as_huggingface(found: Decoded, held: Mapping[str, Held]) -> tuple[dict[str, Any], dict[str, str]]:
    """Shapes of HuggingFace's tensors, of one part where there are several, and the words of those that are decoded."""
    shapes: dict[str, Any] = {}
    coded: dict[str, str] = {}
    for name, tensor in found.tensors.items():
        one = held.get(name)
        for theirs, shape in {slot.tensor: slot.region.shape for slot in one.slots}.items() if one else ():
            shapes[theirs] = shape
            if words := found.coded.get(name):
                coded[theirs] = words
        if one is None:
            shapes[name] = tensor.spec.shape
    return shapes, coded


def _locate(tensors: Mapping[str, Stored], family: Family, facts: Facts) -> Located:
    """See `Located`. Tensors that are there under HuggingFace's names are taken as they are: mlx-lm renames both."""
    held = {one.name: one for one in lay_out(family, facts)}
    specs = expected_specs(family, facts)
    located = Located({}, {}, {})
    for name, tensor in tensors.items():
        one = held.get(name)
        if one is None and name in specs:
            one = Held(name, specs[name].shape, (Slot.whole(name, specs[name].shape),))
        if one is None:
            if reason := family.reason_to_leave_out(name, facts):
                located.left_out[name] = reason
            else:
                located.unknown[name] = tensor.extents[0].file
            continue
        if tensor.spec.shape != one.shape:
            raise shape_error(name, tensor.extents[0].file, one.shape, tensor.spec.shape)
        if all(slot.tensor not in specs for slot in one.slots):
            continue
        for piece in pieces(one.slots, tensor.extents, tensor.spec.dtype):
            located.pieces.setdefault(piece.tensor, []).append(piece)
    return located


def as_held(held: Iterable[Held], logical: Logical) -> Logical:
    """The same tensors as MLX has them: under its names, each with the boxes of HuggingFace's that it is made of.

    Raises:
        Refused: experts of one layer in several dtypes.
    """
    specs: dict[str, TensorSpec] = {}
    where: dict[str, tuple[Piece, ...]] = {}
    twins: dict[str, tuple[Piece, ...]] = {}
    for one in held:
        names = dict.fromkeys(slot.tensor for slot in one.slots)
        dtypes = {logical.specs[name].dtype for name in names if name in logical.specs}
        if len(dtypes) > 1:
            raise Refused(
                "experts of several dtypes have no place in one tensor, nothing was written",
                where=one.name,
                found=", ".join(sorted(dtypes)),
                do="--dtype gives all one",
            )
        if not dtypes:  # left out by --drop: building the plan names it
            continue
        specs[one.name] = TensorSpec(one.name, one.shape, dtypes.pop())
        where[one.name] = _joined(one, _through(one, logical.pieces), logical.derived)
        if again := _through(one, logical.replicas):
            twins[one.name] = again
    return replace(logical, specs=specs, pieces=where, replicas=twins)


def _joined(one: Held, boxes: tuple[Piece, ...], derived: Mapping[str, Derived]) -> tuple[Piece, ...]:
    """The boxes as one where all are of a computed tensor that is this very one: then its codes may be kept."""
    if not boxes:  # a config alone has none
        return boxes
    first = boxes[0]
    made = derived.get(first.file)
    if made is None or made.shape != one.shape or sum(box.region.volume for box in boxes) != prod(one.shape):
        return boxes
    apart = steps(one.shape)
    for box in boxes:
        along = zip(box.strides, apart, box.region.shape, strict=True)
        straight = all(n == 1 or stride == step for stride, step, n in along)
        here = sum(at * step for at, step in zip(box.region.start, apart, strict=True))
        same = (box.file, box.dtype, box.factor) == (first.file, first.dtype, 1.0)
        if not (straight and same and box.offset == here):
            return boxes
    return (made.piece(one.name, first.file, first.dtype),)


def _through(one: Held, pieces_of: Mapping[str, tuple[Piece, ...]]) -> tuple[Piece, ...]:
    """Boxes of HuggingFace's tensors as boxes of MLX's: `dconv.sharding.layout.pieces` the other way round."""
    found: list[Piece] = []
    for slot in one.slots:
        for piece in pieces_of.get(slot.tensor, ()):
            box = slot.region.intersect(piece.region)
            if box is None:
                continue
            offset = piece.offset + sum(
                (b - a) * s for a, b, s in zip(piece.region.start, box.start, piece.strides, strict=True)
            )
            axes = list(zip(slot.start, slot.axes, strict=True))
            start = tuple(at if a < 0 else at + box.start[a] - slot.region.start[a] for at, a in axes)
            shape = tuple(1 if a < 0 else box.shape[a] for _, a in axes)
            strides = tuple(0 if a < 0 else piece.strides[a] for _, a in axes)
            found.append(replace(piece, tensor=one.name, region=Region(start, shape), offset=offset, strides=strides))
    return tuple(found)


def lay_out_target(
    specs: Iterable[TensorSpec],
    *,
    config: Mapping[str, object],
    side: Side,
    shard_size: int,
    left_out: dict[str, str],
) -> Target:
    """An MLX directory to be written: it has an index in any case, as MLX's own have.

    Args:
        specs: MLX's tensors, codes and scales among them.
        config: config.json, which says how codes are to be read.
        side: files that travel with the model, by name.
        shard_size: bytes of tensors in a weight file, at most (one tensor at least).
        left_out: stored tensors that are not written, each with the reason.
    """
    held = [(spec, (Slot.whole(spec.name, spec.shape),)) for spec in specs]
    return huggingface_target.lay_out_slots(
        held, config=config, side=side, shard_size=shard_size, left_out=left_out, indexed=True, framework=signs.MLX
    )
