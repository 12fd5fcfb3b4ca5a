"""Several kinds of codes in one checkpoint: what transformers makes of it, what calibration has seen, who refuses."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="calibration computes with torch")
transformers = pytest.importorskip("transformers", reason="calibration runs transformers' layers")

from compressed_tensors.compressors import ModelCompressor  # noqa: E402
from transformers import AutoModelForCausalLM, CompressedTensorsConfig  # noqa: E402

from dconv import bounds, checking, logits  # noqa: E402
from dconv.describe import describe_model  # noqa: E402
from dconv.errors import DconvError, Preempted, Refused, UsageError, VerifyFailed  # noqa: E402
from dconv.examine import inspect  # noqa: E402
from dconv.pipeline import Request, prepare, run  # noqa: E402
from dconv.quant import loop  # noqa: E402
from dconv.sharding.rank import Settings  # noqa: E402
from tests.processes import call  # noqa: E402
from tests.quant.calibrated import FAMILIES, model_of  # noqa: E402
from tests.quant.test_calibrate import weights_digest  # noqa: E402

TOKENS = torch.arange(3, 35)[None]
INT4 = {"wq": "int4", "aq": "bf16", "group_size": 32}
#: The issue's own words, but for the groups of these small models.
ISSUE = {
    "default": INT4,
    "overrides": [
        {"pattern": "*.mlp.experts.*", "wq": "mxfp4", "group_size": 32},
        {"pattern": "*.mlp.gate", "skip": True},
    ],
}
EVERY = {
    "default": INT4,
    "overrides": [
        {"pattern": "*.k_proj", "wq": "mxfp6"},
        {"pattern": "*.v_proj", "wq": "mxfp8", "aq": "mxfp8"},
        {"pattern": "*.o_proj", "wq": "fp8", "aq": "fp8", "group_size": -1},
        {"pattern": "*.gate_proj", "wq": "int8", "group_size": -1},
        {"pattern": "*.up_proj", "wq": "mxfp4"},
        {"pattern": "*.layers.1.mlp.down_proj", "skip": True},
    ],
}


def experts_in(wq: str, **more: Any) -> dict[str, Any]:
    return {"default": INT4, "overrides": [{"pattern": "*.mlp.experts.*", "wq": wq, **more}]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: model_of(family, folder / family) for family in ("llama", "qwen2_moe")}


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 61, (4, 64)))
    return path


def request_for(model: Path, ids: Path, out: Path, table: dict[str, Any], quant: str | None = None) -> Request:
    said = json.dumps({"nsamples": 4, "seqlen": 64, **table})
    return Request(model, "gptq", out, calibration=str(ids), quantization_config=said, quant=quant)


def made(model: Path, ids: Path, out: Path, table: dict[str, Any], quant: str | None = None) -> dict[str, Any]:
    """An output's ``quantization_config``."""
    run(prepare(request_for(model, ids, out, table, quant)), Settings())
    return json.loads((out / "config.json").read_text())["quantization_config"]


