"""Which rank holds what: told among the ranks by names, shapes and places, proved equal by hashes, never sent."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dconv.checkpoint.memory import Chunks, Manifest, Memory, plain_args, shard_name
from dconv.errors import Damaged, UsageError, group_names
from dconv.live.ranks import Ranks, standing
from dconv.sharding.coords import Coord, Parallel
from dconv.sharding.parsed import is_list_or_tuple, is_mapping
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical, Piece


def state_dicts(models: object) -> list[Mapping[str, Any]]:
    """The state dicts of this rank's virtual chunks; modules are asked for what Megatron would save.

    Raises:
        UsageError: neither modules nor state dicts.
    """
    chunks = models if is_list_or_tuple(models) else [models]
    found: list[Mapping[str, Any]] = []
    for chunk in chunks:
        ask = getattr(chunk, "state_dict_for_save_checkpoint", None) or getattr(chunk, "state_dict", None)
        state: object = ask() if callable(ask) else chunk
        if not is_mapping(state) or not all(isinstance(name, str) for name in state):
            raise UsageError(
                "not a model, nothing was written",
                expected="this rank's module, its state dict (sharded or not), or a list of them, one a virtual chunk",
                found=type(chunk).__name__,
            )
        found.append(state)
    if not found:
        raise UsageError("no model, nothing was written", expected="one module or state dict a virtual chunk")
    return found


@dataclass(frozen=True)
class Places:
    """Which ranks hold which shard (its virtual file), and what this one holds."""

    memory: Memory
    file: str
    holders: dict[str, list[int]]
    manifests: list[Manifest]
    args: dict[str, object] | None


def describe(models: object, ranks: Ranks, args: object, coord: Coord | None, parallel: Parallel | None) -> Places:
    """Who holds what. Ranks of one description (middle stages, data parallelism) send it once.

    Args:
        models: of this rank, see `state_dicts`.
        ranks: all of them; all call it.
        args: Megatron's; those of rank 0 count.
        coord: this rank's place, where Megatron's parallel state does not say it.
        parallel: the job's sizes, likewise.

    Raises:
        UsageError: no model, or nothing that says which shard a rank holds.
        Damaged: two ranks of one place hold different models.
    """

    def look() -> tuple[Memory, tuple[tuple[Coord, Parallel] | None, int, int, str]]:
        memory = Memory(state_dicts(models))
        place = None if memory.sharded else standing(coord, parallel, ranks)
        return memory, (place, memory.size, time.time_ns(), memory.digest)

    memory, said = ranks.together(look)
    first = {digest: rank for rank, (*_, digest) in reversed(list(enumerate(said)))}

    def tell() -> tuple[None, tuple[Chunks | None, dict[str, object] | None]]:
        mine = memory.chunks if ranks.rank in first.values() else None
        return None, (mine, plain_args(args) if ranks.rank == 0 else None)

    _, sent = ranks.together(tell)
    holders: dict[str, list[int]] = {}
    manifests: list[Manifest] = []
    files: list[str] = []
    for rank, (place, size, when, digest) in enumerate(said):
        # of sharded state dicts those are one shard that say the same
        files.append(shard_name(place[0]) if place else f"shard of rank {first[digest]}")
        held = holders.setdefault(files[rank], [])
        held.append(rank)
        if len(held) == 1:
            manifests.append(Manifest(files[rank], place, size, when, sent[first[digest]][0] or ()))
        elif (digest, place) != (said[held[0]][-1], said[held[0]][0]):
            raise Damaged(
                "two ranks of one place hold different models, nothing was written",
                where=f"rank {held[0]} and rank {rank}, {files[rank]}",
                expected="tensors of the same names, shapes and strides",
            )
    return Places(memory, files[ranks.rank], holders, manifests, sent[0][1])


def proved(logical: Logical, shards: Places, ranks: Ranks) -> Logical:
    """Prove that what several ranks hold is equal, by hashes, and deal it out to them.

    Raises:
        Damaged: it is not.
    """
    boxes: dict[tuple[str, Region], list[Piece]] = {}
    for name, again in logical.replicas.items():
        for piece in (*logical.pieces[name], *again):
            boxes.setdefault((name, piece.region), []).append(piece)

    several = len(shards.holders[shards.file]) > 1

    def hashes() -> tuple[None, tuple[dict[tuple[int, int], int], list[int]]]:
        mine = {
            (i, j): shards.memory.hash(piece)
            for i, held in enumerate(boxes.values())
            for j, piece in enumerate(held)
            if piece.file == shards.file
        }
        return None, (mine, shards.memory.hashes() if several else [])

    _, found = ranks.together(hashes)
    for manifest in shards.manifests:
        first, *others = shards.holders[manifest.file]
        names = [name for chunk in manifest.chunks for name in chunk]
        for other in others:
            pairs = zip(names, found[first][1], found[other][1], strict=True)
            if torn := [name for name, one, two in pairs if one != two]:
                raise _differ(torn, first, other)
    differing: dict[tuple[int, int], list[str]] = {}
    for i, ((name, _), held) in enumerate(boxes.items()):
        owners = [shards.holders[piece.file][0] for piece in held]
        values = [found[owner][0][i, j] for j, owner in enumerate(owners)]
        for owner, value in zip(owners, values, strict=True):
            if value != values[0]:
                differing.setdefault((owners[0], owner), []).append(name)
    for pair, names in differing.items():
        raise _differ(names, *pair)
    turn = itertools.count()
    dealt = {(name, region): held[next(turn) % len(held)] for (name, region), held in boxes.items()}
    pieces = {
        name: tuple(dealt.get((name, piece.region), piece) for piece in held) for name, held in logical.pieces.items()
    }
    return replace(logical, pieces=pieces, replicas={})


def _differ(names: Sequence[str], one: int, other: int) -> Damaged:
    return Damaged(
        "two ranks disagree on tensors that both hold, nothing was written",
        where=f"{group_names(names)}\nrank {one} and rank {other}",
        expected="the same bytes in both",
        do="call handoff when no parameter is still being gathered;  replicas='first'  takes the first rank's",
    )
