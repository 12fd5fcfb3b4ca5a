"""Records what ModelOpt 0.47.0 exports of a small Llama, in ``modelopt/``: run it by hand where it is installed.

ModelOpt is not a test dependency: it brings a solver and what talks to NVIDIA's drivers. ``modelopt.safetensors`` has
what it makes of its own export: of some weights the values, of others the logits of the model before, weights rounded.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).with_name("modelopt")
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
TOKENS = torch.arange(24).reshape(2, 12)
SOME = ("self_attn.k_proj", "mlp.down_proj")


def model(dtype: torch.dtype, **sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).to(dtype).eval()


def record(name: str, said: str | dict[str, Any], plain: LlamaForCausalLM, edit: Any = None) -> dict[str, torch.Tensor]:
    import modelopt.torch.quantization as quantization  # pyright: ignore
    from modelopt.torch.export import export_hf_checkpoint  # pyright: ignore

    how = copy.deepcopy(getattr(quantization, said)) if isinstance(said, str) else said
    coded = quantization.quantize(plain, how, lambda model: model(TOKENS))
    if edit:
        edit(coded)
    found: dict[str, torch.Tensor] = {}
    if name in ("int8_smooth", "int8"):
        for module in coded.modules():
            if "TensorQuantizer" in type(module).__name__ and module.num_bits == 8 and module.axis is None:
                module.disable_quant()  # of activations: what is left is what the weights do
        with torch.no_grad():
            found["logits"] = coded(TOKENS).logits.float()
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    faked = export_with(lambda: export_hf_checkpoint(coded, export_dir=FOLDER / name), coded)
    if name == "int4_awq":
        found.update((f"{module}.weight", faked[module]) for module in faked if module.endswith(SOME))
    (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
    tensors = load_file(FOLDER / name / "model.safetensors")
    for module in (f"model.layers.0.{end}" for end in SOME):
        parts = {part: tensors[f"{module}.{part}"] for part in _PARTS if f"{module}.{part}" in tensors}
        values = dequantised(parts, tensors["lm_head.weight"].dtype)
        if values is not None:
            found[f"{module}.weight"] = values
    return {f"{name}/{tensor}": value.contiguous() for tensor, value in found.items()}


def export_with(export: Any, coded: nn.Module) -> dict[str, torch.Tensor]:
    """What ModelOpt's quantisers make of the weights as they are exported, which is not what they were before."""
    from modelopt.torch.export import unified_export_hf  # pyright: ignore

    names = {module: name for name, module in coded.named_modules()}
    found: dict[str, torch.Tensor] = {}
    own = unified_export_hf._export_quantized_weight

    def seen(module: Any, *args: Any, **named: Any) -> None:
        with torch.no_grad():
            values = module.weight_quantizer(module.weight) if module.weight_quantizer.num_bits == 4 else None
        if values is not None:
            by = module.input_quantizer.pre_quant_scale
            found[names[module]] = values.detach() * (1 if by is None else by)
        own(module, *args, **named)

    unified_export_hf._export_quantized_weight = seen
    try:
        export()
    finally:
        unified_export_hf._export_quantized_weight = own
    return found


_PARTS = ("weight", "weight_scale", "weight_scale_2", "pre_quant_scale")


def dequantised(parts: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor | None:
    """A weight by ModelOpt's own tensor of its codes; None where it has none that reads what it exports."""
    from modelopt.torch.quantization import qtensor  # pyright: ignore

    codes, scale = parts["weight"], parts.get("weight_scale")
    if scale is None:
        return None
    shape = codes.shape
    if codes.dtype == torch.float8_e4m3fn and scale.dtype != torch.uint8:
        blocks: dict[str, Any] = {"block_sizes": {-1: 128, -2: 128}} if scale.ndim > 1 else {}
        by = scale[:, None] if scale.ndim == 1 else scale.squeeze((1, 3)) if scale.ndim == 4 else scale
        return qtensor.FP8QTensor(shape, dtype, codes).dequantize(torch.float32, scale=by, **blocks).to(dtype)
    if codes.dtype == torch.float8_e4m3fn:
        return qtensor.MXFP8QTensor(shape, dtype, codes).dequantize(dtype, scale=scale)
    wide = torch.Size((shape[0], shape[1] * 2))
    if scale.dtype == torch.uint8:
        held = qtensor.MXFP4QTensor(wide, dtype, codes)
        return held.dequantize(dtype, scale=scale, block_sizes={-1: 32})
    if "weight_scale_2" in parts and scale.dtype == torch.float8_e4m3fn:
        held = qtensor.NVFP4QTensor(wide, torch.float32, codes)
        values = held.dequantize(torch.float32, scale=scale, double_scale=parts["weight_scale_2"], block_sizes={-1: 16})
        by = parts.get("pre_quant_scale")
        return values if by is None else values * by.float()  # in fp32, which is rounded last
    return None


def smoothed(coded: nn.Module) -> None:
    """The inputs of one layer scaled, as an AWQ search would, which needs a GPU for this format."""
    layer: Any = coded.get_submodule("model.layers.0.mlp.down_proj")
    layer.input_quantizer.pre_quant_scale = torch.linspace(0.25, 4, layer.weight.shape[1]).to(layer.weight.dtype)


def main() -> None:
    import modelopt.torch.quantization as quantization  # pyright: ignore

    half, whole = torch.bfloat16, torch.float32

    def both(*names: str) -> dict[str, Any]:
        said = [copy.deepcopy(getattr(quantization, name)) for name in names]
        return {**said[0], "quant_cfg": [entry for one in said for entry in one["quant_cfg"]]}

    mixed = both("FP8_DEFAULT_CFG")
    nv = both("NVFP4_DEFAULT_CFG")["quant_cfg"]
    mixed["quant_cfg"] += [
        {**entry, "quantizer_name": f"*mlp{entry['quantizer_name']}"}
        for entry in nv
        if entry["quantizer_name"] in ("*weight_quantizer", "*input_quantizer")
    ]
    int4 = both("INT4_AWQ_CFG")
    for entry in int4["quant_cfg"]:
        if "cfg" in entry:
            entry["cfg"]["block_sizes"][-1] = 16
    found = record("fp8_kv", both("FP8_DEFAULT_CFG", "FP8_KV_CFG"), model(half))
    found |= record("fp8_rows", "FP8_PER_CHANNEL_PER_TOKEN_CFG", model(half))
    blocks = "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"
    found |= record("fp8_blocks", blocks, model(half, intermediate_size=136))
    found |= record("fp8_blocks_real", blocks, model(half, intermediate_size=136), quantization.compress)
    found |= record("mxfp8", "MXFP8_DEFAULT_CFG", model(half))
    found |= record("mxfp4", "MXFP4_DEFAULT_CFG", model(half))
    found |= record("nvfp4", "NVFP4_DEFAULT_CFG", model(half))
    found |= record("mxfp4_fp8", "W4A8_MXFP4_FP8_CFG", model(half))
    found |= record("nvfp4_weights", "W4A16_NVFP4_CFG", model(half))
    found |= record("nvfp4_smooth", "NVFP4_DEFAULT_CFG", model(half), smoothed)
    found |= record("mixed", mixed, model(half))
    found |= record("int8", "INT8_WEIGHT_ONLY_CFG", model(whole))
    found |= record("int8_smooth", "INT8_SMOOTHQUANT_CFG", model(whole))
    found |= record("int4_awq", int4, model(whole))
    save_file(found, FOLDER.with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
    for path in sorted(FOLDER.rglob("*.json")):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=1) + "\n")
