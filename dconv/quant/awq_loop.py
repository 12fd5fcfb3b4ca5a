"""AWQ of one layer: count, search scales, fold them, search ranges, round.

Unlike GPTQ's, what comes to a layer is what the model itself would give it: scales are of the weights' own inputs, and
rounding one weight changes no other's. All samples are counted; the losses of the search (`dconv.quant.awq_probes`) are
of a few.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dconv.errors import Refused
from dconv.net.untyped import lengths
from dconv.quant.awq import Search, magnitudes, settled
from dconv.quant.awq_maps import Fold, Folds
from dconv.quant.awq_probes import Probe, Probing, Seen, probes_of
from dconv.quant.awq_round import round_off
from dconv.quant.awq_sums import Hessians, Magnitudes
from dconv.quant.awq_watch import Watch
from dconv.quant.blocks import Blocks
from dconv.quant.gptq import Recipe
from dconv.quant.network import Layer, Network
from dconv.quant.parts import Result
from dconv.quant.peers import AWAY, Peers
from dconv.quant.ranks import Ranks
from dconv.quant.room import Room, block_bytes

if TYPE_CHECKING:
    import torch

#: A token whose answer the fold changed by more than this part of it, and how many there may be: near a tie, routers
#: decide otherwise for a last bit.
_SAME: Final = 1e-3
_TIES: Final = 0.05


@dataclass(frozen=True)
class Layers:
    """AWQ of the layers of a model, on this rank.

    Attributes:
        recipes: of the weights to be quantised, by name.
        stored: torch's name of the dtype in which a norm is stored, by name.
        cut: whether ranges are searched.
        threads: blocks that are computed at once.
        room: bytes that this rank may take beside three times a layer.
    """

    net: Network
    recipes: Mapping[str, Recipe]
    folds: Folds
    blocks: Blocks
    ranks: Ranks
    peers: Peers
    search: Search
    stored: Mapping[str, str]
    cut: bool = True
    threads: int = 1
    room: int = 256 << 20

    def choose(
        self, layer: Layer, index: int, mine: Sequence[int]
    ) -> tuple[dict[str, Result | torch.Tensor], list[dict[str, Any]]]:
        """The numbers of a layer's weights, and the tensors that change without being quantised, float32.

        Args:
            layer: with its weights, as the model has them.
            index: its number.
            mine: the blocks of this rank, which are taken to the next layer.

        Raises:
            Refused: the layer with its scales folded computes something else.
        """
        began = time.perf_counter()
        folds = [fold for fold in self.folds.folds if fold.layer == index]
        size = self.blocks.samples(0).size
        room = Room.of(layer.nbytes, self.room, block_bytes(size, self.net.hidden, layer.widest), (), self.threads)
        watch = Watch(
            layer, [fold.source for fold in folds if fold.is_norm], self.ranks.least(room.threads), self.peers
        )
        names = [name for name in self.recipes if watch.has(name)]
        try:
            sums, counts = self._counted(watch, index, mine, folds, names)
            probing = self.probing
            count, length, probes = probes_of(self.blocks)
            here = probing.here(probes, mine)
            with self.ranks.leaving_together():
                seen = probing.seen(watch, index, here, length, folds)
            tried = {at: self._scales(watch, folds[at], *found) for at, found in counts.items()}
            with self.ranks.leaving_together():
                own = probing.losses(watch, folds, tried, here, count, seen)
            losses = probing.summed(own)
            best = [line.index(min(line)) for line in losses]
            chosen = {at: (folds[at], found[best[at]]) for at, found in tried.items()}
            values, around = self._folded(watch, chosen.values())
            watch.set(values)
            self._check(watch, index, here[:1], seen)
            hessians = {name: _divided(sums[name][0], around.get(name)) for name in names}
            tokens = {name: sums[name][1] for name in names}
            cut: set[str] = set(names) - self.folds.uncut if self.cut else set()
            del seen, sums
            results: dict[str, Result] = {}
            for ranks in self._domains():
                some = {name: found for name, found in hessians.items() if self._ranks_of(watch, name) is ranks}
                results |= round_off(watch.get, some, tokens, self.recipes, cut, ranks, self.threads)
        finally:
            watch.close()
        whole = time.perf_counter() - began
        by_reader = {name: (fold, at) for at, fold in enumerate(folds) for name in fold.readers}
        lines: list[dict[str, Any]] = []
        for name, result in results.items():
            said: dict[str, Any] = {}
            if name in by_reader:
                at = by_reader[name][1]
                none, found = losses[at][0], losses[at][best[at]]
                said = {
                    "scaled_from": by_reader[name][0].source,
                    "ratio": (best[at] - 1) / self.search.points if best[at] else None,
                    "search_loss": found / none if none else 1.0,
                }
            lines.append(result.line(index, name, self.recipes[name], whole) | said)
        plain = {name: value for name, value in values.items() if name in self.folds.plain}
        return {**results, **plain}, lines

    @property
    def probing(self) -> Probing:
        """This rank's part in the search of scales."""
        return Probing(self.net, self.recipes, self.blocks, self.ranks, self.peers, self.search)

    def _domains(self) -> Sequence[Ranks]:
        """All ranks, and where experts are divided, those with the same ones."""
        return (self.ranks,) if self.peers.size == 1 else (self.ranks, self.peers.replicas)

    def _ranks_of(self, watch: Watch, name: str) -> Ranks:
        """Those that have a weight."""
        return self._domains()[-1 if watch.of_expert(name) else 0]

    def _counted(
        self, watch: Watch, index: int, mine: Sequence[int], folds: Sequence[Fold], names: Sequence[str]
    ) -> tuple[dict[str, tuple[torch.Tensor, int]], dict[int, tuple[torch.Tensor, int]]]:
        """Σ x xᵀ in groups and tokens of each weight; Σ |x| and tokens of each fold that is of tensors here.

        Takes blocks to the next layer.
        """
        import torch

        device, last = self.net.device, index + 1 == len(self.net)
        for block in mine:  # before there are threads
            self.net.given(index, (1, 1) if block == AWAY else self.blocks.samples(block).shape)
        with self.ranks.leaving_together():
            groups = watch.shared(self.net.embedded(torch.zeros(1, 1, dtype=torch.long)).to(device), names)
        products: dict[tuple[str, ...], Hessians] = {}
        for group in groups:
            columns = watch.get(group[0]).shape[1]
            size = self.recipes[group[0]].group
            products[group] = Hessians(columns, columns if size < 0 else size, device)
        here = {at: fold for at, fold in enumerate(folds) if watch.has(fold.source)}
        means = {
            at: Magnitudes(len(watch.get(fold.source)) if fold.is_norm else watch.get(fold.readers[0]).shape[1], device)
            for at, fold in here.items()
        }
        listening: dict[str, list[Any]] = {}
        for group, product in products.items():
            listening.setdefault(watch.listener(group[0]), []).append(product.add)
        for at, fold in here.items():
            if fold.is_norm:
                watch.outputs[fold.source] = _all([means[at].add])
            else:
                listening.setdefault(watch.listener(fold.readers[0]), []).append(means[at].add)
        watch.inputs = {name: _all(calls) for name, calls in listening.items()}

        def one(block: int) -> None:
            made = watch.layer(self.probing.read(index, block))
            if not last and block != AWAY:
                self.blocks.write(index + 1, block, made.float().cpu().numpy())

        with self.ranks.leaving_together():
            watch.through(mine, one)
        watch.inputs, watch.outputs = {}, {}
        owners = [self._ranks_of(watch, group[0]) for group in products]
        owners += [
            self._ranks_of(watch, fold.readers[0] if not fold.is_norm else fold.source) for fold in here.values()
        ]
        exact = [item.sum for item in (*products.values(), *means.values())]
        tokens = [0] * len(exact)
        for ranks in self._domains():
            some = [i for i, owner in enumerate(owners) if owner is ranks]
            for i in some:
                ranks.sum(exact[i].parts())
            for i, count in zip(some, ranks.counts([exact[i].count for i in some]), strict=True):
                tokens[i] = count
        by_group = dict(zip(products, tokens, strict=False))
        by_fold = dict(zip(means, tokens[len(products) :], strict=True))
        return (
            {name: (product.sum.total(), by_group[group]) for group, product in products.items() for name in group},
            {at: (mean.sum.total(), by_fold[at]) for at, mean in means.items()},
        )

    def _scales(self, watch: Watch, fold: Fold, total: torch.Tensor, tokens: int) -> list[torch.Tensor]:
        """What is tried: scales of each point of the grid; none at all where no token came.

        Args:
            watch: of the layer.
            fold: whose scales.
            total: Σ |x| over the tokens.
            tokens: how many they were.
        """
        import torch

        quantised = [name for name in fold.readers if name in self.recipes]
        sums = torch.zeros(len(quantised), len(total) + 1, dtype=torch.float64, device=total.device)
        apart = self.peers.size > 1 and fold.is_norm  # what reads a norm may be on several ranks
        for at, name in enumerate(quantised):
            if watch.has(name) and not (apart and self._ranks_of(watch, name).rank):
                weight = watch.get(name)
                sums[at, :-1], sums[at, -1] = magnitudes(weight, self.recipes[quantised[0]].group), len(weight)
        if apart:
            self.ranks.sum([sums])
        if not tokens:
            return [torch.ones_like(total)] * len(self.search)
        whole = torch.zeros_like(sums[0])
        for some in sums:
            whole += some
        return list(self.search.scales(total / tokens, (whole[:-1] / whole[-1]).float()))

    def _folded(
        self, watch: Watch, chosen: Collection[tuple[Fold, torch.Tensor]]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Tensors that are here with the scales in them; the scales that a weight was multiplied by."""
        touched = {name for fold, _ in chosen for name in (fold.source, fold.bias, *fold.readers) if watch.has(name)}
        values = {name: watch.get(name).clone() for name in sorted(touched)}
        around: dict[str, torch.Tensor] = {}
        for fold, found in chosen:
            scale, rows = found, slice(fold.start, fold.start + len(found))
            if fold.is_norm:
                offset = watch.offset(fold.source)
                values[fold.source], scale = settled(values[fold.source], found, offset, self.stored[fold.source])
            else:
                values[fold.source][rows] /= scale[:, None]
            if fold.bias in values:
                values[fold.bias][rows] /= scale
            for name in values.keys() & set(fold.readers):
                values[name] *= scale
                around[name] = scale
        return values, around

    def _check(self, watch: Watch, index: int, probes: Sequence[Probe | int], seen: Seen) -> None:
        """See that the layer computes what it did.

        Raises:
            Refused: it does not.
        """
        same = True
        with self.ranks.leaving_together():
            found = self.probing.again(watch, index, probes, seen)
        for hidden, before, after in found:
            off = lengths(after - before) > _SAME * lengths(before - hidden)
            same = float(off.float().mean()) <= _TIES and bool(after.isfinite().all())
        if self.ranks.any(not same):
            raise Refused(
                "a layer with AWQ's scales folded computes something else, the output is not finished",
                where=watch.layer.name,
                expected="scales that cancel between a norm, or a linear layer, and all that reads it",
                do="FORMAT gptq folds nothing",
            )


def _all(calls: Sequence[Any]) -> Any:
    def listen(x: torch.Tensor, item: Any) -> None:
        del item
        for call in calls:
            call(x)

    return listen


def _divided(hessians: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Σ x xᵀ of inputs that are divided by scales."""
    if scales is None:
        return hessians
    parts = scales.reshape(hessians.shape[:2])
    return hessians / parts[:, :, None] / parts[:, None, :]
