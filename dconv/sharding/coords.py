"""Parallel coordinates in Megatron's rank order, and which layers a pipeline stage holds.

Sources: ``megatron/core/parallel_state.py`` (order tp-cp-ep-dp-pp, expert order with etp) and
``megatron/core/transformer/transformer_layer.py: get_transformer_layer_offset``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from dconv.errors import Refused, UsageError


@dataclass(frozen=True, slots=True)
class Coord:
    """One rank's place. ``inner`` counts ranks inside a pipeline stage."""

    pp: int
    inner: int
    tp: int
    ep: int
    etp: int


@dataclass(frozen=True)
class Parallel:
    """Sizes of tensor, pipeline, virtual pipeline, expert and expert-tensor parallelism, and uneven stages.

    Attributes:
        first, last: layers of the first and last stage when they differ from the rest.
        count_embedding, count_loss: the embedding / the loss take a layer's place in an even split.
        stages: explicit layer counts, one list a stage with one entry a virtual chunk; instead of the four above.

    Raises:
        Refused: sizes that no world of ranks has.
        UsageError: two ways at once to say which stage has which layers: Megatron refuses such args.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    first: int | None = None
    last: int | None = None
    count_embedding: bool = False
    count_loss: bool = False
    stages: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "ep", "etp"):
            if getattr(self, name) < 1:
                raise Refused(f"--{name} must be at least 1, nothing was written", found=str(getattr(self, name)))
        if self.inner % self.tp or self.inner % (self.ep * self.etp):
            raise Refused(
                "the expert layout does not fit the tensor layout",
                expected="one of tp and ep x etp divides the other",
                found=f"tp {self.tp}, ep {self.ep}, etp {self.etp}",
            )
        if self.vpp > 1 and self.pp < 2:
            raise Refused("a virtual pipeline needs a pipeline", expected="--pp of at least 2 with --vpp")
        # the conflicts of TransformerConfig.__post_init__
        ends, counted = self.first is not None or self.last is not None, self.count_embedding or self.count_loss
        ways = {
            "--pp-layout": self.stages is not None,
            "--first-stage-layers, --last-stage-layers": ends,
            "--count-embedding, --count-loss": counted,
        }
        if sum(ways.values()) > 1:
            raise UsageError(
                "two ways at once to divide the layers over the pipeline, nothing was written",
                where="\n".join(way for way, taken in ways.items() if taken),
                do="keep one of them",
            )

    @property
    def inner(self) -> int:
        """Ranks inside a stage (data parallelism aside): expert parallelism re-slices the tensor ranks."""
        return max(self.tp, self.ep * self.etp)

    @property
    def world(self) -> int:
        """Ranks of the model, data parallelism aside."""
        return self.pp * self.inner

    def layout_string(self) -> str | None:
        """Explicit stages in Megatron's own spelling (``Ett|tt|ttL``), None when the stages follow from the sizes.

        Source: ``megatron/core/transformer/pipeline_parallel_layer_layout.py``.
        """
        if self.stages is None:
            return None
        flat = ["t" * self.stages[pp][vp] for vp in range(self.vpp) for pp in range(self.pp)]
        return "E" + "|".join(flat) + "L"

    def coords(self) -> Iterator[Coord]:
        """Every rank's place, in rank order."""
        for pp in range(self.pp):
            for i in range(self.inner):
                yield Coord(pp, i, i % self.tp, (i // self.etp) % self.ep, i % self.etp)

    def chunks(self, layers: int) -> list[list[range]]:
        """Global layer numbers of each stage's virtual chunks: ``chunks(L)[pp][vp]``.

        Raises:
            Refused: the layers do not divide.
        """
        counts = self._counts(layers)
        total = sum(map(sum, counts))
        if total != layers:
            raise Refused(
                "the pipeline layout does not hold the model's layers, nothing was written",
                expected=f"{layers} layers in all",
                found=f"{total} layers",
            )
        ranges: list[list[range]] = [[range(0)] * self.vpp for _ in range(self.pp)]
        at = 0
        for vp in range(self.vpp):  # the model runs through all stages once for each virtual chunk
            for pp in range(self.pp):
                ranges[pp][vp] = range(at, at + counts[pp][vp])
                at += counts[pp][vp]
        return ranges

    def _counts(self, layers: int) -> list[list[int]]:
        if self.stages is not None:
            if len(self.stages) != self.pp or any(len(stage) != self.vpp for stage in self.stages):
                raise Refused(
                    "the pipeline layout does not match --pp and --vpp",
                    expected=f"{self.pp} stages of {self.vpp} chunks",
                    found=f"{len(self.stages)} stages",
                )
            if any(n < 0 for stage in self.stages for n in stage):
                raise Refused(
                    "the pipeline layout has a chunk of less than no layers, nothing was written",
                    expected="0 or more layers a chunk",
                    found="|".join("+".join(map(str, stage)) for stage in self.stages)[:200],
                )
            return [list(stage) for stage in self.stages]
        if self.first is not None or self.last is not None:
            return self._uneven(layers)
        slots = layers + self.count_embedding + self.count_loss
        each = _divide(slots, self.pp * self.vpp, "layers (embedding and loss counted as asked)")
        counts = [[each] * self.vpp for _ in range(self.pp)]
        counts[0][0] -= self.count_embedding
        counts[-1][-1] -= self.count_loss
        return counts

    def _uneven(self, layers: int) -> list[list[int]]:
        ends = [n for n in (self.first, self.last) if n is not None]
        if min(ends) < 1 or not len(ends) <= self.pp <= layers or self.vpp > layers:
            raise Refused(
                "the layers do not make such a first and last stage, nothing was written",
                expected=f"stages of 1 or more of {layers} layers, as many stages as are named",
                found=f"first {self.first}, last {self.last}, {self.described}",
            )
        stages: list[int | None] = [None] * self.pp
        if self.first is not None:
            stages[0] = self.first
        if self.last is not None:
            stages[-1] = self.last
        rest = layers - sum(n for n in stages if n is not None)
        middle = stages.count(None)
        if rest < 0 or bool(rest) != bool(middle):  # Megatron has no stages in the middle without layers
            raise Refused(
                "the first and last stage do not add up",
                expected=f"{layers} layers",
                found=f"first {self.first}, last {self.last}, pp {self.pp}",
            )
        each = _divide(rest, middle, "layers of the middle stages") if middle else 0
        return [[_divide(each if n is None else n, self.vpp, "layers of a stage")] * self.vpp for n in stages]

    @cached_property
    def described(self) -> str:
        """The sizes for a person: ``tp 2 x pp 4``, the others where they are more than 1."""
        parts = [f"tp {self.tp}", f"pp {self.pp}"]
        parts += [f"{name} {getattr(self, name)}" for name in ("vpp", "ep", "etp") if getattr(self, name) > 1]
        return " x ".join(parts)


def _divide(n: int, by: int, what: str) -> int:
    if n % by:
        raise Refused(
            f"{n} {what} do not divide by {by}",
            do="choose a pp (x vpp) that divides, or give first/last stage counts or --pp-layout",
        )
    return n // by
