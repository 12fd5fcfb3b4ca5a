"""Law 4 for families with experts and latent attention: the real megatron-core computes what transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")
pytest.importorskip("megatron.core", reason="megatron-core is not installed: the oracle cannot run")

from dconv.checkpoint.detect import open_source  # noqa: E402
from dconv.export.megatron_cpu import parallel_world, spawn  # noqa: E402
from dconv.pipeline import Request, convert  # noqa: E402
from dconv.sharding.coords import Parallel  # noqa: E402
from tests.arch.test_function import TOKENS, Check, close, last, load  # noqa: E402
from tests.oracles import hf  # noqa: E402

#: name -> (family, config keys). megatron-core 0.16.1 chooses groups of experts as these do where topk / groups is 2.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"sliding_window": None}),
    "mixtral-tied": ("mixtral", {"tie_word_embeddings": True, "sliding_window": 8, "vocab_size": 301}),
    "qwen2-moe": ("qwen2_moe", {"mlp_only_layers": [1], "layer_types": ["full_attention"] * 4}),
    "qwen3-moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3-moe-every-second": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "deepseek-v2": ("deepseek_v2", {"topk_method": "greedy", "q_lora_rank": None}),
    "deepseek-v3": ("deepseek_v3", {}),
    "gpt-oss": ("gpt_oss", {}),
    "glm4-moe": ("glm4_moe", {"use_qk_norm": True, "attention_bias": True}),
}

#: tp, pp, vpp, ep, etp.
LAYOUTS = [(1, 1, 1, 1, 1), (2, 1, 1, 2, 1), (1, 2, 2, 2, 1), (2, 1, 1, 2, 2), (2, 2, 1, 1, 2)]
#: At etp > 1 megatron-core adds the bias of an expert once a rank.
NOT_CUT = ("gpt-oss",)


def _name(layout: tuple[int, ...]) -> str:
    return "tp{}pp{}vpp{}ep{}etp{}".format(*layout)


def _parallel(layout: tuple[int, ...]) -> Parallel:
    tp, pp, vpp, ep, etp = layout
    return Parallel(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Every model of `MODELS` as a directory, with transformers' logits."""
    root = tmp_path_factory.mktemp("hf")
    made = {}
    for name, (family, keys) in MODELS.items():
        _, model = hf.tiny(family, **keys)
        made[name] = (hf.save(model, root / name), hf.logits(model, TOKENS))
    return made


@pytest.mark.parametrize("layout", LAYOUTS, ids=_name)
def test_megatron_core_computes_what_transformers_does(
    layout: tuple[int, ...], sources: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    parallel = _parallel(layout)
    checks, expected = [], []
    for name, (source, logits) in sources.items():
        if name in NOT_CUT and parallel.etp > 1:
            continue
        for container, impl in (("torch_dist", "local"), ("legacy", "transformer_engine"), ("legacy", "local")):
            out = tmp_path / f"{name}-{container}-{impl}"
            convert(
                Request(source, "megatron", out, parallel=parallel, megatron_format=container, transformer_impl=impl)
            )
            checks.append(Check(out, container))
            expected.append((name, container, impl, logits))
    computed = last(spawn(load, parallel.world, layout, checks))
    wrong = [case[:3] for case, ours in zip(expected, computed, strict=True) if not close(ours, case[3])]
    assert not wrong


def _write(
    rank: int, world: int, init: str, layout: tuple[int, ...], jobs: list[tuple[dict[str, Any], Path]]
) -> list[Any]:
    from dconv.export.megatron_runtime import build_gpt, logits
    from dconv.export.megatron_weights import save_legacy, save_torch_dist, seed_weights

    found = []
    with parallel_world(*layout, rank=rank, world=world, init_method=init):
        for seed, (args, root) in enumerate(jobs):
            models = build_gpt(args)
            seed_weights(models, seed)
            save_torch_dist(models, root / "torch_dist", args)
            save_legacy(models, root / "legacy", args)
            found.append(logits(models, TOKENS))
    return found


@pytest.mark.parametrize("layout", LAYOUTS[1:4], ids=_name)
def test_checkpoints_that_megatron_core_wrote_convert(
    layout: tuple[int, ...], sources: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    """Args alone describe the model: no HuggingFace config comes along."""
    parallel = _parallel(layout)
    jobs, names = [], []
    (tmp_path / "args").mkdir()
    for name, (source, _) in sources.items():
        if name in NOT_CUT and parallel.etp > 1:
            continue
        convert(Request(source, "megatron", tmp_path / "args" / name, parallel=parallel))
        args = open_source(tmp_path / "args" / name).args
        assert args is not None
        jobs.append((args, tmp_path / "written" / name))
        names.append(name)
    computed = last(spawn(_write, parallel.world, layout, jobs))
    wrong = []
    for name, (_, root), theirs in zip(names, jobs, computed, strict=True):
        for container in ("torch_dist", "legacy"):
            out = tmp_path / "hf" / f"{name}-{container}"
            out.parent.mkdir(exist_ok=True)
            convert(Request(root / container, "hf", out))
            if not close(theirs, hf.logits(out, TOKENS)):
                wrong.append((name, container))
    assert not wrong
