"""What a model family is: a table of names, a config translation, and nothing else.

The engine reads the same table in both directions; an inverse is derived, never written.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Final

from dconv.arch import predictors
from dconv.arch.layouts import Facts, Layout, size
from dconv.arch.mup import Mup
from dconv.arch.translate import CONFIG, Config
from dconv.errors import Damaged
from dconv.sharding.layout import Fused
from dconv.sharding.region import Index

#: The output layer of nearly all of HuggingFace's decoders.
TIED_HEAD: Final = "lm_head.weight"
#: What Megatron's names of a vision tower begin with.
TOWER: Final = "vision_model."
#: Kimi K2 has some 70,000, nearly all of them of experts; so many take seconds to name.
_MOST_TENSORS: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a family's table.

    Attributes:
        megatron: Megatron's global name in TransformerEngine's spelling; ``*`` is the layer number, ``#`` the expert's.
        hf: HuggingFace's name; ``{q,k,v}`` spells several, in the layout's order.
        layout: the structural kind.
        when: the fact that must hold for the row to exist ("" means always); it may differ by layer.
        stack: the fact that numbers the layers. Only ``layers`` are spread over pipeline stages.
        after: the fact that HuggingFace adds to the layer number ("" for none).
        folds: how many of Megatron's layers one of HuggingFace's is.
        stage: the pipeline stage of what is in no pipelined layer: ``first`` or ``last``.
        keeps: whether ``--dtype`` leaves it as it is (a router's bias is fp32 whatever the weights are).
        beside: whether Megatron's model has no such tensor; it travels with the checkpoint.
        apart: the ends of the names under which torch_dist keeps the parts, each as a tensor of its own.
    """

    megatron: str
    hf: str
    layout: Layout
    when: str = ""
    stack: str = "layers"
    after: str = ""
    stage: str = ""
    keeps: bool = False
    apart: tuple[str, ...] = ()
    beside: bool = False
    folds: int = 1

    @property
    def per_layer(self) -> bool:
        """Whether each layer has one."""
        return "*" in self.megatron

    @property
    def per_expert(self) -> bool:
        """Whether each expert has one."""
        return "#" in self.megatron

    @property
    def pipelined(self) -> bool:
        """Whether its layers are spread over pipeline stages."""
        return self.per_layer and self.stack == "layers"

    @property
    def stacked(self) -> bool:
        """Whether torch_dist may have all layers in one tensor: of token predictors it never has."""
        return self.per_layer and self.stack != "mtp" and not self.beside

    @property
    def first_stage(self) -> bool:
        """Whether it is in the first pipeline stage, where it is in no pipelined layer."""
        return (self.stage or ("first" if self.megatron.startswith("embedding.") else "last")) == "first"

    @property
    def is_embedding(self) -> bool:
        """Whether it is the embedding of words, the one that a tied model uses twice."""
        return not self.per_layer and self.first_stage and self.layout.padded

    @property
    def is_linear(self) -> bool:
        """Whether it is the matrix of a linear layer of the decoder: what quantised formats store in codes."""
        module, _, last = self.megatron.rpartition(".")
        named = module.rpartition(".")[2]
        decoder = self.per_layer and self.megatron.removeprefix("language_model.").startswith(("decoder.", "mtp."))
        return decoder and last == "weight" and (named.startswith("linear_") or named in ("in_proj", "out_proj"))

    @property
    def shared(self) -> bool:
        """Whether HuggingFace has one tensor for all experts, of which Megatron has one each."""
        return self.per_expert and "#" not in self.hf

    @property
    def logical(self) -> tuple[str, ...]:
        """HuggingFace's names with the braces spelled out."""
        return spelled_out(self.hf)

    def stored_shape(self, stored: Mapping[str, Index], layer: int) -> Index | None:
        """The shape of this row's tensor in a source, under any of its names; None where it is not there."""
        for name in (self.hf.replace("*", str(layer // self.folds)), self.megatron.replace("*", str(layer))):
            if name in stored:
                return stored[name]
        stacked = stored.get(self.megatron.replace(".*", "")) if self.per_layer else None
        return None if stacked is None else stacked[1:]

    def exists(self, facts: Facts, layer: int) -> bool:
        """Whether a model with these facts has it in this layer (-1: outside of the layers)."""
        if not self.when:
            return True
        here: bool | tuple[bool, ...] = facts.get(self.when, False)
        return bool(here[layer] if isinstance(here, tuple) else here)


@dataclass(frozen=True)
class Entry:
    """A row applied to a model: one Megatron tensor and the place it has in the pipeline.

    Attributes:
        row: the row it came from.
        layer: global layer number, or -1.
        expert: global expert number, or -1.
    """

    fused: Fused
    row: Row
    layer: int
    expert: int = -1

    @property
    def is_embedding(self) -> bool:
        """As `Row.is_embedding`."""
        return self.row.is_embedding


@dataclass(frozen=True, slots=True)
class Twin:
    """A HuggingFace tensor that is another once more; ``*``, ``stack`` and ``after`` are as in `Row`."""

    hf: str
    of: str
    stack: str
    after: str = ""


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: what ``--model-type`` takes.
        config: how config.json and Megatron's args translate.
        rows: the table.
        recomputed: tensors that carry no weights, with the reason they may be left out.
        twins: HuggingFace tensors that Megatron does not store a second time.
        marks: what stands in the name of some stored tensor, one of them, where the config alone does not tell this
            family from others of its architecture; of two that fit, the first is meant.
        either: pairs of facts, each true in just the layers where the other is not.
        base: what a directory of the base class alone leaves out before HuggingFace's names.
        head: where a tied model may still store a second copy of its embedding.
        again: other HuggingFace names under which a tensor may be stored once more, each with the tensor's own.
        also: beginnings of names that some versions of transformers write, and those of the table; with a ``*`` before
            them, ends of names.
        classes: other classes that a config.json of this family may name: the files are this family's where they have
            all that its own class has.
        mup: how scalars of its config.json are folded into its weights (``--mup2llama``); None where it has none.
    """

    name: str
    config: Config
    rows: tuple[Row, ...]
    recomputed: tuple[tuple[str, str], ...] = ()
    twins: tuple[Twin, ...] = ()
    marks: tuple[str, ...] = ()
    either: tuple[tuple[str, str], ...] = ()
    base: str = ""
    head: str = TIED_HEAD
    again: tuple[tuple[str, str], ...] = ()
    also: tuple[tuple[str, str], ...] = ()
    classes: tuple[str, ...] = ()
    mup: Mup | None = None

    @property
    def sees(self) -> bool:
        """Whether there is a vision tower, in Megatron's model or beside it."""
        return any(row.megatron.startswith((TOWER, "beside_the_model.vision.")) for row in self.rows)

    def published(self, name: str) -> str:
        """The table's name for a tensor, however a version of transformers begins it."""
        for theirs, ours in self.also:
            if theirs.startswith("*") and name.endswith(theirs[1:]):
                return name.removesuffix(theirs[1:]) + ours[1:]
            if name.startswith(theirs) and not name.startswith(ours):
                return ours + name.removeprefix(theirs)
        return name

    def depth(self, facts: Facts) -> int:
        """Layers as HuggingFace counts them, which Megatron may have several for (`Row.folds`)."""
        return size(facts, "layers") // max((row.folds for row in self.rows if row.pipelined), default=1)

    def lacking(self, names: Collection[str]) -> list[str]:
        """HuggingFace's names, outside the layers, that every model of this family has and ``names`` has not."""
        there = {prefix + self.published(name) for name in names for prefix in ("", self.base)}
        wanted = (row.hf for row in self.rows if "*" not in row.hf and not row.when)
        return [name for name in wanted if name not in there and name not in dict(self.again).values()]

    def borne_out(
        self, config: Mapping[str, object], stored: Collection[str]
    ) -> tuple[Mapping[str, object], dict[str, str]]:
        """The config of what is stored. transformers saves no token predictor, and leaves their number in config.json.

        Args:
            config: config.json.
            stored: names of the source's tensors, HuggingFace's or Megatron's; none where there is only a config.

        Returns:
            The config, without predictors of which not one tensor is there; what it lost, with the reason.
        """
        facts = self.config.facts(config)
        first, count = size(facts, "layers"), size(facts, "mtp")
        theirs = [f"model.layers.{layer}." for layer in range(first, first + count)]
        if not count or not stored or any(name.startswith(("mtp.", *theirs)) for name in stored):
            return config, {}
        reason = f"{predictors.KEYS[0]} is {count} and no tensor of a token predictor is stored, the output has none"
        return predictors.without(config), {f"{name}*": reason for name in theirs}

    def facts(self, config: Mapping[str, object], stored: Mapping[str, Index] | None = None) -> dict[str, Any]:
        """The facts of a config, and those that follow from which tensors there are: rows ``as_stored``.

        Args:
            config: config.json.
            stored: shapes of the source's tensors by name, HuggingFace's or Megatron's (layers apart, or stacked).

        Returns:
            Those of the config; for each row as stored the fact that it exists under, by layer; ``stored``, their
            shapes by HuggingFace's name; ``uniform_layers``.

        Raises:
            Damaged: see `dconv.arch.translate.Config.facts`.
        """
        facts = self.config.facts(config)
        shapes: dict[str, Index] = {}
        for row in self.rows:
            if row.layout.stored:
                layers = range(size(facts, row.stack)) if row.per_layer else range(-1, 0)
                found = [row.stored_shape(stored or {}, layer) for layer in layers]
                names = (row.hf.replace("*", str(layer // row.folds)) for layer in layers)
                shapes |= {name: shape for name, shape in zip(names, found, strict=True) if shape is not None}
                here = tuple(shape is not None for shape in found)
                before = facts.get(row.when) or (False,) * len(here)
                facts[row.when] = tuple(a or b for a, b in zip(before, here, strict=True))
        for fact, otherwise in self.either:
            facts[otherwise] = tuple(not here for here in facts[fact])
        by_layer = [facts[row.when] for row in self.rows if row.layout.stored and row.pipelined]
        self._check_count(facts)
        uniform = facts.get("uniform_layers", True) and all(len(set(here)) == 1 for here in by_layer)
        return {**facts, "stored": shapes, "uniform_layers": uniform}

    def _check_count(self, facts: Facts) -> None:
        """That nobody is kept waiting for a list of tensors that no model has.

        Raises:
            Damaged: the config says that many.
        """
        experts = size(facts, "experts")
        count = sum((experts if row.per_expert else 1) * size(facts, row.stack) for row in self.rows if row.per_layer)
        if count > _MOST_TENSORS:
            raise Damaged(
                "the config says more tensors than any model has",
                where=CONFIG,
                expected=f"at most {_MOST_TENSORS:,}, experts counted one by one",
                found=f"up to {count:,}",
            )

    def derive(
        self,
        name: str,
        config: Config,
        add: tuple[Row, ...] = (),
        drop: tuple[str, ...] = (),
        twins: tuple[Twin, ...] = (),
        marks: tuple[str, ...] = (),
    ) -> Family:
        """A variant: this family's rows less those whose Megatron name is in ``drop``, plus ``add`` and ``twins``."""
        kept = tuple(row for row in self.rows if row.megatron not in drop)
        return replace(self, name=name, config=config, rows=kept + add, twins=self.twins + twins, marks=marks)

    def twin_names(self, facts: Facts) -> dict[str, str]:
        """The name of every twin, with the name of what it repeats."""
        tied = {self.head: next(row.hf for row in self.rows if row.is_embedding)} if facts["tied"] else {}
        return {
            twin.hf.replace("*", str(layer + (size(facts, twin.after) if twin.after else 0))): tied.get(
                twin.of, twin.of
            )
            for twin in self.twins
            for layer in range(size(facts, twin.stack))
        }

    def entries(self, facts: Facts, dtypes: Mapping[str, str] | None = None) -> Iterator[Entry]:
        """Every Megatron tensor of a model with these facts, in the model's own order.

        Args:
            facts: of the model (`facts`).
            dtypes: dtype of each logical tensor where known (bf16 otherwise).
        """
        single = [row for row in self.rows if not row.per_layer and row.exists(facts, -1)]
        stacks: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.per_layer:
                stacks.setdefault(row.stack, []).append(row)
        experts = size(facts, "experts")
        for row in single:
            if row.first_stage:
                yield _entry(row, -1, -1, facts, dtypes)
        for stack, rows in stacks.items():
            for layer in range(size(facts, stack)):
                for row in rows:
                    if row.exists(facts, layer):
                        for expert in range(experts) if row.per_expert else (-1,):
                            yield _entry(row, layer, expert, facts, dtypes)
        for row in single:
            if not row.first_stage:
                yield _entry(row, -1, -1, facts, dtypes)

    def samples(self, facts: Facts) -> Iterator[Entry]:
        """An entry of each row that exists: how it is cut is the same in all layers, and of all experts."""
        for row in self.rows:
            layers = range(size(facts, row.stack)) if row.per_layer else range(-1, 0)
            layer = next((layer for layer in layers if row.exists(facts, layer)), None)
            if layer is not None and (not row.per_expert or size(facts, "experts")):
                yield _entry(row, layer, 0 if row.per_expert else -1, facts, None)

    def copies(self, facts: Facts) -> dict[str, str]:
        """HuggingFace names under which a tensor may be stored once more, each with the tensor's own."""
        embedding = next(row.hf for row in self.rows if row.megatron.endswith("embedding.word_embeddings.weight"))
        return {self.head: embedding, **dict(self.again)} if facts["tied"] else dict(self.again)

    def reason_to_leave_out(self, name: str, facts: Facts) -> str:
        """Why a tensor that no row names may be left out; empty when it may not."""
        if original := self.copies(facts).get(name):
            return "tied to the input embedding by the config" if name == self.head else f"a copy of {original}"
        return next((reason for pattern, reason in self.recomputed if fnmatchcase(name, pattern)), "")


@cache
def spelled_out(name: str) -> tuple[str, ...]:
    """``{q,k,v}_proj`` as ``q_proj``, ``k_proj``, ``v_proj``."""
    fields = [piece.split(",") for piece in re.split(r"[{}]", name)]
    return tuple("".join(parts) for parts in itertools.product(*fields))


def _entry(row: Row, layer: int, expert: int, facts: Facts, dtypes: Mapping[str, str] | None) -> Entry:
    def fill(name: str, number: int) -> str:
        return name.replace("*", str(number)).replace("#", str(expert))

    theirs = layer // row.folds + (size(facts, row.after) if row.after else 0)
    logical = [fill(name, theirs) for name in row.logical]
    dtype = dtypes.get(logical[0], "bf16") if dtypes else "bf16"
    return Entry(row.layout.fuse(fill(row.megatron, layer), logical, facts, dtype, expert), row, layer, expert)
