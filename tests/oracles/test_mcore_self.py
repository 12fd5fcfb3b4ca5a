"""megatron-core against itself: the judge must agree with itself in every layout before it judges a converter.

Each test starts one world of processes (a few seconds, most of it imports) and does in it all that it needs.
"""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dconv.errors import Damaged, DconvError, Refused, ToolMissing
from dconv.export import megatron_runtime as megatron

LLAMA: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 172,
    "num_attention_heads": 8,
    "group_query_attention": True,
    "num_query_groups": 4,
    "kv_channels": 16,
    "padded_vocab_size": 320,
    "untie_embeddings_and_output_weights": True,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
}
TIED = LLAMA | {"untie_embeddings_and_output_weights": False}
QWEN = LLAMA | {"add_qkv_bias": True, "qk_layernorm": True, "num_query_groups": 2}
ONE_GROUP = LLAMA | {"num_query_groups": 1}
GPT2 = LLAMA | {
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "bias_gelu_fusion": True,
    "position_embedding_type": "learned_absolute",
    "max_position_embeddings": 64,
}
MOE = LLAMA | {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48}
QWEN_MOE = MOE | {
    "qk_layernorm": True,
    "add_qkv_bias": True,
    "moe_router_pre_softmax": True,
    "moe_shared_expert_intermediate_size": 56,
    "moe_shared_expert_gate": True,
}
DEEPSEEK = LLAMA | {
    "group_query_attention": False,
    "num_query_groups": 1,
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "q_lora_rank": 48,
    "kv_lora_rank": 24,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 12,
    "rope_type": "yarn",
    "rotary_scaling_factor": 4.0,
    "mscale_all_dim": 1.0,
    "num_experts": 8,
    "moe_ffn_hidden_size": 48,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_shared_expert_intermediate_size": 96,
    "moe_router_topk": 4,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
}
LITE = DEEPSEEK | {"q_lora_rank": None, "rope_type": "rope", "mscale_all_dim": 0.0, "moe_router_num_groups": None,
                   "moe_router_group_topk": None, "moe_router_score_function": "softmax", "moe_layer_freq": 1,
                   "moe_router_enable_expert_bias": False, "transformer_impl": "transformer_engine"}  # fmt: skip
GPT_OSS = MOE | {
    "swiglu": False,
    "quick_geglu": True,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
    "add_bias_linear": True,
    "softmax_type": "learnable",
    "window_size": (7, 0),
    "window_attn_skip_freq": [1, 0, 1, 0],
    "position_embedding_type": "yarn",
    "yarn_rotary_scaling_factor": 32.0,
    "yarn_original_max_position_embeddings": 4096,
}

TOKENS = torch.randint(0, 301, (2, 24), generator=torch.Generator().manual_seed(0))
TOLERANCE = 2e-5  # fp32, logits around 1; tensor parallelism only changes the order of sums (3e-6 seen)


class Ranks:
    """One process's view: runs a piece of work in a layout, if this process is part of it."""

    def __init__(self, rank: int, init_method: str) -> None:
        self.rank = rank
        self.init_method = init_method

    def run(
        self, args: dict[str, Any], *sizes: int, save: str = "", load: str = "", root: str = ""
    ) -> torch.Tensor | None:
        """Logits in the layout (tp, pp, vpp, ep, etp), of seeded weights or of those loaded from ``root``."""
        tp, pp, vpp, ep, etp = sizes + (1,) * (5 - len(sizes))
        world = pp * max(tp, ep * etp)
        if self.rank >= world:
            return None
        with megatron.parallel_world(tp, pp, vpp, ep, etp, rank=self.rank, world=world, init_method=self.init_method):
            models = megatron.build_gpt(args)
            if load:
                getattr(megatron, f"load_{load}")(models, root)
            else:
                megatron.seed_weights(models, seed=1)
            if save:
                getattr(megatron, f"save_{save}")(models, root, args)
            return megatron.logits(models, TOKENS)


def spread(results: list[list[torch.Tensor | None]]) -> list[float]:
    """Per case, the largest difference of any rank's logits to the first case's, which rank 0 computed alone."""
    expected = results[0][0]
    assert expected is not None
    assert expected.isfinite().all()
    return [
        max((logits - expected).abs().max().item() for logits in case if logits is not None)
        for case in zip(*results, strict=True)
    ]


