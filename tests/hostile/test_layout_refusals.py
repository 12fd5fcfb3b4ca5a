"""Layouts that do not divide and shards that do not fit together are refused by name before a byte is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: legacy files cannot be edited")

from dconv.arch.registry import by_name  # noqa: E402
from dconv.checkpoint import safetensors  # noqa: E402
from dconv.checkpoint.shards import Holder, Shard, locate  # noqa: E402
from dconv.checkpoint.source import expected_specs  # noqa: E402
from dconv.errors import Damaged, DconvError, Refused  # noqa: E402
from dconv.pipeline import Request, convert, prepare  # noqa: E402
from dconv.sharding.coords import Parallel  # noqa: E402
from dconv.sharding.dtypes import ITEMSIZE  # noqa: E402
from dconv.sharding.ops import op_between  # noqa: E402
from dconv.sharding.region import Region, row_major  # noqa: E402
from dconv.sharding.tensor import Extent, Stored, TensorSpec  # noqa: E402
from tests.models import config_of, facts_of, tensors, write_random  # noqa: E402

LLAMA = by_name("llama")
FILE = "model_optim_rng.pt"
CONTAINERS = ("legacy", "torch_dist")

Tree = dict[str, Any]


def model_of(folder: Path, **sizes: Any) -> Path:
    return write_random(folder / "work" / "model", LLAMA, config_of(LLAMA, **sizes))


def megatron(model: Path, container: str, tp: int, pp: int = 1, **options: Any) -> Request:
    parallel = Parallel(tp=tp, pp=pp, etp=tp)
    out = model.parent / "out"
    return Request(model, "megatron", out, parallel=parallel, megatron_format=container, divisor=8, **options)


def refused(request: Request, kind: type[DconvError], *words: str) -> None:
    """The error has these words, and nothing appears beside the source."""
    before = sorted(request.output.parent.rglob("*"))
    with pytest.raises(DconvError) as caught:
        convert(request)
    assert type(caught.value) is kind, caught.value
    for word in words:
        assert re.search(word, str(caught.value)), f"no {word} in {caught.value}"
    assert sorted(request.output.parent.rglob("*")) == before


# ------------------------------------------------------------------------------------------- layouts that do not divide


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    ("sizes", "tp", "words"),
    [
        ({"intermediate_size": 50}, 4, ["mlp", "50"]),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, 6, ["12 query heads in 4 query groups"]),
        ({"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 6}, 6, ["--tp 1, 2, 4, 12"]),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, 8, ["12 query heads"]),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, 12, ["12 query heads"]),  # 160 rows of qkv
    ],
)  # fmt: skip
def test_sizes_that_tensor_parallelism_does_not_divide(
    tmp_path: Path, container: str, sizes: dict[str, int], tp: int, words: list[str]
) -> None:
    refused(megatron(model_of(tmp_path, **sizes), container, tp), Refused, *words)


@pytest.mark.parametrize(
    ("sizes", "tp"),
    [({"intermediate_size": 50}, 2), ({"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 6}, 12)],
)
def test_the_same_sizes_in_a_layout_that_divides_them(tmp_path: Path, sizes: dict[str, int], tp: int) -> None:
    model = model_of(tmp_path, **sizes)
    convert(megatron(model, "legacy", tp))
    convert(Request(model.parent / "out", "hf", model.parent / "back"))
    assert tensors(model.parent / "back") == tensors(model)


# ---------------------------------------------------------------------------------------------- config beside its args


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("key", "value"), [("rope_theta", 500000.0), ("rms_norm_eps", 1e-6)])
def test_one_stale_number_in_the_config_inside(tmp_path: Path, container: str, key: str, value: float) -> None:
    model = model_of(tmp_path)
    made = megatron(model, container, 2)
    convert(made)
    config = made.output / "huggingface" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    again = Request(made.output, "hf", model.parent / "back")
    refused(again, Refused, "config.json inside", key, f"{value}")
    convert(replace(again, hf_config=model))
    assert tensors(model.parent / "back") == tensors(model)


# ------------------------------------------------------------------------------------------------------------- dtypes


def retyped(folder: Path, name: str, dtype: str) -> Path:
    """A model in which the tensors whose name ends so have another dtype."""
    config = config_of(LLAMA)
    model = model_of(folder)
    specs = expected_specs(LLAMA, LLAMA.config.facts(config)).values()
    size, first, _ = safetensors.lay_out([replace(s, dtype=dtype) if s.name.endswith(name) else s for s in specs])
    (model / "model.safetensors").write_bytes(first + np.random.default_rng(0).bytes(size - len(first)))
    return model


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", ["layers.1.self_attn.k_proj.weight", "layers.1.mlp.up_proj.weight"])
def test_one_fused_tensor_of_two_dtypes(tmp_path: Path, container: str, name: str) -> None:
    model = retyped(tmp_path, name, "f32")
    refused(megatron(model, container, 2), Refused, "different dtypes", re.escape(name), "bf16, f32", "--dtype")
    convert(megatron(model, container, 2, dtype="f32"))


@pytest.mark.parametrize("container", CONTAINERS)
def test_two_dtypes_in_two_tensors_stay_what_they_are(tmp_path: Path, container: str) -> None:
    model = retyped(tmp_path, "layernorm.weight", "f32")
    convert(megatron(model, container, 2))
    convert(Request(model.parent / "out", "hf", model.parent / "back"))
    assert tensors(model.parent / "back") == tensors(model)


def test_one_tensor_of_two_dtypes_in_two_layers(tmp_path: Path) -> None:
    """torch_dist stacks the layers under one key and one dtype; legacy files keep each layer's own."""
    model = retyped(tmp_path, "layers.1.self_attn.o_proj.weight", "f32")
    named = "self_attention.linear_proj.weight"
    refused(megatron(model, "torch_dist", 2), Refused, "under one dtype", named, "--dtype")
    convert(megatron(model, "legacy", 2))
    convert(Request(model.parent / "out", "hf", model.parent / "back"))
    assert tensors(model.parent / "back") == tensors(model)
    convert(replace(megatron(model, "torch_dist", 2, dtype="f32"), out=model.parent / "f32"))


