"""The search of AWQ's scales: what a few samples are given and give, and the loss of each point of the grid over them.

They are the same ones for any number of ranks, and each one's loss is one number, so that the sum has one order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from dconv.net.untyped import first_of, from_numpy, listed
from dconv.quant.awq import Search, rounded
from dconv.quant.awq_maps import Fold
from dconv.quant.awq_watch import Call, Listen, Watch
from dconv.quant.blocks import Blocks
from dconv.quant.gptq import Recipe
from dconv.quant.network import Network
from dconv.quant.peers import AWAY, Peers
from dconv.quant.ranks import Ranks

if TYPE_CHECKING:
    import torch

#: Tokens of the search's losses, and of one of its samples at most. One number is chosen for a layer's channels, which
#: takes few tokens; each costs what the model costs, times the points of the grid.
_TOKENS: Final = 2048
_LENGTH: Final = 256


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
class Seen:
    """What the search needs of a layer, by probe.

    Attributes:
        inputs: of linear layers whose own answer is compared, by the weight's name.
        calls: arguments and answers of modules, by path.
        whole: what comes to the layer, and what leaves it.
    """

    inputs: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict[tuple[str, int], Any])
    calls: dict[tuple[str, int], tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = field(
        default_factory=dict[tuple[str, int], Any]
    )
    whole: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict[int, Any])


@dataclass(frozen=True)
class Probing:
    """This rank's part in the search.

    Attributes:
        recipes: of the weights to be quantised, by name.
    """

    net: Network
    recipes: Mapping[str, Recipe]
    blocks: Blocks
    ranks: Ranks
    peers: Peers
    search: Search

    def read(self, index: int, block: int) -> torch.Tensor:
        """What comes to a layer; of no block something that goes through while others' tokens come to its experts."""
        found = self.blocks.read(index, 0)[:1, :1] if block == AWAY else self.blocks.read(index, block)
        return from_numpy(found).to(self.net.device)

    def here(self, probes: Sequence[Probe], mine: Sequence[int]) -> list[Probe | int]:
        """The probes in this rank's blocks; where experts are divided, as many as any rank has."""
        world = self.ranks.world
        most = max(sum(probe.block % world == rank for probe in probes) for rank in range(world))
        return self.peers.padded([probe for probe in probes if probe.block in set(mine)], most)

    def seen(self, watch: Watch, index: int, here: Sequence[Probe | int], length: int, folds: Sequence[Fold]) -> Seen:
        """What the search needs, of this rank's probes."""
        seen = Seen()
        for shape in ((1, length), (1, 1)):
            self.net.given(index, shape)
        alone = {fold.readers[0] for fold in folds if len(fold.readers) == 1}
        paths = {watch.parent(fold.readers) for fold in folds if len(fold.readers) > 1}

        def heard(name: str) -> Listen:
            def keep(x: torch.Tensor, number: int) -> None:
                seen.inputs[name, number] = x

            return keep

        def called(path: str) -> Call:
            def keep(args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
                seen.calls[path, watch.item] = args, kwargs, first_of(made)

            return keep

        watch.catch(paths)
        watch.inputs = {watch.listener(name): heard(name) for name in alone}
        watch.calls = {path: called(path) for path in paths}

        by_number = {_number(probe): probe for probe in here}

        def one(number: int) -> None:
            probe = by_number[number]
            if isinstance(probe, Probe):
                hidden = self.read(index, probe.block)[probe.row : probe.row + 1, :length].clone()
                seen.whole[number] = hidden, watch.layer(hidden)
            else:
                watch.layer(self.read(index, AWAY))

        watch.through([_number(probe) for probe in here], one)
        watch.inputs, watch.calls = {}, {}
        return seen

    def losses(
        self,
        watch: Watch,
        folds: Sequence[Fold],
        tried: Mapping[int, Sequence[torch.Tensor]],
        here: Sequence[Probe | int],
        count: int,
        seen: Seen,
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

    def summed(self, losses: torch.Tensor) -> list[list[float]]:
        """The sum over probes, of all ranks, in their order.

        Every probe's is one number, of one rank; zeros are added to it elsewhere.
        """
        import torch

        self.ranks.sum([losses])
        total = torch.zeros_like(losses[:, :, 0])
        for number in range(losses.shape[2]):
            total += losses[:, :, number]
        return listed(torch.where(total.isfinite(), total, torch.inf))

    def again(
        self, watch: Watch, index: int, probes: Sequence[Probe | int], seen: Seen
    ) -> list[tuple[torch.Tensor, ...]]:
        """What came to the layer, what left it and what leaves it now, of each of some probes that are here."""

        def one(number: int) -> torch.Tensor:
            return watch.layer(self.read(index, AWAY) if number == AWAY else seen.whole[number][0])

        numbers = [_number(probe) for probe in probes]
        after = watch.through(numbers, one)
        return [(*seen.whole[number], made) for number, made in zip(numbers, after, strict=True) if number != AWAY]


def _number(probe: Probe | int) -> int:
    return probe.number if isinstance(probe, Probe) else probe


def _square(error: torch.Tensor) -> float:
    import torch

    return float(error.square().sum(dtype=torch.float64))
