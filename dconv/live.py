"""Live handoff: the ranks of a running Megatron job write another format straight from their memory.

Each rank says what it holds, never a weight; from that all derive one plan. A rank writes what it holds at its final
offset, so a leaf of the output may have several writers; such a leaf is digested by reading it back. Ranks meet after
each step, and what one of them raises, all raise.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from dconv import pipeline
from dconv.checkpoint.memory import Chunks, Manifest, Memory, MemoryReader, open_source, plain_args, shard_name
from dconv.codec.kernels import apply
from dconv.errors import Damaged, DconvError, Refused, StorageFault, ToolMissing, UsageError, group_names
from dconv.pipeline import Job, Request
from dconv.sharding.commit import Outcome, Settings, conclude, hash_task
from dconv.sharding.coords import Coord, Parallel
from dconv.sharding.execute import Done, Outputs, run_tasks
from dconv.sharding.finish import cannot
from dconv.sharding.journal import sync_folder
from dconv.sharding.plan import Plan, Task
from dconv.sharding.receipt import check_output, partial_folder
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical, Piece

T = TypeVar("T")
S = TypeVar("S")
_STATE: Final = "megatron.core.parallel_state"


class Ranks:
    """The processes that call together.

    Args:
        group: a ``torch.distributed`` process group; None is all of them, or this process alone where there are none.
    """

    def __init__(self, group: object = None) -> None:
        self._group: Any = group
        self.rank, self.world = 0, 1
        dist = _distributed()
        if dist is not None:
            self.rank, self.world = dist.get_rank(self._group), dist.get_world_size(self._group)

    def together(self, work: Callable[[], tuple[T, S]]) -> tuple[T, list[S]]:
        """Do ``work``; its first result, and every rank's second.

        Raises:
            DconvError: what ``work`` raised here, else the first that it raised on another rank.
        """
        own: Any = None
        told: Any = None
        cause: Exception | None = None
        try:
            own, told = work()
        except Exception as error:  # nobody may be left waiting
            cause = error
        mine = None if cause is None else _portable(cause, self.rank)
        everyone = self._exchange((told, mine))
        if mine is not None and mine is not cause:
            raise mine from cause
        if mine is not None:
            raise mine
        for _, error in everyone:
            if error is not None:
                raise error
        return own, [told for told, _ in everyone]

    def _exchange(self, mine: tuple[Any, DconvError | None]) -> list[tuple[Any, DconvError | None]]:
        dist = _distributed()
        if self.world == 1 or dist is None:
            return [mine]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone


def _distributed() -> Any:
    """``torch.distributed`` where a process group runs."""
    import torch.distributed as dist

    return dist if dist.is_available() and dist.is_initialized() else None


def _portable(error: Exception, rank: int) -> DconvError:
    """An error as other ranks raise it."""
    if isinstance(error, DconvError):
        return error
    kind = StorageFault if isinstance(error, OSError | MemoryError) else ToolMissing
    return kind(f"rank {rank} failed, and with it the handoff", found=f"{type(error).__name__}: {error}"[:2000])


def standing(coord: Coord | None, parallel: Parallel | None, ranks: Ranks) -> tuple[Coord, Parallel]:
    """This rank's place and the job's sizes: as given, else Megatron's, else those of a process alone.

    Raises:
        UsageError: they do not say which shard this rank holds.
    """
    state = sys.modules.get(_STATE)
    place = None
    if coord is None and parallel is None and state is not None and state.model_parallel_is_initialized():
        parallel = Parallel(
            tp=state.get_tensor_model_parallel_world_size(),
            pp=state.get_pipeline_model_parallel_world_size(),
            ep=state.get_expert_model_parallel_world_size() or 1,
            etp=state.get_expert_tensor_parallel_world_size() or 1,
        )
        place = (
            state.get_pipeline_model_parallel_rank(),
            state.get_tensor_model_parallel_rank(),
            state.get_expert_model_parallel_rank() or 0,
            state.get_expert_tensor_parallel_rank() or 0,
        )
        coord = next((c for c in parallel.coords() if (c.pp, c.tp, c.ep, c.etp) == place), None)
    parallel = parallel or Parallel()
    coords = list(parallel.coords())
    if coord is None and place is None and ranks.world == parallel.world:
        return coords[ranks.rank], parallel
    if coord not in coords:
        raise UsageError(
            "nothing says which shard this rank holds, nothing was written",
            expected="Megatron's parallel state, or coord= and parallel= of the running job",
            found=f"{coord or place or 'no coord'}, {parallel.described}, {ranks.world} ranks",
        )
    return coord, parallel


def state_dicts(models: object) -> list[Mapping[str, Any]]:
    """The state dicts of this rank's virtual chunks; modules are asked for what Megatron would save.

    Raises:
        UsageError: neither modules nor state dicts.
    """
    chunks = models if isinstance(models, list | tuple) else [models]
    found: list[Mapping[str, Any]] = []
    for chunk in chunks:
        ask = getattr(chunk, "state_dict_for_save_checkpoint", None) or getattr(chunk, "state_dict", None)
        state = ask() if callable(ask) else chunk
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            raise UsageError(
                "not a model, nothing was written",
                expected="this rank's module, its state dict, or a list of them, one a virtual chunk",
                found=type(chunk).__name__,
            )
        found.append(state)
    if not found:
        raise UsageError("no model, nothing was written", expected="one module or state dict a virtual chunk")
    return found


@dataclass(frozen=True)
class _Shards:
    """Which ranks hold which shard (its virtual file), and what this one holds."""

    memory: Memory
    file: str
    holders: dict[str, list[int]]
    manifests: list[Manifest]
    args: dict[str, object] | None


def handoff(
    models: object,
    request: Request,
    settings: Settings,
    ranks: Ranks,
    *,
    args: object = None,
    coord: Coord | None = None,
    parallel: Parallel | None = None,
) -> Outcome:
    """See `dconv.api.handoff`; ``request.model`` is only a name here."""
    _, asked = ranks.together(lambda: (None, f"{request} {settings.algorithm}"))
    _require_one("set of options", asked)
    shards = _describe(models, ranks, args, coord, parallel)
    model, configs = ranks.together(lambda: _settled(request, shards))
    _require_one("config", configs)  # before the next step, in which ranks count on one description
    if request.replicas == "equal":
        model = replace(model, logical=_proved(model.logical, shards, ranks))
    job, ids = ranks.together(lambda: _planned(request, model))
    _require_one("plan, config or tokenizer", ids)
    settings = replace(settings, rank=ranks.rank, world=ranks.world, about=pipeline.about(job))
    _, started = ranks.together(lambda: (None, _start(job, settings) if ranks.rank == 0 else None))
    partial = next(folder for folder in started if folder is not None)
    try:
        return _write(job, partial, shards, settings, ranks)
    finally:
        if ranks.rank == 0:  # after a failure, which all know of; a success renamed it
            shutil.rmtree(partial, ignore_errors=True)


def _describe(models: object, ranks: Ranks, args: object, coord: Coord | None, parallel: Parallel | None) -> _Shards:
    """Who holds what. Ranks of one description (middle stages, data parallelism) send it once."""

    def look() -> tuple[tuple[Memory, Coord], tuple[Coord, Parallel, int, int, str]]:
        place, sizes = standing(coord, parallel, ranks)
        memory = Memory(state_dicts(models))
        return (memory, place), (place, sizes, memory.size, time.time_ns(), memory.digest)

    (memory, place), said = ranks.together(look)
    first = {digest: rank for rank, (*_, digest) in reversed(list(enumerate(said)))}

    def tell() -> tuple[None, tuple[Chunks | None, dict[str, object] | None]]:
        mine = memory.chunks if ranks.rank in first.values() else None
        return None, (mine, plain_args(args) if ranks.rank == 0 else None)

    _, sent = ranks.together(tell)
    holders: dict[str, list[int]] = {}
    manifests: list[Manifest] = []
    for rank, (where, sizes, size, when, digest) in enumerate(said):
        held = holders.setdefault(shard_name(where), [])
        held.append(rank)
        if len(held) == 1:
            manifests.append(Manifest(where, sizes, size, when, sent[first[digest]][0] or ()))
        elif digest != said[held[0]][-1] or sizes != said[held[0]][1]:
            raise Damaged(
                "two ranks of one place hold different models, nothing was written",
                where=f"rank {held[0]} and rank {rank}, {shard_name(where)}",
                expected="tensors of the same names, shapes and strides",
            )
    return _Shards(memory, shard_name(place), holders, manifests, sent[0][1])


def _require_one(what: str, said: Sequence[str]) -> None:
    """All ranks must say the same.

    Raises:
        Refused: one does not; on all ranks, since each sees what all said.
    """
    other = next((rank for rank, word in enumerate(said) if word != said[0]), 0)
    if other:
        raise Refused(
            f"the ranks do not have one {what}, nothing was written",
            where=f"rank 0 and rank {other}",
            expected="the same call, and the same files in --hf-config, on every rank",
        )


def _settled(request: Request, shards: _Shards) -> tuple[pipeline.Described, str]:
    source = open_source(shards.manifests, shards.args)
    model = pipeline.settle(
        source,
        model_type=request.model_type,
        hf_config=request.hf_config,
        drop=request.drop,
        with_eagle=request.with_eagle,
    )
    return model, f"{model.family.name} {model.config}"


def _planned(request: Request, model: pipeline.Described) -> tuple[Job, str]:
    job = pipeline.prepare_described(request, model)
    return job, job.plan.id


def _proved(logical: Logical, shards: _Shards, ranks: Ranks) -> Logical:
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
        return None, (mine, shards.memory.whole() if several else [])

    _, found = ranks.together(hashes)
    for manifest in shards.manifests:
        first, *others = shards.holders[shard_name(manifest.coord)]
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


def _start(job: Job, settings: Settings) -> Path:
    """The partial folder, made by one rank when nothing is in the way."""
    out = job.request.output.absolute()
    check_output(job.plan, out, overwrite=settings.overwrite, resume=False, launched=math.inf)
    pipeline.check_space(job.plan, out)
    partial = partial_folder(out, job.plan)
    try:
        partial.mkdir()
        sync_folder(partial.parent)
    except OSError as fault:
        raise cannot("create the output", partial, fault) from fault
    return partial


def _writers(plan: Plan, holders: Mapping[str, Sequence[int]], world: int) -> list[list[int]]:
    """For each task the ranks that write it: one for each shard that has bytes of it, data-parallel ranks in turn."""
    found: list[list[int]] = []
    for task in plan.tasks:
        copies = plan.copies[task.tensor] if task.tensor >= 0 else ()
        files = dict.fromkeys(copy.file for copy in copies if copy.region.intersect(task.region) is not None)
        found.append([holders[file][task.index % len(holders[file])] for file in files] or [task.index % world])
    return found


def _write(job: Job, partial: Path, shards: _Shards, settings: Settings, ranks: Ranks) -> Outcome:
    plan = job.plan
    writers = _writers(plan, shards.holders, ranks.world)
    mine = [task for task, who in zip(plan.tasks, writers, strict=True) if ranks.rank in who]
    written, done = ranks.together(lambda: _write_own(plan, mine, partial, shards, settings))
    digests = {task: digest for each in done for task, digest in each.items() if digest}
    shared = [task for task in plan.tasks if task.index not in digests]
    again = shared[ranks.rank :: ranks.world]
    _, done = ranks.together(lambda: (None, _read_back(plan, again, partial, settings.algorithm)))
    digests |= {task: digest for each in done for task, digest in each.items()}
    out = job.request.output.absolute()
    ranks.together(lambda: (_commit(plan, out, partial, digests, settings) if ranks.rank == 0 else None, None))
    return Outcome(ranks.rank == 0, True, sum(task.nbytes for task in mine), written, 0)


def _write_own(
    plan: Plan, tasks: Sequence[Task], partial: Path, shards: _Shards, settings: Settings
) -> tuple[int, dict[int, str]]:
    """Write what this rank holds: the bytes written, and the digests of leaves that it holds all of."""
    finished: list[Done] = []
    at, share = 0, sum(task.nbytes for task in tasks)

    def on_done(done: Done) -> None:
        nonlocal at
        finished.append(done)
        at += done.task.nbytes
        settings.progress(at, share)

    with contextlib.closing(_outputs(plan, partial)) as outputs:
        run_tasks(
            plan,
            tasks,
            outputs,
            on_done,
            kernel=apply,
            max_memory=settings.max_memory,
            threads=settings.threads,
            algorithm=settings.algorithm,
            reader=lambda _: MemoryReader(shards.file, shards.memory),
        )
        outputs.sync(sorted({task.file for task in tasks}))
    return sum(done.written for done in finished), {done.task.index: done.digest for done in finished}


def _read_back(plan: Plan, tasks: Sequence[Task], partial: Path, algorithm: str) -> dict[int, str]:
    """The digests of leaves that several ranks wrote."""
    with contextlib.closing(_outputs(plan, partial)) as outputs:  # opened anew: a network file system looks again
        return {task.index: hash_task(plan, outputs, task, algorithm) for task in tasks}


def _outputs(plan: Plan, partial: Path) -> Outputs:
    try:
        return Outputs(partial, plan)
    except OSError as fault:
        raise StorageFault(
            f"a rank cannot open the output's folder: {fault.strerror}",
            where=f"{partial} on {os.uname().nodename}",
            expected="a file system that all ranks share",
        ) from fault


def _commit(plan: Plan, out: Path, partial: Path, digests: Mapping[int, str], settings: Settings) -> None:
    check_output(plan, out, overwrite=settings.overwrite, resume=False, launched=math.inf)  # it may have come meanwhile
    try:
        conclude(plan, out, partial, digests, settings)
    except OSError as fault:
        raise cannot("commit", partial, fault) from fault
