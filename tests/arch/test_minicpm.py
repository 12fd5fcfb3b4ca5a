"""The MiniCPM line: scalars, longrope and sparse settings survive the args, and its variants are told by tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")
pytest.importorskip("transformers", reason="transformers is not installed: the oracle cannot run")

from safetensors.torch import save_file  # noqa: E402

from dconv.arch.registry import by_name, detect, families  # noqa: E402
from dconv.checkpoint.detect import open_source  # noqa: E402
from dconv.checkpoint.source import expected_specs  # noqa: E402
from dconv.errors import Damaged, Refused  # noqa: E402
from dconv.pipeline import Request, convert, describe_model  # noqa: E402
from dconv.sharding.coords import Parallel  # noqa: E402
from tests.models import config_of, facts_of, tensors, write_random  # noqa: E402
from tests.oracles import hf, minicpm  # noqa: E402

TOKENS = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(3))
SCALES = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
PLAIN = {
    "architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "hidden_act": "silu", "initializer_range": 0.1,
    "rms_norm_eps": 1e-5, "attention_dropout": 0.0, "torch_dtype": "bfloat16", "rope_theta": 10000.0,
    "tie_word_embeddings": True, "attention_bias": False, **SCALES,
}  # fmt: skip


def longrope(pairs: int, original: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0 + i / 64 for i in range(pairs)], "long_factor": [1.0 + i / 8 for i in range(pairs)]}
    return {"rope_type": "longrope", **factors, "original_max_position_embeddings": original}


#: Published config.json files, less what is of a run; factors are not the published ones.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "MiniCPM-2B": ("minicpm", {
        **PLAIN, "hidden_size": 2304, "intermediate_size": 5760, "num_hidden_layers": 40, "num_attention_heads": 36,
        "num_key_value_heads": 36, "max_position_embeddings": 4096, "vocab_size": 122753, "rope_scaling": None,
    }),
    "MiniCPM4-8B": ("minicpm", {
        **PLAIN, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 2, "max_position_embeddings": 32768, "vocab_size": 73448, "mup_denominator": 32,
        "tie_word_embeddings": False, "rope_scaling": longrope(64, 32768),
    }),
    "MiniCPM4.1-8B": ("minicpm", {
        **PLAIN, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 2, "max_position_embeddings": 65536, "vocab_size": 73448, "mup_denominator": 32,
        "tie_word_embeddings": False, "rope_scaling": longrope(64, 65536),
        "sparse_config": {
            "kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64, "window_size": 2048,
            "topk": 64, "use_nope": False, "dense_len": 8192,
        },
    }),
    "MiniCPM-MoE-8x2B": ("minicpm_moe", {
        **PLAIN, "hidden_size": 2304, "intermediate_size": 5760, "num_hidden_layers": 40, "num_attention_heads": 36,
        "num_key_value_heads": 36, "max_position_embeddings": 4096, "vocab_size": 122753, "num_experts": 8,
        "num_experts_per_tok": 2,
    }),
    "MiniCPM3-4B": ("minicpm3", {
        **PLAIN, "architectures": ["MiniCPM3ForCausalLM"], "model_type": "minicpm3", "hidden_size": 2560,
        "intermediate_size": 6400, "num_hidden_layers": 62, "num_attention_heads": 40, "num_key_value_heads": 40,
        "max_position_embeddings": 32768, "vocab_size": 73448, "q_lora_rank": 768, "kv_lora_rank": 256,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "rope_scaling": longrope(16, 32768),
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    family, config = by_name(PUBLISHED[name][0]).config, PUBLISHED[name][1]
    args = json.loads(json.dumps(family.to_args(config)))
    back = family.to_hf(args)
    assert {key: back[key] for key in config} == config
    assert family.facts(back) == family.facts(config)
    assert family.to_args(back) == args
    assert family.check_pair(config, args) == []
    assert {type(back[key]) for key in ("scale_emb", "dim_model_base")} == {int}  # transformers' class insists
    fitting = [one.name for one in families().values() if one.config.matches_args(args) == []]
    assert fitting[0] == PUBLISHED[name][0]
    needs = " ".join(family.needs(config))
    assert all(key in needs for key in SCALES)
    assert ("longrope" in needs) == bool(config.get("rope_scaling"))
    assert ("InfLLM" in needs) == ("sparse_config" in config)


def test_numbers_of_minicpm3() -> None:
    facts = by_name("minicpm3").config.facts(PUBLISHED["MiniCPM3-4B"][1])
    assert (facts["v_dim"], facts["q_rows"], facts["kv_a_rows"], facts["kv_b_rows"]) == (64, 3840, 288, 5120)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("minicpm", {"sparse_config": {"topk": 32}}),
        ("minicpm", {"scale_depth": 1.0}),
        ("minicpm", {"rope_scaling": longrope(64, 4096)}),
        ("minicpm3", {"rope_scaling": longrope(16, 4096)}),
    ],
    ids=["sparse", "depth", "rope", "latent rope"],
)
def test_a_stale_config_is_found(family: str, keys: dict[str, Any]) -> None:
    published = {"minicpm": "MiniCPM4.1-8B", "minicpm3": "MiniCPM3-4B"}[family]
    config, translate = PUBLISHED[published][1], by_name(family).config
    assert translate.check_pair({**config, **keys}, translate.to_args(config))


@pytest.mark.parametrize("factors", [[1.0] * 63, [1.0] * 63 + ["2"], None], ids=["short", "text", "absent"])
def test_broken_longrope_is_damage(factors: object) -> None:
    scaling = {**longrope(64, 4096), "long_factor": factors}
    with pytest.raises(Damaged, match="long"):
        by_name("minicpm").config.to_args({**PUBLISHED["MiniCPM4-8B"][1], "rope_scaling": scaling})


def test_longrope_without_scalars_is_a_llama_and_qwen_has_none() -> None:
    args = by_name("minicpm").config.to_args({**PUBLISHED["MiniCPM4-8B"][1], "scale_emb": None, "scale_depth": None,
                                              "dim_model_base": None})  # fmt: skip
    assert detect(None, args).name == "llama"
    assert by_name("llama").config.to_hf(args)["rope_scaling"] == PUBLISHED["MiniCPM4-8B"][1]["rope_scaling"]
    assert any("rope_scaling" in reason for reason in by_name("qwen2").config.matches_args(args))


def test_a_llama_by_the_name_of_minicpm_is_a_llama(tmp_path: Path) -> None:
    """MiniCPM5 is one by its config.json."""
    llama = by_name("llama")
    source = write_random(tmp_path / "MiniCPM5-1B", llama, config_of(llama))
    assert describe_model(source).family.name == "llama"


def write_model(folder: Path, family: str, **keys: Any) -> Path:
    """A random fp32 model that computes something: not the random bits of `write_random`."""
    known = by_name(family)
    config = {**config_of(known), "torch_dtype": "float32", **keys}
    generator = torch.Generator().manual_seed(1)
    specs = expected_specs(known, facts_of(known, config)).values()
    weights = {
        spec.name: torch.randn(spec.shape, generator=generator) / spec.shape[-1] ** 0.5
        if len(spec.shape) > 1
        else 1 + 0.1 * torch.randn(spec.shape, generator=generator)
        for spec in specs
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "scaled": ("minicpm", {"tie_word_embeddings": True}),
    "longrope": ("minicpm", {"rope_scaling": longrope(4, 64)}),
    "longrope, long": ("minicpm", {"rope_scaling": longrope(4, 16)}),
    "experts": ("minicpm_moe", {}),
}


@pytest.mark.parametrize("container", ["torch_dist", "legacy"])
@pytest.mark.parametrize("name", MODELS)
def test_the_args_alone_say_the_function(name: str, container: str, tmp_path: Path) -> None:
    """No HuggingFace config comes along: scalars, factors and experts have to be in Megatron's args."""
    family, keys = MODELS[name]
    source = write_model(tmp_path / "hf", family, **keys)
    out = tmp_path / "megatron"
    convert(Request(source, "megatron", out, parallel=Parallel(tp=2, pp=2, etp=2), megatron_format=container))
    shutil.rmtree(out / "huggingface")
    convert(Request(out, "hf", tmp_path / "back"))
    theirs = minicpm.logits(source, TOKENS)
    assert torch.equal(minicpm.logits(tmp_path / "back", TOKENS), theirs)
    for key in ("scale_emb", "scale_depth", "dim_model_base", *(["rope_scaling"] if "rope_scaling" in keys else [])):
        config = json.loads((tmp_path / "back" / "config.json").read_text())
        config[key] = longrope(4, 32) if key == "rope_scaling" else config[key] * 2
        (tmp_path / "other").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "back" / "model.safetensors", tmp_path / "other")
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        changed = minicpm.logits(tmp_path / "other", TOKENS)
        assert (changed - theirs).abs().max() > 1e-3 * theirs.abs().max(), key