def stored(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()


def decompressed(folder: Path) -> Any:
    """A model as transformers loads it and compressed-tensors decompresses it, computing in fp32, activations plain."""
    model = load(folder)
    ModelCompressor.from_pretrained_model(model).decompress_model(model)
    torch.nn.Module.float(model)
    for module in model.modules():
        if scheme := getattr(module, "quantization_scheme", None):
            scheme.input_activations = None
    return model


def dense(folder: Path) -> Path:
    """The same by dconv's own decoding."""
    out = folder.with_name(f"{folder.name}-dense")
    run(prepare(Request(folder, "hf", out, dtype="f32")), Settings())
    return out


def differing(model: Any, wanted: Any) -> set[str]:
    found = model.state_dict()
    return {name for name, value in wanted.state_dict().items() if not torch.equal(found[name].float(), value)}


# ------------------------------------------------------------------------------------------------ who loads it


@pytest.mark.parametrize(
    ("family", "table", "formats"),
    [
        ("qwen2_moe", ISSUE, {"pack-quantized": "int4", "mxfp4-pack-quantized": "mxfp4"}),
        (
            "llama",
            EVERY,
            {
                "pack-quantized": "int", "mxfp4-pack-quantized": "mxfp4", "mxfp6-pack-quantized": "mxfp6",
                "mxfp8-quantized": "mxfp8", "float-quantized": "fp8",
            },
        ),
        ("qwen2_moe", experts_in("mxfp6"), {"pack-quantized": "int4", "mxfp6-pack-quantized": "mxfp6"}),
        ("qwen2_moe", experts_in("fp8", aq="fp8", group_size=-1), {"pack-quantized": "", "float-quantized": ""}),
        ("llama", {"default": {**INT4, "aq": "fp8"}, "overrides": []}, {"pack-quantized": "int4"}),
    ],
    ids=["issue", "every", "mxfp6", "fp8", "activations"],
)  # fmt: skip
def test_transformers_computes_what_dconv_decodes(
    models: dict[str, Path], ids: Path, tmp_path: Path, family: str, table: dict[str, Any], formats: dict[str, str]
) -> None:
    config = made(models[family], ids, tmp_path / "out", table)
    groups = config["config_groups"].values()
    assert {group["format"] for group in groups} == formats.keys()
    assert config["format"] == ("mixed-precision" if len(formats) > 1 else next(iter(formats)))
    ours, theirs = load(dense(tmp_path / "out")), decompressed(tmp_path / "out")
    assert differing(theirs, ours) == set()
    with torch.no_grad():
        assert torch.equal(theirs(TOKENS).logits, ours(TOKENS).logits)


def test_activations_are_a_dynamic_scheme(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """Where ``aq`` says so and nowhere else; every group names its modules, experts by an expression."""
    groups = made(models["llama"], ids, tmp_path / "out", EVERY)["config_groups"].values()
    rounded = {
        (group["format"], group["input_activations"]["strategy"], group["input_activations"]["dynamic"])
        for group in groups
        if group["input_activations"]
    }
    assert rounded == {("mxfp8-quantized", "group", True), ("float-quantized", "token", True)}
    named = [module for group in groups for module in group["targets"]]
    assert len(named) == len(set(named)) == 13 and "model.layers.1.mlp.down_proj" not in named


def test_what_transformers_does_not_load(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """transformers 5.23 with compressed-tensors 0.20, to be seen when they learn; the plan says the first three."""
    experts = {"pattern": "*.experts.*"}
    job = prepare(request_for(models["qwen2_moe"], ids, tmp_path / "mxfp8", experts_in("mxfp8")))
    assert any("does not load experts in mxfp8" in note for note in job.notes)
    run(job, Settings())
    with pytest.raises(RuntimeError, match="automatic conversion"):
        load(tmp_path / "mxfp8")
    job = prepare(request_for(models["qwen2_moe"], ids, tmp_path / "fp4", experts_in("fp4")))
    assert any("does not load experts in fp4" in note for note in job.notes)
    run(job, Settings())
    wrong = differing(decompressed(tmp_path / "fp4"), load(dense(tmp_path / "fp4")))
    assert wrong and all(".mlp.experts." in name for name in wrong)
    layers = [{**experts, "wq": "mxfp4"}, {"pattern": "*.layers.0.mlp.experts.*", "wq": "mxfp6"}]
    job = prepare(request_for(models["qwen2_moe"], ids, tmp_path / "two", {"default": INT4, "overrides": layers}))
    assert any("decodes the experts of all layers alike: not as mxfp4" in note for note in job.notes)
    run(job, Settings())
    with pytest.raises(RuntimeError, match="automatic conversion"):
        load(tmp_path / "two")
    assert describe_model(dense(tmp_path / "two")).logical.specs  # which our own reader decodes
    two = {"default": INT4, "overrides": [{"pattern": "*.mlp.*", "wq": "mxfp4"}]}
    made(models["llama"], ids, tmp_path / "dense layers", two)
    with pytest.raises(RuntimeError, match="automatic conversion"):
        load(tmp_path / "dense layers", quantization_config=CompressedTensorsConfig(dequantize=True))


def test_widths_under_the_names_of_vllm(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """vLLM asks ``dynamic`` for a fused layer and for a layer's experts by names that no file has; the first expression
    that fits the beginning counts, as in its ``get_dynamic_override``. GPTQModel asks for each module of the files.
    """
    table = {
        "default": {**INT4, "wq": "int8"},
        "overrides": [
            {"pattern": "*.mlp.experts.*", "wq": "int4"},
            {"pattern": "*.layers.1.self_attn.q_proj", "wq": "int4"},
            {"pattern": "*.layers.1.mlp.experts.*", "wq": "int8"},
            {"pattern": "*.layers.1.mlp.experts.3.*", "skip": True},
        ],
    }
    config = made(models["qwen2_moe"], ids, tmp_path / "out", table)

    def bits(module: str) -> int:
        for rule, said in config["dynamic"].items():
            if re.match(rule[2:], module):
                return said["bits"] if rule.startswith("+:") else 0
        return config["bits"]

    assert config["quant_method"] == "gptq"
    words = {name.removesuffix(".qweight"): value for name, value in stored(tmp_path / "out").items()
             if name.endswith(".qweight")}  # fmt: skip
    columns = {name: stored(tmp_path / "out")[f"{name}.g_idx"].numel() for name in words}
    assert {name: bits(name) for name in words} == {
        name: 32 * value.shape[0] // columns[name] for name, value in words.items()
    }
    first, second = (f"model.layers.{layer}" for layer in (0, 1))
    assert (bits(f"{first}.self_attn.qkv_proj"), bits(f"{first}.mlp.shared_expert.gate_up_proj")) == (8, 8)
    assert (bits(f"{first}.mlp.experts"), bits(f"{second}.mlp.experts")) == (4, 8)
    for plain in ("lm_head", f"{first}.mlp.gate", f"{first}.mlp.shared_expert_gate", f"{second}.mlp.experts.3.up_proj"):
        assert bits(plain) == 0, plain


# ------------------------------------------------------------------------------------------------ what is computed


def test_calibration_sees_what_the_others_will_be_worth(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """The same whole numbers as for a model whose other weights are those already, by compressed-tensors' decoding."""
    from safetensors.torch import save_file

    others = [{"pattern": "*.mlp.*", "wq": "mxfp4"}, {"pattern": "*.v_proj", "wq": "fp8"}]
    table = {"default": INT4, "overrides": others}
    plain = {"default": INT4, "overrides": [{**one, "wq": "bf16"} for one in others]}
    made(models["llama"], ids, tmp_path / "mixed", table)
    already = tmp_path / "already"
    already.mkdir()
    (already / "config.json").write_bytes((models["llama"] / "config.json").read_bytes())
    theirs = decompressed(tmp_path / "mixed").state_dict()
    source = stored(models["llama"])
    for name in source:
        if ".mlp." in name or "v_proj" in name:
            assert not torch.equal(source[name], theirs[name])
            source[name] = theirs[name].float().contiguous()
    save_file(source, already / "model.safetensors", metadata={"format": "pt"})
    for name, model in (("after", already), ("before", models["llama"])):
        made(model, ids, tmp_path / name, plain, "pack-quantized")
    mixed, after, before = (stored(tmp_path / name) for name in ("mixed", "after", "before"))
    whole = [name for name in after if re.search(r"[qko]_proj\.weight_(packed|scale)$", name)]
    assert len(whole) == 12 and all(torch.equal(mixed[name], after[name]) for name in whole)
    assert not all(torch.equal(mixed[name], before[name]) for name in whole)


def test_experts_that_are_not_calibrated_are_asked_anew(
    ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came to them before a layer was quantised is not kept, however much memory there is for it."""
    monkeypatch.setitem(FAMILIES["deepseek_v2"], "first_k_dense_replace", 0)  # its shared experts come last
    model = model_of("deepseek_v2", tmp_path / "model")
    for name, room in (("much", 1 << 30), ("little", 1 << 14)):
        request = request_for(model, ids, tmp_path / name, {**ISSUE, "true_sequential": False})
        run(prepare(request), Settings(max_memory=room))
    assert weights_digest(tmp_path / "much") == weights_digest(tmp_path / "little")


@pytest.mark.long
def test_any_number_of_ranks(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    request = request_for(models["qwen2_moe"], ids, tmp_path / "one", ISSUE)
    run(prepare(request), Settings(threads=2))
    code, _, err = call(
        sys.executable, "-m", "dconv", "convert", str(models["qwen2_moe"]), "gptq", "-o", str(tmp_path / "many"),
        "--calibration", str(ids), "--quantization-config", request.quantization_config or "", "--nproc", "2",
    )  # fmt: skip
    assert code == 0, err
    assert weights_digest(tmp_path / "one") == weights_digest(tmp_path / "many")


def test_gone_on_from_a_kill(
    models: dict[str, Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again = (request_for(models["qwen2_moe"], ids, tmp_path / name, ISSUE) for name in ("whole", "again"))
    run(prepare(whole), Settings())
    own = loop.Calibration._pass_on

    def killed(self: loop.Calibration, at: int, report: list[Any]) -> None:
        if at == 1:
            raise Preempted("killed")
        own(self, at, report)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Calibration, "_pass_on", killed)
        with pytest.raises(Preempted):
            run(prepare(again), Settings())
    run(prepare(again), Settings())
    assert weights_digest(tmp_path / "whole") == weights_digest(tmp_path / "again")


@pytest.mark.parametrize(
    ("default", "alone"),
    [
        ({"wq": "mxfp4"}, {"format": "mx", "quant": "mxfp4", "quant_config": "compressed-tensors"}),
        ({"wq": "fp8", "aq": "fp8"}, {"format": "fp8"}),
        ({"wq": "fp8", "aq": "fp8", "group_size": -1}, {"format": "fp8", "quant": "fp8_channel"}),
        ({"wq": "mxfp8", "aq": "mxfp8"}, {"format": "mx", "quant": "mxfp8"}),
        ({"wq": "mxfp6", "extra": {"format": "e3m2"}}, {"format": "mx", "quant": "mxfp6_e3m2"}),
    ],
    ids=str,
)
def test_one_floating_kind_is_what_its_format_writes(
    models: dict[str, Path], tmp_path: Path, default: dict[str, Any], alone: dict[str, Any]
) -> None:
    """Nothing is calibrated, and samples are not so much as looked for."""
    job = prepare(request_for(models["llama"], tmp_path / "nowhere.npy", tmp_path / "out", {"default": default}))
    assert job.calibrating is None and any("nothing is calibrated" in note for note in job.notes)
    run(job, Settings())
    run(prepare(Request(models["llama"], out=tmp_path / "alone", **alone)), Settings())
    assert weights_digest(tmp_path / "out") == weights_digest(tmp_path / "alone")


def test_two_kinds_of_quark(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """Each weight as its kind alone has it, and decoded so; the config names the kind with fewer weights."""
    e3m2 = {"wq": "mxfp6", "extra": {"format": "e3m2"}}
    table = {"default": e3m2, "overrides": [{"pattern": "*.mlp.*", "wq": "mxfp4"}]}
    config = made(models["llama"], ids, tmp_path / "out", table)
    assert config["global_quant_config"]["weight"]["dtype"] == "fp6_e3m2" and config["quant_method"] == "quark"
    assert {one["weight"]["dtype"] for one in config["layer_quant_config"].values()} == {"fp4"}
    ours = stored(dense(tmp_path / "out"))
    for quant, part in (("mxfp6_e3m2", ".self_attn."), ("mxfp4", ".mlp.")):
        run(prepare(Request(models["llama"], "mx", tmp_path / quant, quant=quant)), Settings())
        wanted = {name: value for name, value in stored(dense(tmp_path / quant)).items() if part in name}
        assert wanted and all(torch.equal(ours[name], value) for name, value in wanted.items())


# ------------------------------------------------------------------------------------------------ what is said of it


def test_verified_checked_and_explained(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    out = tmp_path / "out"
    job = prepare(request_for(models["qwen2_moe"], ids, out, ISSUE))
    heading = "mxfp4 g32                                             24 weights"
    assert heading in job.notes and any("compressed-tensors (mixed-precision), read by" in note for note in job.notes)
    logits.require(job)
    run(job, Settings())
    held = logits.compare(job, out)["weights"]
    assert isinstance(held, dict) and (held["coded"], held["calibrated"]) == (24, 14)
    assert 0 < held["error"] <= held["bound"] == 0.25
    checked = checking.check(out)
    assert checked.run and checked.reread and checked.reread.whole
    assert inspect(out).family == "qwen2_moe"
    text = inspect(out, explain=True).text()
    assert "int4 code x the scale of its 32 columns (14 tensors)" in text
    assert "e2m1 code x the power of two of its 32 columns (24 tensors)" in text
    tensors = stored(out)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[f"{name}_scale"][3, 1] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerifyFailed, match="farther from the source's") as failed:
        bounds.compare(job, describe_model(out), out)
    assert name in failed.value.where


@pytest.mark.parametrize(
    ("asked", "table", "error", "words"),
    [
        ({}, {"default": INT4, "overrides": [{"pattern": "*.mlp.*", "wq": "mxfp6", "extra": {"format": "e3m2"}}]},
         Refused, "mxfp6_e3m2 g32: quark"),
        ({}, {"default": {"wq": "fp6", "group_size": 32}}, Refused, "fp6_e2m3 g32: none"),
        ({"quant": "gptq_v2"}, EVERY, Refused, "--quant pack-quantized"),
        ({"quant": "pack-quantized"}, {"default": {"wq": "mxfp6", "extra": {"format": "e3m2"}}}, Refused, "quark"),
        ({}, {**EVERY, "desc_act": True}, Refused, '"static_groups": true'),
        ({"format": "awq"}, EVERY, UsageError, "FORMAT gptq takes mixed types"),
    ],
)  # fmt: skip
def test_refused_before_the_first_byte(
    models: dict[str, Path], ids: Path, tmp_path: Path, asked: dict[str, Any], table: dict[str, Any],
    error: type[DconvError], words: str,
) -> None:  # fmt: skip
    request = request_for(models["llama"], ids, tmp_path / "out", table)
    with pytest.raises(error) as refused:
        prepare(Request(**{**{name: getattr(request, name) for name in request.__dataclass_fields__}, **asked}))
    assert words in str(refused.value)
    assert not list(tmp_path.iterdir())
