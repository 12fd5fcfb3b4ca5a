"""Calibration from the request to the files: against a plain loop over transformers' model, any ranks, after a kill."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="calibration computes with torch")
transformers = pytest.importorskip("transformers", reason="calibration runs transformers' layers")

from dconv.describe import describe_model  # noqa: E402
from dconv.errors import Preempted, Refused, UsageError  # noqa: E402
from dconv.pipeline import Request, prepare, run  # noqa: E402
from dconv.quant import loop  # noqa: E402
from dconv.quant.gptq import Recipe  # noqa: E402
from dconv.quant.grid import Numbers  # noqa: E402
from dconv.sharding.rank import Settings  # noqa: E402
from tests.models import tree_digest  # noqa: E402
from tests.processes import call  # noqa: E402
from tests.quant.calibrated import FAMILIES, model_of, request_for  # noqa: E402
from tests.quant.models import values_of  # noqa: E402
from tests.quant.textbook import textbook  # noqa: E402


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: model_of(family, folder / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 61, (12, 512)))
    return path


# ------------------------------------------------------------------------------------------------ what is computed


def plain_gptq(folder: Path, tokens: torch.Tensor, recipe: Recipe) -> dict[str, torch.Tensor]:
    """GPTQ of a Llama by its own forward pass, with hooks, all samples at once, and the textbook: codes by name."""
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    found: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(net.model.layers):
        stages = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
                  ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))  # fmt: skip
        for names in stages:
            given: list[torch.Tensor] = []
            hook = layer.get_submodule(names[0]).register_forward_pre_hook(lambda _, args, to=given: to.append(args[0]))
            with torch.no_grad():
                net(tokens)
            hook.remove()
            x = given[0].reshape(-1, given[0].shape[-1]).double()
            for name in names:
                module = layer.get_submodule(name)
                weight, codes = textbook(module.weight.data, (x.T @ x).float(), recipe)
                module.weight.data = weight.float()
                found[f"model.layers.{index}.{name}"] = codes
    return found


@pytest.mark.parametrize("said", [{}, {"sym": False, "desc_act": True}], ids=str)
def test_against_a_plain_loop(models: dict[str, Path], ids: Path, tmp_path: Path, said: dict[str, Any]) -> None:
    out = tmp_path / "out"
    run(prepare(request_for(models["llama"], ids, out, quant="gptq_v2", **said)), Settings())
    ordered = said.get("desc_act", False)
    recipe = Recipe(Numbers(4, said.get("sym", True)), 32, desc_act=ordered, group_aware=not ordered)
    wanted = plain_gptq(models["llama"], torch.from_numpy(np.load(ids)), recipe)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    same = []
    for name, codes in wanted.items():
        words = torch.from_numpy(stored(out)[f"{name}.qweight"])
        ours = ((words[:, None, :] >> shifts[None, :, None]) & 15).reshape(-1, words.shape[1]).T
        same.append(float((ours == codes).float().mean()))
    assert min(same) > 0.97, same  # a tie that falls otherwise moves the columns behind it
    assert np.mean(same) > 0.99


def stored(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "quant"),
    [*((family, "gptq") for family in FAMILIES),
     *((family, quant) for family in ("llama", "qwen2_moe") for quant in ("gptq_v2", "pack-quantized"))],
)  # fmt: skip
def test_every_family_gets_nearer_than_rounding(
    family: str, models: dict[str, Path], ids: Path, tmp_path: Path, quant: str
) -> None:
    """Outputs are decoded from the written files; the samples' own logits are what calibration is for."""
    out = tmp_path / "out"
    run(prepare(request_for(models[family], ids, out, quant=quant, routing_weighted=family == "mixtral")), Settings())
    dense, rounded = decoded(out), nearest_of(models[family])
    tokens = torch.from_numpy(np.load(ids))[:4, :64]
    reference = logits(models[family], tokens, {})
    near, far = (float((logits(models[family], tokens, w) - reference).square().mean()) for w in (dense, rounded))
    assert near < 0.9 * far
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == ("compressed-tensors" if quant == "pack-quantized" else "gptq")
    report = json.loads((out / "calibration.json").read_text())
    assert {line["weight"] for line in report["weights"]} == rounded.keys()
    assert "<svg" in (out / "calibration.html").read_text()


def decoded(folder: Path) -> dict[str, Any]:
    """The weights of an output, as dconv reads them back."""
    dense = folder.with_name(f"{folder.name}-dense")
    run(prepare(Request(folder, "hf", dense, dtype="f32")), Settings())
    return values_of(dense)


def nearest_of(folder: Path) -> dict[str, Any]:
    """Every linear layer rounded to nearest on the same grid."""
    from dconv.coded.encode import linears
    from dconv.quant.gptq import nearest

    model = describe_model(folder)
    recipe, values = Recipe(Numbers(4, symmetric=True), 32), values_of(folder)
    names = linears(model.family, model.facts, model.logical)
    return {name: nearest(torch.from_numpy(values[name]).float(), recipe).decode().numpy() for name in names}


