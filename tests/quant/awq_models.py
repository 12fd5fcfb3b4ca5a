"""Small models with activations as AWQ is for, and one rank's search over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from dconv.calibrate import Calibrating
from dconv.describe import describe_model
from dconv.net.weights import Weights
from dconv.pipeline import Request, prepare, run
from dconv.quant.gptq import Recipe
from dconv.quant.grid import Numbers
from dconv.sharding.rank import Settings
from tests.quant.models import values_of

_SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
    "intermediate_size": 96,
}  # fmt: skip
_HEADS = {"num_key_value_heads": 4}
#: One of each kind: query groups, heads of their own (values fold into the output projection) with biases, tensors in
#: one, norms that add one, experts, a shared one with a gate, latent attention.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": _HEADS,
    "phi3": _HEADS,
    "gemma2": {"head_dim": 16, "sliding_window": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
    },
    "deepseek_v2": {
        "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16, **_HEADS, "n_group": 1, "topk_group": 1,
    },
}  # fmt: skip
RECIPE: Final = Recipe(Numbers(4, symmetric=False), 32)


def model_of(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A small model as transformers writes it; some channels are far larger than others, as AWQ is for."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **(_SIZES | FAMILIES[family]), tie_word_embeddings=False)
    net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if value.ndim > 1:
                value.normal_(0, 0.2)
            elif "norm" in name:
                value.copy_(torch.randn_like(value).exp() - (1 if family == "gemma2" else 0))
            else:
                value.normal_(0, 0.1)
    net.to(dtype).save_pretrained(folder)
    return folder


def request_for(model: Path, ids: Path, out: Path, **said: Any) -> Request:
    settings = {"group_size": 32, "nsamples": 6, "seqlen": 64, "n_grid": 6, **said}
    return Request(model, "awq", out, calibration=str(ids), quantization_config=json.dumps(settings))


def planned(request: Request) -> Calibrating:
    job = prepare(request).calibrating
    assert job is not None
    return job


def logits(folder: Path, tokens: torch.Tensor, changed: dict[str, Any]) -> torch.Tensor:
    """Of a model with some tensors replaced, by their names in the checkpoint."""
    net = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager", attn_implementation="eager"
    )
    weights = Weights(describe_model(folder).logical, net)
    used = set()
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if (source := weights.source(name)) in changed:
                used.add(source)
                value.copy_(torch.as_tensor(changed[source]))
            elif value.ndim == 3 and weights.by_expert(name):
                for expert, names in enumerate(weights.sources(name)):
                    if names[0] in changed:
                        used.update(names)
                        value[expert].copy_(torch.cat([torch.as_tensor(changed[one]) for one in names]))
        assert used == changed.keys()
        return net(tokens).logits


def decoded(folder: Path) -> dict[str, Any]:
    """The tensors of an output, as dconv reads them back."""
    dense = folder.with_name(f"{folder.name}-dense")
    run(prepare(Request(folder, "hf", dense, dtype="f32")), Settings())
    return values_of(dense)
