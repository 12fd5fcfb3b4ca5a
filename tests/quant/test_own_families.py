"""Families that transformers lacks: what is built for them computes what the references do, and can be calibrated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="calibration computes with torch")
pytest.importorskip("transformers", reason="calibration runs transformers' layers")

import torch
from safetensors.torch import load_file, save_file

from dconv.arch.registry import by_name
from dconv.cli import main
from dconv.coded.encode import linears
from dconv.describe import describe_model
from dconv.errors import Refused, ToolMissing
from dconv.export import huggingface, layerwise
from dconv.export.prompt import Prompt, prompt_for
from dconv.net.skeleton import built
from dconv.pipeline import Request, prepare, run
from dconv.quant.awq_loop import Layers
from dconv.quant.gptq import Recipe, nearest
from dconv.quant.grid import Numbers
from dconv.sharding.rank import Settings
from tests.arch.test_minicpm import longrope, write_model
from tests.oracles import deepseek, hf, minicpm
from tests.quant.models import values_of
from tests.quant.one_process import assert_same, calibrated, calibrated_by

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_UNKNOWN = {"architectures": ["NobodysForCausalLM"], "model_type": "nobodys"}
#: The family whose tensors they have, and keys; sequences of 16 tokens and 64 are asked.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "minicpm": ("minicpm", {"tie_word_embeddings": True, "sparse_config": None}),
    "minicpm4": ("minicpm", {
        "rope_scaling": longrope(8, 32), "max_position_embeddings": 64, "sparse_config": {"dense_len": 65},
    }),
    "minicpm_moe": ("minicpm_moe", {}),
    "deepseek": ("deepseek", {"moe_intermediate_size": 32, "norm_topk_prob": False}),
    "deepseek, sum of 1": ("deepseek", {"moe_intermediate_size": 32, "norm_topk_prob": True, "n_shared_experts": None}),
    "generic_moe": ("deepseek", {"moe_intermediate_size": 32, "norm_topk_prob": True, "moe_top_k": 2, **_UNKNOWN}),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / name, family, **{**_SIZES, **keys}) for name, (family, keys) in MODELS.items()}


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 61, (24, 64)))
    return path


def reference(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    oracle = minicpm if "scale_emb" in json.loads((folder / "config.json").read_text()) else deepseek
    return oracle.logits(folder, tokens)


def with_weights(folder: Path, changed: dict[str, Any], out: Path) -> Path:
    """The model with other weights, by their names."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    assert changed.keys() <= tensors.keys()
    said = {name: torch.as_tensor(np.asarray(value)).float().contiguous() for name, value in changed.items()}
    save_file(tensors | said, out / "model.safetensors", metadata={"format": "pt"})
    return out


def request_for(model: Path, ids: Path, out: Path, form: str = "gptq", **said: Any) -> Request:
    settings = {"bits": 4, "group_size": 32, "nsamples": 24, "seqlen": 64, **said}
    return Request(model, form, out, calibration=str(ids), quantization_config=json.dumps(settings))


# ------------------------------------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [16, 64])
def test_logits(name: str, length: int, models: dict[str, Path], ids: Path) -> None:
    """Whole, and layer by layer; the longer ones are past the first context of a longrope."""
    tokens = np.load(ids)[:2, :length]
    expected = reference(models[name], torch.from_numpy(tokens)).numpy()
    prompt = Prompt("decoder", tokens)
    model = describe_model(models[name])
    for found in (huggingface.answers_of(models[name], prompt), layerwise.answers_of(model, prompt, 1 << 20)):
        assert np.abs(found[0] - expected).max() < 2e-6 * np.abs(expected).max()


def test_scalars_and_routing_are_of_the_config(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """Each key changes what is computed, and as the reference says."""
    tokens = np.load(ids)[:2, :16]
    for name, keys in (
        ("minicpm4", {"scale_emb": 3}), ("minicpm4", {"scale_depth": None}), ("minicpm4", {"dim_model_base": 32}),
        ("minicpm_moe", {"num_experts_per_tok": 3}), ("deepseek", {"num_experts_per_tok": 3}),
    ):  # fmt: skip
        other = tmp_path / f"{name}-{next(iter(keys))}"
        shutil.copytree(models[name], other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | keys))
        expected = reference(other, torch.from_numpy(tokens)).numpy()
        (found,) = huggingface.answers_of(other, Prompt("decoder", tokens))
        assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()
        before = reference(models[name], torch.from_numpy(tokens)).numpy()
        assert np.abs(before - expected).max() > 1e-3 * np.abs(before).max()


