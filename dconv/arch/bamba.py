"""Bamba: layers of a Mamba-2 mixer or attention and a gated feed-forward, which are two layers of Megatron's stack.

HuggingFace's layer ``i`` is ``2i`` (``M`` or ``*`` of the pattern) and ``2i + 1`` (``-``) there, so that each norm
opens a layer on both sides; half of each head is rotated. Sources: transformers' ``modeling_bamba.py``; megatron-core's
``models/mamba/mamba_model.py`` and ``mamba_layer_specs.py``, whose model scales no rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from dconv.arch.attention import Grouped
from dconv.arch.config import COMMON
from dconv.arch.decoder import DecoderConfig
from dconv.arch.family import Family, Row
from dconv.arch.fields import deep, heads, multiple, number, whole
from dconv.arch.hybrid import PATTERN, Mixer, Stack
from dconv.arch.layouts import columns, copied, gate_up, query_groups, vocab_rows
from dconv.arch.mamba import MAMBA2
from dconv.arch.rope import rope_parameters
from dconv.arch.rotary import Rope
from dconv.arch.translate import CONFIG, Said
from dconv.errors import Damaged
from dconv.sharding.parsed import is_list

_ATTENDS: Final = "attn_layer_indices"
_STACK: Final = Stack("M*-")
#: The part of a head that is rotated, in all published models.
_HALF: Final = 0.5


@dataclass(frozen=True)
class Pairs:
    """Which layers attend, as the pattern of a stack with two layers for each."""

    @property
    def owns(self) -> tuple[str, ...]:
        """Those of the stack."""
        return _STACK.owns

    @property
    def compared(self) -> Mapping[str, str]:
        """The list of the layers that attend, by the pattern."""
        return {_ATTENDS: PATTERN}

    def facts(self, said: Said) -> dict[str, Any]:
        """Those of the stack; ``layers`` are Megatron's, two for each of HuggingFace's."""
        apart = _apart(said)
        return {**_STACK.facts(apart), "layers": apart["num_hidden_layers"]}

    def to_args(self, said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """Those of the stack, of twice as many layers; another rotated part of a head than half is lost."""
        args, lost = _STACK.to_args(_apart(said), facts)
        rotated = said.get("attn_rotary_emb")
        if rotated not in (None, facts["head_dim"] // 2):
            lost.append(f"attn_rotary_emb {rotated!r:.60}: half of each head ({facts['head_dim'] // 2}) is rotated")
        part = rope_parameters(said).get("partial_rotary_factor", _HALF)
        if part != _HALF:  # the older spelling, a key of its own, is judged by `only`
            lost.append(f"rope_parameters.partial_rotary_factor {part!r:.60}: half of each head is rotated")
        return {**args, "num_layers": facts["layers"]}, lost

    def to_hf(self, said: Said) -> dict[str, object]:
        """Half as many layers, and those of them that attend."""
        pattern = str(_STACK.to_hf(said)[PATTERN])
        return {
            "num_hidden_layers": len(pattern) // 2,
            _ATTENDS: [i // 2 for i, kind in enumerate(pattern) if kind == "*"],
        }

    def mismatches(self, said: Said) -> list[str]:
        """Those of the stack; layers that are not a mixer or attention, then a feed-forward, in turn."""
        reasons = _STACK.mismatches(said)
        if reasons:
            return reasons
        pattern = str(_STACK.to_hf(said)[PATTERN])
        paired = set(pattern[::2]) <= {"M", "*"} and set(pattern[1::2]) == {"-"} and len(pattern) % 2 == 0
        return [] if paired else [f"the pattern {pattern!r:.120} is not made of M- and *-"]

    def needs(self, _said: Said) -> list[str]:
        """Nothing: mainline megatron-core computes it."""
        return []


def _apart(said: Said) -> dict[str, object]:
    """The config of the stack, with each layer's two.

    Raises:
        Damaged: ``attn_layer_indices`` is no list of layers.
    """
    layers = deep(said, "num_hidden_layers", CONFIG)
    attends: object = said.get(_ATTENDS) or []
    if not is_list(attends) or not all(type(at) is int and 0 <= at < layers for at in attends):
        raise Damaged(
            "no list of layers", where=f"{CONFIG}: {_ATTENDS}", expected=f"0 to {layers - 1}", found=f"{attends!r:.80}"
        )
    pattern = "".join("*-" if layer in attends else "M-" for layer in range(layers))
    said = {**said, PATTERN: pattern, "layers_block_type": None, "num_hidden_layers": 2 * layers}
    return {**said, "use_conv_bias": said.get("mamba_conv_bias")}


def _with_width(said: Said) -> dict[str, object]:
    """A mixer's heads are as wide as ``mamba_expand`` says, where their width is not said."""
    if said.get("mamba_d_head") not in (None, "auto"):
        return {}
    wide = int(number(said, "mamba_expand", CONFIG) * whole(said, "hidden_size", CONFIG))
    count = heads(said, "mamba_n_heads", CONFIG)
    return {"mamba_d_head": multiple("mamba_expand x hidden_size", wide, "mamba_n_heads", count, CONFIG)}


