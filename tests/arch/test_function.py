"""Law 4: the real megatron-core and the real transformers compute the same logits from the same weights.

One group of gloo processes a layout does all its work, since starting them costs more than the checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")
pytest.importorskip("megatron.core", reason="megatron-core is not installed: the oracle cannot run")

from dconv.checkpoint.detect import open_source  # noqa: E402
from dconv.export.megatron_cpu import parallel_world, spawn  # noqa: E402
from dconv.pipeline import Request, convert  # noqa: E402
from dconv.sharding.coords import Parallel  # noqa: E402
from tests.oracles import hf  # noqa: E402

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip

#: name -> (family, config keys). Together: tied and untied, padded and odd vocabulary, bias, q/k norm, scaled RoPE,
#: head_dim of its own, one query group for all heads, a sliding window, half of a head rotated, a stated softmax scale.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-odd": ("llama", {"tie_word_embeddings": True, "vocab_size": 301}),
    "llama3-scaled": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 131072, "vocab_size": 256}),
    "llama-mha": ("llama", {"num_key_value_heads": 8}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-odd": ("qwen2", {"vocab_size": 301}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "phi3": ("phi3", {"sliding_window": 8, "num_key_value_heads": 2}),
    "glm": ("glm", {}),
    "granite": ("granite", {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}),
    "gpt2": ("gpt2", {"vocab_size": 301}),
    "gpt2-erf-untied": ("gpt2", {"activation_function": "gelu", "tie_word_embeddings": False, "n_inner": 344}),
}

#: tp, pp, vpp. Four layers in all models.
LAYOUTS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1), (1, 2, 2), (1, 4, 1)]
TOKENS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Check:
    """A checkpoint for real megatron-core to load. ``container`` says by which of its loaders."""

    path: Path
    container: str


def load(rank: int, world: int, init: str, layout: tuple[int, ...], checks: list[Check]) -> list[Any]:
    """One rank of megatron-core: the logits of every check on the last stage. Layout: tp, pp, vpp, ep, etp."""
    from dconv.export.megatron_runtime import build_gpt, logits
    from dconv.export.megatron_weights import load_legacy, load_torch_dist

    found = []
    with parallel_world(*layout, rank=rank, world=world, init_method=init):
        for check in checks:
            args = open_source(check.path).args
            assert args is not None
            models = build_gpt(args)
            (load_torch_dist if check.container == "torch_dist" else load_legacy)(models, check.path)
            found.append(logits(models, TOKENS))
    return found


def last(results: list[list[Any]]) -> list[Any]:
    """The last stage's answers."""
    return next(found for found in results if found[0] is not None)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Every model of `MODELS` as a directory, with transformers' logits."""
    root = tmp_path_factory.mktemp("hf")
    made = {}
    for name, (family, keys) in MODELS.items():
        _, model = hf.tiny(family, **keys)
        made[name] = (hf.save(model, root / name), hf.logits(model, TOKENS))
    return made


def close(ours: Any, theirs: Any) -> bool:
    """fp32, within 1e-4 of the logits' scale."""
    return bool((ours[..., : theirs.shape[-1]] - theirs).abs().max() <= 1e-4 * theirs.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}pp{}vpp{}".format(*layout))
def test_megatron_core_computes_what_transformers_does(
    layout: tuple[int, int, int], sources: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    tp, pp, vpp = layout
    parallel = Parallel(tp=tp, pp=pp, vpp=vpp, etp=tp)
    checks, expected = [], []
    for name, (source, logits) in sources.items():
        for container, impl in (("torch_dist", "local"), ("legacy", "transformer_engine"), ("legacy", "local")):
            out = tmp_path / f"{name}-{container}-{impl}"
            convert(
                Request(source, "megatron", out, parallel=parallel, megatron_format=container, transformer_impl=impl)
            )
            checks.append(Check(out, container))
            expected.append((name, container, impl, logits))
    computed = last(spawn(load, tp * pp, layout, checks))
    wrong = [case[:3] for case, ours in zip(expected, computed, strict=True) if not close(ours, case[3])]
    assert not wrong


def test_torch_dist_loads_in_another_layout(sources: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    """Written for tp 4 x pp 2, loaded by megatron-core as tp 2 x pp 1: the padding differs, too."""
    checks, expected = [], []
    for name in ("llama-tied-odd", "qwen2-odd", "qwen3"):
        source, logits = sources[name]
        convert(Request(source, "megatron", tmp_path / name, parallel=Parallel(tp=4, pp=2, etp=4)))
        checks.append(Check(tmp_path / name, "torch_dist"))
        expected.append(logits)
    computed = last(spawn(load, 2, (2, 1, 1), checks))
    for ours, theirs in zip(computed, expected, strict=True):
        assert close(ours, theirs)


def _write(
    rank: int, world: int, init: str, layout: tuple[int, int, int], jobs: list[tuple[dict[str, Any], Path]]
) -> list[Any]:
    from dconv.export.megatron_runtime import build_gpt, logits
    from dconv.export.megatron_weights import save_legacy, save_torch_dist, seed_weights

    tp, pp, vpp = layout
    found = []
    with parallel_world(tp, pp, vpp, rank=rank, world=world, init_method=init):
        for seed, (args, root) in enumerate(jobs):
            models = build_gpt(args)
            seed_weights(models, seed)
            save_torch_dist(models, root / "torch_dist", args)
            save_legacy(models, root / "legacy", args)
            found.append(logits(models, TOKENS))
    return found


@pytest.mark.parametrize(
    "layout", [(1, 1, 1), (2, 2, 1), (1, 2, 2)], ids=lambda layout: "tp{}pp{}vpp{}".format(*layout)
)
def test_checkpoints_that_megatron_core_wrote_convert(
    layout: tuple[int, int, int], sources: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    """Args alone describe the model: no HuggingFace config comes along."""
    tp, pp, vpp = layout
    jobs, names = [], []
    (tmp_path / "args").mkdir()
    for name in ("llama-tied-odd", "llama3-scaled", "llama-mha", "qwen2-odd", "qwen3", "gpt2"):
        source, _ = sources[name]
        convert(Request(source, "megatron", tmp_path / "args" / name, parallel=Parallel(tp=tp, pp=pp, vpp=vpp, etp=tp)))
        args = open_source(tmp_path / "args" / name).args
        assert args is not None
        jobs.append((args, tmp_path / "written" / name))
        names.append(name)
    computed = last(spawn(_write, tp * pp, layout, jobs))
    for name, (_, root), theirs in zip(names, jobs, computed, strict=True):
        for container in ("torch_dist", "legacy"):
            out = tmp_path / "hf" / f"{name}-{container}"
            out.parent.mkdir(exist_ok=True)
            convert(Request(root / container, "hf", out))
            ours = hf.logits(out, TOKENS)
            assert close(theirs, ours), (name, container)
