"""State dicts as teams keep them: ``pt``, BMTrain's, Megatron's ``model.pt``, bare ``mp_rank_*``; read and written.

What dconv writes is opened by torch itself; what it reads was written by torch in the test.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dconv.arch.registry import by_name
from dconv.cli import main
from dconv.errors import Damaged, DconvError, Refused
from dconv.examine import check, inspect
from dconv.pipeline import Request, convert, describe_model, prepare, run
from dconv.sharding.commit import Settings
from dconv.sharding.coords import Parallel
from tests.models import config_of, tensors, tree_digest, write_random
from tests.oracles import hf

FAMILIES = ("llama", "qwen3", "phi3")
Weights = dict[str, Tensor]


def source(folder: Path, family: str = "llama", **sizes: Any) -> Path:
    known = by_name(family)
    return write_random(folder, known, config_of(known, **sizes))


def load(path: Path) -> Weights:
    """What torch makes of a file."""
    found = torch.load(path, weights_only=True)
    return {name: value for name, value in found.items() if value is not None}


def weights_of(folder: Path) -> Weights:
    """A HuggingFace directory's tensors, its bytes read by the test's own few lines."""
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    return {
        name: torch.frombuffer(bytearray(data), dtype=dtypes[dtype]).reshape(shape)
        for name, (dtype, shape, data) in tensors(folder).items()
    }


def same(got: Weights, expected: Weights) -> None:
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert got[name].shape == weight.shape, name
        assert torch.equal(got[name].contiguous().view(torch.int16), weight.contiguous().view(torch.int16)), name


def refused(kind: type[DconvError], message: str, request: Request) -> DconvError:
    """Expect an error that leaves nothing behind."""
    before = tree_digest(request.output.parent)
    with pytest.raises(kind, match=message) as caught:
        convert(request)
    assert tree_digest(request.output.parent) == before
    return caught.value


# ------------------------------------------------------------------------------------------------------------- pt


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_pt_is_a_plain_state_dict(tmp_path: Path, family: str, tied: bool) -> None:
    model = source(tmp_path / "model", family, tie_word_embeddings=tied)
    convert(Request(model, "pt", tmp_path / "pt"))
    same(load(tmp_path / "pt" / "pytorch_model.bin"), weights_of(model))
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "pt" / name).read_bytes() == (model / name).read_bytes()
    convert(Request(tmp_path / "pt", "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(model)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen3", True)])
def test_pt_cut_into_ranks(tmp_path: Path, family: str, tied: bool, tp: int) -> None:
    """Each file has torch's own chunk of rows or columns, and the files together are the model again."""
    model = source(tmp_path / "model", family, tie_word_embeddings=tied, num_key_value_heads=4, vocab_size=64)
    convert(Request(model, "pt", tmp_path / "pt", parallel=Parallel(tp=tp, etp=tp)))
    whole = weights_of(model)
    for rank in range(tp):
        expected = {}
        for name, weight in whole.items():
            axis = None if "norm" in name else int(name.endswith(("o_proj.weight", "down_proj.weight")))
            expected[name] = weight if axis is None else weight.chunk(tp, axis)[rank]
        same(load(tmp_path / "pt" / f"pytorch_model.tp{rank}.bin"), expected)
    assert not (tmp_path / "pt" / f"pytorch_model.tp{tp}.bin").exists()
    convert(Request(tmp_path / "pt", "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(model)


def test_pt_with_dtype(tmp_path: Path) -> None:
    model = source(tmp_path / "model")
    convert(Request(model, "pt", tmp_path / "pt", dtype="f32"))
    assert {weight.dtype for weight in load(tmp_path / "pt" / "pytorch_model.bin").values()} == {torch.float32}
    assert json.loads((tmp_path / "pt" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("family", "sizes", "tp", "message"),
    [
        ("llama", {"vocab_size": 64}, 4, "q_proj.weight does not divide over 4"),  # two query groups
        ("llama", {}, 2, "does not divide over tensor parallel 2"),  # 61 words
        ("llama", {"vocab_size": 64, "intermediate_size": 45}, 2, "does not divide"),
        ("phi3", {"vocab_size": 64}, 2, "qkv_proj.weight does not divide over 2"),
    ],
)
def test_pt_that_does_not_divide(tmp_path: Path, family: str, sizes: dict[str, Any], tp: int, message: str) -> None:
    model = source(tmp_path / "work" / "model", family, **sizes)
    request = Request(model, "pt", tmp_path / "work" / "out", parallel=Parallel(tp=tp, etp=tp))
    refused(Refused, message, request)


def test_ranks_of_fused_projections_are_not_put_together(tmp_path: Path) -> None:
    model = source(tmp_path / "work" / "model", "phi3", vocab_size=64)
    weights = weights_of(model)
    (model / "model.safetensors").unlink()
    for rank in range(2):
        cut = {n: w if "norm" in n else w.chunk(2, int("o_proj" in n or "down" in n))[rank] for n, w in weights.items()}
        torch.save(cut, model / f"pytorch_model.tp{rank}.bin")
    refused(Refused, "fused projections", Request(model, "hf", tmp_path / "work" / "out"))


@pytest.mark.parametrize("name", ["model.pt", "checkpoint.pth", "pytorch_model.bin", "anything.bin"])
@pytest.mark.parametrize("old_form", [False, True])
def test_a_file_by_name_and_its_directory(tmp_path: Path, name: str, old_form: bool) -> None:
    """Read with the config beside it, or with another's, or as the directory's only state dict."""
    model = source(tmp_path / "model")
    bare = tmp_path / "bare"
    bare.mkdir()
    torch.save(weights_of(model), bare / name, _use_new_zipfile_serialization=not old_form)
    convert(Request(bare / name, "hf", tmp_path / "a", hf_config=model))
    shutil.copy(model / "config.json", bare)
    torch.save({"step": 1}, bare / "training_args.bin")  # a trainer's, no weights
    convert(Request(bare / name, "hf", tmp_path / "b"))
    convert(Request(bare, "hf", tmp_path / "c"))
    for out in "abc":
        assert tensors(tmp_path / out) == tensors(model)


def test_a_bare_file_without_a_config(tmp_path: Path) -> None:
    model = source(tmp_path / "model")
    bare = tmp_path / "bare"
    bare.mkdir()
    torch.save(weights_of(model), bare / "model.pt")
    error = refused(Refused, "nothing says what model this is", Request(bare / "model.pt", "hf", bare / "out"))
    assert "--hf-config" in error.do


def test_two_state_dicts_are_not_guessed_between(tmp_path: Path) -> None:
    model = source(tmp_path / "work" / "model")
    weights = weights_of(model)
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "a.pt")
    torch.save(weights, model / "b.pt")
    refused(Damaged, "no weights that can be told apart", Request(model, "hf", tmp_path / "work" / "out"))
    refused(Damaged, "no state dict that can be told apart",
            Request(model, "hf", tmp_path / "work" / "out", source_format="pt"))  # fmt: skip
    convert(Request(model / "b.pt", "hf", tmp_path / "out"))
    assert weights_of(tmp_path / "out").keys() == weights.keys()


@pytest.mark.parametrize("keep", [0, 10, 3000])
def test_truncated(tmp_path: Path, keep: int) -> None:
    work = tmp_path / "work"
    work.mkdir()
    convert(Request(source(tmp_path / "model"), "pt", work / "pt"))
    path = work / "pt" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    refused(Damaged, "", Request(path, "hf", work / "out"))


class Evil:
    """Pickled as a call of ``os.system``."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("names", ["pt", "bmtrain", "model_pt"])
def test_a_pickle_that_is_code(tmp_path: Path, names: str) -> None:
    work = tmp_path / "work"
    work.mkdir()
    made = {
        "pt": "model.norm.weight",
        "bmtrain": "input_embedding.weight",
        "model_pt": "decoder.final_layernorm.weight",
    }
    torch.save({made[names]: torch.ones(4), "x": Evil(tmp_path / "executed")}, work / "model.pt")
    (work / "metadata.json").write_text('{"model_type": "GPT"}')
    for path in (work, work / "model.pt"):
        refused(Damaged, "foreign global", Request(path, "hf", work / "out"))
    assert not (tmp_path / "executed").exists()
    torch.load(work / "model.pt", weights_only=False)
    assert (tmp_path / "executed").exists(), "the pickle was not hostile at all"


@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt", "fifo.pt"])
def test_other_files(tmp_path: Path, name: str) -> None:
    work = tmp_path / "work"
    work.mkdir()
    if name == "fifo.pt":
        os.mkfifo(work / name)
        with pytest.raises(Refused, match="a checkpoint is a directory"):
            prepare(Request(work / name, "hf", work / "out"))
        return
    (work / name).write_bytes(b"PK")
    refused(Refused, "a checkpoint is a directory", Request(work / name, "hf", work / "out"))


# -------------------------------------------------------------------------------------------------------- bmtrain


def bmtrain_name(name: str) -> str:
    """HuggingFace's name as the public BMTrain converters translate it."""
    for theirs, ours in (
        ("model.embed_tokens", "input_embedding"), ("model.norm", "encoder.output_layernorm"),
        ("lm_head", "output_projection"), ("model.layers", "encoder.layers"),
        ("post_attention_layernorm", "ffn.layernorm_before_ffn"),
        ("input_layernorm", "self_att.layernorm_before_attention"),
        ("self_attn.o_proj", "self_att.self_attention.attention_out"), ("mlp.gate_proj", "ffn.ffn.w_in.w_0"),
        ("mlp.up_proj", "ffn.ffn.w_in.w_1"), ("mlp.down_proj", "ffn.ffn.w_out"),
        *((f"self_attn.{x}_proj", f"self_att.self_attention.project_{x}") for x in "qkv"),
    ):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_bmtrain(tmp_path: Path, tied: bool, biased: bool) -> None:
    sizes = {"tie_word_embeddings": tied, "attention_bias": biased, "mlp_bias": biased, "rope_theta": 5e5}
    model = source(tmp_path / "model", **sizes)
    convert(Request(model, "bmtrain", tmp_path / "bmt"))
    expected = {bmtrain_name(name): weight for name, weight in weights_of(model).items()}
    same(load(tmp_path / "bmt" / "pytorch_model.pt"), expected)
    said = json.loads((tmp_path / "bmt" / "config.json").read_text())
    keys = ("dim_model", "dim_ff", "num_layers", "num_heads", "num_kv_heads", "dim_head")
    assert [said[key] for key in keys] == [32, 48, 4, 4, 2, 8]
    assert (said["vocab_size"], said["eps"], said["base"], said["tie_lm_head"]) == (61, 1e-5, 5e5, tied)
    assert not said.keys() & {"hidden_size", "scale_emb", "scale_depth", "dim_model_base"}
    convert(Request(tmp_path / "bmt", "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(model)
    family = by_name("llama")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "back"))
    assert family.config.facts(after) == family.config.facts(before)
    assert {key: after[key] for key in ("rms_norm_eps", "rope_theta", "torch_dtype", "max_position_embeddings")} == {
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "torch_dtype": "bfloat16", "max_position_embeddings": 128,
    }  # fmt: skip


def bmtrain_source(folder: Path, model: Path, **config: Any) -> Path:
    """A ModelCenter directory as its own converters write it: four sizes in the config, torch.save."""
    folder.mkdir(parents=True)
    torch.save({bmtrain_name(n): w for n, w in weights_of(model).items()}, folder / "pytorch_model.pt")
    said = {"dim_model": 32, "dim_ff": 48, "num_layers": 4, "num_heads": 4, "dim_head": 8, "norm_eps": 1e-5, **config}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in said.items() if value != "absent"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_bmtrain_sizes_from_the_tensors(tmp_path: Path) -> None:
    """Query groups, vocabulary and tying are what the tensors show; the rotation's base is ModelCenter's constant."""
    model = source(tmp_path / "model", tie_word_embeddings=True)
    made = bmtrain_source(tmp_path / "bmt", model)
    convert(Request(made, "hf", tmp_path / "hf"))
    assert tensors(tmp_path / "hf") == tensors(model)
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (said["num_key_value_heads"], said["vocab_size"], said["tie_word_embeddings"]) == (2, 61, True)
    assert said["rope_theta"] == 10000.0


def test_bmtrain_minicpm_is_called_by_its_name(tmp_path: Path) -> None:
    """MiniCPM's scalars make it a MiniCPM, never a Llama without them."""
    model = source(tmp_path / "model", tie_word_embeddings=True)
    scales = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
    made = bmtrain_source(tmp_path / "bmt", model, eps=1e-5, tie_lm_head=True, scale=True, **scales)
    found = inspect(made)
    assert found.architecture == "MiniCPMForCausalLM"
    from dconv.arch.registry import families

    if "minicpm" not in families():
        refused(Refused, "no family is called MiniCPMForCausalLM", Request(made, "hf", tmp_path / "out"))
        return
    convert(Request(made, "hf", tmp_path / "hf"))
    assert tensors(tmp_path / "hf") == tensors(model)
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {key: said[key] for key in scales} == scales
    convert(Request(tmp_path / "hf", "bmtrain", tmp_path / "again"))
    said = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: said[key] for key in scales} == scales


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"norm_eps": "absent"}, Damaged, "norm_eps is None"),
        ({"num_heads": "absent"}, Damaged, "num_heads is None"),
        ({"num_heads": 3}, Damaged, "project_q is 32"),
        ({"dim_head": 16}, Damaged, "another shape"),
        ({"dim_ff": 64}, Damaged, "another shape"),
        ({"num_layers": 3}, Refused, "in no row of llama"),
        ({"num_layers": 5}, Damaged, "not whole"),
        ({"num_layers": "4"}, Damaged, "num_layers is '4'"),
        ({"qk_norm": True}, Refused, "neither Llama nor MiniCPM"),
        ({"ffn_activate_fn": "gated_gelu"}, Refused, "neither Llama nor MiniCPM"),
        ({"rope_scaling_type": "longrope"}, Refused, "neither Llama nor MiniCPM"),
        ({"scale_emb": 12}, Refused, "neither Llama nor MiniCPM"),
        ({"att_bias": True}, Damaged, "not whole"),
        ({"tie_lm_head": False}, Damaged, "not whole"),
    ],
)
def test_bmtrain_config_that_lies(tmp_path: Path, config: dict[str, Any], kind: type[DconvError], message: str) -> None:
    model = source(tmp_path / "model", tie_word_embeddings=True)
    made = bmtrain_source(tmp_path / "work" / "bmt", model, **config)
    refused(kind, message, Request(made, "hf", tmp_path / "work" / "out"))
    if kind is Refused or config.get("num_heads") or "norm_eps" in config:  # the true config in its place
        convert(Request(made, "hf", tmp_path / "out", hf_config=model))
        assert tensors(tmp_path / "out") == tensors(model)