_CONFIG = DecoderConfig(
    "bamba", "BambaForCausalLM",
    {
        **COMMON, "vocab_size": 128000, "intermediate_size": 14336, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144, "partial_rotary_factor": _HALF, "mamba_n_heads": 128, "mamba_d_head": "auto",
        "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True,
    },
    Grouped(),
    rope=Rope(kinds=("default",), part="partial_rotary_factor"),
    more=(
        Mixer(
            "mamba_n_heads", "mamba_d_head", "mamba_d_state", "hidden_act", "mamba_n_groups", "mamba_d_conv",
            "mamba_conv_bias", "mamba_proj_bias", "rms_norm_eps", expand="mamba_expand", residual="",
        ),
        Pairs(),
    ),
    constants={"rotary_percent": _HALF},
    only={"attention_bias": False, "mlp_bias": False, "partial_rotary_factor": _HALF},
    filling=_with_width,
)  # fmt: skip

_MLP, _ATTENTION = "decoder.layers.*.mlp", "decoder.layers.*.self_attention"
_HF = "model.layers.*"


def _of_bamba(row: Row) -> Row:
    """A mixer's row of Mamba-2, under Bamba's name."""
    norm = row.hf.replace("backbone.layers.*.norm.", f"{_HF}.input_layernorm.")
    return replace(row, hf=norm.replace("backbone.layers.*.mixer.", f"{_HF}.mamba."), folds=2)


# fmt: off
BAMBA = Family("bamba", _CONFIG, (
    Row("embedding.word_embeddings.weight",            "model.embed_tokens.weight",                      vocab_rows("vocab", "hidden")),
    *(_of_bamba(row) for row in MAMBA2.rows if row.per_layer),
    Row(f"{_ATTENTION}.linear_qkv.layer_norm_weight",  f"{_HF}.input_layernorm.weight",                 copied("hidden"),           when="attention", folds=2),
    Row(f"{_ATTENTION}.linear_qkv.weight",             f"{_HF}.self_attn.{{q,k,v}}_proj.weight",         query_groups("hidden"),     when="attention", folds=2),
    Row(f"{_ATTENTION}.linear_proj.weight",            f"{_HF}.self_attn.o_proj.weight",                 columns("hidden", "q"),     when="attention", folds=2),
    Row(f"{_MLP}.linear_fc1.layer_norm_weight",        f"{_HF}.pre_ff_layernorm.weight",                 copied("hidden"),           when="mlp", folds=2),
    Row(f"{_MLP}.linear_fc1.weight",                   f"{_HF}.feed_forward.{{gate,up}}_proj.weight",    gate_up("ffn", "hidden"),   when="mlp", folds=2),
    Row(f"{_MLP}.linear_fc2.weight",                   f"{_HF}.feed_forward.down_proj.weight",           columns("hidden", "ffn"),   when="mlp", folds=2),
    Row("decoder.final_norm.weight",                   "model.final_layernorm.weight",                   copied("hidden")),
    Row("output_layer.weight",                         "lm_head.weight",                                 vocab_rows("vocab", "hidden"), when="untied"),
))
# fmt: on
FAMILIES = (BAMBA,)
