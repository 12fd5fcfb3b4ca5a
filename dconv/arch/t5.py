"""T5, T5 1.1, Flan-T5: an encoder and a decoder with relative positions, in one stage.

megatron-core's T5 computes the same with RMSNorm, no biases, ``softmax_scale`` 1 and positions ``relative``. It does not
scale logits, as the first T5 does: that travels in the args, under HuggingFace's name. It ties them only with a bias
that HuggingFace lacks: Megatron's output layer is therefore one of its own, with the embedding's values where
HuggingFace ties the two.
Sources: ``modeling_t5.py`` of transformers; ``models/T5`` of megatron-core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dconv.arch.absolute import Multihead
from dconv.arch.activation import OFF
from dconv.arch.args import ARGS
from dconv.arch.attention import differing
from dconv.arch.decoder import DecoderConfig
from dconv.arch.family import Family, Row
from dconv.arch.fields import deep, flag, whole
from dconv.arch.layouts import columns, copied, gate_up, key_value_groups, query_groups, rows, vocab_rows
from dconv.arch.translate import CONFIG, Said

#: What Megatron calls the kinds of feed-forward that both have.
_KINDS: Final[Mapping[str, Mapping[str, object]]] = {
    "gated-gelu": {"gated_linear_unit": True, "bias_gelu_fusion": True},
    "gated-silu": {"swiglu": True},
    "gelu": {},
    "relu": {"activation_func": "relu"},  # a field of TransformerConfig
}
_OFF: Final[Mapping[str, object]] = {**OFF, "activation_func": None}
_SCALED: Final = "scale_decoder_outputs"
_BUCKETS: Final = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}


@dataclass(frozen=True)
class FeedForward:
    """Which of `_KINDS` the feed-forward is."""

    @property
    def owns(self) -> tuple[str, ...]:
        """Every switch of an activation."""
        return tuple(_OFF)

    @property
    def compared(self) -> Mapping[str, str]:
        """The kind, by the switch of the gate."""
        return {"feed_forward_proj": "gated_linear_unit"}

    def facts(self, said: Said) -> dict[str, Any]:
        """gated, plain."""
        gated = str(said.get("feed_forward_proj")).startswith("gated-")
        return {"gated": gated, "plain": not gated}

    def to_args(self, said: Said, _facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """The kind's switches; a kind that Megatron has not is lost, and keys that contradict it."""
        named = str(said.get("feed_forward_proj"))
        lost = [] if named in _KINDS else [f"feed_forward_proj {named}: Megatron has {', '.join(_KINDS)} here"]
        function = "gelu_new" if named == "gated-gelu" else named.rpartition("-")[2]
        meant: dict[str, object] = {"dense_act_fn": function, "is_gated_act": named.startswith("gated-")}
        lost += [
            f"{key} {said[key]!r:.60}: feed_forward_proj {named} means {value}"
            for key, value in meant.items()
            if said.get(key, value) != value
        ]
        return {**OFF, **_KINDS.get(named, {})}, lost

    def to_hf(self, said: Said) -> dict[str, object]:
        """The kind that the switches say."""
        return {"feed_forward_proj": next((name for name in _KINDS if not self._differs(said, name)), "gelu")}

    def mismatches(self, said: Said) -> list[str]:
        """Switches of none of the kinds; why they are not the last one's."""
        found = [self._differs(said, name) for name in _KINDS]
        return [] if not all(found) else found[-1]

    def needs(self, said: Said) -> list[str]:
        """A gated tanh-GELU and a ReLU, which no argument turns on."""
        return {
            "gated-gelu": ["a gated tanh-GELU: TransformerConfig.gated_linear_unit without --swiglu has no argument"],
            "relu": ["a ReLU: TransformerConfig.activation_func has it, no argument sets it"],
        }.get(str(said.get("feed_forward_proj")), [])

    def _differs(self, said: Said, name: str) -> list[str]:
        wanted = {**_OFF, **_KINDS[name]}
        if name == "gated-silu":  # its gate and its kernel are said twice, or not at all
            wanted = {arg: its for arg, its in wanted.items() if arg not in ("gated_linear_unit", "bias_gelu_fusion")}
        return differing(said, wanted)


