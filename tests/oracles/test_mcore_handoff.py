"""Live handoff of real megatron-core models: the bytes are those of saving with megatron-core and converting that.

Each test starts one world of gloo processes, which saves its model in Megatron's own two containers, hands it over from
memory, and leaves the comparison to this process.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import dconv
from dconv.export import megatron_runtime as megatron
from tests.models import tree_digest

LLAMA: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 172,
    "num_attention_heads": 8,
    "group_query_attention": True,
    "num_query_groups": 4,
    "kv_channels": 16,
    "vocab_size": 301,
    "padded_vocab_size": 320,
    "make_vocab_size_divisible_by": 32,
    "max_position_embeddings": 128,
    "seq_length": 128,
    "untie_embeddings_and_output_weights": True,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
TIED = LLAMA | {"untie_embeddings_and_output_weights": False, "add_qkv_bias": True}
MOE = LLAMA | {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48}

#: What is made of each model: name -> FORMAT and options.
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf": ("hf", {}),
    "small-files-small-memory": ("hf", {"shard_size": 60_000, "max_memory": 100_000, "threads": 2}),
    "rounded": ("hf", {"dtype": "bf16"}),
    "torch_dist": ("megatron", {"tp": 4, "make_vocab_size_divisible_by": 16}),
    "legacy": ("megatron", {"pp": 4, "megatron_format": "legacy", "transformer_impl": "local"}),
    "one-file": ("pt", {}),
}
#: name -> Megatron's args and the running layout (tp, pp, vpp, ep, etp) of four ranks.
MODELS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "dense": (LLAMA, (2, 2)),
    "tied": (TIED, (1, 2, 2)),  # two data-parallel ranks a shard
    "experts": (MOE, (1, 2, 1, 2, 1)),
    "cut experts": (MOE, (2, 1, 1, 2, 2)),
}


def hands_over(rank: int, world: int, init_method: str, root: str, name: str) -> list[int]:
    """Saves and hands over a model; the bytes that this rank wrote, by target."""
    args, layout = MODELS[name]
    with megatron.parallel_world(*layout, rank=rank, world=world, init_method=init_method):
        models = megatron.build_gpt(args)
        megatron.seed_weights(models, seed=1)
        megatron.save_torch_dist(models, f"{root}/saved-torch_dist", args)
        if len(layout) < 4 or layout[-1] == 1:
            megatron.save_legacy(models, f"{root}/saved-legacy", args)
        written = []
        for target, (to, options) in TARGETS.items():
            given: Any = Namespace(**args) if target == "hf" else args
            done = dconv.handoff(models, to, f"{root}/{target}", args=given, **options)
            assert done.complete
            assert done.committed == (rank == 0)
            written.append(done.written)
        return written


def digests(folder: Path) -> tuple[object, ...]:
    receipt = json.loads((folder / "dconv.json").read_bytes())
    return receipt["tensors"], receipt["frames"], receipt["closing"]


@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_are_those_of_saving_and_converting(name: str, tmp_path: Path) -> None:
    written = megatron.spawn(hands_over, 4, str(tmp_path), name, timeout=300)
    for by_target in written:
        assert min(by_target) > 0  # every rank wrote of every target
    for target, (to, options) in TARGETS.items():
        handed = tree_digest(tmp_path / target)
        for saved in tmp_path.glob("saved-*"):
            converted = tmp_path / f"{target}-of-{saved.name}"
            dconv.convert(saved, to, converted, **options)
            assert tree_digest(converted) == handed, f"{target}, {saved.name}"
            assert digests(converted) == digests(tmp_path / target)
    left = {path.name.partition("-of-")[0] for path in tmp_path.iterdir()}
    assert left == {*TARGETS, *(path.name for path in tmp_path.glob("saved-*") if "-of-" not in path.name)}
