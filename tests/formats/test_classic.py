"""Checkpoints from before megatron-core, made by torch: nested names, each version's row order, args of their time."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dconv.arch.registry import by_name
from dconv.errors import Damaged, Refused
from dconv.pipeline import Request, convert, prepare
from dconv.sharding.coords import Parallel
from tests.models import config_of, tensors, write_random

WIDTH = 8  # of a head in `config_of`
VERSIONS = (None, 0, 1.0, 2.0, 3.0)
LAYOUTS = (Parallel(), Parallel(tp=2, pp=2, etp=2), Parallel(tp=4, pp=1, etp=4), Parallel(pp=2, vpp=2))
#: Both generations of names: before 2021, and the last.
EARLY = {"stack": "transformer", "attention": "attention", "input_layernorm": "input_layernorm",
         "pre_mlp_layernorm": "post_attention_layernorm", "final_layernorm": "final_layernorm"}  # fmt: skip
LATE = {"stack": "encoder", "attention": "self_attention", "input_layernorm": "input_norm",
        "pre_mlp_layernorm": "post_attention_norm", "final_layernorm": "final_norm"}  # fmt: skip
#: Args that a namespace of 2020 had; those of the model alone.
OF_2020 = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "attention_dropout",
           "hidden_dropout", "init_method_std", "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "fp16",
           "bias_gelu_fusion", "apply_residual_connection_post_layernorm", "padded_vocab_size",
           "make_vocab_size_divisible_by")  # fmt: skip


def of_version(rows: Tensor, version: float | None) -> Tensor:
    """The inverse of Megatron-LM's ``fix_query_key_value_ordering`` on one tensor-parallel partition."""
    if version in (2.0, 3.0):
        return rows
    heads = rows.view(-1, 3, WIDTH, *rows.shape[1:])
    if version in (None, 0):
        heads = heads.transpose(0, 1)
    else:
        heads = heads.transpose(1, 2)
    return heads.reshape(rows.shape).contiguous()


def nested(state: dict[str, Any], version: float | None, names: dict[str, str], tied: bool) -> dict[str, Any]:
    """A stage's state dict of megatron-core's local spec as ``state_dict_for_save_checkpoint`` nested it."""
    model: dict[str, Any] = {}
    language: dict[str, Any] = {}
    for name, value in state.items():
        if value is None:
            continue
        head, _, rest = name.partition(".")
        if head in ("encoder", "decoder"):
            for ours, theirs in (("self_attention.linear_qkv", f"{names['attention']}.query_key_value"),
                                 ("self_attention.linear_proj", f"{names['attention']}.dense"),
                                 ("mlp.linear_fc1", "mlp.dense_h_to_4h"), ("mlp.linear_fc2", "mlp.dense_4h_to_h"),
                                 *((norm, names[norm]) for norm in names if norm.endswith("norm"))):  # fmt: skip
                rest = rest.replace(ours, theirs)
            if "query_key_value" in rest:
                value = of_version(value, version)
            language.setdefault(names["stack"], {})[rest] = value
        elif head == "embedding":
            module, parameter = rest.split(".")
            language.setdefault("embedding", {})[module] = {parameter: value}
        elif name == "output_layer.weight":
            if tied:
                model["word_embeddings_for_head"] = {"weight": value}
            else:
                language["output_layer"] = {"weight": value}
        elif head == "pooler":
            language.setdefault("pooler", {})[rest] = value
        elif name == "output_layer.bias":
            model.setdefault("lm_head", {})["bias"] = value
        else:
            model.setdefault(head, {})[rest.replace("layer_norm.", "layernorm.")] = value
    return {"language_model": language, **model}


def classic(
    folder: Path, family: str, parallel: Parallel, version: float | None, names: dict[str, str], **args: Any
) -> tuple[Path, Path]:
    """A HuggingFace directory of random bits, and the same model as a classic checkpoint; their paths."""
    known = by_name(family)
    # args of 2020 have the padded vocabulary alone, and nothing about the feed-forward size
    sizes = {"vocab_size": 64, "intermediate_size": 4 * 8 * WIDTH} if names is EARLY else {}
    config = config_of(known, num_attention_heads=8, tie_word_embeddings=family != "llama", **sizes)
    source = write_random(folder / "hf", known, config)
    convert(
        Request(
            source, "megatron", folder / "core", parallel=parallel, megatron_format="legacy", divisor=16,
            transformer_impl="local",
        )
    )  # fmt: skip
    for path in sorted((folder / "core").rglob("model_optim_rng.pt")):
        with torch.serialization.safe_globals([Namespace]):
            state = torch.load(path, weights_only=True)
        said = vars(state["args"])
        if names is EARLY:
            said = {name: said.get(name, False) for name in OF_2020}
            said["layernorm_epsilon"] = config.get("layer_norm_epsilon", config.get("layer_norm_eps"))
        made = {"args": Namespace(**said, **args), "iteration": 10, "lr_scheduler": {"num_steps": 10}}
        made |= {key: nested(state[key], version, names, family != "llama") for key in state if key.startswith("model")}
        if version is not None:
            made["checkpoint_version"] = version
        out = folder / "classic" / "iter_0000010" / path.parent.name / path.name
        out.parent.mkdir(parents=True)
        torch.save(made, out)
    (folder / "classic" / "latest_checkpointed_iteration.txt").write_text("10")
    return source, folder / "classic"


