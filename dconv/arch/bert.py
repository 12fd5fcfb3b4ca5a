"""BERT: Megatron's own, which normalises before each block (``megatron-bert``), and Google's, which does so after (``bert``).

The second is the first with ``apply_residual_connection_post_layernorm``: when a block's residual is taken behind its
norm, the norm that opens a layer is the one that closed the layer before, and the embedding's norm opens the first.
Only names move. Sources: ``modeling_megatron_bert.py`` and ``modeling_bert.py`` of transformers; ``bert_model.py`` and
``transformer.py`` of Megatron-LM before megatron-core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from dconv.arch.absolute import Gelu, Learned, Multihead
from dconv.arch.attention import Biases
from dconv.arch.decoder import DecoderConfig
from dconv.arch.family import Family, Row
from dconv.arch.fields import deep, whole
from dconv.arch.layouts import columns, copied, query_groups, rows, vocab_rows
from dconv.arch.translate import CONFIG, Said

_TYPES: Final = 2


@dataclass(frozen=True)
class Pretraining:
    """Both heads and both token types: Megatron has all of it or, with ``bert_binary_head`` false, only the words' head."""

    @property
    def owns(self) -> tuple[str, ...]:
        """None: no constant of the decoder speaks of the heads."""
        return ()

    @property
    def compared(self) -> Mapping[str, str]:
        """No key."""
        return {}

    def facts(self, said: Said) -> dict[str, Any]:
        """token_types; first_layer and later_layers, as a row's ``when``; previous, as its ``after``."""
        layers = deep(said, "num_hidden_layers", CONFIG)
        first = tuple(layer == 0 for layer in range(layers))
        later = tuple(layer > 0 for layer in range(layers))
        types = whole(said, "type_vocab_size", CONFIG)
        return {"token_types": types, "first_layer": first, "later_layers": later, "previous": -1}

    def to_args(self, _said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """That there are two heads; another number of token types than two is lost."""
        found = facts["token_types"]
        lost = [] if found == _TYPES else [f"type_vocab_size {found}: Megatron's BERT has {_TYPES} token types"]
        return {"bert_binary_head": True}, lost

    def to_hf(self, _said: Said) -> dict[str, object]:
        """Two token types."""
        return {"type_vocab_size": _TYPES}

    def mismatches(self, said: Said) -> list[str]:
        """A model without token types and pooler."""
        headless = said.get("bert_binary_head") is False
        return ["bert_binary_head is False: no token types and no pooler, which these classes have"] if headless else []

    def needs(self, _said: Said) -> list[str]:
        """Nothing: mainline megatron-core computes it."""
        return []


_PRE = DecoderConfig(
    model_type="megatron-bert",
    architecture="MegatronBertForPreTraining",
    defaults={
        "vocab_size": 29056, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "initializer_range": 0.02, "attention_probs_dropout_prob": 0.1,
        "tie_word_embeddings": True,
    },
    attention=Multihead(),
    bias=Biases(qkv=True, out=True, mlp=True),
    rope=Learned(),
    activation=Gelu(tanh=False),
    more=(Pretraining(),),
    constants={"normalization": "LayerNorm"},
    only={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
    numbers={"initializer_range": "init_method_std", "attention_probs_dropout_prob": "attention_dropout"},
    norm_eps="layer_norm_eps",
)  # fmt: skip
_POST = replace(
    _PRE,
    model_type="bert",
    architecture="BertForPreTraining",
    defaults={
        **_PRE.defaults, "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    constants={**_PRE.constants, "apply_residual_connection_post_layernorm": True},
    lacking=("apply_residual_connection_post_layernorm: megatron-core has the option and does not look at it",),
)  # fmt: skip

_LAYER, _HF = "encoder.layers.*", "bert.encoder.layer.*"
_QKV = f"{_HF}.attention.self.{{query,key,value}}"
_OPENS, _THEN, _END = (
    f"{_LAYER}.self_attention.linear_qkv.layer_norm",
    f"{_LAYER}.mlp.linear_fc1.layer_norm",
    "encoder.final_layernorm",
)
_BOTH = ("weight", "bias")


def _norm(megatron: str, hf: str, when: str = "", after: str = "") -> tuple[Row, ...]:
    return tuple(Row(f"{megatron}{part}", f"{hf}.{part}", copied("hidden"), when, after=after) for part in _BOTH)


def _classes(name: str) -> tuple[str, ...]:
    """The classes of the hub's files that have both heads, or may have."""
    return tuple(f"{name}{head}" for head in ("ForMaskedLM", "Model", "LMHeadModel", "ForNextSentencePrediction"))


#: As norms were called in TensorFlow, and are in the hub's oldest files.
_OLD = (("*.LayerNorm.gamma", "*.LayerNorm.weight"), ("*.LayerNorm.beta", "*.LayerNorm.bias"))

# fmt: off
MEGATRON_BERT = Family("megatron-bert", _PRE, (
    Row("embedding.word_embeddings.weight",            "bert.embeddings.word_embeddings.weight",        vocab_rows("vocab", "hidden")),
    Row("embedding.position_embeddings.weight",        "bert.embeddings.position_embeddings.weight",    copied("positions", "hidden")),
    Row("embedding.tokentype_embeddings.weight",       "bert.embeddings.token_type_embeddings.weight",  copied("token_types", "hidden")),
    *_norm(f"{_OPENS}_",                               f"{_HF}.attention.ln"),
    Row(f"{_LAYER}.self_attention.linear_qkv.weight",  f"{_QKV}.weight",                                query_groups("hidden")),
    Row(f"{_LAYER}.self_attention.linear_qkv.bias",    f"{_QKV}.bias",                                  query_groups()),
    Row(f"{_LAYER}.self_attention.linear_proj.weight", f"{_HF}.attention.output.dense.weight",          columns("hidden", "q")),
    Row(f"{_LAYER}.self_attention.linear_proj.bias",   f"{_HF}.attention.output.dense.bias",            copied("hidden")),
    *_norm(f"{_THEN}_",                                f"{_HF}.ln"),
    Row(f"{_LAYER}.mlp.linear_fc1.weight",             f"{_HF}.intermediate.dense.weight",              rows("ffn", "hidden")),
    Row(f"{_LAYER}.mlp.linear_fc1.bias",               f"{_HF}.intermediate.dense.bias",                rows("ffn")),
    Row(f"{_LAYER}.mlp.linear_fc2.weight",             f"{_HF}.output.dense.weight",                    columns("hidden", "ffn")),
    Row(f"{_LAYER}.mlp.linear_fc2.bias",               f"{_HF}.output.dense.bias",                      copied("hidden")),
    *_norm(f"{_END}.",                                 "bert.encoder.ln"),
    Row("pooler.dense.weight",                         "bert.pooler.dense.weight",                      copied("hidden", "hidden")),
    Row("pooler.dense.bias",                           "bert.pooler.dense.bias",                        copied("hidden")),
    Row("lm_head.dense.weight",                        "cls.predictions.transform.dense.weight",        copied("hidden", "hidden")),
    Row("lm_head.dense.bias",                          "cls.predictions.transform.dense.bias",          copied("hidden")),
    *_norm("lm_head.layer_norm.",                      "cls.predictions.transform.LayerNorm"),
    Row("output_layer.weight",                         "cls.predictions.decoder.weight",                vocab_rows("vocab", "hidden"), when="untied"),
    Row("output_layer.bias",                           "cls.predictions.bias",                          vocab_rows("vocab")),
    Row("binary_head.weight",                          "cls.seq_relationship.weight",                   copied("2", "hidden")),
    Row("binary_head.bias",                            "cls.seq_relationship.bias",                     copied("2")),
), recomputed=(
    ("bert.embeddings.position_ids", "counted"),
    ("bert.embeddings.token_type_ids", "zeros"),
), head="cls.predictions.decoder.weight", again=(("cls.predictions.decoder.bias", "cls.predictions.bias"),), also=_OLD, base="bert.", classes=_classes("MegatronBert"))

BERT = replace(MEGATRON_BERT, classes=_classes("Bert")).derive("bert", _POST, drop=tuple(f"{norm}{part}" for norm in (f"{_OPENS}_", f"{_THEN}_", f"{_END}.") for part in _BOTH), add=(
    *_norm(f"{_OPENS}_",                               "bert.embeddings.LayerNorm",                     when="first_layer"),
    *_norm(f"{_OPENS}_",                               f"{_HF}.output.LayerNorm",                       when="later_layers", after="previous"),
    *_norm(f"{_THEN}_",                                f"{_HF}.attention.output.LayerNorm"),
    *_norm(f"{_END}.",                                 f"{_HF}.output.LayerNorm",                       after="layers"),
))
# fmt: on
FAMILIES = (MEGATRON_BERT, BERT)