def test_bmtrain_under_two_names(tmp_path: Path) -> None:
    model = source(tmp_path / "model", tie_word_embeddings=True)
    made = bmtrain_source(tmp_path / "work" / "bmt", model)
    held = torch.load(made / "pytorch_model.pt")
    torch.save({**held, "model.norm.weight": torch.zeros(32)}, made / "pytorch_model.pt")
    refused(Damaged, "two|at once", Request(made, "hf", tmp_path / "work" / "out"))


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("qwen3", {}, "no place for 8 of"),
        ("qwen2", {}, "cannot say all of this qwen2"),
        ("phi3", {}, "no place for"),
        ("mistral", {"sliding_window": 64}, "cannot say all of this mistral"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "cannot say all of this llama"),
        ("llama", {"hidden_act": "gelu"}, "cannot say all of this llama"),
        ("llama", {"scale_emb": 12}, "cannot say all of this llama"),
    ],
)
def test_what_bmtrain_has_no_place_for(tmp_path: Path, family: str, sizes: dict[str, Any], message: str) -> None:
    model = source(tmp_path / "work" / "model", family, **sizes)
    refused(Refused, message, Request(model, "bmtrain", tmp_path / "work" / "out"))


# -------------------------------------------------------------------------------------- bare mp_rank, model_pt


