"""A small reference model of DeepSeek-MoE 16B, which transformers lacks: the maths of its published code in torch.

Llama, with routed experts behind the first dense layers: each token's best scores of a softmax over all experts, which
are its weights, divided by their sum where ``norm_topk_prob`` says so; and experts that all tokens share.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

from tests.oracles.minicpm import Model


def logits(folder: Path, tokens: Tensor) -> Tensor:
    """fp32 logits [batch, sequence, vocabulary] of a HuggingFace directory."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    plain = {"scale_emb": 1.0, "scale_depth": None, "dim_model_base": None}  # Llama is MiniCPM without scalars
    return _Deepseek({**config, **plain}, weights).logits(tokens)


class _Deepseek(Model):
    def _feed_forward(self, at: str, x: Tensor) -> Tensor:
        if f"{at}gate.weight" not in self.w:
            return self._gated(at, x)
        out = self._gated(f"{at}shared_experts.", x) if self.c["n_shared_experts"] else torch.zeros_like(x)
        for sample, place in torch.cartesian_prod(torch.arange(len(x)), torch.arange(x.shape[1])).tolist():
            token = x[sample, place]
            scores = (self.w[f"{at}gate.weight"] @ token).softmax(0)
            best = scores.argsort(descending=True)[: self.c["num_experts_per_tok"]].tolist()
            total = float(scores[best].sum()) if self.c["norm_topk_prob"] else 1.0
            for expert in best:
                out[sample, place] += scores[expert] / total * self._gated(f"{at}experts.{expert}.", token)
        return out

    def _gated(self, at: str, x: Tensor) -> Tensor:
        return self._linear(f"{at}down_proj", silu(self._linear(f"{at}gate_proj", x)) * self._linear(f"{at}up_proj", x))
