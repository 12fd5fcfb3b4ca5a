"""What a calibrated quantisation is asked to do: method, its settings, the samples, and which weights get what.

`dconv.quant.parse` makes it of ``--quantization-config``. All of it is checked before any work, and nothing in it
depends on a model; `dconv.quant.mixed` lays it over one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from dconv.quant.table import Fields, Table

Method = Literal["gptq", "awq"]


@dataclass(frozen=True)
class Calibration:
    """The samples.

    Attributes:
        data: a file or a folder (`dconv.quant.data`); None for the text that ships.
        nsamples: how many.
        seqlen: tokens of each.
        seed: draws them.
    """

    data: str | None = None
    nsamples: int = 128
    seqlen: int = 2048
    seed: int = 0

    def clipped(self, longest: int | None) -> tuple[Calibration, str]:
        """The same with samples that are no longer than the model's positions, and what to say of it.

        Args:
            longest: ``max_position_embeddings``, None where the model has no such bound.
        """
        if longest is None or self.seqlen <= longest:
            return self, ""
        note = f"samples are cut to {longest:,} tokens, the model's longest input; {self.seqlen:,} were asked for"
        return replace(self, seqlen=longest), note


@dataclass(frozen=True)
class Gptq:
    """GPTQ's settings, by GPTQModel's names and with its defaults.

    Attributes:
        bits, group_size: of weights that the table gives whole numbers and says no more about.
        sym: whether the grid is symmetric around zero.
        desc_act: columns in the order of falling diagonal of the Hessian.
        act_group_aware: the same for whole groups and inside of each, which needs no stored order; of no meaning
            beside ``desc_act``.
        static_groups: scales from the weights as they were, before errors are spread.
        damp_percent: part of the diagonal's mean that is added to it; between 0 and 1.
        damp_auto_increment: what is added to that where the Hessian cannot be inverted, again and again.
        mse: exponent of the error by which a grid is searched; 0 takes the extremes.
        true_sequential: inside a layer, later modules see the output of earlier ones as quantised.
        routing_weighted: tokens count for an expert by the router's weight: ``H = Σ c·xxᵀ`` (MoEQuant).
        lm_head: whether the output layer is quantised, too.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    act_group_aware: bool = True
    static_groups: bool = False
    damp_percent: float = 0.05
    damp_auto_increment: float = 0.01
    mse: float = 0.0
    true_sequential: bool = True
    routing_weighted: bool = False
    lm_head: bool = False


@dataclass(frozen=True)
class Awq:
    """AWQ's settings.

    Attributes:
        bits, group_size: of all weights; the format has one of each.
        zero_point: whether a group has a zero of its own.
        n_grid: points of the search for scales.
        clip: whether the range of weights is searched, too.
        duo_scaling: scales from activations and weights, not from activations alone.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    n_grid: int = 20
    clip: bool = True
    duo_scaling: bool = True


@dataclass(frozen=True)
class Quantization:
    """All that decides what a calibrated quantisation chooses.

    Attributes:
        settings: of the method.
        calibration: the samples.
        table: which weights get what; see `dconv.quant.mixed.resolve`.
        preset: the name of the ready config that it is made of; "" where there is none.
    """

    settings: Gptq | Awq = Gptq()
    calibration: Calibration = Calibration()
    table: Table = field(default_factory=lambda: uniform(4, 128))
    preset: str = ""

    @property
    def method(self) -> Method:
        """Which of the two ``settings`` are of."""
        return "gptq" if isinstance(self.settings, Gptq) else "awq"

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        return self.settings.sym if isinstance(self.settings, Gptq) else not self.settings.zero_point

    @property
    def lm_head(self) -> bool:
        """Whether the output layer is quantised as well."""
        return isinstance(self.settings, Gptq) and self.settings.lm_head

    def describe(self) -> dict[str, object]:
        """In plain JSON, for the receipt and the plan's identity: equal where the same is computed.

        Which file the samples are from is not in it: `dconv.quant.data.Samples.record` says it by content, with
        digests, and belongs beside it.
        """
        drawn = asdict(self.calibration)
        del drawn["data"]
        return {"method": self.method, **asdict(self.settings), "calibration": drawn, **self.table.describe()}


def uniform(bits: int, group: int) -> Table:
    """Whole numbers of so many bits for all weights, in groups of so many columns."""
    return Table(Fields(wq=f"int{bits}", group=group))
