"""What compressed-tensors itself writes and reads: tiny models in each of its formats, with unusual weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam, maybe_pad_tensor_for_block_quant
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.oracles import hf

#: Sizes of tiny models that every group of columns divides.
EVEN: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2}
#: Weights that llm-compressor gives one global scale.
FUSED = (("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("w1", "w3"))


def spread(model: PreTrainedModel) -> None:
    """Weights of many sizes, zeros of either sign, subnormals, and stretches of zeros in every matrix."""
    draw = torch.Generator().manual_seed(5)
    for weight in model.parameters():
        if weight.ndim != 2:
            continue
        size = torch.exp(2 * torch.randn(weight.shape, generator=draw).float())
        values = weight.float() * size
        values[1, :64], values[2], values[3] = 0, values[2] * 1e-30, values[3] * 1e-41
        values[4, ::3] = -0.0
        values[5] = 0
        weight.copy_(values)


def statistics(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """What shares a scale, by its smallest and largest weight, as llm-compressor's observer has them."""
    if args.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if args.strategy == "block":
        assert args.block_structure
        m, n = args.block_structure
        weight = maybe_pad_tensor_for_block_quant(weight, (m, n))
        weight = weight.reshape(weight.shape[0] // m, m, weight.shape[1] // n, n).transpose(1, 2).flatten(-2)
    elif args.group_size:
        weight = weight.unflatten(-1, (-1, args.group_size))
    keep = args.strategy == "channel"
    return weight.amin(-1, keepdim=keep), weight.amax(-1, keepdim=keep)


def calibrate(model: PreTrainedModel) -> None:
    """Give every module its scales by data-free rounding to nearest."""
    for parent in model.modules():
        for names in [*FUSED, *([name] for name in dict(parent.named_children()))]:
            found = [getattr(parent, name, None) for name in names]
            modules = [it for it in found if getattr(getattr(it, "quantization_scheme", None), "weights", None)]
            if len(modules) < len(names) or hasattr(modules[0], "is_calibrated"):
                continue
            args = modules[0].quantization_scheme.weights  # type: ignore[union-attr]
            ends = [statistics(module.weight.data, args) for module in modules]  # type: ignore[union-attr, arg-type]
            whole = None
            if args.strategy == "tensor_group":
                largest = torch.stack([torch.maximum(-low.min(), high.max()) for low, high in ends]).max().reshape(1)
                whole = generate_gparam(-largest, largest)
            for module, (low, high) in zip(modules, ends, strict=True):
                scale, zero = calculate_qparams(low, high, args, whole)
                module.weight_scale.data.copy_(scale)  # type: ignore[union-attr]
                if hasattr(module, "weight_zero_point"):
                    module.weight_zero_point.data.copy_(zero)  # type: ignore[union-attr]
                if whole is not None:
                    module.weight_global_scale.data.copy_(whole)  # type: ignore[union-attr]
                module.is_calibrated = True  # type: ignore[union-attr]


def write(
    folder: Path,
    groups: dict[str, Any],
    dtype: torch.dtype,
    family: str = "llama",
    *,
    plain: Path | None = None,
    form: str | None = None,
    **sizes: Any,
) -> Path:
    """Have compressed-tensors write a tiny model.

    Args:
        plain: where to save the model as it was before.
        form: of all groups, where it is not the one that their arguments imply.
    """
    _, model = hf.tiny(family, **{**EVEN, **sizes})
    model = model.to(dtype)
    with torch.no_grad():
        spread(model)
    if plain:
        model.save_pretrained(plain)
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    with torch.no_grad():
        calibrate(model)
    compressor = ModelCompressor.from_pretrained_model(model, form)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


def config(folder: Path) -> QuantizationConfig:
    """What a directory's config says, read by compressed-tensors."""
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    return QuantizationConfig(**{key: value for key, value in said.items() if key in QuantizationConfig.model_fields})


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a directory as compressed-tensors makes it, by the groups' own compressors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.utils.match import match_name

    groups = config(folder)
    tensors = load_file(folder / "model.safetensors")
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = value
    found = {}
    for module, parts in modules.items():
        if "weight_scale" not in parts:
            found |= {f"{module}.{part}": value for part, value in parts.items()}
            continue
        schemes = [group for group in groups.config_groups.values() if not isinstance(group, list)]
        scheme = next(s for s in schemes if any(match_name(module, t) for t in s.targets) or s.targets == ["Linear"])
        compressor = BaseCompressor.get_value_from_registry(scheme.format or groups.format)
        found[f"{module}.weight"] = compressor.decompress(parts, scheme)["weight"]
    return found
