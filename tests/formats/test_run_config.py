"""Megatron-Bridge's run_config.yaml is read as data and says the same model as the args that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dconv.arch.registry import families
from dconv.checkpoint import run_config
from dconv.errors import Damaged, Refused
from dconv.pipeline import Request, convert, describe_model
from dconv.sharding.coords import Parallel
from tests.models import config_of, tensors, write_random


def without_args(made: Path) -> Path:
    """An iteration of dconv's with the args taken out, as Bridge leaves one."""
    iteration = made / "release"
    (iteration / "common.pt").unlink()
    for path in (made / "huggingface").iterdir():
        path.unlink()
    (made / "huggingface").rmdir()
    metadata = iteration / ".metadata"
    data = metadata.read_bytes()
    assert data.count(b"common_state") == 1
    metadata.write_bytes(data.replace(b"common_state", b"absent_state"))
    return iteration


SCALED = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


TIED = {"tie_word_embeddings": True, "num_key_value_heads": 4, "vocab_size": 64}


def _says(name: str, rope: dict[str, Any]) -> bool:
    """Whether the family's args have a name for this scaling."""
    family = families()[name]
    return not family.config.unsayable(config_of(family, rope_scaling=rope))


def _ties(name: str) -> bool:
    """Whether Megatron ties what HuggingFace does: T5's output layer is its own there, with the embedding's values."""
    family = families()[name]
    return family.config.facts(config_of(family, **TIED))["tied"]


ROPES: list[dict[str, Any]] = [SCALED, LINEAR, YARN]
CASES = [
    (name, sizes)
    for name in sorted(families())
    if run_config.can_say(families()[name].config.to_args(config_of(families()[name])))
    for sizes in (
        {},
        *([TIED] if _ties(name) else []),
        *({"rope_scaling": rope} for rope in ROPES if _says(name, rope)),
    )
]


#: Families that Bridge builds with providers of their own, or not at all.
UNSAID = {
    "blockffn", "blockffn_mla",
    "bert", "deepseek", "deepseek_v2", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "glm4", "glm4_moe", "gpt2",
    "bamba", "gpt_oss", "granite", "mamba2", "megatron-bert", "minicpm", "minicpm3", "minicpm_blockffn", "minicpm_moe",
    "minimax_m2", "nemotron_h", "olmo2", "olmoe", "qwen2_moe", "t5",
}  # fmt: skip


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_says_what_the_args_say(tmp_path: Path, name: str, sizes: dict[str, Any]) -> None:
    family = families()[name]
    config = config_of(family, **sizes)
    source = write_random(tmp_path / "hf", family, config)
    parallel = Parallel(tp=2, pp=family.config.facts(config).get("most_stages", 2), etp=2)
    convert(Request(source, "megatron", tmp_path / "made", parallel=parallel, divisor=2))
    by_args = describe_model(tmp_path / "made")
    assert by_args.source.args is not None
    if name in UNSAID:
        assert not (tmp_path / "made" / "release" / "run_config.yaml").exists()
        return
    expected = family.config.to_hf(by_args.source.args)
    found = describe_model(without_args(tmp_path / "made"), model_type=name)
    assert found.rebuilt
    assert expected["torch_dtype"] == "bfloat16"  # a name that transformers has
    assert found.config == expected
    assert found.logical.specs == by_args.logical.specs


@pytest.mark.parametrize(
    "text", ["model: [1", "[]", "model: 3", "model: !!python/object/apply:os.system [true]", "\x00", "a: &a [*a]"]
)
def test_a_broken_one_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run_config.yaml").write_text(text)
    with pytest.raises(Damaged) as caught:
        run_config.read_args(tmp_path / "run_config.yaml")
    assert "run_config.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_func", {"_target_": "torch.nn.functional.gelu", "_call_": False}),
        ("gated_linear_unit", False),
        ("num_moe_experts", 8),
        ("multi_latent_attention", True),
        ("qk_l2_norm", True),
        ("layernorm_zero_centered_gamma", True),
        ("position_embedding_type", "learned_absolute"),
        ("experimental_attention_variant", "gated_delta_net"),
    ],
)
def test_another_function_is_refused(tmp_path: Path, field: str, value: object) -> None:
    family = families()["llama"]
    source = write_random(tmp_path / "hf", family, config_of(family))
    convert(Request(source, "megatron", tmp_path / "made"))
    iteration = without_args(tmp_path / "made")
    written = yaml.safe_load((iteration / "run_config.yaml").read_text())
    written["model"][field] = value
    (iteration / "run_config.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(Refused):
        convert(Request(iteration, "hf", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "target",
    [
        "megatron.bridge.models.gemma.gemma3_provider.Gemma3ModelProvider",
        "megatron.bridge.models.llama_nemotron.llama_nemotron_provider.LlamaNemotronHeterogeneousProvider",
        "megatron.bridge.models.olmoe.olmoe_provider.OlMoEModelProvider",
        "megatron.bridge.models.qwen_vl.qwen3_vl_provider.Qwen3VLModelProvider",
        "house.models.OurProvider",
    ],
)
def test_a_provider_with_layers_of_its_own_asks_for_a_config(tmp_path: Path, target: str) -> None:
    """Its fields alone look like some other model's; Gemma 3's are not even of the kinds that Megatron-LM has."""
    family = families()["llama"]
    source = write_random(tmp_path / "hf", family, config_of(family))
    convert(Request(source, "megatron", tmp_path / "made"))
    iteration = without_args(tmp_path / "made")
    written = yaml.safe_load((iteration / "run_config.yaml").read_text())
    written["model"] |= {"_target_": target, "rotary_base": [10000, 1000000], "window_size": 512}
    (iteration / "run_config.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(Refused) as refused:
        convert(Request(iteration, "hf", tmp_path / "out"))
    assert target in str(refused.value)
    assert "--hf-config" in str(refused.value)
    convert(Request(iteration, "hf", tmp_path / "out", hf_config=source))
    assert tensors(tmp_path / "out") == tensors(source)


@pytest.mark.parametrize(
    "target",
    [
        "megatron.bridge.models.llama.llama_provider.Llama31ModelProvider8B",
        "megatron.bridge.models.mistral.mistral_provider.MistralModelProvider",
        "megatron.bridge.models.qwen.qwen_provider.Qwen3MoEModelProvider30B_A3B",
    ],
)
def test_a_provider_that_only_has_other_defaults_is_read(tmp_path: Path, target: str) -> None:
    (tmp_path / "run_config.yaml").write_text(yaml.safe_dump({"model": {"_target_": target, "num_layers": 3}}))
    args, lacks = run_config.read_args(tmp_path / "run_config.yaml")
    assert not lacks
    assert args is not None
    assert args["num_layers"] == 3