def bare(folder: Path, model: Path, tp: int, pp: int) -> Path:
    """``mp_rank_*`` directly in a directory with only the model inside, as torch saves it."""
    folder.mkdir(parents=True)
    made = folder.parent / "whole"
    convert(Request(model, "megatron", made, parallel=Parallel(tp=tp, pp=pp, etp=tp), megatron_format="legacy"))
    for path in sorted((made / "release").glob("mp_rank_*")):
        states = torch.load(path / "model_optim_rng.pt", weights_only=False)
        (folder / path.name).mkdir(parents=True)
        torch.save({"model": states["model"]}, folder / path.name / "model_optim_rng.pt")
    return folder


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_bare_mp_rank(tmp_path: Path, tp: int, pp: int) -> None:
    model = source(tmp_path / "model")
    made = bare(tmp_path / "work" / "bare", model, tp, pp)
    error = refused(Refused, "nothing says what model this is", Request(made, "hf", tmp_path / "work" / "out"))
    assert "--hf-config" in error.do
    convert(Request(made, "hf", tmp_path / "a", hf_config=model))
    shutil.copy(model / "config.json", made)
    convert(Request(made, "hf", tmp_path / "b"))
    for out in "ab":
        assert tensors(tmp_path / out) == tensors(model)


def test_a_neighbour_is_not_the_config_of_bare_shards(tmp_path: Path) -> None:
    """``huggingface/`` beside bare shards is anybody's; inside a root it is the iteration's."""
    made = bare(tmp_path / "work" / "bare", source(tmp_path / "model"), 1, 1)
    source(tmp_path / "work" / "huggingface", rope_theta=5e5)
    assert describe_model(tmp_path / "work" / "whole").source.config is not None
    refused(Refused, "nothing says what model this is", Request(made, "hf", tmp_path / "work" / "out"))


