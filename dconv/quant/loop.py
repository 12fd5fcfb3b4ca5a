"""Calibration, layer by layer: load, sum, choose, write, go on.

Only the layer at hand is in memory. Between two layers there are the hidden states of all samples, on disk, which is
where a killed run goes on from, on any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from dconv.net.untyped import from_numpy
from dconv.quant.blocks import Blocks
from dconv.quant.gptq import Recipe
from dconv.quant.network import Layer, Network
from dconv.quant.parts import Result
from dconv.quant.passes import Group, Passes
from dconv.quant.peers import AWAY, Peers
from dconv.quant.ranks import Ranks
from dconv.quant.room import Room, block_bytes
from dconv.quant.solve import solve
from dconv.quant.sums import Sum
from dconv.sharding.finish import sync_folders, write_synced
from dconv.sharding.journal import sync_folder

#: How far a run is: a digest of the second line, and that line, as JSON.
_STATE: Final = "state.json"


@dataclass(frozen=True)
class Options:
    """How to calibrate.

    Attributes:
        weigh_by_routing: an expert's tokens count by their routing weights.
        sequential: within a layer each group is calibrated with those before it quantised.
        room: bytes that this rank may take beside three times a layer.
        threads: blocks that are computed at once.
    """

    weigh_by_routing: bool = False
    sequential: bool = True
    room: int = 256 << 20
    threads: int = 1


def _digest(noted: bytes) -> bytes:
    return hashlib.sha256(noted).hexdigest().encode()


def _unsaid(_layer: int, _layers: int, _lines: list[dict[str, Any]]) -> None:
    pass


@dataclass
class Calibration:
    """A run of calibration on this rank.

    Attributes:
        recipes: of the weights to be quantised, by name.
        folder: working state, shared by all ranks, that outlives a kill.
        write: called with a layer's results, on every rank; returns when they are written durably.
        method: what is done to a layer instead of GPTQ, given its number and this rank's blocks; returns what ``write``
            takes, and lines of the report.
        said: called with a layer's number, how many there are, and its report, on every rank.
        is_kept: whether this rank's part of what an earlier run wrote of these weights is still as it was; called once,
            on every rank, where there is something to go on with.
    """

    net: Network
    recipes: Mapping[str, Recipe]
    blocks: Blocks
    ranks: Ranks
    peers: Peers
    folder: Path
    options: Options
    write: Callable[[Mapping[str, Any]], None]
    said: Callable[[int, int, list[dict[str, Any]]], None] = _unsaid
    method: Callable[[Layer, int, Sequence[int]], tuple[dict[str, Any], list[dict[str, Any]]]] | None = None
    is_kept: Callable[[Iterable[str]], bool] = lambda _: True

    def run(self) -> list[dict[str, Any]]:
        """Calibrate all layers that are not yet; the report has a line for each weight.

        Raises:
            Preempted: some rank was told to stop, or has gone; what is finished is kept.
        """
        import torch

        torch.set_num_threads(1)
        mine = self.blocks.mine(self.ranks.rank, self.ranks.world)
        rounds = self.peers.padded(mine, len(self.blocks.mine(0, self.ranks.world)))
        first, report = self._begun()
        if first < 0:
            for block in mine:
                tokens = from_numpy(self.blocks.samples(block).astype(np.int64))
                self.blocks.write(0, block, self.net.embedded(tokens).numpy())
            first = 0
            self._pass_on(0, report)
        for index in range(first, len(self.net)):
            layer = self.net.load(index)
            results, lines = (self.method or self._layer)(layer, index, rounds)
            with self.ranks.leaving_together():
                self.write(results)
            lines = self._told(lines)
            report += lines
            self.net.forget(layer)
            self._pass_on(index + 1, report)
            self.said(index + 1, len(self.net), lines)
        return report

    def _layer(self, layer: Layer, index: int, mine: Sequence[int]) -> tuple[dict[str, Result], list[dict[str, Any]]]:
        import torch

        device, options, last = self.net.device, self.options, index + 1 == len(self.net)

        def read(block: int) -> torch.Tensor:
            if block == AWAY:  # something that goes through the layer while others' tokens come to its experts
                return from_numpy(self.blocks.read(index, 0)[:1, :1]).to(device)
            return from_numpy(self.blocks.read(index, block)).to(device)

        def write(block: int, hidden: torch.Tensor) -> None:
            self.blocks.write(index + 1, block, hidden.float().cpu().numpy())

        for block in mine:  # before there are threads
            self.net.given(index, (1, 1) if block == AWAY else self.blocks.samples(block).shape)
        results: dict[str, Result] = {}
        lines: list[dict[str, Any]] = []
        passes = Passes(layer, set(self.recipes), weigh_shared=options.weigh_by_routing, peers=self.peers)
        try:
            stages = passes.groups(read(0)[:1])
            if not options.sequential:
                stages = [[group for stage in stages for group in stage]] if stages else []
            needs = [sum(Sum.bytes_for(group.columns) for group in stage) for stage in stages]
            block = block_bytes(self.blocks.samples(0).size, self.net.hidden, layer.widest)
            room = Room.of(layer.nbytes, options.room, block, needs, options.threads)
            passes.keep(room.kept)
            passes.threads = self.ranks.least(room.threads)
            at_once = self.ranks.least(room.sums)  # of sums, so that all ranks make the same ones in one pass
            for stage in stages:
                began = time.perf_counter()
                found = self._stage(passes, stage, at_once, mine, read)
                for name, result in found.items():
                    passes.set(name, result.chosen.decode())
                    lines.append(result.line(index, name, self.recipes[name], time.perf_counter() - began))
                passes.settle(name for group in stage for name in group.names)
                results |= found
            if not last:
                with self.ranks.leaving_together():
                    passes.finish(mine, read, write)
        finally:
            passes.close()
        return results, lines

    def _told(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of all ranks, one a weight."""
        if self.peers.size == 1:
            return lines
        found = {line["weight"]: line for said in reversed(self.ranks.gather(lines)) for line in said}
        return [found[name] for name in self.recipes if name in found]

    def _stage(
        self, passes: Passes, stage: Sequence[Group], room: int, mine: Sequence[int], read: Callable[[int], Any]
    ) -> dict[str, Result]:
        """Quantise some groups, in as many passes as their sums take.

        Args:
            passes: through the layer.
            stage: groups that do not depend on each other.
            room: bytes for sums at a time.
            mine: this rank's blocks.
            read: what comes to the layer, by block.
        """
        here = [group for group in stage if group.expert < 0 or self.peers.owns(group.expert)]
        here.sort(key=lambda group: group.expert >= 0)  # first what all ranks have, which they must begin at once
        sums: dict[Group, Sum] = {}
        found: dict[str, Result] = {}
        while True:
            begun = self._begun_sums([g for g in here if g not in sums or not sums[g].is_whole], sums, room)
            experts = self._agreed({(group.module, group.outer) for group in begun if group.module})
            if not begun and not experts:
                return found
            self._pass(passes, {group: sums[group] for group in begun}, experts, mine, read)
            whole = [group for group in begun if sums[group].is_whole]
            for ranks, some in self._by_ranks(whole):
                counts = ranks.counts([sums[group].count for group in some])
                hessians = [sums[group].total() for group in some]
                found |= solve(some, hessians, counts, passes.weight, self.recipes, ranks, self.options.threads)

    def _agreed(self, experts: set[tuple[str, bool]]) -> set[tuple[str, bool]]:
        """The stages of experts that some rank has sums for: its peers pass through them, too."""
        if self.peers.size == 1:
            return experts
        return {(module, outer) for said in self.ranks.gather(sorted(experts)) for module, outer in said}

    def _by_ranks(self, groups: Sequence[Group]) -> list[tuple[Ranks, list[Group]]]:
        """Groups by who has their weights."""
        each = [
            (self.ranks, [group for group in groups if group.expert < 0]),
            (self.peers.replicas, [group for group in groups if group.expert >= 0]),
        ]
        return [(ranks, some) for ranks, some in each if some]

    def _begun_sums(self, left: Sequence[Group], sums: dict[Group, Sum], room: int) -> list[Group]:
        """The first groups, with as much of their sums as there is room for opened; of one group at least something."""
        begun: list[Group] = []
        for group in left:
            one = sums.setdefault(group, Sum(group.columns, self.net.device, room=0))
            room -= one.closed_bytes
            if not (taken := one.open(room, least=not begun)):
                break
            begun.append(group)
            room -= taken
        return begun

    def _pass(
        self,
        passes: Passes,
        sums: Mapping[Group, Sum],
        experts: Collection[tuple[str, bool]],
        mine: Sequence[int],
        read: Callable[[int], Any],
    ) -> None:
        import torch

        def sink(group: Group) -> Callable[[torch.Tensor, torch.Tensor | None], None]:
            weigh = self.options.weigh_by_routing
            return lambda x, weights: sums[group].add(x, weights if weigh else None)

        sinks = {group: sink(group) for group in sums}
        with self.ranks.leaving_together():
            passes.collect(mine, read, sinks, experts, through=not self.options.sequential)
        for ranks, some in self._by_ranks(list(sums)):
            for group in some:
                ranks.sum(sums[group].parts())
                sums[group].close()

    def _begun(self) -> tuple[int, list[dict[str, Any]]]:
        """The layer to go on with, -1 at the very start, and the report so far.

        Where weights of the layers before it, or the note itself, are not as they were written, all is done again.
        """
        state = self._noted()
        kept = False
        with self.ranks.leaving_together():
            kept = state is not None and self.is_kept(line["weight"] for line in state["report"])
        whole = self.ranks.least(int(kept))  # before anything else: all ranks begin at one layer
        return (state["layer"], state["report"]) if whole and state is not None else (-1, [])

    def _noted(self) -> dict[str, Any] | None:
        try:
            digest, _, noted = (self.folder / _STATE).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        return json.loads(noted) if digest == _digest(noted) else None

    def _pass_on(self, layer: int, report: list[dict[str, Any]]) -> None:
        """Note that everything before a layer is done, once that is so on every rank."""
        self.ranks.wait()
        if self.ranks.rank == 0:
            sync_folders(self.folder)
            fresh = self.folder / f"{_STATE}.new"
            noted = json.dumps({"layer": layer, "report": report}).encode()
            write_synced(fresh, _digest(noted) + b"\n" + noted)
            os.replace(fresh, self.folder / _STATE)
            sync_folder(self.folder)
            if layer:
                self.blocks.forget(layer - 1)
        self.ranks.wait()