@pytest.mark.parametrize("names", [EARLY, LATE], ids=["2020", "2023"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", ["gpt2", "megatron-bert", "bert"])
def test_every_version_reads_as_it_was(
    family: str, version: float | None, names: dict[str, str], tmp_path: Path
) -> None:
    for number, parallel in enumerate(LAYOUTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        source, path = classic(folder, family, parallel, version, names)
        job = prepare(Request(path, "hf", folder / "back"))
        assert job.family.name == family
        convert(job.request)
        assert tensors(folder / "back") == tensors(source), parallel


def test_llama_of_before_megatron_core(tmp_path: Path) -> None:
    """Rotary positions, gate and up, two heads a query group, an output layer: all of 2023, version 3."""
    for number, parallel in enumerate(LAYOUTS[:2]):
        folder = tmp_path / str(number)
        folder.mkdir()
        source, path = classic(folder, "llama", parallel, 3.0, LATE)
        convert(Request(path, "hf", folder / "back"))
        assert tensors(folder / "back") == tensors(source)


def test_a_classic_checkpoint_becomes_one_of_megatron_core_in_another_layout(tmp_path: Path) -> None:
    source, path = classic(tmp_path, "gpt2", Parallel(tp=2, pp=2, etp=2), 0, EARLY)
    convert(Request(path, "megatron", tmp_path / "m", parallel=Parallel(tp=4, etp=4)))
    convert(Request(tmp_path / "m", "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(source)


def test_a_release_without_args_takes_the_config_that_is_given(tmp_path: Path) -> None:
    """As NVIDIA's 345M models were published: one file, no args, no version."""
    source, path = classic(tmp_path, "gpt2", Parallel(), None, EARLY)
    file = next(path.rglob("*.pt"))
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(file, weights_only=True)
    torch.save({"model": state["model"], "iteration": 0}, file)
    convert(Request(path, "hf", tmp_path / "back", hf_config=source))
    assert tensors(tmp_path / "back") == tensors(source)


def test_the_earliest_namespaces_mean_gelu_by_tanh(tmp_path: Path) -> None:
    _, path = classic(tmp_path, "gpt2", Parallel(), 1.0, EARLY)
    file = next(path.rglob("*.pt"))
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(file, weights_only=True)
    del state["args"].bias_gelu_fusion
    torch.save(state, file)
    job = prepare(Request(path, "megatron"))
    assert job.source.args is not None
    assert job.family.config.to_hf(job.source.args)["activation_function"] == "gelu_new"


@pytest.mark.parametrize("version", [4.0, "2", True, 1.5])
def test_an_order_that_nobody_knows_is_refused(version: Any, tmp_path: Path) -> None:
    _, path = classic(tmp_path, "gpt2", Parallel(), 2.0, LATE)
    file = next(path.rglob("*.pt"))
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(file, weights_only=True)
    torch.save({**state, "checkpoint_version": version}, file)
    with pytest.raises(Refused, match="unknown row order"):
        prepare(Request(path, "hf"))


def test_ranks_of_two_versions_are_damage(tmp_path: Path) -> None:
    _, path = classic(tmp_path, "gpt2", Parallel(tp=2, etp=2), 2.0, LATE)
    file = sorted(path.rglob("*.pt"))[1]
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(file, weights_only=True)
    torch.save({**state, "checkpoint_version": 0}, file)
    with pytest.raises(Damaged, match="version"):
        prepare(Request(path, "hf"))


@pytest.mark.parametrize(
    ("place", "named"),
    [(("language_model", "encoder"), "encoder.layers.0.adapter.weight"), (("tail",), "tail.layers.0.adapter.weight")],
)
def test_nothing_of_a_nested_model_is_passed_over(place: tuple[str, ...], named: str, tmp_path: Path) -> None:
    _, path = classic(tmp_path, "gpt2", Parallel(), 3.0, LATE)
    file = next(path.rglob("*.pt"))
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(file, weights_only=True)
    tree = state["model"]
    for key in place:
        tree = tree.setdefault(key, {})
    tree["layers.0.adapter.weight"] = torch.zeros(2, 2)
    torch.save(state, file)
    with pytest.raises(Refused, match="in no row of gpt2") as caught:
        prepare(Request(path, "hf"))
    assert named.partition(".")[2] in str(caught.value)
