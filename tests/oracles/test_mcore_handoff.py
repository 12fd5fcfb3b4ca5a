"""Live handoff of real megatron-core models: the bytes are those of saving with megatron-core and converting that.

Each test starts one world of gloo processes, which saves its model in Megatron's own two containers, hands it over from
memory, and leaves the comparison to this process.
"""

from __future__ import annotations

import errno
import json
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dconv
from dconv.errors import DconvError, ToolMissing
from dconv.export import megatron_runtime as megatron
from dconv.live import write as live_write
from dconv.sharding import outputs
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


def hands_over(rank: int, world: int, init_method: str, root: str, name: str, targets: list[str]) -> list[int]:
    """Saves and hands over a model; the bytes that this rank wrote, by target."""
    args, layout = MODELS[name]
    with megatron.parallel_world(*layout, rank=rank, world=world, init_method=init_method):
        models = megatron.build_gpt(args)
        megatron.seed_weights(models, seed=1)
        megatron.save_torch_dist(models, f"{root}/saved-torch_dist", args)
        if len(layout) < 4 or layout[-1] == 1:
            megatron.save_legacy(models, f"{root}/saved-legacy", args)
        written = []
        for target in targets:
            to, options = TARGETS[target]
            given: Any = Namespace(**args) if target == "hf" else args
            done = dconv.handoff(models, to, f"{root}/{target}", args=given, **options)
            assert done.complete
            assert done.committed == (rank == 0)
            written.append(done.written)
            sharded = [model.sharded_state_dict() for model in models]
            states = sharded[0] if target == "hf" and len(sharded) == 1 else sharded
            done = dconv.handoff(states, to, f"{root}/{target}-sharded", args=given, **options)
            assert done.committed == (rank == 0)
            written.append(done.written)
        return written


def digests(folder: Path) -> tuple[object, ...]:
    receipt = json.loads((folder / "dconv.json").read_bytes())
    return receipt["tensors"], receipt["frames"], receipt["closing"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in ("dense", "cut experts"))) for name in MODELS]
)
def test_the_bytes_are_those_of_saving_and_converting(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """To half of the targets, another half from one model to the next; with --long to all."""
    half = list(MODELS).index(name) % 2
    targets = list(TARGETS) if request.config.getoption("--long") else list(TARGETS)[half::2]
    written = megatron.spawn(hands_over, 4, str(tmp_path), name, targets, timeout=300)
    for by_target in written:
        assert min(by_target) > 0  # every rank wrote of every target
    for target in targets:
        to, options = TARGETS[target]
        handed = tree_digest(tmp_path / target)
        assert tree_digest(tmp_path / f"{target}-sharded") == handed
        for saved in tmp_path.glob("saved-*"):
            converted = tmp_path / f"{target}-of-{saved.name}"
            dconv.convert(saved, to, converted, **options)
            assert tree_digest(converted) == handed, f"{target}, {saved.name}"
            assert digests(converted) == digests(tmp_path / target)
    left = {path.name.partition("-of-")[0] for path in tmp_path.iterdir()}
    saved = {path.name for path in tmp_path.glob("saved-*") if "-of-" not in path.name}
    assert left == {*targets, *(f"{target}-sharded" for target in targets), *saved}


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    """How a call is refused: the error's kind, and its text."""
    with pytest.raises(DconvError) as refused:
        call()
    return type(refused.value).__name__, str(refused.value)


def fails(rank: int, world: int, init_method: str, root: str) -> dict[str, tuple[str, str]]:
    """Handoffs that cannot be: how this rank was refused, by case."""
    found: dict[str, tuple[str, str]] = {}
    with megatron.parallel_world(2, 2, rank=rank, world=world, init_method=init_method):
        models = megatron.build_gpt(LLAMA)
        megatron.seed_weights(models, seed=1)

        def hand(case: str, given: object = models, to: str = "hf", **options: Any) -> None:
            options.setdefault("args", LLAMA)
            out = f"{root}/{options.pop('out', case)}"
            found[case] = refusal(lambda: dconv.handoff(given, to, out, **options))

        hand("exists")
        for case, args in ARGS.items():
            megatron.save_legacy(models, f"{root}/saved-{case}", args)
            hand(case, args=args)
        hand("no args", args=None)
        hand("other options", shard_size=10**6 if rank == 3 else 10**5)
        hand("other replicas", replicas="first" if rank == 3 else "equal")
        hand("a bad option", **({"tp": 2} if rank == 3 else {}))
        hand("of a checkpoint", rename="names.json")
        hand("another format", to="npz")
        hand("no model", given=[])

        state = models[0].state_dict()
        hand("unknown tensor", given=state | ({"surprise": torch.zeros(2)} if rank == 1 else {}))
        hand("a number for a tensor", given=state | ({"surprise": [1]} if rank == 1 else {}))
        norm = "decoder.layers.0.input_layernorm.weight"
        hand("another dtype", given=state | ({norm: state[norm].double()} if rank == 1 else {}))
        less = {name: value for name, value in state.items() if name != norm or rank != 0}
        hand("one copy less", to="megatron", given=less if rank < 2 else state, out="exists")
        other = state | ({norm: state[norm] + 1} if rank == 1 else {})
        hand("replicas differ", given=other)
        dconv.handoff(other, "hf", f"{root}/replicas-first", args=LLAMA, replicas="first")

        with pytest.MonkeyPatch.context() as patch:
            if rank == 2:
                patch.setattr(outputs.Outputs, "write", full)
            hand("a full disk")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(live_write, "conclude", full)
            hand("a commit that fails")
    with megatron.parallel_world(1, 2, rank=rank, world=world, init_method=init_method):
        models = megatron.build_gpt(LLAMA)
        megatron.seed_weights(models, seed=1)
        if rank == 3:
            models[0].state_dict()["output_layer.weight"][0, 0] += 1
        found["data-parallel copies differ"] = refusal(lambda: dconv.handoff(models, "hf", f"{root}/dp", args=LLAMA))
    return found


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "told to")


