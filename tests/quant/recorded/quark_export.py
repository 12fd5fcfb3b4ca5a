"""Records what amd-quark 0.13 exports of one weight, in ``quark_export.json``: run it by hand where it is installed.

amd-quark is not a test dependency: it brings some thirty packages and compiles a kernel when it is imported.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

#: One weight [2, 64] is recorded.
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 32,
    "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 32,
}  # fmt: skip
MODULE = "model.layers.0.self_attn.k_proj"


def weight() -> torch.Tensor:
    """bf16 [2, 64]: far magnitudes, zeros, and a block that the rules scale differently."""
    values = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.02], [3.0]])
    values[0, :4] = torch.tensor([0.0, 1.0, -0.0625, 0.03125])
    values[1, 32:] *= 1.9375 / values[1, 32:].abs().max()
    return values.to(torch.bfloat16)


def record() -> dict[str, Any]:
    from quark.torch import ModelQuantizer, export_safetensors  # pyright: ignore
    from quark.torch.quantization.config import config as quark  # pyright: ignore

    specs = {"fp4": quark.OCP_MXFP4Spec, "fp6_e2m3": quark.OCP_MXFP6E2M3Spec, "fp6_e3m2": quark.OCP_MXFP6E3M2Spec}
    found: dict[str, Any] = {"weight": _hex(weight()), "exports": {}}
    for kind, spec in specs.items():
        for rule in ("floor", "even"):
            model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)
            model.get_submodule(MODULE).weight.data.copy_(weight())
            of = spec(ch_axis=-1, is_dynamic=False, scale_calculation_mode=rule).to_quantization_spec()
            said = quark.QConfig(global_quant_config=quark.QLayerConfig(weight=of), exclude=["lm_head"])
            quantizer = ModelQuantizer(said)
            tokens = torch.utils.data.DataLoader([torch.zeros(16, dtype=torch.long)])
            model = quantizer.freeze(quantizer.quantize_model(model, tokens))
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                export_safetensors(model, folder)
                tensors = load_file(f"{folder}/model.safetensors")
                config = json.loads(Path(folder, "config.json").read_text())["quantization_config"]
                layer = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).get_submodule(MODULE)
                values = layer(torch.eye(64, dtype=torch.bfloat16)).T  # through transformers' own loading
            found["exports"][f"{kind} {rule}"] = {
                "codes": _hex(tensors[f"{MODULE}.weight"]),
                "scales": _hex(tensors[f"{MODULE}.weight_scale"]),
                "values": _hex(values),
                "config": config,
            }
    return found


def _hex(tensor: torch.Tensor) -> str:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes().hex()


if __name__ == "__main__":
    Path(__file__).with_suffix(".json").write_text(json.dumps(record(), indent=1))
