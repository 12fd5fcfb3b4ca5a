"""``pytorch_model*.bin`` as input: any strides and shared storages, an index, per-rank files; hostile pickles."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dconv.errors import Damaged, DconvError, Refused
from dconv.pipeline import Request, convert
from dconv.sharding.coords import Parallel
from tests.oracles import hf

Weights = dict[str, Tensor]


def tiny(family: str = "qwen2", **overrides: Any) -> tuple[Any, Weights]:
    """Config and bf16 weights of a small model (qwen2: with biases), the tied output among them where tied."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    more = {"head_dim": 8, "intermediate_size": 48, "vocab_size": 80}
    config, model = hf.tiny(family, **{**sizes, **more, **overrides})
    return config, {name: weight.bfloat16() for name, weight in model.state_dict().items()}


def folder(path: Path, config: Any) -> Path:
    path.mkdir()
    config.save_pretrained(path)
    return path


def to_hf(source: Path, out: Path, **options: Any) -> Weights:
    convert(Request(source, "hf", out, **options))
    return load_file(out / "model.safetensors")


def same(got: Weights, expected: Weights) -> None:
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert got[name].dtype == weight.dtype, name
        assert torch.equal(got[name].view(torch.int16), weight.contiguous().view(torch.int16)), name


def transposed(weight: Tensor) -> Tensor:
    return weight.mT.contiguous().mT if weight.ndim > 1 else weight


def every_third(weight: Tensor) -> Tensor:
    wide = weight.new_full((*weight.shape[:-1], 3 * weight.shape[-1]), 7.0)
    wide[..., ::3] = weight
    return wide[..., ::3]


def broadcast(weight: Tensor) -> Tensor:
    return weight[:1].expand_as(weight)


@pytest.mark.parametrize("stride", [torch.clone, transposed, every_third, broadcast])
@pytest.mark.parametrize("old_form", [False, True])
def test_strides(tmp_path: Path, stride: Callable[[Tensor], Tensor], old_form: bool) -> None:
    config, weights = tiny()
    source = folder(tmp_path / "bin", config)
    weights = {name: stride(weight) for name, weight in weights.items()}
    torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=not old_form)
    same(to_hf(source, tmp_path / "hf"), weights)


def test_one_storage_for_all_and_parameters(tmp_path: Path) -> None:
    config, weights = tiny()
    source = folder(tmp_path / "bin", config)
    flat = torch.cat([weight.flatten() for weight in weights.values()])
    views = flat.split([weight.numel() for weight in weights.values()])
    shared = {
        name: torch.nn.Parameter(view.view(weight.shape))
        for (name, weight), view in zip(weights.items(), views, strict=True)
    }
    torch.save(shared, source / "pytorch_model.bin")
    same(to_hf(source, tmp_path / "hf"), weights)


