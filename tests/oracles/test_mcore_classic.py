"""GPT-2, BERT and T5 of megatron-core against transformers, with weights copied by hand."""

from __future__ import annotations

from typing import Any

import torch

from dconv.export import megatron_runtime as megatron
from tests.oracles import hf
from tests.oracles.test_mcore_transformers import TOKENS, Weights, by_group, under

ANSWERS = TOKENS.flip(1)[:, :17]
MASK = (torch.arange(24) < torch.tensor([[24], [19]])).long()
TYPES = (torch.arange(24) >= 9).long().expand(2, -1)
SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 8, "padded_vocab_size": 320}
Case = tuple[str, dict[str, Any], Weights, torch.Tensor]


def both(weights: Weights, names: dict[str, str]) -> Weights:
    """Weight and bias of each module, under its other name."""
    return {
        f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for theirs, ours in names.items() for kind in ("weight", "bias")
    }


def gpt2(args: dict[str, Any], **keys: Any) -> Case:
    _, model = hf.tiny("gpt2", **keys)
    source = under(dict(model.state_dict()), "transformer.")
    found = {f"embedding.{ours}_embeddings.weight": source[f"{theirs}.weight"]
             for theirs, ours in (("wte", "word"), ("wpe", "position"))}  # fmt: skip
    found |= both(source, {"ln_f": "decoder.final_layernorm"})
    names = {"ln_1": "input_layernorm", "ln_2": "pre_mlp_layernorm", "attn.c_attn": "self_attention.linear_qkv",
             "attn.c_proj": "self_attention.linear_proj", "mlp.c_fc": "mlp.linear_fc1",
             "mlp.c_proj": "mlp.linear_fc2"}  # fmt: skip
    for number in range(4):
        for name, value in both(under(source, f"h.{number}."), names).items():
            rows = value.T if value.ndim == 2 else value  # Conv1D keeps [in, out]
            rows = by_group(list(rows.chunk(3)), 8) if "linear_qkv" in name else rows
            found[f"decoder.layers.{number}.{name}"] = rows
    said = SIZES | {"ffn_hidden_size": 512, "max_position_embeddings": 256} | args
    return "gpt", said, found, hf.logits(model, TOKENS)