#: Args with which a checkpoint could not be converted either.
ARGS: dict[str, dict[str, Any]] = {
    "no family": LLAMA | {"normalization": "LayerNorm"},
    "no width": {name: value for name, value in LLAMA.items() if name != "hidden_size"},
    "another width": LLAMA | {"ffn_hidden_size": 180},
}
REFUSALS: dict[str, tuple[str, str]] = {
    "exists": ("UsageError", "the output exists, nothing was written"),
    "no args": ("Refused", "nothing says what model this is"),
    "other options": ("Refused", "the ranks do not have one set of options"),
    "other replicas": ("Refused", "the ranks do not have one set of options"),
    "a bad option": ("UsageError", "--tp"),
    "of a checkpoint": ("UsageError", "rename"),
    "another format": ("Refused", "no format is called npz"),
    "no model": ("UsageError", "no model"),
    "unknown tensor": ("Refused", "surprise"),
    "a number for a tensor": ("Refused", "surprise"),
    "another dtype": ("Damaged", "disagree on the dtype"),
    "one copy less": ("UsageError", "the output exists"),  # the copy of another rank is enough
    "replicas differ": ("Damaged", "model.layers.0.input_layernorm.weight"),
    "a full disk": ("StorageFault", "told to"),
    "a commit that fails": ("StorageFault", "told to"),
    "data-parallel copies differ": ("Damaged", "output_layer.weight"),
}


def test_what_cannot_be_handed_over_is_refused_by_all_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists" / "mine").write_text("kept")
    found = megatron.spawn(fails, 4, str(tmp_path), timeout=300)
    assert found[0].keys() == REFUSALS.keys() | ARGS.keys()
    for case, (kind, words) in REFUSALS.items():
        for answers in found:
            assert answers[case][0] == kind, answers[case]
            assert words in answers[case][1], answers[case]
    for case in ARGS:
        of_checkpoint = refusal(lambda: dconv.convert(tmp_path / f"saved-{case}", "hf", tmp_path / "converted"))  # noqa: B023
        for answers in found:
            assert answers[case][0] == of_checkpoint[0]
            assert answers[case][1].splitlines()[0] == of_checkpoint[1].splitlines()[0]
    assert [path.name for path in (tmp_path / "exists").iterdir()] == ["mine"]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"exists", "replicas-first", *(f"saved-{case}" for case in ARGS)}


def dies(rank: int, world: int, init_method: str, root: str) -> None:
    with megatron.parallel_world(2, 2, rank=rank, world=world, init_method=init_method):
        models = megatron.build_gpt(LLAMA)
        megatron.seed_weights(models, seed=1)
        if rank == 2:
            outputs.Outputs.write = lambda *_: os._exit(9)
        dconv.handoff(models, "hf", f"{root}/out", args=LLAMA)


def test_a_rank_that_dies_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    with pytest.raises(ToolMissing):
        megatron.spawn(dies, 4, str(tmp_path), timeout=300)
    assert not (tmp_path / "out").exists()
