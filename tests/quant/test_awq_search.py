"""AWQ: scales that cancel, a search that is AutoAWQ's, any ranks, what is written; on small models of every kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="calibration computes with torch")
pytest.importorskip("transformers", reason="calibration runs transformers' layers")

import torch
import transformers

from dconv import verify
from dconv.arch.registry import families
from dconv.checkpoint.source import expected_specs
from dconv.errors import Preempted, Refused
from dconv.pipeline import prepare, run
from dconv.quant.awq import settled
from dconv.quant.awq_loop import Layers
from dconv.quant.awq_maps import folds_of
from dconv.quant.awq_probes import probes_of
from dconv.quant.blocks import Blocks
from dconv.quant.gptq import nearest
from dconv.quant.loop import Calibration
from dconv.sharding.rank import Settings
from dconv.sharding.tensor import Logical
from tests.models import config_of, facts_of
from tests.quant.awq_models import (
    FAMILIES,
    RECIPE,
    decoded,
    logits,
    model_of,
    planned,
    request_for,
)
from tests.quant.models import values_of
from tests.quant.one_process import assert_same, calibrated, calibrated_by


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: model_of(family, folder / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 61, (24, 512)))
    return path


# ------------------------------------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_changes_no_function(
    family: str, models: dict[str, Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors with their scales, before anything is rounded, in transformers' own model; and the written ones,
    which are nearer to it than the same weights rounded to nearest."""
    whole: dict[str, Any] = {}
    own = Layers._folded

    def noted(self: Layers, *args: Any) -> Any:
        values, around = own(self, *args)
        whole.update(values)
        return values, around

    monkeypatch.setattr(Layers, "_folded", noted)
    out = tmp_path / "out"
    run(prepare(request_for(models[family], ids, out)), Settings())
    report = json.loads((out / "calibration.json").read_text())["weights"]
    scaled = [line for line in report if line.get("ratio") is not None]
    assert len(scaled) > len(report) // 2  # there is something to cancel
    assert all(line["search_loss"] <= 1 for line in report if "search_loss" in line)
    tokens = torch.from_numpy(np.load(ids))[6:8, :48]
    reference = logits(models[family], tokens, {})
    assert float((logits(models[family], tokens, whole) - reference).abs().max()) < 1e-5 * float(reference.abs().max())
    written, source = decoded(out), values_of(models[family])
    weights = {line["weight"]: nearest(torch.from_numpy(source[line["weight"]]).float(), RECIPE).decode() for line in
               report}  # fmt: skip
    near = float((logits(models[family], tokens, written) - reference).square().mean())
    far = float((logits(models[family], tokens, weights) - reference).square().mean())
    assert near < far


def textbook(weight: torch.Tensor) -> torch.Tensor:
    """Round to nearest in groups of 32 of a row, 4 bits with a zero point (AutoAWQ's ``pseudo_quantize_tensor``)."""
    parts = weight.double().reshape(-1, 32)
    low, high = parts.amin(1, keepdim=True).clamp(max=0), parts.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).half().double()
    zero = (-low / scale).round().clamp(0, 15)
    return (((parts / scale).round() + zero).clamp(0, 15) - zero).mul(scale).reshape(weight.shape)