@dataclass(frozen=True)
class EncoderDecoder:
    """Two stacks in one pipeline stage, their positions, and what the output layer is."""

    @property
    def owns(self) -> tuple[str, ...]:
        """The kind of positions and their buckets, and the output layer's switches."""
        return "position_embedding_type", *_BUCKETS, "untie_embeddings_and_output_weights", _SCALED

    @property
    def compared(self) -> Mapping[str, str]:
        """Layers of the decoder, buckets, and whether logits are scaled."""
        return {"num_decoder_layers": "decoder_num_layers", **{key: key for key in (*_BUCKETS, _SCALED)}}

    def facts(self, said: Said) -> dict[str, Any]:
        """Sizes of the second stack, and whose the output layer's values are.

        Returns:
            decoder_layers, buckets, most_stages; tied (never: see above), own_head or shared_head.
        """
        key = "num_layers" if said.get("num_decoder_layers") is None else "num_decoder_layers"
        shared = flag(said, "tie_word_embeddings", CONFIG)
        return {
            "decoder_layers": deep(said, key, CONFIG),
            "buckets": whole(said, "relative_attention_num_buckets", CONFIG),
            "most_stages": 1,
            "tied": False,
            "untied": True,
            "shared_head": shared,
            "own_head": not shared,
        }

    def to_args(self, said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """Layers of both stacks, buckets, and whether logits are scaled; nothing is lost."""
        return {
            "encoder_num_layers": whole(said, "num_layers", CONFIG),
            "decoder_num_layers": facts["decoder_layers"],
            "position_embedding_type": "relative",
            **{key: whole(said, key, CONFIG) for key in _BUCKETS},
            **({_SCALED: True} if _scales(said) else {}),
        }, []

    def to_hf(self, said: Said) -> dict[str, object]:
        """Layers of the decoder, buckets, and a tied output where logits are scaled."""
        said = {**_BUCKETS, "decoder_num_layers": said.get("num_layers"), **said}
        layers = whole(said, "decoder_num_layers", ARGS)
        scaled = {"tie_word_embeddings": True, _SCALED: True} if flag(said, _SCALED, ARGS) else {}
        return {"num_decoder_layers": layers, **{key: whole(said, key, ARGS) for key in _BUCKETS}, **scaled}

    def mismatches(self, said: Said) -> list[str]:
        """Positions of another kind, a tied output layer, or two numbers for the encoder's layers."""
        wanted = {"position_embedding_type": "relative", "untie_embeddings_and_output_weights": True}
        return differing(said, {**wanted, "encoder_num_layers": said.get("encoder_num_layers") and said["num_layers"]})

    def needs(self, said: Said) -> list[str]:
        """The softmax's scale, and that of logits where they are scaled."""
        scaled = [f"{_SCALED}: logits times d_model ** -0.5"] if _scales(said) else []
        return ["softmax_scale: TransformerConfig has it, no argument sets it", *scaled]


def _scales(said: Said) -> bool:
    """As transformers decides it: where the output is tied, unless the config says no."""
    return flag(said, "tie_word_embeddings", CONFIG) and said.get(_SCALED) is not False


_CONFIG = DecoderConfig(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    defaults={
        "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_decoder_layers": None,
        "num_heads": 8, "n_positions": 512, "layer_norm_epsilon": 1e-6, "dropout_rate": 0.1, "feed_forward_proj": "relu",
        "tie_word_embeddings": True, **_BUCKETS,
    },
    attention=Multihead("num_heads", "d_model", "d_kv"),
    rope=EncoderDecoder(),
    activation=FeedForward(),
    constants={"softmax_scale": 1.0},
    sizes={
        "num_layers": "num_layers", "d_model": "hidden_size", "d_ff": "ffn_hidden_size",
        "n_positions": "max_position_embeddings",
    },
    numbers={"dropout_rate": "attention_dropout"},
    norm_eps="layer_norm_epsilon",
)  # fmt: skip


def _stack(block: str, stack: str) -> tuple[Row, ...]:
    """Attention to oneself and feed-forward, the last sublayer, of one stack."""
    here, there = f"{block}.layers.*", f"{block}.block.*.layer"
    last = f"{there}.{1 if block == 'encoder' else 2}"
    own, fed = f"{there}.0.SelfAttention", f"{last}.DenseReluDense"
    table = (
        Row(
            f"{here}.self_attention.linear_qkv.layer_norm_weight",
            f"{there}.0.layer_norm.weight",
            copied("hidden"),
            stack=stack,
        ),
        Row(f"{here}.self_attention.linear_qkv.weight", f"{own}.{{q,k,v}}.weight", query_groups("hidden"), stack=stack),
        Row(f"{here}.self_attention.linear_proj.weight", f"{own}.o.weight", columns("hidden", "q"), stack=stack),
        Row(f"{here}.mlp.linear_fc1.layer_norm_weight", f"{last}.layer_norm.weight", copied("hidden"), stack=stack),
        Row(f"{here}.mlp.linear_fc1.weight", f"{fed}.wi_{{0,1}}.weight", gate_up("ffn", "hidden"), "gated", stack),
        Row(f"{here}.mlp.linear_fc1.weight", f"{fed}.wi.weight", rows("ffn", "hidden"), "plain", stack),
        Row(f"{here}.mlp.linear_fc2.weight", f"{fed}.wo.weight", columns("hidden", "ffn"), stack=stack),
    )
    positions = f"{block}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        *table,
        Row(f"{block}_relative_pos_emb.relative_attention_bias.weight", positions, copied("buckets", "heads")),
        Row(f"{block}.final_layernorm.weight", f"{block}.final_layer_norm.weight", copied("hidden")),
    )


