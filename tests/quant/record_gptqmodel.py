"""Writes tiny checkpoints with GPTQModel, and what its own layers make of them: its pins clash with our environment's.

By hand, in an environment with gptqmodel 7.7.0::

    GPTQMODEL_CPU_WORKERS=2 python tests/quant/record_gptqmodel.py tests/quant/recorded
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def main(out: Path) -> None:
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from gptqmodel.quantization.config import FORMAT, AWQConfig
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rules = {r"-:.*\.o_proj": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": 64}}
    configs = {
        "gptq": QuantizeConfig(bits=4, group_size=32, sym=False, desc_act=True, act_group_aware=False),
        "gptq_v2": QuantizeConfig(bits=4, group_size=32, sym=False, format=FORMAT.GPTQ_V2, dynamic=rules),
        "gptq_3_bits": QuantizeConfig(bits=3, group_size=-1, sym=False, act_group_aware=False),
        "awq": AWQConfig(bits=4, group_size=32, sym=False),
    }
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    plain = LlamaForCausalLM(shape).to(torch.float16)
    for value in plain.parameters():
        if value.dim() == 2:
            value.data.normal_(0, 0.05)
    tokens = [{"input_ids": torch.randint(2, 60, (32,)).tolist(), "attention_mask": [1] * 32} for _ in range(64)]
    base = Path(tempfile.mkdtemp())
    plain.save_pretrained(base)
    tokenizer = Tokenizer(models.WordLevel({f"w{at}": at for at in range(64)}, unk_token="w63"))  # noqa: S106
    named = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w63", pad_token="w63", eos_token="w1")  # noqa: S106
    named.save_pretrained(base)
    for name, config in configs.items():
        model = GPTQModel.load(str(base), config, device="cpu")
        model.quantize(tokens, batch_size=8, backend=BACKEND.AUTO if name == "awq" else BACKEND.TORCH)
        written = Path(tempfile.mkdtemp())
        model.save(str(written))
        backend = BACKEND.AWQ_TORCH if name == "awq" else BACKEND.TORCH
        loaded = GPTQModel.load(str(written), device="cpu", backend=backend, dtype=torch.float16)
        found = {}
        for module, layer in loaded.model.named_modules():
            if not isinstance(layer, BaseQuantLinear):
                continue
            if name == "awq":
                weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size)
            else:
                weight = layer.dequantize_weight()
            found[module] = digest(weight.detach().half().T.contiguous().numpy().tobytes())
        (out / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(written / "model.safetensors", out / name)
        said = json.loads((written / "config.json").read_text())
        said["quantization_config"]["meta"] = {"quantizer": said["quantization_config"]["meta"]["quantizer"]}
        (out / name / "config.json").write_text(json.dumps(said, indent=1) + "\n")
        (out / name / "weights.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