@pytest.mark.parametrize("rope", [None, longrope(4, 16)], ids=["rope", "longrope"])
def test_minicpm3_from_args_alone_is_what_transformers_computes(rope: dict[str, Any] | None, tmp_path: Path) -> None:
    keys = {} if rope is None else {"rope_parameters": {**rope, "rope_theta": 10000.0, "factor": 16.0}}
    _, model = hf.tiny("minicpm3", **keys)
    source = hf.save(model, tmp_path / "hf")
    out = tmp_path / "megatron"
    convert(Request(source, "megatron", out, parallel=Parallel(tp=2, pp=2, etp=2), megatron_format="legacy"))
    shutil.rmtree(out / "huggingface")
    convert(Request(out, "hf", tmp_path / "back"))
    assert torch.equal(hf.logits(tmp_path / "back", TOKENS), hf.logits(model, TOKENS))


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_half_names_of_latent_attention_are_read(impl: str, tmp_path: Path) -> None:
    """All four matrices divided over tensor parallel ranks, as the local spec has them."""
    family = by_name("minicpm3")
    source = write_random(tmp_path / "hf", family, config_of(family))
    out = tmp_path / "megatron"
    parallel = Parallel(tp=2, etp=2)
    convert(Request(source, "megatron", out, parallel=parallel, megatron_format="legacy", transformer_impl=impl))
    renamed = set()
    for file in out.rglob("*.pt"):
        tree = torch.load(file, weights_only=False)
        for name in list(tree["model"]):
            if "_up_proj." in name or "_down_proj." in name:
                half = name.replace("_up_proj.", "_up.").replace("_down_proj.", "_down.")
                tree["model"][half] = tree["model"].pop(name)
                renamed.add(half.split("self_attention.")[1])
        torch.save(tree, file)
    assert {f"linear_{name}.weight" for name in ("q_up", "q_down", "kv_up", "kv_down")} <= renamed
    convert(Request(out, "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(source)


@pytest.mark.parametrize(
    ("family", "said"), [("minicpm", "sparse_config"), ("minicpm_blockffn", "moe_w_in"), ("minicpm3", "minicpm3")]
)
def test_bmtrain_takes_none_that_computes_something_else(family: str, said: str, tmp_path: Path) -> None:
    source = write_random(tmp_path / "hf", by_name(family), config_of(by_name(family)))
    with pytest.raises(Refused) as caught:
        convert(Request(source, "bmtrain", tmp_path / "out"))
    assert said in str(caught.value)


BLOCK = "model.layers.{}.mlp.moe_router.weight"
LATENT = "self_attn.kv_a_proj_with_mqa.weight", "self_attention.linear_kv_down_proj.weight"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.layers.0.mlp.gate_proj.weight"], "minicpm"),
        (["model.layers.0.mlp.experts.0.w1.weight"], "minicpm_moe"),
        (["decoder.layers.mlp.experts.experts.linear_fc1.weight"], "minicpm_moe"),
        ([BLOCK.format(3)], "minicpm_blockffn"),
        (["decoder.layers.3.mlp.moe_router.weight"], "minicpm_blockffn"),
        (["model.layers.3.mlp.router_proj.weight"], "blockffn"),
        (
            ["model.layers.3.mlp.router_proj.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"],
            "blockffn_mla",
        ),
        (
            ["decoder.layers.mlp.router_proj.weight", "decoder.layers.self_attention.linear_kv_down_proj.weight"],
            "blockffn_mla",
        ),
    ],
)
def test_variants_are_told_by_their_tensors(names: list[str], expected: str) -> None:
    """Their config.json is of one architecture, and num_experts stands in that of two."""
    assert detect({**PLAIN, "num_experts": 40}, None, names).name == expected


