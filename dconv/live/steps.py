"""Live handoff: the ranks of a running Megatron job write another format straight from their memory.

Each rank says what it holds, never a weight; from that all derive one plan. A rank writes what it holds at its final
offset, so a leaf of the output may have several writers; such a leaf is digested by reading it back. Ranks meet after
each step, and what one of them raises, all raise.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace

from dconv import pipeline
from dconv.checkpoint.memory import open_source
from dconv.errors import Refused
from dconv.live.ranks import Ranks
from dconv.live.shards import Places, describe, proved
from dconv.live.write import start, write
from dconv.pipeline import Job, Request
from dconv.sharding.coords import Coord, Parallel
from dconv.sharding.rank import Outcome, Settings


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
    shards = describe(models, ranks, args, coord, parallel)
    model, configs = ranks.together(lambda: _settled(request, shards))
    _require_one("config", configs)  # before the next step, in which ranks count on one description
    if request.replicas == "equal":
        model = replace(model, logical=proved(model.logical, shards, ranks))
    job, ids = ranks.together(lambda: _planned(request, model))
    _require_one("plan, config or tokenizer", ids)
    settings = replace(settings, rank=ranks.rank, world=ranks.world, about=pipeline.about(job))
    _, started = ranks.together(lambda: (None, start(job, settings) if ranks.rank == 0 else None))
    partial = next(folder for folder in started if folder is not None)
    try:
        return write(job, partial, shards, settings, ranks)
    finally:
        if ranks.rank == 0:  # after a failure, which all know of; a success renamed it
            shutil.rmtree(partial, ignore_errors=True)


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


def _settled(request: Request, shards: Places) -> tuple[pipeline.Described, str]:
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
