"""AWQ of one layer: count, search scales, fold them, search ranges, round.

Unlike GPTQ's, what comes to a layer is what the model itself would give it: scales are of the weights' own inputs, and
rounding one weight changes no other's. All samples are counted; the losses of the search are of a few, the same ones
for any number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from dconv.errors import Refused
from dconv.quant.awq import Search, magnitudes, rounded, settled
from dconv.quant.awq_maps import Fold, Folds
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

#: Tokens of the search's losses, and of one of its samples at most. One number is chosen for a layer's channels, which
#: takes few tokens; each costs what the model costs, times the points of the grid.
_TOKENS: Final = 2048
_LENGTH: Final = 256
#: A token whose answer the fold changed by more than this part of it, and how many there may be: near a tie, routers
#: decide otherwise for a last bit.
_SAME: Final = 1e-3
_TIES: Final = 0.05


@dataclass(frozen=True)
class Probe:
    """A sample of the search.

    Attributes:
        number: among all of them.
        block, row: where it is.
    """

    number: int
    block: int
    row: int


def probes_of(blocks: Blocks) -> tuple[int, int, list[Probe]]:
    """How many samples the search has, how many tokens of each, and which they are."""
    samples, length = blocks.tokens.shape
    used = min(length, _LENGTH)
    count = min(samples, max(1, _TOKENS // used))
    each = len(blocks.samples(0))
    chosen = [number * samples // count for number in range(count)]
    return count, used, [Probe(number, at // each, at % each) for number, at in enumerate(chosen)]


@dataclass
class _Seen:
    """What the search needs of a layer, by probe.

    Attributes:
        inputs: of linear layers whose own answer is compared, by the weight's name.
        calls: arguments and answers of modules, by path.
        whole: what comes to the layer, and what leaves it.
    """

    inputs: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    calls: dict[tuple[str, int], tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = field(default_factory=dict)
    whole: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


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
            count, length, probes = probes_of(self.blocks)
            here = self._here(probes, mine)
            with self.ranks.leaving_together():
                seen = self._seen(watch, index, here, length, folds)
            tried = {at: self._scales(watch, folds[at], *found) for at, found in counts.items()}
            with self.ranks.leaving_together():
                own = self._losses(watch, folds, tried, here, count, seen)
            losses = self._summed(own)
            best = [line.index(min(line)) for line in losses]
            chosen = {at: (folds[at], found[best[at]]) for at, found in tried.items()}
            values, around = self._folded(watch, chosen.values())
            watch.set(values)
            self._check(watch, index, here[:1], seen)
            hessians = {name: _divided(sums[name][0], around.get(name)) for name in names}
            tokens = {name: sums[name][1] for name in names}
            cut = set(names) - self.folds.uncut if self.cut else set()
            del seen, sums
            results: dict[str, Result] = {}
            for ranks in self._domains():
                some = {name: found for name, found in hessians.items() if self._ranks_of(watch, name) is ranks}
                results |= round_off(watch.get, some, tokens, self.recipes, cut, ranks, self.threads)
        finally:
            watch.close()
        whole = time.perf_counter() - began
        by_reader = {name: (fold, at) for at, fold in enumerate(folds) for name in fold.readers}
        lines = []
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

    def _domains(self) -> Sequence[Ranks]:
        """All ranks, and where experts are divided, those with the same ones."""
        return (self.ranks,) if self.peers.size == 1 else (self.ranks, self.peers.replicas)

    def _ranks_of(self, watch: Watch, name: str) -> Ranks:
        """Those that have a weight."""
        return self._domains()[-1 if watch.of_expert(name) else 0]

    def _here(self, probes: Sequence[Probe], mine: Sequence[int]) -> list[Probe | int]:
        """The probes in this rank's blocks; where experts are divided, as many as any rank has."""
        world = self.ranks.world
        most = max(sum(probe.block % world == rank for probe in probes) for rank in range(world))
        return self.peers.padded([probe for probe in probes if probe.block in set(mine)], most)

    def _counted(
        self, watch: Watch, index: int, mine: Sequence[int], folds: Sequence[Fold], names: Sequence[str]
    ) -> tuple[dict[str, tuple[torch.Tensor, int]], dict[int, tuple[torch.Tensor, int]]]:
        """Σ x xᵀ in groups and tokens of each weight; Σ |x| and tokens of each fold that is of tensors here. Takes
        blocks to the next layer.
        """
        import torch

        device, last = self.net.device, index + 1 == len(self.net)
        for block in mine:  # before there are threads
            self.net.given(index, (1, 1) if block == AWAY else self.blocks.samples(block).shape)
        with self.ranks.leaving_together():
            groups = watch.shared(self.net.embedded(torch.zeros(1, 1, dtype=torch.long)).to(device), names)
        products = {}
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
            made = watch.layer(self._read(index, block))
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

    def _read(self, index: int, block: int) -> torch.Tensor:
        """What comes to a layer; of no block something that goes through while others' tokens come to its experts."""
        import torch

        found = self.blocks.read(index, 0)[:1, :1] if block == AWAY else self.blocks.read(index, block)
        return torch.from_numpy(found).to(self.net.device)

    def _seen(self, watch: Watch, index: int, here: Sequence[Probe | int], length: int, folds: Sequence[Fold]) -> _Seen:
        """What the search needs, of this rank's probes."""
        seen = _Seen()
        for shape in ((1, length), (1, 1)):
            self.net.given(index, shape)
        alone = {fold.readers[0] for fold in folds if len(fold.readers) == 1}
        paths = {watch.parent(fold.readers) for fold in folds if len(fold.readers) > 1}

        def heard(name: str) -> Any:
            return lambda x, number: seen.inputs.__setitem__((name, number), x)

        def called(path: str) -> Any:
            def keep(args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
                seen.calls[path, watch.item] = args, kwargs, made[0] if isinstance(made, tuple) else made

            return keep

        watch.catch(paths)
        watch.inputs = {watch.listener(name): heard(name) for name in alone}
        watch.calls = {path: called(path) for path in paths}

        by_number = {_number(probe): probe for probe in here}

        def one(number: int) -> None:
            probe = by_number[number]
            if isinstance(probe, Probe):
                hidden = self._read(index, probe.block)[probe.row : probe.row + 1, :length].clone()
                seen.whole[number] = hidden, watch.layer(hidden)
            else:
                watch.layer(self._read(index, AWAY))

        watch.through([_number(probe) for probe in here], one)
        watch.inputs, watch.calls = {}, {}
        return seen

    def _scales(self, watch: Watch, fold: Fold, total: torch.Tensor, tokens: int) -> list[torch.Tensor]:
        """What is tried: scales of each point of the grid; none at all where no token came.

        Args:
            total: Σ |x| over the tokens.
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

    def _losses(
        self,
        watch: Watch,
        folds: Sequence[Fold],
        tried: Mapping[int, Sequence[torch.Tensor]],
        here: Sequence[Probe | int],
        count: int,
        seen: _Seen,
    ) -> torch.Tensor:
        """Squared errors of each point of the grid, for each fold: float64 [folds, points, probes], this rank's own."""
        import torch

        device = self.net.device
        losses = torch.zeros(len(folds), len(self.search), count, dtype=torch.float64, device=device)
        for at, scales in tried.items():
            quantised = [name for name in folds[at].readers if name in self.recipes]
            if len(folds[at].readers) == 1:
                name = quantised[0]
                found = [number for number in range(count) if (name, number) in seen.inputs]

                def direct(point: int, name: str = name, at: int = at, found: Sequence[int] = found,
                           scales: Sequence[torch.Tensor] = scales) -> None:  # fmt: skip
                    weight = watch.get(name)
                    error = rounded(weight, scales[point], self.recipes[name]) - weight
                    for number in found:
                        losses[at, point, number] = _square(seen.inputs[name, number] @ error.t())

                watch.run(range(len(self.search)) if found else (), direct)
                continue
            path, here_too = watch.parent(folds[at].readers), [name for name in quantised if watch.has(name)]
            for point in range(len(self.search)):
                made = watch.run(
                    here_too, lambda name, s=scales[point]: rounded(watch.get(name), s, self.recipes[name])
                )

                def through(number: int, path: str = path, at: int = at, point: int = point) -> None:
                    args, kwargs, answer = seen.calls[path, number]
                    error = watch.call(path, args, kwargs) - answer
                    if number != AWAY:
                        losses[at, point, number] = _square(error)

                with watch.instead(dict(zip(here_too, made, strict=True))):
                    watch.through([_number(probe) for probe in here], through)
        return losses

    def _summed(self, losses: torch.Tensor) -> list[list[float]]:
        """The sum over probes, of all ranks, in their order.

        Every probe's is one number, of one rank; zeros are added to it elsewhere.
        """
        import torch

        self.ranks.sum([losses])
        total = torch.zeros_like(losses[:, :, 0])
        for number in range(losses.shape[2]):
            total += losses[:, :, number]
        return torch.where(total.isfinite(), total, torch.inf).tolist()

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

    def _check(self, watch: Watch, index: int, probes: Sequence[Probe | int], seen: _Seen) -> None:
        """See that the layer computes what it did.

        Raises:
            Refused: it does not.
        """
        same = True

        def again(number: int) -> torch.Tensor:
            return watch.layer(self._read(index, AWAY) if number == AWAY else seen.whole[number][0])

        numbers = [_number(probe) for probe in probes]
        with self.ranks.leaving_together():
            after_all = watch.through(numbers, again)
        for number, after in zip(numbers, after_all, strict=True):
            if number != AWAY:
                hidden, before = seen.whole[number]
                off = (after - before).norm(dim=-1) > _SAME * (before - hidden).norm(dim=-1)
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


def _number(probe: Probe | int) -> int:
    return probe.number if isinstance(probe, Probe) else probe


def _square(error: torch.Tensor) -> float:
    import torch

    return float(error.square().sum(dtype=torch.float64))


def _divided(hessians: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Σ x xᵀ of inputs that are divided by scales."""
    if scales is None:
        return hessians
    parts = scales.reshape(hessians.shape[:2])
    return hessians / parts[:, :, None] / parts[:, None, :]