def logits(folder: Path, tokens: torch.Tensor, changed: dict[str, Any]) -> torch.Tensor:
    """Of a model with some weights replaced, by their names in the checkpoint."""
    from dconv.net.weights import Weights

    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = net.state_dict()
    weights = Weights(describe_model(folder).logical, net)
    with torch.no_grad():
        for name, value in state.items():
            if (source := weights.source(name)) in changed:
                value.copy_(torch.from_numpy(np.asarray(changed[source], np.float32)))
            elif value.ndim == 3 and weights.by_expert(name):
                for expert, names in enumerate(weights.sources(name)):
                    if names[0] in changed:
                        parts = [torch.from_numpy(np.asarray(changed[one], np.float32)) for one in names]
                        value[expert].copy_(torch.cat(parts))
        return net(tokens).logits


# ------------------------------------------------------------------------------------------------ who computes it


@pytest.mark.parametrize(
    ("name", "world", "ep"),
    [
        ("mixtral", 2, 2),
        *(
            pytest.param(*it, marks=pytest.mark.long)
            for it in (("mixtral", 2, 1), ("llama", 3, 1), ("deepseek_v2", 4, 2))
        ),
    ],
)
def test_any_number_of_ranks(
    models: dict[str, Path], ids: Path, tmp_path: Path, name: str, world: int, ep: int
) -> None:
    """Same codes and scales; the samples are two blocks, so that some of three ranks have none."""
    request = request_for(models[name], ids, tmp_path / "one", desc_act=True, static_groups=True, mse=True)
    run(prepare(request), Settings(threads=2))
    code, _, err = call(
        sys.executable, "-m", "dconv", "convert", str(models[name]), "gptq", "-o", str(tmp_path / "many"),
        "--calibration", str(ids), "--quantization-config", request.quantization_config or "",
        "--nproc", str(world), "--ep", str(ep), "--quiet",
    )  # fmt: skip
    assert code == 0, err
    one, many = (weights_digest(tmp_path / folder) for folder in ("one", "many"))
    assert one == many


def weights_digest(folder: Path) -> dict[str, str]:
    return {
        name: digest for name, digest in tree_digest(folder).items() if name.endswith((".safetensors", "config.json"))
    }