_ACROSS, _OTHER, _DEC = "decoder.layers.*.cross_attention", "decoder.block.*.layer.1", "decoder_layers"
#: One module under two names, both of which megatron-core saves and asks for.
_HEAD = ("lm_head.output_layer.weight", "output_layer.weight")

# fmt: off
T5 = Family("t5", _CONFIG, (
    Row("embedding.word_embeddings.weight",                 "shared.weight",                             vocab_rows("vocab", "hidden")),
    *_stack("encoder", "layers"),
    *_stack("decoder", _DEC),
    Row("decoder.layers.*.pre_cross_attn_layernorm.weight", f"{_OTHER}.layer_norm.weight",               copied("hidden"), stack=_DEC),
    Row(f"{_ACROSS}.linear_q.weight",                       f"{_OTHER}.EncDecAttention.q.weight",        rows("q", "hidden"), stack=_DEC),
    Row(f"{_ACROSS}.linear_kv.weight",                      f"{_OTHER}.EncDecAttention.{{k,v}}.weight",  key_value_groups("hidden"), stack=_DEC),
    Row(f"{_ACROSS}.linear_proj.weight",                    f"{_OTHER}.EncDecAttention.o.weight",        columns("hidden", "q"), stack=_DEC),
    *(Row(name, "lm_head.weight", vocab_rows("vocab", "hidden"), when="own_head") for name in _HEAD),
    *(Row(name, "shared.weight", vocab_rows("vocab", "hidden"), when="shared_head") for name in _HEAD),
), recomputed=(
    ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", "never used"),
), again=(("encoder.embed_tokens.weight", "shared.weight"), ("decoder.embed_tokens.weight", "shared.weight")), classes=("T5WithLMHeadModel", "T5Model"))
# fmt: on
FAMILIES = (T5,)
