"""Meta's params.json as a config.json of Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dconv.arch.config import LLAMA
from dconv.arch.fields import flag, multiple, number, table, whole
from dconv.errors import Refused

#: Meta's params.json: ``ModelArgs`` of llama, llama3 and llama-models.
_META_KEYS: Final = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "multiple_of"} | {
    *("ffn_dim_multiplier", "rope_theta", "use_scaled_rope", "rope_scaling_factor", "high_freq_factor"),
    *("max_seq_len", "max_batch_size", "model_parallel_size"),  # of a run, not of the model
}


def hf_config_from_meta(params: Mapping[str, object], vocab: int | None) -> dict[str, object]:
    """A Llama config.json for Meta's params.json, without a dtype.

    Feed-forward size: ``FeedForward.__init__`` of Meta's model.py. Context length, token ids and the tied embedding of
    Llama 3.2 as in transformers' ``convert_llama_weights_to_hf.py``. Llama 3.2 (scaled, narrower than 3.1's 4096)
    stretches by 32 where 3.1 stretches by 8; no key says so.

    Args:
        params: params.json (also wrapped in ``{"model": …}``).
        vocab: rows of the embedding, needed where ``vocab_size`` is -1 or absent.

    Raises:
        Damaged: a missing or impossible value.
        Refused: a key that plain Llama does not have (vision, quantisation, another maker's params.json).
    """
    where = "params.json"
    params = table(params, "model", where) or params
    foreign = sorted(key for key in params.keys() - _META_KEYS if params[key] is not None)
    if foreign:
        raise Refused(
            "this params.json is not a plain Llama model's, nothing was written",
            where=where,
            expected="dim, n_layers, n_heads, … of Llama 1, 2, 3, 3.1, 3.2 text, Code Llama",
            found=", ".join(foreign),
            do="supply a config.json with --hf-config DIR",
        )
    said = {
        "multiple_of": 256,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        **{k: v for k, v in params.items() if v is not None},
    }
    dim, heads = whole(said, "dim", where), whole(said, "n_heads", where)
    ffn = int(8 * dim / 3)
    if "ffn_dim_multiplier" in said:
        wider = number(said, "ffn_dim_multiplier", where) * ffn
        ffn = int(number({"ffn_dim_multiplier": wider}, "ffn_dim_multiplier", where))
    step = whole(said, "multiple_of", where)
    rows = vocab if said.get("vocab_size", -1) == -1 else said["vocab_size"]
    theta, eps = number(said, "rope_theta", where), number(said, "norm_eps", where)
    scaled = flag(said, "use_scaled_rope", where)
    small = scaled and dim < 4096
    llama3 = theta == 500000.0
    context = {10000.0: 4096 if eps > 1e-6 else 2048, 1e6: 16384, 500000.0: 8192}.get(theta, 4096)
    hf: dict[str, object] = {
        "architectures": [LLAMA.architecture],
        "model_type": LLAMA.model_type,
        "vocab_size": rows,
        "hidden_size": dim,
        "intermediate_size": -(-ffn // step) * step,
        "num_hidden_layers": whole(said, "n_layers", where),
        "num_attention_heads": heads,
        "num_key_value_heads": whole({"n_kv_heads": heads, **said}, "n_kv_heads", where),
        "head_dim": multiple("dim", dim, "n_heads", heads, where),
        "hidden_act": "silu",
        "max_position_embeddings": 131072 if scaled else context,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "rope_scaling": None,
        "tie_word_embeddings": small,
        "bos_token_id": 128000 if llama3 else 1,
        "eos_token_id": 128001 if llama3 else 2,
    }
    if scaled:
        hf["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": number({"rope_scaling_factor": 32.0 if small else 8.0, **said}, "rope_scaling_factor", where),
            "low_freq_factor": 1.0,
            "high_freq_factor": number({"high_freq_factor": 4.0, **said}, "high_freq_factor", where),
            "original_max_position_embeddings": 8192,
        }
    LLAMA.facts(hf)
    return hf
