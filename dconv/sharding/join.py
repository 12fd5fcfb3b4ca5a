"""Several described checkpoints as one, for an output that holds them all (a student and its teacher)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from dconv.sharding.tensor import Logical, Piece, Stored


def join(held: Mapping[str, Logical]) -> Logical:
    """One checkpoint of several, each under its prefix. Files are named from the directory that all have in common.

    Args:
        held: prefix of the logical names, and the checkpoint.
    """
    roots = {prefix: os.path.realpath(logical.root) for prefix, logical in held.items()}
    root = os.path.commonpath(list(roots.values()))
    joined = Logical(Path(root), {}, {}, {})
    for prefix, logical in held.items():
        below = Path(os.path.relpath(roots[prefix], root))
        joined.specs.update({prefix + name: replace(spec, name=prefix + name) for name, spec in logical.specs.items()})
        joined.pieces.update(_moved(prefix, below, logical.pieces))
        joined.replicas.update(_moved(prefix, below, logical.replicas))
        joined.files.update({(below / name).as_posix(): stamp for name, stamp in logical.files.items()})
        joined.left_out.update({prefix + name: reason for name, reason in logical.left_out.items()})
    return replace(joined, stored=partial(_stored, {roots[prefix]: one for prefix, one in held.items()}, root))


def _stored(held: Mapping[str, Logical], root: str) -> Iterator[Stored]:
    for folder, logical in held.items():
        below = Path(os.path.relpath(folder, root))
        for at in logical.stored():
            moved = (replace(extent, file=(below / extent.file).as_posix()) for extent in at.extents)
            yield replace(at, extents=tuple(moved))


def _moved(prefix: str, below: Path, pieces: Mapping[str, tuple[Piece, ...]]) -> dict[str, tuple[Piece, ...]]:
    return {
        prefix + name: tuple(
            replace(piece, tensor=prefix + piece.tensor, file=(below / piece.file).as_posix()) for piece in found
        )
        for name, found in pieces.items()
    }