@pytest.mark.parametrize("impl", ["transformer_engine", "local"])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("qwen3", False), ("phi3", False)])
def test_model_pt(tmp_path: Path, family: str, tied: bool, impl: str) -> None:
    """The same tensors as the legacy container's only rank, without what stands around them."""
    model = source(tmp_path / "model", family, tie_word_embeddings=tied)
    common: dict[str, Any] = {"transformer_impl": impl, "divisor": 8}
    convert(Request(model, "megatron", tmp_path / "legacy", megatron_format="legacy", **common))
    convert(Request(model, "megatron", tmp_path / "made", megatron_format="model_pt", **common))
    states = torch.load(tmp_path / "legacy" / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    found = torch.load(tmp_path / "made" / "model.pt", weights_only=True)
    assert found.keys() == states["model"].keys()
    assert [n for n, w in found.items() if w is None] == [n for n, w in found.items() if n.endswith("_extra_state")]
    same(load(tmp_path / "made" / "model.pt"), {n: w for n, w in states["model"].items() if w is not None})
    said = json.loads((tmp_path / "made" / "metadata.json").read_text())
    fields = ("model_type", "num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
    assert [said[key] for key in fields] == [family, 4, 32, 4, 128, 61]
    fields = ("position_embedding_type", "swiglu", "linear_bias", "output_layer")
    assert [said[key] for key in fields] == ["rope", True, False, not tied]
    convert(Request(tmp_path / "made", "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(model)
    assert (tmp_path / "back" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert (tmp_path / "back" / "tokenizer.json").exists()


@pytest.mark.parametrize("parallel", [Parallel(tp=2, etp=2), Parallel(pp=2), Parallel(tp=2, pp=2, etp=2)])
def test_model_pt_is_one_file(tmp_path: Path, parallel: Parallel) -> None:
    model = source(tmp_path / "work" / "model")
    out = tmp_path / "work" / "out"
    refused(
        Refused,
        "whole model in one file",
        Request(model, "megatron", out, parallel=parallel, megatron_format="model_pt"),
    )


def house(folder: Path, model: Path, **fields: Any) -> Path:
    """A ``model.pt`` that torch saved, with the loaders' fields in ``metadata.json``, and nothing else."""
    folder.mkdir(parents=True)
    made = folder.parent / "legacy"
    convert(Request(model, "megatron", made, megatron_format="legacy", divisor=8))
    states = torch.load(made / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    torch.save(states["model"], folder / "model.pt")
    said = {
        "model_type": "GPT", "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4,
        "max_position_embeddings": 128, "vocab_size": 61, "position_embedding_type": "rope", "swiglu": True,
        "linear_bias": False, "output_layer": True, **fields,
    }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps({key: value for key, value in said.items() if value != "absent"}))
    return folder


ENOUGH = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0}


def test_house_model_pt_needs_what_it_does_not_say(tmp_path: Path) -> None:
    """The house fields alone leave out epsilon and base, which no tensor shows: asked for, not guessed."""
    model = source(tmp_path / "model")
    made = house(tmp_path / "work" / "house", model)
    error = refused(Refused, "nothing says what model this is", Request(made, "hf", tmp_path / "work" / "out"))
    assert "rms_norm_eps, rope_theta" in error.found
    assert "--hf-config" in error.do
    assert "rms_norm_eps" in inspect(made).refused
    convert(Request(made, "hf", tmp_path / "a", hf_config=model))
    convert(Request(made / "model.pt", "hf", tmp_path / "b", hf_config=model))
    for out in "ab":
        assert tensors(tmp_path / out) == tensors(model)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("qwen3", False), ("qwen2", False)])
def test_metadata_that_says_enough(tmp_path: Path, family: str, tied: bool) -> None:
    """Query groups, head size, feed-forward size, norms and biases are read off the tensors, exactly."""
    model = source(tmp_path / "model", family, tie_word_embeddings=tied, rope_theta=5e5)
    fields = {**ENOUGH, "rope_theta": 5e5, "output_layer": not tied, "max_position_embeddings": 777}
    made = house(tmp_path / "work" / "house", model, **fields)
    convert(Request(made, "hf", tmp_path / "hf"))
    assert tensors(tmp_path / "hf") == tensors(model)
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    config = by_name(family).config
    assert config.facts(said) == config.facts(json.loads((model / "config.json").read_text()))
    assert (said["rms_norm_eps"], said["rope_theta"], said["max_position_embeddings"]) == (1e-5, 5e5, 777)
    assert said["torch_dtype"] == "bfloat16"


def test_own_metadata_without_its_side_files(tmp_path: Path) -> None:
    """What dconv writes describes the model by itself where the fields can; a scaled rope they cannot say."""
    for name, rope in (("plain", None), ("scaled", {"rope_type": "linear", "factor": 2.0})):
        model = source(tmp_path / name, rope_scaling=rope)
        made = tmp_path / f"{name}-made"
        convert(Request(model, "megatron", made, megatron_format="model_pt"))
        shutil.rmtree(made / "huggingface")
        if rope is None:
            convert(Request(made, "hf", tmp_path / "hf"))
            assert tensors(tmp_path / "hf") == tensors(model)
        else:
            refused(Refused, "nothing says what model this is", Request(made, "hf", tmp_path / "out"))


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"num_layers": 3}, Refused, "in no row of llama"),
        ({"num_layers": 5}, Damaged, "not whole"),
        ({"num_layers": True}, Damaged, "num_layers is True"),
        ({"num_layers": 10**9}, Damaged, "num_layers is 1000000000"),
        ({"num_layers": "absent"}, Refused, "nothing says"),
        ({"hidden_size": 64}, Damaged, "another shape"),
        ({"num_attention_heads": 3}, Damaged, "another model than its tensors"),
        ({"num_attention_heads": 16, "head_dim": 8}, Damaged, "another model than its tensors"),
        ({"intermediate_size": 64}, Damaged, "another model than its tensors"),
        ({"num_key_value_heads": 4}, Damaged, "another model than its tensors"),
        ({"vocab_size": 65}, Damaged, "another model than its tensors"),
        ({"vocab_size": -1}, Damaged, "vocab_size is -1"),
        ({"linear_bias": True}, Damaged, "not whole"),
        ({"linear_bias": "no"}, Damaged, "true or false"),
        ({"output_layer": False}, Damaged, "two shards of the source disagree"),
        ({"position_embedding_type": "learned_absolute"}, Refused, "none of the families"),
        ({"swiglu": False}, Refused, "none of the families"),
        ({"model_type": "minicpm"}, Refused, "nothing says"),
        ({"model_type": "qwen3"}, Refused, "nothing says"),
        ({"rms_norm_eps": "1e-5"}, Damaged, "finite number"),
        ({"rope_theta": None}, Refused, "nothing says"),
        ({"sharded_backend": "zarr"}, Damaged, "another container"),
        ({"sharded_backend": "torch_dist"}, Damaged, "metadata"),
    ],
)
def test_metadata_that_lies(tmp_path: Path, fields: dict[str, Any], kind: type[DconvError], message: str) -> None:
    model = source(tmp_path / "model", vocab_size=61)
    made = house(tmp_path / "work" / "house", model, **{**ENOUGH, **fields})
    refused(kind, message, Request(made, "hf", tmp_path / "work" / "out"))


