"""One rank's run of a calibration that `dconv.calibrate` has planned."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from dconv.calibrate import Calibrating
from dconv.errors import Preempted, Refused, UsageError, group_names
from dconv.quant.held import Held, folded_file, numbers_of, tasks_of
from dconv.quant.settings import Gptq
from dconv.sharding.allocation import return_freed_memory
from dconv.sharding.derived import open_reader
from dconv.sharding.tuning import AUTO

if TYPE_CHECKING:
    from pathlib import Path

    from dconv.quant.loop import Calibration
    from dconv.quant.network import Network
    from dconv.quant.peers import Peers
    from dconv.quant.ranks import Ranks
    from dconv.sharding.plan import Task
    from dconv.sharding.rank import Rank

_FOLDER: Final = "calibration"


def work(job: Calibrating, device: str, world: int) -> Callable[[Rank], None]:
    """What a rank does of a calibration: to be given to `dconv.sharding.commit.run_rank`.

    Raises:
        UsageError: the ranks are no whole groups of peers.
    """
    if world % job.peers:
        raise UsageError(
            "the experts do not divide over these ranks, nothing was written",
            where="--ep",
            expected=f"a number that divides {world} ranks",
            found=str(job.peers),
        )

    def do(rank: Rank) -> None:
        _run(job, rank, device)

    return do


def _run(job: Calibrating, rank: Rank, device: str) -> None:
    from dconv.quant.network import Network
    from dconv.quant.peers import Peers
    from dconv.quant.ranks import Ranks

    settings, plan, held = rank.settings, rank.plan, Held()
    by_weight = tasks_of(plan)
    parts: dict[str, list[Task]] = {}
    later = {index for found in by_weight.values() for index in found}
    plain = [task for task in plan.share(settings.rank, settings.world) if task.index not in later]
    rank.reader = lambda scratch: open_reader(plan.source, scratch, rank.kernel, settings.log, held.reader, rank.stage)

    def write(results: Mapping[str, Any]) -> None:
        held.arrays = {}
        for name, result in results.items():
            if name in job.recipes:
                held.arrays |= numbers_of(name, result.chosen, job.recipes[name])
            else:
                held.arrays[folded_file(name)] = result.cpu().numpy()
        rank.do([task for name in results for task in parts[name]])
        held.arrays = {}

    def is_kept(weights: Iterable[str]) -> bool:
        names = {name for name in weights if name in parts}
        noted = rank.journal.read()
        found = [task for name, part in parts.items() for task in part if name in names or task.index in noted]
        return not rank.unfinished(found)

    threads = _threads(settings.threads, settings.world)
    return_freed_memory()
    ranks = Ranks(settings.rank, settings.world, device, settings.stop or threading.Event())
    ranks.begin()
    try:
        source = job.source
        peers = Peers.of(ranks, job.peers, threads)
        net = Network(source.config, source.logical, device, max(settings.max_memory, 1 << 26), peers, source.family)
        known = net.names()
        if unreached := sorted(job.recipes.keys() - known.keys()):
            raise Refused(
                "weights to be quantised are in no layer of the model that is run, nothing was written",
                where=group_names(unreached),
                expected="linear layers of transformers' decoder layers",
                do="leave them out: an override with skip in --quantization-config",
            )
        if peers.size > 1 and max(known.values()) < 0:
            raise Refused("this model's experts are not divided over ranks, nothing was written", where="--ep")
        for name, found in by_weight.items():
            expert = known.get(name, -1)
            if expert < 0 or peers.owns(expert):
                parts[name] = _share([plan.tasks[i] for i in found], ranks if expert < 0 else peers.replicas)
        rank.share = sum(task.nbytes for task in (*plain, *(task for part in parts.values() for task in part)))
        with ranks.leaving_together():
            rank.do(plain)
        run = calibration_of(job, net, ranks, peers, rank.state / _FOLDER, settings.max_memory, threads, write)
        run.is_kept = is_kept
        try:
            job.lines[:] = run.run()
            if {line["weight"] for line in job.lines} != set(job.recipes):
                raise RuntimeError("a pass of the model did not come to all weights that were to be quantised")
        finally:
            net.close()
        ranks.wait()
    except Preempted as error:
        error.where = error.where or str(rank.partial)
        raise
    finally:
        ranks.end()


def calibration_of(
    job: Calibrating,
    net: Network,
    ranks: Ranks,
    peers: Peers,
    folder: Path,
    room: int,
    threads: int,
    write: Callable[[Mapping[str, Any]], None],
) -> Calibration:
    """One rank's calibration of a model; see `dconv.quant.loop.Calibration`.

    Args:
        job: what is calibrated, and how.
        net: the model, of which this rank loads a layer at a time.
        ranks: this rank among all of the run.
        peers: this rank among those that divide a layer's experts.
        folder: working state, shared by all ranks.
        room: bytes that it may take beside three times a layer.
        threads: blocks that are computed at once.
        write: called with a layer's results.
    """
    from dconv.quant.awq import Search
    from dconv.quant.awq_loop import Layers
    from dconv.quant.blocks import Blocks
    from dconv.quant.loop import Calibration, Options

    asked, blocks, method = job.settings, Blocks(job.samples.tokens, folder / "hidden"), None
    options = Options(room=room, threads=threads)
    if isinstance(asked, Gptq):
        options = replace(options, weigh_by_routing=asked.routing_weighted, sequential=asked.true_sequential)
    elif job.folds is not None:
        search = Search(asked.n_grid, asked.duo_scaling)
        layers = Layers(
            net, job.recipes, job.folds, blocks, ranks, peers, search, job.stored, asked.clip, threads, room
        )
        method = layers.choose
    return Calibration(net, job.recipes, blocks, ranks, peers, folder, options, write, method=method)


def _share(tasks: list[Task], ranks: Ranks) -> list[Task]:
    """Every weight's tasks begin with another rank, so that small weights have different writers."""
    return [task for task in tasks if task.index % ranks.world == ranks.rank]


def _threads(asked: int, world: int) -> int:
    """Threads of a rank: as asked, else what this machine has for each of its ranks."""
    if asked != AUTO:
        return asked
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or world)
    return max(1, (os.cpu_count() or 1) // here)
