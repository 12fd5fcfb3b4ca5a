"""One file a tensor-parallel rank, HuggingFace's or Meta's names in it: which files there are, which box each holds."""

from __future__ import annotations

import re
from pathlib import Path

from dconv.checkpoint.source import shape_error
from dconv.errors import Damaged, group_names
from dconv.sharding.region import Region
from dconv.sharding.tensor import Stored, TensorSpec


def read_ranks(folder: Path, pattern: re.Pattern[str]) -> list[tuple[str, dict[str, Stored]]]:
    """The torch files of a directory that hold one tensor-parallel rank each, in rank order, with their tensors.

    Args:
        folder: the directory.
        pattern: of their names; its group is the rank's number.

    Raises:
        Damaged: a number is missing, or stands there twice.
    """
    ranks: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if match := pattern.fullmatch(path.name):
            if int(match[1]) in ranks:
                raise Damaged("two files of one rank", where=str(path), found=ranks[int(match[1])].name)
            ranks[int(match[1])] = path
    count = max(ranks, default=-1) + 1
    if count != len(ranks):
        first = next(rank for rank in range(count) if rank not in ranks)
        raise Damaged(
            f"{count - len(ranks)} of {count} tensor-parallel shards are missing, nothing was written",
            where=f"rank {first} is the first in {folder}",
            expected=f"every number up to that of {ranks[count - 1].name}",
            found=group_names(path.name for path in ranks.values()),
            do="fetch them again",
        )
    if not ranks:
        return []
    from dconv.checkpoint import state_dict  # seldom

    return [(path.name, state_dict.read_tensors(path)) for _, path in sorted(ranks.items())]


def cut_region(spec: TensorSpec, tensor: Stored, rank: int, count: int, *, ranked: bool) -> Region:
    """The box of a logical tensor that a rank's file holds: stacked along the one axis on which it is short.

    Args:
        spec: the logical tensor, whole.
        tensor: what the rank's file has of it.
        rank: the rank's number.
        count: how many ranks there are.
        ranked: the file is one of several ranks', of which some may be missing.

    Raises:
        Damaged: it is no such part.
    """
    whole, shape, file = spec.file_shape, tensor.spec.shape, tensor.extents[0].file
    cut = [i for i, (n, m) in enumerate(zip(whole, shape, strict=False)) if n != m]
    if len(whole) != len(shape) or len(cut) > 1:
        raise shape_error(spec.name, file, whole, shape)
    start = [0] * len(whole)
    for axis in cut:
        n, m = whole[axis], shape[axis]
        if ranked and m and n % m == 0 and n // m > count:
            raise Damaged(
                f"{n // m - count} of {n // m} tensor-parallel shards are missing, nothing was written",
                where=f"{spec.name} in {file}",
                expected=f"{n // m} files: {whole} in parts of {shape}",
                found=f"{count} files",
                do="fetch the others; if there are none, the config belongs to another model",
            )
        if m * count != n:
            raise shape_error(spec.name, file, whole, shape)
        start[axis] = rank * m
    return Region(tuple(start), shape)