def test_torch_dist_beside_a_model_pt(tmp_path: Path) -> None:
    """``sharded_backend`` is looked at first: the directory is torch_dist's, whatever else lies in it."""
    model = source(tmp_path / "model")
    convert(Request(model, "megatron", tmp_path / "dist"))
    torch.save({"decoder.final_layernorm.weight": torch.zeros(32)}, tmp_path / "dist" / "release" / "model.pt")
    found = describe_model(tmp_path / "dist")
    assert found.source.format == "megatron torch_dist"
    convert(Request(tmp_path / "dist", "hf", tmp_path / "hf"))
    assert tensors(tmp_path / "hf") == tensors(model)


def test_extra_states_of_any_kind(tmp_path: Path) -> None:
    """TransformerEngine keeps a tensor there; it is no weight."""
    model = source(tmp_path / "model")
    made = house(tmp_path / "house", model, **ENOUGH)
    held = torch.load(made / "model.pt")
    held["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(5, dtype=torch.uint8)
    torch.save(held, made / "model.pt")
    convert(Request(made, "hf", tmp_path / "hf"))
    assert tensors(tmp_path / "hf") == tensors(model)


# ---------------------------------------------------------------------------------------------------- all of them

TARGETS: dict[str, dict[str, Any]] = {
    "pt": {"format": "pt"},
    "pt in two": {"format": "pt", "parallel": Parallel(tp=2, etp=2)},
    "bmtrain": {"format": "bmtrain"},
    "model_pt": {"format": "megatron", "megatron_format": "model_pt"},
}


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("target", TARGETS)
def test_any_world_gives_the_same_bytes(tmp_path: Path, target: str, world: int) -> None:
    """Ranks as plain calls, the last one first; and again from the container back to HuggingFace."""
    model = source(tmp_path / "model", hidden_size=64, intermediate_size=96, vocab_size=500)
    convert(Request(model, out=tmp_path / "one", **TARGETS[target]))

    def by_ranks(request: Request) -> None:
        launched = time.time()
        outcomes = [
            run(prepare(request), Settings(rank=rank, world=world, launched=launched, max_memory=64 << 10))
            for rank in reversed(range(world))
        ]
        assert [outcome.committed for outcome in outcomes] == [False] * (world - 1) + [True]

    by_ranks(Request(model, out=tmp_path / "many", **TARGETS[target]))
    assert tree_digest(tmp_path / "many") == tree_digest(tmp_path / "one")
    by_ranks(Request(tmp_path / "many", "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(model)


@pytest.mark.parametrize("target", TARGETS)
def test_check_runs_it(tmp_path: Path, target: str) -> None:
    """A real model's output is read back against its receipt and run by transformers or megatron-core."""
    _, model = hf.tiny("llama")
    hf.save(model, tmp_path / "model")
    convert(Request(tmp_path / "model", out=tmp_path / "out", **TARGETS[target]))
    found = check(tmp_path / "out")
    assert found.reread is not None and found.reread.whole and found.run is not None
    expected = check(tmp_path / "model").run
    assert expected is not None
    assert found.run["largest_logit"] == pytest.approx(expected["largest_logit"], rel=1e-4)


def test_verify_logits_of_a_cut_state_dict(tmp_path: Path) -> None:
    from dconv import verify

    _, model = hf.tiny("llama")
    hf.save(model, tmp_path / "model")
    job = prepare(Request(tmp_path / "model", "pt", tmp_path / "out", parallel=Parallel(tp=2, etp=2)))
    run(job, Settings())
    assert verify.logits(job, tmp_path / "out")["why"] == "the same weights"


def edit(path: Path, change: Callable[[Weights], object]) -> None:
    held = torch.load(path)
    change(held)
    torch.save(held, path)


@pytest.mark.parametrize("target", ["pt", "bmtrain", "model_pt"])
def test_strange_and_missing_tensors(tmp_path: Path, target: str) -> None:
    work = tmp_path / "work"
    work.mkdir()
    convert(Request(source(tmp_path / "model"), out=work / "made", **TARGETS[target]))
    path = next(path for path in sorted((work / "made").iterdir()) if path.suffix in (".pt", ".bin"))
    edit(path, lambda held: held.update({"more.weight": torch.zeros(3)}))
    refused(Refused, "in no row of llama", Request(work / "made", "hf", work / "out"))
    edit(path, lambda held: held.pop("more.weight"))
    edit(path, lambda held: held.pop(next(name for name in held if "norm" in name and held[name] is not None)))
    refused(Damaged, "not whole", Request(work / "made", "hf", work / "out"))


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--tp`` is of ``pt`` as of Megatron; the other layout options are not; the list of formats has them all."""
    model = source(tmp_path / "model", vocab_size=64)
    out = tmp_path / "out"
    assert main(["plan", str(model), "pt", "--tp", "2", "--json"]) == 0
    target = json.loads(capsys.readouterr().out)["target"]
    assert (target["format"], target["layout"], target["files"], target["shards"]) == ("pt", "tp 2", 2, 2)
    for options in (["pt", "--pp", "2"], ["pt", "--megatron-format", "legacy"], ["bmtrain", "--tp", "2"]):
        assert main(["convert", str(model), *options, "-o", str(out)]) == 2
        assert "has no such layout" in capsys.readouterr().err
    assert main(["convert", str(model), "modelcenter", "-o", str(out), "--quiet"]) == 0
    assert main(["convert", str(out / "pytorch_model.pt"), "pt", "--quiet", "-o", str(tmp_path / "pt")]) == 0
    assert main(["formats", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert {"pt", "bmtrain", "model_pt"} <= set(known["read"])
    assert known["write"]["bmtrain"] == ["bmtrain", "modelcenter"]
    assert main(["inspect", str(tmp_path / "pt" / "pytorch_model.bin"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["family"], found["refused"]) == ("pt", "llama", "")
    assert found["receipt"] is not None
