"""A small reference model of MiniCPM (1B, 2B, 4, 4.1, with experts and with BlockFFN), which transformers lacks.

The maths of OpenBMB's published code in the plainest torch: Llama, with the embedding times ``scale_emb``, what each
block adds times ``scale_depth / sqrt(layers)``, and the head's input over ``hidden_size / dim_model_base``; longrope
divides each frequency by a factor, and cosine and sine are scaled by sqrt(1 + ln(stretch) / ln(original context)). A
BlockFFN layer (``modeling_minicpm.py`` of thunlp/BlockFFN) weighs blocks of a feed-forward layer without a gate by a
normalised ReLU. ``null`` for a scalar is a factor of 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, relu, silu, softmax


def logits(folder: Path, tokens: Tensor) -> Tensor:
    """fp32 logits [batch, sequence, vocabulary] of a HuggingFace directory."""
    config = json.loads((folder / "config.json").read_text())
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {name: value.float() for name, value in load_file(file).items()}
    return Model(config, weights).logits(tokens)


class Model:
    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        self.c, self.w = config, weights
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.head = config["hidden_size"] // self.heads

    def logits(self, tokens: Tensor) -> Tensor:
        c, w = self.c, self.w
        x = w["model.embed_tokens.weight"][tokens] * c["scale_emb"]
        depth = c["scale_depth"]
        residual = 1.0 if depth is None else depth / math.sqrt(c["num_hidden_layers"])
        for layer in range(c["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            x = x + residual * self._attention(at + "self_attn.", self._norm(at + "input_layernorm", x))
            x = x + residual * self._feed_forward(at + "mlp.", self._norm(at + "post_attention_layernorm", x))
        x = self._norm("model.norm", x) / (c["hidden_size"] / (c["dim_model_base"] or c["hidden_size"]))
        return linear(x, w["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.c["rms_norm_eps"])
        return x * scale * self.w[f"{name}.weight"]

    def _rotation(self, length: int) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.head, 2).float() / self.head
        frequencies, scale = self.c["rope_theta"] ** -exponents, 1.0
        if scaling := self.c.get("rope_scaling"):
            original = scaling["original_max_position_embeddings"]
            long = length > original
            frequencies = frequencies / torch.tensor(scaling["long_factor" if long else "short_factor"])
            stretch = self.c["max_position_embeddings"] / original
            scale = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
        return angles.cos() * scale, angles.sin() * scale

    def _attention(self, at: str, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (self._linear(f"{at}{name}_proj", x) for name in "qkv")
        q, k, v = (part.view(batch, length, -1, self.head).transpose(1, 2) for part in (q, k, v))
        cos, sin = self._rotation(length)
        q, k = (part * cos + torch.cat((-part.chunk(2, -1)[1], part.chunk(2, -1)[0]), -1) * sin for part in (q, k))
        k, v = (part.repeat_interleave(self.heads // self.groups, 1) for part in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(self.head)
        hidden = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        out = softmax(scores.masked_fill(hidden, -math.inf), -1) @ v
        return self._linear(f"{at}o_proj", out.transpose(1, 2).reshape(batch, length, -1))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def _feed_forward(self, at: str, x: Tensor) -> Tensor:
        if f"{at}moe_router.weight" in self.w:
            router, w_in, w_out = (self.w[f"{at}{name}.weight"] for name in ("moe_router", "moe_w_in", "moe_w_out"))
            shares = self._norm(f"{at}router_norm", relu(linear(x, router)))
            inner = silu(torch.einsum("bsm,edm->bsed", x, w_in))
            return torch.einsum("bsed,bse,emd->bsm", inner, shares, w_out)
        if f"{at}gate.weight" not in self.w:
            gate, up, down = (self.w[f"{at}{name}_proj.weight"] for name in ("gate", "up", "down"))
            return linear(silu(linear(x, gate)) * linear(x, up), down)
        scores = softmax(linear(x, self.w[f"{at}gate.weight"]), -1)
        best, chosen = scores.topk(self.c["num_experts_per_tok"], -1)
        shares = torch.zeros_like(scores).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
        out = torch.zeros_like(x)
        for number in range(self.c["num_experts"]):
            w1, w2, w3 = (self.w[f"{at}experts.{number}.w{i}.weight"] for i in (1, 2, 3))
            out += shares[..., number : number + 1] * linear(silu(linear(x, w1)) * linear(x, w3), w2)
        return out