@pytest.mark.parametrize("dtype", ["i8", "u8", "f8_e5m2"])
@pytest.mark.parametrize("format", ["hf", "megatron"])
def test_codes_are_not_cast(tmp_path: Path, dtype: str, format: str) -> None:
    model = retyped(tmp_path, "down_proj.weight", dtype)
    request = Request(model, format, model.parent / "out", dtype="bf16")
    refused(request, Refused, f"{dtype} cannot become bf16 by a cast")
    convert(Request(model, "hf", model.parent / "out"))
    assert tensors(model.parent / "out") == tensors(model)


@pytest.mark.parametrize("format", ["hf", "megatron"])
def test_codes_without_their_scales_are_not_even_moved(tmp_path: Path, format: str) -> None:
    model = retyped(tmp_path, "down_proj.weight", "f8_e4m3")
    refused(Request(model, format, model.parent / "out"), Damaged, "have no scale", "down_proj.weight")


def test_no_dtype_but_the_four_floats_is_ever_cast() -> None:
    floats = {"f64", "f32", "bf16", "f16"}
    for source in ITEMSIZE:
        for target in ITEMSIZE.keys() - {source}:
            if {source, target} <= floats:
                assert op_between(source, target).exact == (source != "f64" and target in ("f32", "f64"))
            else:
                with pytest.raises(Refused, match=f"{source} cannot become {target}"):
                    op_between(source, target)  # fmt: skip