# name: arguments, layouts (tp, pp, vpp, ep, etp) that must agree with (1, 1)
FUNCTIONS: dict[str, tuple[dict[str, Any], list[tuple[int, ...]]]] = {
    "llama": (LLAMA, [(2, 2), (4, 1), (1, 2, 2)]),
    "tied": (TIED, [(2, 2), (1, 2, 2)]),
    "bias and q/k norms, groups < tp": (QWEN, [(2, 2), (4, 1)]),
    "one query group": (ONE_GROUP, [(2, 2)]),
    "gpt2": (GPT2, [(2, 2)]),
}
# besides plain ones: experts cut less than attention, more, over the same ranks and over others
EXPERTS: dict[str, tuple[dict[str, Any], list[tuple[int, ...]]]] = {
    "experts": (MOE, [(1, 1, 1, 2), (2, 1, 1, 2, 2), (1, 1, 1, 2, 2), (4, 1, 1, 2, 2), (4, 1, 1, 2, 1), (2, 1)]),
    "shared and gated": (QWEN_MOE, [(2, 2, 1, 2), (1, 2, 2, 2), (2, 1, 1, 1, 2)]),
    "latent attention": (DEEPSEEK, [(2, 2, 1, 2), (1, 2, 2, 2), (4, 1, 1, 2, 2), (2, 1, 1, 4)]),
    "latent attention, one projection": (LITE, [(2, 2, 1, 2), (4, 1, 1, 1, 4)]),
    "sinks and biases": (GPT_OSS, [(2, 2, 1, 2), (1, 2, 2, 2)]),
}
SPLITS: dict[str, tuple[dict[str, Any], list[tuple[int, ...]]]] = {
    "embedding and loss counted": (
        LLAMA
        | {
            "num_layers": 6,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
        [(1, 2), (1, 2, 2)],
    ),
    "short first stage": (LLAMA | {"decoder_first_pipeline_num_layers": 1}, [(1, 2), (1, 4)]),
    "long last stage": (LLAMA | {"decoder_last_pipeline_num_layers": 3}, [(2, 2)]),
    "layout text": (LLAMA | {"pipeline_model_parallel_layout": "E|t|ttt|L"}, [(1, 2, 2), (1, 4)]),
    "split written for another size": (
        LLAMA | {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "E|t|tt|tL"},
        [(1, 2), (1, 4)],
    ),
}


def seeded_layouts(
    rank: int, world: int, init_method: str, cases: dict[str, tuple[dict[str, Any], list[tuple[int, ...]]]]
) -> dict[str, list[torch.Tensor | None]]:
    ranks = Ranks(rank, init_method)
    return {name: [ranks.run(args, *sizes) for sizes in ((1, 1), *layouts)] for name, (args, layouts) in cases.items()}


@pytest.mark.parametrize(
    "cases",
    [pytest.param(FUNCTIONS, id="functions"), pytest.param(EXPERTS, id="experts"), pytest.param(SPLITS, id="splits")],
)
def test_every_layout_is_the_same_model(cases: dict[str, tuple[dict[str, Any], list[tuple[int, ...]]]]) -> None:
    results = megatron.spawn(seeded_layouts, 4, cases, timeout=300)
    differences = {name: max(spread([result[name] for result in results])) for name in cases}
    assert max(differences.values()) < TOLERANCE, differences


def through_torch_dist(rank: int, world: int, init_method: str, root: str) -> list[torch.Tensor | None]:
    ranks = Ranks(rank, init_method)
    return [
        ranks.run(LLAMA, 1, 1),
        ranks.run(LLAMA, 2, 2, save="torch_dist", root=root),
        ranks.run(LLAMA, 1, 1, load="torch_dist", root=root) if rank == 0 else None,
        ranks.run(LLAMA, 2, 1, load="torch_dist", root=f"{root}/iter_0000001"),
    ]


def test_torch_dist_saved_in_one_layout_loads_in_others(tmp_path: Path) -> None:
    results = megatron.spawn(through_torch_dist, 4, str(tmp_path), timeout=300)
    _, _, one_process, tensor_parallel = spread(results)
    assert one_process == 0
    assert tensor_parallel < TOLERANCE
    assert {"metadata.json", ".metadata", "common.pt"} <= {file.name for file in (tmp_path / "iter_0000001").iterdir()}


def through_legacy(rank: int, world: int, init_method: str, root: str) -> list[torch.Tensor | None]:
    ranks = Ranks(rank, init_method)
    cases = [ranks.run(TIED, 1, 1) if rank == 0 else None, ranks.run(TIED, 1, 2, 2, save="legacy", root=root)]
    cases.append(ranks.run(TIED, 1, 2, 2, load="legacy", root=root))
    file = next(Path(root).glob(f"iter_*/mp_rank_00_{rank:03d}/model_optim_rng.pt"))
    state = torch.load(file, weights_only=False)
    for chunk in ("model0", "model1"):
        state[chunk] = {transformer_engine_name(key): value for key, value in state[chunk].items()}
    torch.save(state, file)
    cases.append(ranks.run(TIED, 1, 2, 2, load="legacy", root=root))
    return cases


def transformer_engine_name(key: str) -> str:
    renamed = key.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    return renamed.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")


def test_legacy_chunks_load_under_both_sets_of_names(tmp_path: Path) -> None:
    results = megatron.spawn(through_legacy, 2, str(tmp_path), timeout=300)
    assert spread(results) == [0, 0, 0, 0]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"
    file = tmp_path / "iter_0000001" / "mp_rank_00_001" / "model_optim_rng.pt"
    last = torch.load(file, weights_only=False)
    assert last["args"].virtual_pipeline_model_parallel_size == 2
    assert "output_layer.weight" in last["model1"]  # the tied copy
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in last["model0"]  # renamed above, local numbers


#: layout -> the files that a legacy checkpoint has
EXPERT_FILES: dict[tuple[int, ...], set[str]] = {
    (2, 1, 1, 2, 1): {"mp_rank_00_000", "mp_rank_01_001"},
    (1, 1, 1, 2): {"mp_rank_00_000", "mp_rank_00_001"},
    (2, 1, 1, 2, 2): {"mp_rank_00_000", "mp_rank_01_000", "mp_rank_00_001", "mp_rank_01_001"},
    (4, 1, 1, 2, 2): {"mp_rank_00_000", "mp_rank_01_000", "mp_rank_02_001", "mp_rank_03_001"},
    (1, 2, 2, 2): {"mp_rank_00_000_000", "mp_rank_00_000_001", "mp_rank_00_001_000", "mp_rank_00_001_001"},
    (2, 1, 1, 1, 1): {"mp_rank_00", "mp_rank_01"},
}
TE = {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True}


def through_expert_files(rank: int, world: int, init_method: str, root: str) -> list[list[torch.Tensor | None]]:
    """Per model, logits of seeded weights and of what each container gives back in each layout."""
    ranks = Ranks(rank, init_method)
    found = []
    for name, args in (("shared", QWEN_MOE), ("latent", DEEPSEEK)):
        found.append([ranks.run(args, 1, 1)])
        for layout in EXPERT_FILES:
            spelled = args | (TE if layout[0] == 2 else {})
            place = f"{root}/{name}-{'-'.join(map(str, layout))}"
            ranks.run(spelled, *layout, save="legacy", root=place)
            found[-1].append(ranks.run(spelled, *layout, load="legacy", root=place))
        for layout, impl in (((2, 1, 1, 2, 2), TE), ((1, 2, 2, 2, 1), {})):
            place = f"{root}/{name}-torch_dist-{layout[0]}"
            ranks.run(args | impl, *layout, save="torch_dist", root=place)
            found[-1].append(ranks.run(args, *layout, load="torch_dist", root=place))
            found[-1].append(ranks.run(args, 2, 2, 1, 2, load="torch_dist", root=place))
    return found


@pytest.mark.long
def test_experts_come_back_from_files_of_every_layout(tmp_path: Path) -> None:
    results = megatron.spawn(through_expert_files, 4, str(tmp_path), timeout=300)
    for name, cases in zip(("shared", "latent"), zip(*results, strict=True), strict=True):
        assert max(spread(list(cases))) < TOLERANCE
        for layout, files in EXPERT_FILES.items():
            written = tmp_path / f"{name}-{'-'.join(map(str, layout))}" / "iter_0000001"
            assert {directory.name for directory in written.iterdir()} == files
    file = tmp_path / "latent-2-1-1-2-1/iter_0000001/mp_rank_01_001/model_optim_rng.pt"
    fused = torch.load(file, weights_only=False)["model"]
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in fused
    assert "decoder.layers.1.mlp.experts.linear_fc1.weight3" in fused  # this rank's last
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in fused
    assert fused["decoder.layers.1.mlp.router.expert_bias"].dtype == torch.float32
    assert fused["decoder.layers.0.self_attention.linear_q_up_proj.layer_norm_weight"].shape == (48,)
    assert fused["decoder.layers.0.self_attention.linear_q_down_proj.weight"].shape == (48, 64)  # whole on each rank


def loses_expert_bias(rank: int, world: int, init_method: str) -> bool:
    with megatron.parallel_world(1, 1, rank=rank, world=world, init_method=init_method):
        (model,) = models = megatron.build_gpt(DEEPSEEK)
        untouched = all(value.isnan().all() for value in model.state_dict().values() if value is not None)
        megatron.seed_weights(models, seed=1)
        megatron.logits(models, TOKENS)
        model.decoder.layers[1].mlp.router.expert_bias.fill_(torch.nan)
        with pytest.raises(Damaged, match=r"decoder.layers.1.mlp.router.expert_bias"):
            megatron.logits(models, TOKENS)
        return untouched


def test_a_router_bias_that_no_loader_filled_is_seen() -> None:
    assert megatron.spawn(loses_expert_bias, 1, timeout=300) == [True]


def cuts_experts_further(rank: int, world: int, init_method: str, root: str) -> None:
    Ranks(rank, init_method).run(MOE, 1, 1, 1, 1, 2, save="legacy", root=root)


def test_legacy_files_of_experts_cut_further_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cut further"):
        megatron.spawn(cuts_experts_further, 2, str(tmp_path), timeout=300)


def wrong_checkpoints(rank: int, world: int, init_method: str, root: str) -> list[str]:
    """Saves LLAMA, then loads it as models that have more, less or other weights; says how each was refused."""
    ranks = Ranks(rank, init_method)
    ranks.run(LLAMA, 1, 1, save="torch_dist", root=f"{root}/torch_dist")
    ranks.run(LLAMA, 1, 1, save="legacy", root=f"{root}/legacy")
    ranks.run(QWEN, 1, 1, save="torch_dist", root=f"{root}/more")
    answers = []
    for kind, saved, args in (
        ("torch_dist", "torch_dist", QWEN | {"num_query_groups": 4}),
        ("torch_dist", "more", LLAMA | {"num_query_groups": 2}),  # the same shapes, without bias and q/k norms
        ("torch_dist", "torch_dist", LLAMA | {"ffn_hidden_size": 128}),
        ("torch_dist", "nowhere", LLAMA),
        ("legacy", "legacy", QWEN),
        ("legacy", "legacy", LLAMA | {"ffn_hidden_size": 128}),
        ("legacy", "nowhere", LLAMA),
    ):
        with pytest.raises(Damaged) as refused:
            ranks.run(args, 1, 1, load=kind, root=f"{root}/{saved}")
        answers.append(str(refused.value))
    file = next(Path(root).glob("torch_dist/iter_*/*.distcp"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(Damaged):
        ranks.run(LLAMA, 1, 1, load="torch_dist", root=f"{root}/torch_dist")
    return answers


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    (answers,) = megatron.spawn(wrong_checkpoints, 1, str(tmp_path), timeout=300)
    names = (
        "expected   decoder.layers.self_attention.k_layernorm.weight",
        "also: decoder.layers.self_attention.k_layernorm.weight",
        "decoder.layers.mlp.linear_fc1.weight",
        "nowhere does not exist",
        "decoder.layers.{0..3}.self_attention.linear_qkv.bias",
        "decoder.layers.{0..3}.mlp.linear_fc{1..2}.weight",
        "mp_rank_00/model_optim_rng.pt",
    )
    for name, answer in zip(names, answers, strict=True):
        assert name in answer


def build_only(rank: int, world: int, init_method: str, args: dict[str, Any]) -> None:
    with megatron.parallel_world(1, 1, rank=rank, world=world, init_method=init_method):
        megatron.build_gpt(args)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p"),
        ({"padded_vocab_size": None}, "padded_vocab_size"),
    ],
)
def test_a_model_that_would_be_computed_wrongly_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(Refused, match=named):
        megatron.spawn(build_only, 1, LLAMA | change, timeout=300)


def fails_on_one_rank(rank: int, world: int, init_method: str, how: str) -> None:
    with megatron.parallel_world(2, 1, rank=rank, world=world, init_method=init_method):
        if rank == 1 and how == "error":
            raise ValueError("told to")
        if rank == 1 and how == "refusal":
            raise Refused("told to", where="rank 1")
        torch.distributed.barrier()
        torch.distributed.barrier()


def never_ends(rank: int, world: int, init_method: str) -> None:
    while True:
        time.sleep(1)


@pytest.mark.parametrize(("how", "kind"), [("error", ToolMissing), ("refusal", Refused)])
def test_a_failing_rank_is_reported_and_no_process_stays(how: str, kind: type[DconvError]) -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(kind, match="told to") as failure:
        megatron.spawn(fails_on_one_rank, 2, how, timeout=300)
    told = str(failure.value) + "".join(getattr(failure.value, "__notes__", []))
    assert "fails_on_one_rank" in told  # the rank's own traceback
    assert set(multiprocessing.active_children()) == before


def test_a_rank_that_hangs_is_ended() -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(ToolMissing, match="did not finish in 3 s: rank 0, 1"):
        megatron.spawn(never_ends, 2, timeout=3)
    assert set(multiprocessing.active_children()) == before
