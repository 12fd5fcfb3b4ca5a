"""Which weights of a family AWQ's scales go between, read off its table.

Megatron's names say what HuggingFace's do not: which norm a linear layer's input comes from. So one list serves every
family, and a tensor in a layer that the list does not know is one whose input nobody has looked at: refused. What is in
here agrees with AutoAWQ's models and llm-compressor's ``transform/awq/mappings.py``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dconv.arch.family import Entry, Family
from dconv.arch.layouts import Facts
from dconv.errors import Refused, group_names
from dconv.sharding.tensor import Logical

_LAYER: Final = "decoder.layers.*."
_QKV, _PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
_Q_DOWN, _Q_UP, _KV_UP = (f"self_attention.linear_{name}_proj" for name in ("q_down", "q_up", "kv_up"))
_DENSE, _EXPERT, _SHARED = "mlp", "mlp.experts.#", "mlp.shared_experts"

#: Norms, each with all that reads what it gives.
_NORMS: Final[Mapping[str, tuple[str, ...]]] = {
    f"{_QKV}.layer_norm_weight": (f"{_QKV}.weight",),
    "input_layernorm.weight": (
        "self_attention.linear_q_proj.weight", f"{_Q_DOWN}.weight", "self_attention.linear_kv_down_proj.weight",
    ),
    f"{_Q_UP}.layer_norm_weight": (f"{_Q_UP}.weight",),
    f"{_KV_UP}.layer_norm_weight": (f"{_KV_UP}.weight",),
    f"{_DENSE}.linear_fc1.layer_norm_weight": (f"{_DENSE}.linear_fc1.weight",),
    "pre_mlp_layernorm.weight": (
        "mlp.router.weight", f"{_EXPERT}.linear_fc1.weight", f"{_SHARED}.linear_fc1.weight",
        f"{_SHARED}.gate_weight",
    ),
}  # fmt: skip
#: Gate and up projections, each with the down projection, which is linear in what up gives.
_GATED: Final = {f"{module}.linear_fc1.weight": f"{module}.linear_fc2.weight" for module in (_DENSE, _EXPERT, _SHARED)}
#: What reads no norm, and what no linear layer reads.
_OTHERS: Final = frozenset({
    f"{_PROJ}.weight", *_GATED.values(),
    *(f"{module}.bias" for module in (_QKV, _PROJ, f"{_DENSE}.linear_fc1", f"{_DENSE}.linear_fc2")),
    *(f"{module}.layer_norm_bias" for module in (_QKV, f"{_DENSE}.linear_fc1")),
    "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight", "mlp.router.expert_bias",
    f"{_PROJ}.post_layernorm.weight", f"{_DENSE}.linear_fc2.post_layernorm.weight",
    "self_attention.post_self_attn_layernorm.weight", "mlp.post_mlp_layernorm.weight",
})  # fmt: skip
_KNOWN: Final = frozenset((*_NORMS, *(name for names in _NORMS.values() for name in names), *_OTHERS))
#: Of what makes queries and keys, whose range is never cut: attention's scores come from its largest values (AutoAWQ).
_UNCUT: Final = ("self_attention.linear_q_proj.weight", f"{_Q_DOWN}.weight", f"{_Q_UP}.weight")


@dataclass(frozen=True)
class Fold:
    """Two neighbours between which scales, one for each channel, cancel: divided out of one, multiplied into the other.

    Attributes:
        layer: of the decoder.
        source: the weight that is divided: a norm's, or a linear layer's rows.
        start: the first of those rows.
        is_norm: whether it is a norm's.
        readers: the weights that are multiplied, column by column: all that there is behind ``source``.
    """

    layer: int
    source: str
    start: int
    is_norm: bool
    readers: tuple[str, ...]

    @property
    def bias(self) -> str:
        """The name of what is added behind ``source``, where there is such a thing: it is divided, too."""
        return f"{self.source.removesuffix('.weight')}.bias"


@dataclass(frozen=True)
class Folds:
    """What AWQ does with a model.

    Attributes:
        folds: in the order of the layers.
        uncut: weights whose range is not searched.
        plain: tensors that are not quantised and change all the same.
    """

    folds: tuple[Fold, ...]
    uncut: frozenset[str]
    plain: frozenset[str]


def is_known(family: Family) -> bool:
    """Whether it is known of all that a family's layers have what AWQ's scales go through; see `folds_of`."""
    names = (row.megatron.removeprefix("language_model.") for row in family.rows)
    return all(name.removeprefix(_LAYER) in _KNOWN for name in names if name.startswith(_LAYER))


def folds_of(family: Family, facts: Facts, logical: Logical, wanted: Collection[str]) -> Folds:
    """Where AWQ's scales of a model go, and which weights' ranges are not searched.

    Args:
        family: of the model.
        facts: of the model (`dconv.arch.family.Family.facts`).
        logical: the source.
        wanted: names of the weights that are to be quantised.

    Raises:
        Refused: a layer has tensors of which it is not known what they read; or a weight is outside of the layers.
    """
    by_layer: dict[int, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in family.entries(facts):
        row = entry.row.megatron.removeprefix("language_model.")
        if row.startswith(_LAYER):
            by_layer[entry.layer][row.removeprefix(_LAYER)].append(entry)
    here = {spec.name for rows in by_layer.values() for found in rows.values() for one in found for spec in
            one.fused.specs}  # fmt: skip
    if outside := sorted(set(wanted) - here):
        raise Refused(
            "AWQ quantises the decoder's layers alone, nothing was written",
            where=group_names(outside),
            do='leave them out: {"overrides": [{"pattern": …, "skip": true}]}; FORMAT gptq',
        )
    strange = {
        spec.name
        for rows in by_layer.values()
        for name, found in rows.items()
        if name not in _KNOWN
        for one in found
        for spec in one.fused.specs
    }
    if strange:
        raise Refused(
            f"where AWQ's scales of a {family.name} go is not known, nothing was written",
            where=group_names(sorted(strange)),
            expected="layers of attention and gated feed-forward, with experts or without",
            do="FORMAT gptq needs no such knowledge",
        )
    found: list[Fold] = []
    for layer, rows in by_layer.items():
        found += (fold for fold in _layer(layer, rows) if not set(wanted).isdisjoint(fold.readers))
    touched = {name for fold in found for name in (fold.source, fold.bias, *fold.readers)}
    uncut = {name for rows in by_layer.values() for name in _uncut(rows)}
    plain = {name for name in touched - set(wanted) if name in logical.specs}
    return Folds(tuple(found), frozenset(uncut), frozenset(plain))


def _layer(layer: int, rows: Mapping[str, Sequence[Entry]]) -> list[Fold]:
    found: list[Fold] = []
    for norm, readers in _NORMS.items():
        behind = tuple(spec.name for name in readers for one in rows.get(name, ()) for spec in one.fused.specs)
        if behind and norm in rows:
            found.append(Fold(layer, rows[norm][0].fused.specs[0].name, 0, True, behind))
    for inner, outer, parts in ((f"{_QKV}.weight", f"{_PROJ}.weight", 3), *((*pair, 2) for pair in _GATED.items())):
        if inner not in rows:  # latent attention
            continue
        for first, second in zip(rows[inner], rows[outer], strict=True):
            specs, down = first.fused.specs, second.fused.specs[0]
            width = down.shape[1]
            # of q, k, v, or of gate and up, the last: as many rows as the next has columns, unless heads share values
            if sum(spec.shape[0] for spec in specs) == parts * width:
                found.append(Fold(layer, specs[-1].name, specs[-1].shape[0] - width, False, (down.name,)))
    return found


def _uncut(rows: Mapping[str, Sequence[Entry]]) -> list[str]:
    made = [one.fused.specs for one in rows.get(f"{_QKV}.weight", ())]
    names = [spec.name for specs in made for spec in (specs[:2] if len(specs) > 1 else specs)]
    return names + [spec.name for name in _UNCUT for one in rows.get(name, ()) for spec in one.fused.specs]