# ---------------------------------------------------------------------------------------------- shards of a legacy tree


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Legacy shards, tp 2 x pp 2, two layers a stage."""
    model = model_of(tmp_path)
    request = replace(megatron(model, "legacy", 2, 2), out=model.parent / "shards")
    convert(request)
    return request.output / "release"


def edit(shards: Path, ranks: str, change: Callable[[Tree], object]) -> None:
    for folder in shards.glob(f"mp_rank_{ranks}"):
        tree = torch.load(folder / FILE, weights_only=False)  # our own file
        change(tree)
        torch.save(tree, folder / FILE)


def rename(old: str, new: str) -> Callable[[Tree], object]:
    def change(tree: Tree) -> None:
        tree["model"] = {name.replace(old, new): value for name, value in tree["model"].items()}

    return change


def without(part: str) -> Callable[[Tree], object]:
    def change(tree: Tree) -> None:
        tree["model"] = {name: value for name, value in tree["model"].items() if part not in name}

    return change


def cut(name: str, *shape: int) -> Callable[[Tree], object]:
    """A tensor of another shape; larger than it was: zeros behind."""

    def change(tree: Tree) -> None:
        tree["model"][name] = torch.zeros(shape, dtype=torch.bfloat16)

    return change


def classic(tree: Tree) -> None:
    tree["model"] = {"language_model": {"encoder": tree["model"]}}


def two_chunks(tree: Tree) -> None:
    tree["model0"] = tree.pop("model")
    tree["model1"] = {}


QKV, FC1 = "decoder.layers.0.self_attention.linear_qkv", "decoder.layers.1.mlp.linear_fc1"
#: ranks (tp_pp), what is done to their trees, the error and words of it
SHARDS: dict[str, tuple[str, Callable[[Tree], object], type[DconvError], list[str]]] = {
    "megatron-core in a classic shell": ("*", classic, Refused, ["in no row of llama", "decoder.decoder.layers"]),
    "classic on one rank": ("01_001", classic, Damaged, ["disagree on the checkpoint's version", "None"]),
    "tp ranks differ": ("01_000", without(".layers.1."), Damaged, ["different layers", "stage 0"]),
    "tp ranks differ in the last stage": ("00_001", without(".layers.1."), Damaged, ["different layers", "stage 1"]),
    "another vpp": ("01_001", two_chunks, Damaged, ["virtual pipeline", r"\[1, 2\]"]),
    "gap": ("*_000", rename(".layers.1.", ".layers.2."), Damaged, ["lacks layers", "layers 0 to 2", r"\[0, 2\]"]),
    "gap at the start": ("*_001", rename(".layers.0.", ".layers.3."), Damaged, ["lacks layers", r"\[1, 3\]"]),
    "fewer layers than the config": ("*_001", without(".layers.1."), Damaged, [r"layers\.3\.", "not whole"]),
    "shorter rows": ("01_000", cut(f"{QKV}.weight", 30, 32), Damaged, ["linear_qkv", r"\(32, 32\)", r"\(30, 32\)"]),
    "longer rows": ("01_000", cut(f"{QKV}.weight", 40, 32), Damaged, ["linear_qkv", r"\(40, 32\)"]),
    "the whole on one rank": ("01_000", cut(f"{QKV}.weight", 64, 32), Damaged, ["linear_qkv", r"\(64, 32\)"]),
    "other columns": ("01_000", cut(f"{FC1}.weight", 48, 31), Damaged, ["linear_fc1", r"\(48, 31\)"]),
    "another norm": ("01_000", cut(f"{FC1}.layer_norm_weight", 16), Damaged, ["layer_norm_weight", r"\(16,\)"]),
    "other axes": ("01_000", cut(f"{FC1}.weight", 48 * 32), Damaged, ["linear_fc1", r"\(1536,\)"]),
    "fewer rows than the vocabulary": (
        "*_000",
        cut("embedding.word_embeddings.weight", 30, 32),
        Damaged,
        ["word_embeddings", r"\(30, 32\)"],
    ),
    "two dtypes": (
        "01_000",
        lambda tree: tree["model"].update({f"{QKV}.weight": torch.zeros(32, 32)}),
        Damaged,
        ["disagree on the dtype", "bf16, f32"],
    ),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards_that_do_not_fit_together(shards: Path, case: str) -> None:
    ranks, change, kind, words = SHARDS[case]
    edit(shards, ranks, change)
    refused(Request(shards.parent, "hf", shards.parent.parent / "back"), kind, *words)


def test_the_untouched_shards_convert_after_torch_wrote_them_again(shards: Path) -> None:
    edit(shards, "*", lambda tree: None)
    back = shards.parent.parent / "back"
    convert(Request(shards.parent, "hf", back))
    assert tensors(back) == tensors(shards.parent.parent / "model")


def test_names_of_two_depths(shards: Path) -> None:
    folder = min(shards.glob("mp_rank_*"))
    folder.rename(folder.with_name(f"{folder.name}_000"))
    refused(Request(shards.parent, "hf", shards.parent.parent / "back"), Damaged, "two layouts", "mp_rank_")


@pytest.mark.parametrize("layers", [3, 5])
def test_stacked_layers_of_another_number(tmp_path: Path, layers: int) -> None:
    model = model_of(tmp_path)
    made = megatron(model, "torch_dist", 2)
    convert(made)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config_of(LLAMA, num_hidden_layers=layers)))
    request = Request(made.output, "hf", model.parent / "back", hf_config=other)
    refused(request, Damaged, "another number of layers", rf"expected +{layers}\n", r"\(4, ")
    assert prepare(replace(request, hf_config=model)).facts["layers"] == 4


@pytest.mark.parametrize("shape", [(24,), (4, 3, 2), (4, 10)], ids=str)
def test_a_matrix_of_all_experts_that_none_is(shape: tuple[int, ...]) -> None:
    family = by_name("mixtral")
    name = "decoder.layers.0.mlp.experts.weight1"
    stored = Stored(
        TensorSpec(name, shape, "bf16"), (Extent(Region.whole(shape), "mp_rank_00/x.pt", 64, row_major(shape, 2)),)
    )
    facts = facts_of(family, config_of(family))
    with pytest.raises(Damaged, match="the experts of a rank do not divide the matrix") as caught:
        locate({name: [Shard(stored, Holder(0, 1))]}, family, facts)
    assert caught.value.where == f"{name} in mp_rank_00/x.pt"
    assert str(shape) in caught.value.found