def test_tied(tmp_path: Path) -> None:
    config, weights = tiny(tie_word_embeddings=True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    source = folder(tmp_path / "bin", config)
    torch.save(weights, source / "pytorch_model.bin")
    del weights["lm_head.weight"]
    same(to_hf(source, tmp_path / "hf"), weights)


def test_untied_over_one_storage(tmp_path: Path) -> None:
    config, weights = tiny()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    source = folder(tmp_path / "bin", config)
    torch.save(weights, source / "pytorch_model.bin")
    same(to_hf(source, tmp_path / "hf"), weights)


def test_what_is_no_tensor(tmp_path: Path) -> None:
    config, weights = tiny()
    source = folder(tmp_path / "bin", config)
    torch.save({**weights, "step": 3, "by": "someone", "lr": 1e-5, "seed": None}, source / "pytorch_model.bin")
    same(to_hf(source, tmp_path / "hf"), weights)


@pytest.mark.parametrize("wrap", [lambda w: {"model": w}, lambda w: {5: w["model.norm.weight"], **w}, list])
def test_no_plain_state_dict(tmp_path: Path, wrap: Callable[[Weights], object]) -> None:
    config, weights = tiny()
    source = folder(tmp_path / "bin", config)
    torch.save(wrap(weights), source / "pytorch_model.bin")
    refused(source, tmp_path, Damaged, "state dict")


@pytest.mark.parametrize("stride", [torch.clone, transposed])
def test_tied_copies(tmp_path: Path, stride: Callable[[Tensor], Tensor]) -> None:
    """Equal copies are one tensor, whichever is there; of two that differ neither is dropped in silence."""
    config, weights = tiny(tie_word_embeddings=True)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    source = folder(tmp_path / "bin", config)
    weights[head] = stride(weights[embedding])
    torch.save(weights, source / "pytorch_model.bin")
    expected = {name: weight for name, weight in weights.items() if name != head}
    same(to_hf(source, tmp_path / "both"), expected)
    torch.save({name: w for name, w in weights.items() if name != embedding}, source / "pytorch_model.bin")
    same(to_hf(source, tmp_path / "output alone"), expected)
    weights[head] = stride(weights[embedding].clone())
    weights[head][-1, -1] += 1
    torch.save(weights, source / "pytorch_model.bin")
    refused(source, tmp_path, Refused, "differ")


def test_other_dtype(tmp_path: Path) -> None:
    config, weights = tiny()
    source = folder(tmp_path / "bin", config)
    torch.save({name: transposed(weight.float()) for name, weight in weights.items()}, source / "pytorch_model.bin")
    same(to_hf(source, tmp_path / "hf", dtype="bf16"), weights)


def indexed(path: Path, config: Any, weights: Weights, count: int = 3) -> Path:
    source = folder(path, config)
    weight_map = {}
    for i in range(count):
        file = f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin"
        part = dict(list(weights.items())[i::count])
        torch.save(part, source / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(source, weight_map)
    return source


def write_index(source: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def edit_index(**changes: object) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        known = json.loads((source / "pytorch_model.bin.index.json").read_text())["weight_map"]
        write_index(source, {**known, **changes})

    return edit


def test_indexed(tmp_path: Path) -> None:
    config, weights = tiny()
    source = indexed(tmp_path / "bin", config, weights)
    same(to_hf(source, tmp_path / "hf"), weights)


def truncate(source: Path) -> None:
    with open(source / "pytorch_model-00002-of-00003.bin", "r+b") as file:
        file.truncate(2000)


NORM = "model.norm.weight"
BROKEN_INDEX: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda source: (source / "pytorch_model-00002-of-00003.bin").unlink(), "1 of 3 shards"),
    "truncated": (truncate, "truncated"),
    "outside": (edit_index(**{NORM: "../pytorch_model.bin"}), "outside"),
    "no name": (edit_index(**{NORM: ["pytorch_model-00001-of-00003.bin"]}), "outside"),
    "other file": (edit_index(**{NORM: "pytorch_model-00001-of-00003.bin"}), "index"),
    "unknown": (edit_index(extra="pytorch_model-00001-of-00003.bin"), "index names tensors"),
    "a list": (lambda source: write_index(source, ["pytorch_model-00001-of-00003.bin"]), "no weight_map"),
}


@pytest.mark.parametrize("name", BROKEN_INDEX)
def test_broken_index(tmp_path: Path, name: str) -> None:
    breakage, message = BROKEN_INDEX[name]
    config, weights = tiny()
    source = indexed(tmp_path / "bin", config, weights)
    breakage(source)
    refused(source, tmp_path, Damaged, message)


def refused(source: Path, tmp_path: Path, kind: type[DconvError], message: str) -> DconvError:
    """Convert, expecting an error that leaves nothing behind."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(kind, match=message) as caught:
        to_hf(source, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return caught.value


BY_COLUMNS = ("o_proj.weight", "down_proj.weight")
WHOLE = ("norm.weight", "o_proj.bias", "down_proj.bias")


def ranked(path: Path, config: Any, weights: Weights, count: int, *, contiguous: bool = True) -> Path:
    """``pytorch_model.tp{r}.bin`` as Megatron's tensor-parallel layers cut."""
    source = folder(path, config)
    for rank in range(count):
        parts = {}
        for name, weight in weights.items():
            if name.endswith(WHOLE):
                parts[name] = weight
            else:
                part = weight.chunk(count, 1 if name.endswith(BY_COLUMNS) else 0)[rank]
                parts[name] = part.contiguous() if contiguous else part
        torch.save(parts, source / f"pytorch_model.tp{rank}.bin")
    return source


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(
    ("family", "overrides"), [("llama", {}), ("qwen2", {}), ("llama", {"attention_bias": True, "mlp_bias": True})]
)
def test_ranked(tmp_path: Path, count: int, contiguous: bool, family: str, overrides: dict[str, Any]) -> None:
    config, weights = tiny(family, **overrides)
    source = ranked(tmp_path / "bin", config, weights, count, contiguous=contiguous)
    same(to_hf(source, tmp_path / "hf"), weights)


def test_more_than_ten_ranks(tmp_path: Path) -> None:
    """Numbers, not names, order the ranks: tp10 comes after tp9."""
    config, weights = tiny("llama", num_attention_heads=16, num_key_value_heads=16)
    source = ranked(tmp_path / "bin", config, weights, 16)
    same(to_hf(source, tmp_path / "hf"), weights)


def test_ranked_tied_to_megatron(tmp_path: Path) -> None:
    config, weights = tiny("llama", tie_word_embeddings=True)
    source = ranked(tmp_path / "bin", config, weights, 2)
    convert(Request(source, "megatron", tmp_path / "megatron", parallel=Parallel(tp=4, etp=4)))
    del weights["lm_head.weight"]
    same(to_hf(tmp_path / "megatron", tmp_path / "hf"), weights)


def edit_rank(change: Callable[[Weights], object]) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        path = source / "pytorch_model.tp1.bin"
        weights = torch.load(path)
        change(weights)
        torch.save(weights, path)

    return edit


Q = "model.layers.1.self_attn.q_proj.weight"
BROKEN_RANKS: dict[str, tuple[Callable[[Path], None], type[DconvError], str]] = {
    "first": (lambda source: (source / "pytorch_model.tp0.bin").unlink(), Damaged, "1 of 4 tensor-parallel shards"),
    "middle": (lambda source: (source / "pytorch_model.tp2.bin").unlink(), Damaged, "1 of 4 tensor-parallel shards"),
    "last": (lambda source: (source / "pytorch_model.tp3.bin").unlink(), Damaged, "1 of 4 tensor-parallel shards"),
    "twice": (
        lambda source: (source / "pytorch_model.tp3.bin").rename(source / "pytorch_model.tp02.bin"),
        Damaged,
        "two files of one rank",
    ),
    "lacks a tensor": (edit_rank(lambda weights: weights.pop(Q)), Damaged, "not whole"),
    "wrong shape": (edit_rank(lambda weights: weights.update({Q: weights[Q][1:]})), Damaged, "another shape"),
    "too many axes": (edit_rank(lambda weights: weights.update({Q: weights[Q][None]})), Damaged, "another shape"),
    "empty": (edit_rank(lambda weights: weights.update({Q: weights[Q][:0]})), Damaged, "another shape"),
    "unknown": (edit_rank(lambda weights: weights.update({"x.weight": weights[Q]})), Refused, "in no row"),
    "no tensors": (edit_rank(lambda weights: weights.clear()), Damaged, "not whole"),
}


@pytest.mark.parametrize("name", BROKEN_RANKS)
def test_broken_ranks(tmp_path: Path, name: str) -> None:
    breakage, kind, message = BROKEN_RANKS[name]
    config, weights = tiny("llama")
    source = ranked(tmp_path / "bin", config, weights, 4)
    breakage(source)
    refused(source, tmp_path, kind, message)


class Evil:
    """Pickled as a call of ``os.system``."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.tp0.bin", "consolidated.00.pth"])
@pytest.mark.parametrize("old_form", [False, True])
def test_foreign_global(tmp_path: Path, file: str, old_form: bool) -> None:
    config, weights = tiny("llama")
    source = folder(tmp_path / "bin", config)
    witness = tmp_path / "executed"
    tree = {**weights, "x": Evil(f"touch {witness}")}
    torch.save(tree, source / file, _use_new_zipfile_serialization=not old_form)
    fault = refused(source, tmp_path, Damaged, "foreign global")
    assert fault.exit_code == 4
    assert "system" in fault.found
    assert file in fault.where
    torch.load(source / file, weights_only=False)
    assert witness.exists(), "the pickle was not hostile at all"