@pytest.mark.parametrize("name", ["mixtral", "wide"])
def test_any_memory(models: dict[str, Path], ids: Path, tmp_path: Path, name: str,
                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Outputs that there is no room to keep are computed once more, and sums that there is no room for are made in
    several passes, to the same bits."""
    model = models.get(name) or model_of("llama", tmp_path / "model", intermediate_size=640, num_hidden_layers=1)
    own, passes = loop.Calibration._pass, []
    monkeypatch.setattr(loop.Calibration, "_pass", lambda self, *args: passes.append(1) or own(self, *args))
    counted = []
    for kind, room in (("much", 1 << 30), ("little", 1 << 16)):
        run(prepare(request_for(model, ids, tmp_path / kind)), Settings(max_memory=room, threads=2))
        counted.append(len(passes))
    assert counted[1] - counted[0] > counted[0]
    assert weights_digest(tmp_path / "much") == weights_digest(tmp_path / "little")


def killed_before(layer: int, request: Request) -> None:
    """Calibrate, and be killed where what is before a layer is done."""
    own = loop.Calibration._pass_on

    def killed(self: loop.Calibration, at: int, report: list[Any]) -> None:
        if at == layer:
            raise Preempted("killed")
        own(self, at, report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Calibration, "_pass_on", killed)
        with pytest.raises(Preempted):
            run(prepare(request), Settings())


def layers_of(request: Request) -> list[int]:
    """Calibrate; the layers that this run went through."""
    own, passed = loop.Calibration._layer, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Calibration, "_layer", lambda s, la, at, mine: passed.append(at) or own(s, la, at, mine))
        run(prepare(request), Settings())
    return passed


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_stopped_between_layers(models: dict[str, Path], ids: Path, tmp_path: Path, layer: int) -> None:
    """What a killed run leaves is gone on from; only whole layers count."""
    run(prepare(request_for(models["llama"], ids, tmp_path / "whole")), Settings())
    request = request_for(models["llama"], ids, tmp_path / "again")
    killed_before(layer, request)
    assert not (tmp_path / "again").exists()
    assert layers_of(request) == list(range(max(layer - 1, 0), 2))
    assert weights_digest(tmp_path / "whole") == weights_digest(tmp_path / "again")
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize("damage", ["digit", "cut", "empty", "other"])
def test_a_damaged_note_of_a_killed_run(models: dict[str, Path], ids: Path, tmp_path: Path, damage: str) -> None:
    """It is not gone on from where the note of how far it was is not as it was written."""
    run(prepare(request_for(models["llama"], ids, tmp_path / "whole")), Settings())
    request = request_for(models["llama"], ids, tmp_path / "again")
    killed_before(2, request)
    (note,) = tmp_path.glob("again.partial-*/**/state.json")
    noted = note.read_bytes()
    assert b'"layer": 1,' in noted
    changed = {"digit": noted.replace(b'"layer": 1,', b'"layer": 2,'), "cut": noted[:-40], "empty": b"", "other": b"[]"}
    note.write_bytes(changed[damage])
    assert layers_of(request) == [0, 1]
    assert weights_digest(tmp_path / "whole") == weights_digest(tmp_path / "again")


# ------------------------------------------------------------------------------------------------ experts


def test_an_expert_that_sees_no_token(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """Rounded to nearest, and told; the others are calibrated."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((models["qwen2_moe"] / "config.json").read_bytes())
    tensors = load_file(models["qwen2_moe"] / "model.safetensors")
    (embedding,) = (value for name, value in tensors.items() if name.endswith("embed_tokens.weight"))
    embedding[:, 0] = 5.0  # a channel that every token has, and by which the router tells expert 2 from the others
    gate = tensors["model.layers.0.mlp.gate.weight"]
    gate[2] = 0
    gate[2, 0] = -1e4
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        tensors[f"model.layers.0.self_attn.{name}.weight"] *= 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    run(prepare(request_for(folder, ids, out, routing_weighted=True)), Settings())
    report = json.loads((out / "calibration.json").read_text())
    missed = {line["weight"] for line in report["weights"] if not line["tokens"]}
    assert {f"model.layers.0.mlp.experts.2.{part}_proj.weight" for part in ("gate", "up", "down")} <= missed
    first = next(layer for layer in report["coverage"] if layer["layer"] == 0)
    assert first["without_tokens"] == [2]
    assert "rounded to nearest" in report["summary"]
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    assert np.array_equal(decoded(out)[name], nearest_of(folder)[name])


def test_routing_weights(models: dict[str, Path], ids: Path) -> None:
    """Σ c·xxᵀ of an expert and of a shared one, against transformers' own modules."""
    from dconv.quant.blocks import Blocks
    from dconv.quant.network import Network
    from dconv.quant.passes import Passes
    from dconv.quant.peers import Peers
    from dconv.quant.sums import Sum

    model = describe_model(models["qwen2_moe"])
    tokens = torch.from_numpy(np.load(ids))[:2, :64]
    net = Network(model.config, model.logical, "cpu", 1 << 26, peers := Peers())
    hidden = net.embedded(tokens)
    layer = net.load(0)
    names = set(layer.linears()) | {name for one in layer.experts.values() for name in one.weights}
    passes = Passes(layer, names, weigh_shared=True, peers=peers)
    groups = [group for stage in passes.groups(hidden[:1]) for group in stage]
    expert = next(g for g in groups if g.expert == 1 and not g.outer)
    shared = next(g for g in groups if any("shared_expert.gate_proj" in name for name in g.names))
    sums = {group: Sum(group.columns) for group in (expert, shared)}
    for group in (expert, shared):
        experts = {(group.module, group.outer)} if group.module else set()
        passes.collect([0], lambda _: hidden, {group: sums[group].add}, experts, through=False)
    passes.close()
    net.forget(layer)
    whole = transformers.AutoModelForCausalLM.from_pretrained(models["qwen2_moe"], dtype=torch.float32)
    block, seen = whole.model.layers[0].mlp, {}
    block.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    block.gate.register_forward_hook(lambda _m, _a, made: seen.update(routing=made))
    with torch.no_grad():
        whole(tokens)
        x = seen["x"].reshape(-1, 64)
        _, weights, index = seen["routing"]
        chosen = (weights * (index == 1)).sum(-1)
        assert sums[expert].count == int((index == 1).sum())
        gate = block.shared_expert_gate(x).sigmoid()[:, 0]
    for group, each in ((expert, chosen), (shared, gate)):
        assert torch.allclose(sums[group].total(), (x * each[:, None]).T @ x, rtol=1e-3, atol=1e-3)
    assert isinstance(Blocks(np.zeros((1, 8), np.int32), Path()), Blocks)


# ------------------------------------------------------------------------------------------------ what is refused


def test_refused_before_the_first_byte(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    request = request_for(models["llama"], ids, tmp_path / "out")
    for wrong, error in (
        ({"format": "hf"}, UsageError),
        ({"quantization_config": '{"group_size": 32, "overrides": [{"pattern": "*", "wq": "fp6"}]}'}, Refused),
        ({"quantization_config": '{"nsamples": 4096, "seqlen": 512}'}, Refused),
        ({"quantization_config": '{"bits": 5}'}, UsageError),
        ({"quantization_config": '{"group_sise": 32}'}, UsageError),
    ):
        with pytest.raises(error):
            prepare(replace(request, **wrong))
    assert not list(tmp_path.iterdir())


def test_whole_numbers_are_not_calibrated_anew(models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    run(prepare(request_for(models["llama"], ids, tmp_path / "gptq")), Settings())
    with pytest.raises(Refused, match="whole numbers already"):
        prepare(request_for(tmp_path / "gptq", ids, tmp_path / "again"))
    run(prepare(Request(tmp_path / "gptq", "gptq", tmp_path / "v2", quant="gptq_v2")), Settings())
    one, two = decoded(tmp_path / "gptq"), decoded(tmp_path / "v2")
    assert all(np.array_equal(one[name], two[name]) for name in one)