@pytest.mark.parametrize("container", ["torch_dist", "legacy"])
@pytest.mark.parametrize("sparse", [(0, 1, 2, 3), (1, 2), (0, 3), (3,)], ids=str)
@pytest.mark.parametrize("name", ["minicpm_blockffn", "blockffn", "blockffn_mla"])
def test_block_sparse_layers_are_those_that_have_the_tensors(
    name: str, sparse: tuple[int, ...], container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever layers they are: nothing counts from 0 or from 1."""
    import tests.models as models

    monkeypatch.setattr(models, "stored_shapes", lambda *_: models.blocks(name, sparse))
    family = by_name(name)
    source = write_random(tmp_path / "hf", family, config_of(family))
    out = tmp_path / "megatron"
    convert(Request(source, "megatron", out, parallel=Parallel(tp=2, pp=2, etp=2), megatron_format=container))
    found = open_source(out).shapes
    layers = {key.split(".")[2] for key in found if f".mlp.{next(iter(models.BLOCKS[name]))}" in key}
    assert layers == ({"mlp"} if len(sparse) == 4 and container == "torch_dist" else {str(i) for i in sparse})
    convert(Request(out, "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(source)


@pytest.mark.parametrize(
    ("name", "lost"),
    [("minicpm_blockffn", "moe_w_in.weight"), ("blockffn", "up_proj"), ("blockffn_mla", "router_proj.weight")],
)
def test_half_a_block_sparse_layer_is_damage(name: str, lost: str, tmp_path: Path) -> None:
    family = by_name(name)
    config = config_of(family)
    source = write_random(tmp_path / "hf", family, config)
    (source / "model.safetensors").unlink()
    kept = {
        spec.name: torch.zeros(spec.shape)
        for spec in expected_specs(family, facts_of(family, config)).values()
        if spec.name != f"model.layers.3.mlp.{lost}"
    }
    save_file(kept, source / "model.safetensors")
    with pytest.raises(Damaged) as caught:
        convert(Request(source, "megatron", tmp_path / "out"))
    assert f"model.layers.3.mlp.{lost}" in str(caught.value)


def test_an_unknown_tensor_of_a_layer_is_refused(tmp_path: Path) -> None:
    """A sparse attention with weights of its own is not passed over."""
    family = by_name("minicpm")
    source = write_random(tmp_path / "hf", family, config_of(family))
    weights = {"model.layers.0.self_attn.compress_k.weight": torch.zeros(2, 2)}
    (source / "model.safetensors").rename(source / "a.safetensors")
    save_file(weights, source / "b.safetensors")
    names = dict.fromkeys(tensors(source), "a.safetensors") | dict.fromkeys(weights, "b.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(Refused, match="in no row of minicpm"):
        convert(Request(source, "megatron", tmp_path / "out"))