def bert(args: dict[str, Any], **keys: Any) -> Case:
    _, model = hf.tiny("megatron-bert", **keys)
    source = dict(model.state_dict())
    inner = under(source, "bert.")
    found = {f"embedding.{ours}_embeddings.weight": inner[f"embeddings.{theirs}_embeddings.weight"]
             for theirs, ours in (("word", "word"), ("position", "position"), ("token_type", "tokentype"))}  # fmt: skip
    found["output_layer.bias"] = source["cls.predictions.bias"]
    found |= both(source, {
        "bert.encoder.ln": "encoder.final_layernorm", "bert.pooler.dense": "pooler.dense",
        "cls.predictions.transform.dense": "lm_head.dense", "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
        "cls.seq_relationship": "binary_head",
    })  # fmt: skip
    names = {"attention.ln": "input_layernorm", "ln": "pre_mlp_layernorm", "intermediate.dense": "mlp.linear_fc1",
             "attention.output.dense": "self_attention.linear_proj", "output.dense": "mlp.linear_fc2"}  # fmt: skip
    for number in range(4):
        layer = under(inner, f"encoder.layer.{number}.")
        weights = both(layer, names)
        for kind in ("weight", "bias"):
            parts = [layer[f"attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            weights[f"self_attention.linear_qkv.{kind}"] = by_group(parts, 8)
        found |= {f"encoder.layers.{number}.{name}": value for name, value in weights.items()}
    with torch.no_grad():
        answer = model(input_ids=TOKENS, attention_mask=MASK, token_type_ids=TYPES)
    said = SIZES | {"ffn_hidden_size": 352, "max_position_embeddings": 256, "norm_epsilon": 1e-12} | args
    words = answer.prediction_logits[MASK.bool()]  # megatron-core lets padding see nothing, transformers lets it see
    return "bert", said, found, torch.cat([words.flatten(), answer.seq_relationship_logits.flatten()])


def t5(args: dict[str, Any], scale: float = 1.0, **keys: Any) -> Case:
    """``scale``: what transformers multiplies the logits by, and megatron-core does not."""
    _, model = hf.tiny("t5", **keys)
    source = dict(model.state_dict())
    zeros = torch.zeros(320)  # megatron-core has a bias on tied output, transformers none
    found = {"embedding.word_embeddings.weight": source["shared.weight"], "output_layer.bias": zeros,
             "lm_head.output_layer.bias": zeros}  # fmt: skip
    for part in ("encoder", "decoder"):
        blocks = under(source, f"{part}.")
        bias = "relative_attention_bias.weight"
        found[f"{part}_relative_pos_emb.{bias}"] = blocks[f"block.0.layer.0.SelfAttention.{bias}"]
        found[f"{part}.final_layernorm.weight"] = blocks["final_layer_norm.weight"]
        for number in range(4):
            layer, ours = under(blocks, f"block.{number}.layer."), f"{part}.layers.{number}."
            mlp = "1." if part == "encoder" else "2."
            own, fed = under(layer, "0.SelfAttention."), under(layer, f"{mlp}DenseReluDense.")
            found[f"{ours}input_layernorm.weight"] = layer["0.layer_norm.weight"]
            found[f"{ours}self_attention.linear_qkv.weight"] = by_group([own[f"{x}.weight"] for x in "qkv"], 8)
            found[f"{ours}self_attention.linear_proj.weight"] = own["o.weight"]
            found[f"{ours}pre_mlp_layernorm.weight"] = layer[f"{mlp}layer_norm.weight"]
            up = [fed[name] for name in ("wi.weight", "wi_0.weight", "wi_1.weight") if name in fed]
            found[f"{ours}mlp.linear_fc1.weight"] = torch.cat(up)
            found[f"{ours}mlp.linear_fc2.weight"] = fed["wo.weight"]
            if part == "decoder":
                other = under(layer, "1.EncDecAttention.")
                found[f"{ours}pre_cross_attn_layernorm.weight"] = layer["1.layer_norm.weight"]
                found[f"{ours}cross_attention.linear_q.weight"] = other["q.weight"]
                found[f"{ours}cross_attention.linear_kv.weight"] = by_group([other[f"{x}.weight"] for x in "kv"], 8)
                found[f"{ours}cross_attention.linear_proj.weight"] = other["o.weight"]
    said = SIZES | {
        "ffn_hidden_size": 352, "kv_channels": 16, "normalization": "RMSNorm", "norm_epsilon": 1e-6,
        "add_bias_linear": False, "position_embedding_type": "relative", "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20, "softmax_scale": 1.0,
    }  # fmt: skip
    with torch.no_grad():
        answer = model(input_ids=TOKENS, decoder_input_ids=ANSWERS).logits
    return "t5", said | args, found, answer / scale


def difference(rank: int, world: int, init_method: str, cases: list[Case]) -> list[float]:
    build = {"gpt": megatron.build_gpt, "bert": megatron.build_bert, "t5": megatron.build_t5}
    found = []
    with megatron.parallel_world(1, 1, rank=rank, world=world, init_method=init_method):
        for kind, args, weights, expected in cases:
            models: Any = build[kind](args)
            wanted = {name: tuple(value.shape) for name, value in models[0].state_dict().items() if value is not None}
            assert wanted == {name: tuple(value.shape) for name, value in weights.items()}
            models[0].load_state_dict(weights, strict=False)
            if kind == "bert":
                words, classes = megatron.bert_logits(models, TOKENS, MASK, TYPES) or (None, None)
                assert words is not None
                assert classes is not None
                ours: Any = torch.cat([words[MASK.bool()].flatten(), classes.flatten()])
            elif kind == "t5":
                ours = megatron.t5_logits(models, TOKENS, ANSWERS)
            else:
                ours = megatron.logits(models, TOKENS)
            found.append(float((ours - expected).abs().max() / expected.abs().max()))
    return found


def test_gpt2_bert_and_t5_compute_what_transformers_does_and_where_they_do_not() -> None:
    tanh, gated = {"bias_gelu_fusion": True}, {"swiglu": True}
    equal = {
        "gpt2": gpt2(tanh),
        "gpt2, erf": gpt2({}, activation_function="gelu"),
        "bert": bert({}),
        "bert, 1e-5": bert({"norm_epsilon": 1e-5}, layer_norm_eps=1e-5),
        "t5, erf": t5({}, feed_forward_proj="gelu", tie_word_embeddings=False),
        "t5, gated": t5(gated, feed_forward_proj="gated-silu", tie_word_embeddings=False),
        "t5, gated, scaled": t5(gated, 128**-0.5, feed_forward_proj="gated-silu"),
    }
    different = {
        "bert, fused GELU, as its head stays erf": bert(tanh, hidden_act="gelu_new"),
        "t5, relu": t5({}, feed_forward_proj="relu", tie_word_embeddings=False),
        "t5, scaled": t5(gated, feed_forward_proj="gated-silu"),
    }
    (found,) = megatron.spawn(difference, 1, list((equal | different).values()), timeout=300, imported=False)
    measured = dict(zip(equal | different, found, strict=True))
    assert {name: measured[name] for name in equal if not measured[name] < 1e-5} == {}
    assert {name: measured[name] for name in different if not measured[name] > 1e-4} == {}