@pytest.mark.long
def test_deepseek_is_what_megatron_core_computes(models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed: the oracle cannot run")
    words = ["megatron", "--tp", "2", "--etp", "2", "-o", str(tmp_path / "out"), "--verify", "logits", "--quiet"]
    assert main(["convert", str(models["deepseek"]), *words]) == 0


# ------------------------------------------------------------------------------------------------ what it is used for


@pytest.mark.parametrize("name", MODELS)
def test_calibrated(name: str, models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """GPTQ's output computes what the source does more nearly than weights rounded to nearest."""
    out, dense = tmp_path / "out", tmp_path / "dense"
    run(prepare(request_for(models[name], ids, out, routing_weighted="experts" in MODELS[name][0])), Settings())
    run(prepare(Request(out, "hf", dense, dtype="f32")), Settings())
    source = describe_model(models[name])
    values, recipe = values_of(models[name]), Recipe(Numbers(4, symmetric=True), 32)
    names = linears(source.family, source.facts, source.logical)
    rounded = {one: nearest(torch.from_numpy(values[one]).float(), recipe).decode() for one in names}
    tokens = torch.from_numpy(np.load(ids)[:6])
    right = reference(models[name], tokens)
    near = reference(with_weights(models[name], values_of(dense), tmp_path / "near"), tokens)
    far = reference(with_weights(models[name], rounded, tmp_path / "far"), tokens)
    assert float((near - right).square().mean()) < 0.9 * float((far - right).square().mean())
    report = json.loads((out / "calibration.json").read_text())
    assert {line["weight"] for line in report["weights"]} == names
    moe = source.facts.get("moe", (False, False))
    assert [layer["layer"] for layer in report["coverage"]] == [at for at, here in enumerate(moe) if here]
    assert main(["check", str(out)]) == 0


def test_any_number_of_ranks(models: dict[str, Path], tmp_path: Path) -> None:
    """Two blocks of samples, one for each of two ranks, which have two experts each."""
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(1).integers(0, 61, (48, 128)))
    request = request_for(models["minicpm_moe"], ids, tmp_path / "one", routing_weighted=True, nsamples=48, seqlen=128)
    job = prepare(request).calibrating
    assert job is not None
    one = calibrated(job, tmp_path / "alone")
    assert_same(one, calibrated_by(job, tmp_path / "two", 2, ep=2), 2)


@pytest.mark.parametrize("name", ["minicpm", "minicpm_moe", "deepseek"])
def test_awq_folds_and_changes_no_function(
    name: str, models: dict[str, Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors with their scales, before anything is rounded."""
    whole: dict[str, Any] = {}
    own = Layers._folded

    def noted(self: Layers, *args: Any) -> Any:
        values, around = own(self, *args)
        whole.update(values)
        return values, around

    monkeypatch.setattr(Layers, "_folded", noted)
    run(prepare(request_for(models[name], ids, tmp_path / "out", "awq", nsamples=8)), Settings())
    report = json.loads((tmp_path / "out" / "calibration.json").read_text())["weights"]
    assert sum(line.get("ratio") is not None for line in report) > len(report) // 2
    tokens = torch.from_numpy(np.load(ids)[:2])
    right = reference(models[name], tokens)
    folded = reference(with_weights(models[name], whole, tmp_path / "folded"), tokens)
    assert float((folded - right).abs().max()) < 1e-5 * float(right.abs().max())


def test_verify_logits(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["hf", "--dtype", "bf16", "--verify", "logits", "--json"]
    assert main(["convert", str(models["minicpm"]), *words, "-o", str(tmp_path / "out")]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["verified"]["logits"]["difference"] < 0.05


def test_megatron_core_is_not_asked_what_it_lacks(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would compute the layers without their scalars, and answer."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    out = tmp_path / "out"
    words = ["convert", str(models["minicpm4"]), "megatron", "-o", str(out)]
    assert main([*words, "--verify", "logits"]) == 3
    said = capsys.readouterr().err
    assert "scale_emb" in said and "rope_scaling" in said
    assert main([*words, "--quiet"]) == 0
    capsys.readouterr()
    assert main(["check", str(out), "--json"]) == 0
    ran = json.loads(capsys.readouterr().out)["run"]
    tokens = torch.from_numpy(prompt_for(*_asked(models["minicpm4"])).tokens)
    assert ran["largest_logit"] == pytest.approx(float(reference(models["minicpm4"], tokens).abs().max()), rel=1e-5)
    assert "dconv's layers" in ran["runtime"]


def _asked(folder: Path) -> tuple[Any, Any, Any]:
    model = describe_model(folder)
    return model.family, model.facts, model.config


# ------------------------------------------------------------------------------------------------ what is refused


def test_sparse_attention_is_not_taken_for_dense(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """Before a byte is written, and where such a sequence comes to the model in another way."""
    other = tmp_path / "model"
    shutil.copytree(models["minicpm4"], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"sparse_config": {"dense_len": 64}}))
    with pytest.raises(Refused, match="sparse attention"):
        prepare(request_for(other, ids, tmp_path / "out"))
    assert prepare(request_for(other, ids, tmp_path / "out", seqlen=63))
    prompt = Prompt("decoder", np.load(ids)[:1])
    with pytest.raises(Refused, match="sparse attention"):
        huggingface.answers_of(other, prompt)


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"scoring_func": "sigmoid"}, "scoring_func"), ({"embedding_multiplier": 2.0}, "embedding_multiplier"),
     ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic")],
    ids=["router", "scalar", "rope"],
)  # fmt: skip
def test_a_config_that_says_more_is_refused(
    keys: dict[str, Any], said: str, models: dict[str, Path], ids: Path, tmp_path: Path
) -> None:
    other = tmp_path / "model"
    shutil.copytree(models["deepseek"], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(Refused) as caught:
        prepare(request_for(other, ids, tmp_path / "out"))
    assert said in str(caught.value)
    assert said in layerwise.obstacle(describe_model(other))


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"num_experts_per_tok": None, "moe_top_k": None}, "num_experts_per_tok"),
     ({"moe_top_k": 3}, "moe_top_k 3"),
     ({"norm_topk_prob": None}, "norm_topk_prob"),
     ({"rms_norm_eps": None}, "rms_norm_eps"),
     ({"routed_scaling_factor": 2.5, "n_group": 1}, "routed_scaling_factor 2.5"),
     ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_an_unknown_mixture_is_recognised_by_its_config_or_refused(
    keys: dict[str, Any], said: str, models: dict[str, Path], tmp_path: Path
) -> None:
    assert describe_model(models["generic_moe"]).family.name == "generic_moe"
    assert by_name("generic_moe").config.model_type == "generic_moe"
    other = tmp_path / "model"
    shutil.copytree(models["generic_moe"], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(Refused, match="is not told by its config alone") as caught:
        describe_model(other)
    assert said in str(caught.value)


def test_an_unknown_mixture_of_other_names_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(models["generic_moe"], other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(16)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match="in no row of generic_moe"):
        prepare(Request(other, "hf", tmp_path / "out"))


# ------------------------------------------------------------------------------------------------ null in config.json


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe"])
def test_a_null_head_dim_is_the_default(family: str, tmp_path: Path) -> None:
    """As published configs have it; some of transformers' classes compute the default of a missing key alone."""
    _, model = hf.tiny(family)
    source = hf.save(model, tmp_path / "m")
    tokens = np.arange(16)[None]
    (expected,) = huggingface.answers_of(source, Prompt("decoder", tokens))
    config = json.loads((source / "config.json").read_text())
    assert config.pop("head_dim", None) in (None, config["hidden_size"] // config["num_attention_heads"])
    (source / "config.json").write_text(json.dumps({**config, "head_dim": None}))
    assert built(source, "AutoModelForCausalLM", source).model.layers[0].self_attn.head_dim
    assert np.array_equal(huggingface.answers_of(source, Prompt("decoder", tokens))[0], expected)


def test_what_nobody_builds_stays_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"]})
    )
    with pytest.raises(ToolMissing):
        built(tmp_path, "AutoModelForCausalLM", tmp_path, family=by_name("minicpm_blockffn"))
