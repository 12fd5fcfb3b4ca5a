"""Several described checkpoints as one, for an output that holds them all (a student and its teacher)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from dconv.sharding.derived import Derived
from dconv.sharding.tensor import Logical, Piece, Stored


def join(held: Mapping[str, Logical]) -> Logical:
    """One checkpoint of several, each under its prefix. Files are named from the directory that all have in common.

    Args:
        held: prefix of the logical names, and the checkpoint.
    """
    roots = {prefix: os.path.realpath(logical.root) for prefix, logical in held.items()}
    root = os.path.commonpath(list(roots.values()))
    derived: dict[str, Derived] = {}
    joined = Logical(Path(root), {}, {}, {}, derived=derived)
    for prefix, logical in held.items():
        below = Path(os.path.relpath(roots[prefix], root))
        move = partial(_moved, prefix, below, logical.derived)
        joined.specs.update({prefix + name: replace(spec, name=prefix + name) for name, spec in logical.specs.items()})
        joined.pieces.update({prefix + name: move(found) for name, found in logical.pieces.items()})
        joined.replicas.update({prefix + name: move(found) for name, found in logical.replicas.items()})
        joined.files.update({(below / name).as_posix(): stamp for name, stamp in logical.files.items()})
        joined.left_out.update({prefix + name: reason for name, reason in logical.left_out.items()})
        for name, made in logical.derived.items():
            inputs = (replace(one, pieces=move(one.pieces), twins=move(one.twins)) for one in made.inputs)
            derived[prefix + name] = replace(made, inputs=tuple(inputs))
    return replace(joined, stored=partial(_stored, {roots[prefix]: one for prefix, one in held.items()}, root))


def _stored(held: Mapping[str, Logical], root: str) -> Iterator[Stored]:
    for folder, logical in held.items():
        below = Path(os.path.relpath(folder, root))
        for at in logical.stored():
            moved = (replace(extent, file=(below / extent.file).as_posix()) for extent in at.extents)
            yield replace(at, extents=tuple(moved))


def _moved(prefix: str, below: Path, derived: Mapping[str, Derived], pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Pieces from the common directory; what is computed is no file, and gets the prefix instead."""
    return tuple(
        replace(
            piece,
            tensor=prefix + piece.tensor,
            file=prefix + piece.file if piece.file in derived else (below / piece.file).as_posix(),
        )
        for piece in pieces
    )