def test_the_search_is_autoawqs(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """Every point by itself, in float64, with hooks on transformers' model: attention, experts, and one expert."""
    job = planned(request_for(models["mixtral"], ids, tmp_path / "out"))
    noted = calibrated(job, tmp_path / "state")
    lines = {line["weight"]: line for line in noted.lines}
    net = transformers.AutoModelForCausalLM.from_pretrained(
        models["mixtral"], dtype=torch.float64, experts_implementation="eager"
    )
    tokens = torch.from_numpy(job.samples.tokens.astype(np.int64))
    layer, source = net.model.layers[0], values_of(models["mixtral"])
    for norm, parent, names in (
        ("input_layernorm", "self_attn", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("post_attention_layernorm", "mlp",
         [f"block_sparse_moe.experts.{e}.{w}" for e in range(4) for w in ("w1", "w3")]),
    ):  # fmt: skip
        seen: dict[str, Any] = {}
        hooks = [
            layer.get_submodule(norm).register_forward_hook(lambda _m, _a, made, to=seen: to.update(x=made)),
            layer.get_submodule(parent).register_forward_hook(
                lambda _m, args, kwargs, made, to=seen: to.update(args=args, kwargs=kwargs, made=made), with_kwargs=True
            ),
        ]
        with torch.no_grad():
            net(tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
        weights = {f"model.layers.0.{name}.weight": None for name in names}
        weights = {name: torch.from_numpy(source[name]) for name in weights}
        x = seen["x"].reshape(-1, 64).abs().mean(0)
        rows = torch.cat(list(weights.values())).abs().reshape(-1, 2, 32)
        w = (rows / (rows.amax(2, keepdim=True) + 1e-6)).reshape(-1, 64).mean(0)
        losses = []
        for point in range(-1, 6):
            ratio = point / 6
            s = torch.ones(64) if point < 0 else (x**ratio / (w ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
            s = s / (s.max() * s.min()).sqrt()
            changed = {name: textbook(value * s) / s for name, value in weights.items()}
            losses.append(_answer(layer, parent, seen, changed))
        best = min(range(7), key=losses.__getitem__)
        line = lines[next(iter(weights))]
        assert line["ratio"] == ((best - 1) / 6 if best else None)
        assert line["search_loss"] == pytest.approx(losses[best] / losses[0], rel=0.02)


def _answer(layer: Any, parent: str, seen: dict[str, Any], changed: dict[str, torch.Tensor]) -> float:
    """Squared error of a module's answer with other weights."""
    module = layer.get_submodule(parent)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        for name, value in changed.items():
            *_, kind = (part := name.removesuffix(".weight").split("."))
            if "experts" in part:
                place = module.experts.gate_up_proj.data[int(part[-2])]
                half = len(place) // 2
                place[(slice(half) if kind == "w1" else slice(half, None))] = value
            else:
                getattr(module, kind).weight.data = value
        made = module(*seen["args"], **seen["kwargs"])
        module.load_state_dict(before)
    made, was = (one[0] if isinstance(one, tuple) else one for one in (made, seen["made"]))
    return float((made - was).square().sum())


def test_ranges_are_cut_where_that_helps() -> None:
    """Each group of each row takes the cut whose own error is least; against one after the other."""
    from dconv.quant.awq import choose

    torch.manual_seed(0)
    weight, x = torch.randn(8, 64) ** 3, torch.randn(100, 64)
    hessians = torch.stack([part.t() @ part for part in x.split(32, 1)])
    chosen, power = choose(weight, hessians, RECIPE, cut=True)
    plain, _ = choose(weight, hessians, RECIPE, cut=False)
    assert torch.equal(plain.decode(), nearest(weight, RECIPE).decode())
    total = torch.zeros(8)
    for row in range(8):
        for group in range(2):
            some = slice(32 * group, 32 * group + 32)
            w, errors = weight[row, some], []
            for step in range(10):
                bound = (1 - step / 20) * w.abs().max()
                low, high = w.clamp(-bound, bound).min().clamp(max=0), w.clamp(-bound, bound).max().clamp(min=0)
                scale = ((high - low) / 15).half().float()
                zero = (-low / scale).round()
                rounded = (((w / scale).round() + zero).clamp(0, 15) - zero) * scale
                errors.append(float((x[:, some] @ (rounded - w)).square().sum()))
            ours = float((x[:, some] @ (chosen.decode()[row, some] - w)).square().sum())
            assert ours == pytest.approx(min(errors), rel=1e-3)
            total[row] += ours
    assert torch.allclose(chosen.error, total, rtol=1e-3)
    assert float(chosen.error.sum()) < float(plain.error.sum()) < float(power.sum())


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_a_rounded_norm_is_exact(stored: str, offset: float) -> None:
    """Whatever the dtype, what reads the norm is multiplied by just what the norm as stored was divided by."""
    torch.manual_seed(0)
    kind = getattr(torch, stored)
    norm = (torch.randn(4096).exp() - offset).to(kind).float()
    norm[:3] = torch.tensor([-offset, 0.0, -0.996]) if offset else torch.tensor([0.0, 1e-3, 1.0])
    scales = torch.randn(4096).mul(2).exp()
    made, exact = settled(norm, scales, offset, stored)
    assert torch.equal(made, made.to(kind).float())
    assert torch.allclose((made.double() + offset) * exact, norm.double() + offset, rtol=1e-6, atol=0)
    assert bool((exact > 0).all()) and bool(exact.isfinite().all())
    usual = norm + offset > 0.1
    assert float((exact / scales).log().abs()[usual].median()) < 0.05


# ------------------------------------------------------------------------------------------------ who computes it


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_any_number_of_ranks(family: str, models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """The same numbers, bit for bit; 24 samples of 512 tokens are three blocks, so that one of four ranks has none."""
    job = planned(request_for(models[family], ids, tmp_path / "out", nsamples=24, seqlen=512, n_grid=3))
    one = calibrated(job, tmp_path / "1", threads=2)
    for world in (2, 4):
        assert_same(one, calibrated_by(job, tmp_path / str(world), world))


def test_probes_are_the_same_for_all() -> None:
    blocks = Blocks(np.zeros((24, 512), np.int32), Path())
    count, length, probes = probes_of(blocks)
    assert (count, length, len(probes)) == (8, 256, 8)
    assert {probe.block for probe in probes} == {0, 1, 2}
    assert [probe.number for probe in probes] == list(range(8))


def test_stopped_between_layers(
    models: dict[str, Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(prepare(request_for(models["qwen2"], ids, tmp_path / "whole")), Settings())
    request, own = request_for(models["qwen2"], ids, tmp_path / "again"), Calibration._pass_on

    def killed(self: Calibration, at: int, report: list[Any]) -> None:
        own(self, at, report)
        if at == 1:
            raise Preempted("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "_pass_on", killed)
        with pytest.raises(Preempted):
            run(prepare(request), Settings())
    chosen, plain = [], Layers.choose
    monkeypatch.setattr(Layers, "choose", lambda s, la, at, mine: chosen.append(at) or plain(s, la, at, mine))
    run(prepare(request), Settings())
    assert chosen == [1]
    whole, again = (values_of(tmp_path / name) for name in ("whole", "again"))
    assert all(np.array_equal(value, again[name]) for name, value in whole.items())
    whole, again = (decoded(tmp_path / name) for name in ("whole", "again"))
    assert all(np.array_equal(value, again[name]) for name, value in whole.items())


# ------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize(("said", "zero"), [({}, True), ({"zero_point": False, "clip": False}, False)])
def test_what_is_written_is_what_was_chosen(
    ids: Path, tmp_path: Path, said: dict[str, Any], zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bf16 model, whose norms are rounded: codes, scales, zeros and the folded tensors, read back."""
    model = model_of("mixtral", tmp_path / "model", torch.bfloat16)
    results: dict[str, Any] = {}
    own = Layers.choose

    def noted(self: Layers, *args: Any) -> Any:
        found, lines = own(self, *args)
        results.update(found)
        return found, lines

    monkeypatch.setattr(Layers, "choose", noted)
    out = tmp_path / "out"
    run(prepare(request_for(model, ids, out, **said)), Settings())
    written, source = decoded(out), values_of(model)
    stored = values_of(out)  # floating tensors as they lie in the file
    changed = 0
    for name, result in results.items():
        if hasattr(result, "chosen"):
            assert np.array_equal(written[name], result.chosen.decode().double().numpy())
            assert zero or bool((result.chosen.zeros == 8).all())
        else:
            assert np.array_equal(stored[name], result.bfloat16().double().numpy())
            changed += not np.array_equal(stored[name], source[name])
            if "norm" in name:
                assert torch.equal(result, result.bfloat16().float())  # rounded before it was folded
    untouched = written.keys() - results.keys()
    assert untouched == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert changed >= 4
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "awq"
    assert (config["bits"], config["group_size"], config["version"]) == (4, 32, "gemm")


def test_read_back(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """Folded tensors are others than the source's, and all the rest is as it was."""
    job = prepare(request_for(models["llama"], ids, tmp_path / "out"))
    run(job, Settings())
    told: Any = verify.told("logits", job, tmp_path / "out")
    assert told["logits"]["weights"]["calibrated"] == 2 * (7 + 2)
    assert told["logits"]["divergence"] < 0.5


def test_weights_that_are_left_out_are_scaled_all_the_same(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """``v_proj`` and ``down_proj`` stay plain: the one reads a norm that is divided, the other nothing that is."""
    overrides = [{"pattern": "*.v_proj", "skip": True}, {"pattern": "*.down_proj", "skip": True}]
    out, model = tmp_path / "out", models["llama"]
    run(prepare(request_for(model, ids, out, overrides=overrides)), Settings())
    stored, source = values_of(out), values_of(model)
    norm, v = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.v_proj.weight"
    scales = source[norm] / stored[norm]
    assert np.ptp(scales) > 0.1
    assert np.allclose(stored[v], source[v] * scales, rtol=1e-5)
    down = "model.layers.0.mlp.down_proj.weight"
    assert np.array_equal(stored[down], source[down])


# ------------------------------------------------------------------------------------------------ experts


def test_an_expert_that_sees_no_token(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """Rounded to nearest behind its norm's scales, and told; nothing of its own is searched."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((models["mixtral"] / "config.json").read_bytes())
    tensors = load_file(models["mixtral"] / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 5.0  # a channel that every token has, by which expert 2 is told
    gate = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    gate[2] = 0
    gate[2, 0] = -1e4
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        tensors[f"model.layers.0.self_attn.{name}.weight"] *= 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    run(prepare(request_for(folder, ids, out)), Settings())
    report = json.loads((out / "calibration.json").read_text())
    experts = "model.layers.0.block_sparse_moe.experts.2"
    assert {f"{experts}.w{i}.weight" for i in (1, 2, 3)} <= {w["weight"] for w in report["weights"] if not w["tokens"]}
    stored, source, dense = values_of(out), values_of(folder), decoded(out)
    norm = "model.layers.0.post_attention_layernorm.weight"
    scales = torch.from_numpy(source[norm] / stored[norm]).float()
    assert float(scales.std()) > 0.05
    for name, scale in ((f"{experts}.w3.weight", scales), (f"{experts}.w2.weight", 1.0)):
        wanted = nearest(torch.from_numpy(source[name]).float() * scale, RECIPE).decode().double().numpy()
        assert np.mean(dense[name] == wanted) > 0.99  # the norm's quotient is known to the last bit or two


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", sorted(families()))
def test_every_family_is_known_or_refused_by_name(name: str) -> None:
    """Where it is known, all that a norm's readers read is accounted for: each weight has one source at most."""
    from dconv.coded.encode import linears

    family = families()[name]
    facts = facts_of(family, config_of(family))
    specs = expected_specs(family, facts)
    logical = Logical(Path(), specs, {}, {})
    try:
        wanted = linears(family, facts, logical)
    except Refused as error:
        assert name in str(error)
        return
    predictors = {spec.name for e in family.entries(facts) if e.row.stack == "mtp" for spec in e.fused.specs}
    try:
        found = folds_of(family, facts, logical, wanted - predictors)
    except Refused as error:
        assert name in str(error)
        assert any(word in str(error) for word in ("mixer", "mamba", "router", "cross", "Attention", "moe_"))
        return
    readers = [reader for fold in found.folds for reader in fold.readers]
    assert len(readers) == len(set(readers))
    assert all(fold.source not in fold.readers for fold in found.folds)
    down = {name for name in wanted - predictors if name.endswith(("down_proj.weight", "w2.weight"))}
    assert down <= set(readers)


def test_a_forgotten_reader_is_found(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """Were a family to have a tensor that reads a norm and that the list does not know."""
    job = planned(request_for(models["llama"], ids, tmp_path / "out"))
    assert job.folds is not None
    first, *rest = job.folds.folds
    assert first.is_norm
    wrong = replace(job, folds=replace(job.folds, folds=(replace(first, readers=first.readers[:-1]), *rest)))
    with pytest.raises(Refused, match="computes something else"):
        calibrated(wrong, tmp_path / "state")
