"""Law 4 for Mamba: megatron-core's MambaModel and transformers compute the same logits from the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")
pytest.importorskip("megatron.core", reason="megatron-core is not installed: the oracle cannot run")

from dconv.checkpoint.detect import open_source  # noqa: E402
from dconv.export import megatron_runtime as megatron  # noqa: E402
from dconv.export.megatron_cpu import parallel_world, spawn  # noqa: E402
from dconv.pipeline import Request, convert  # noqa: E402
from dconv.sharding.coords import Parallel  # noqa: E402
from tests.oracles.function import TOKENS, Check, Sources, close, last, sources_of  # noqa: E402

#: transformers' Nemotron-H takes no smaller time step, NVIDIA's own code and megatron-core have no least one.
NO_LIMIT = {"time_step_min": 1e-30}
#: name -> (family, config keys).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("mamba2", {"vocab_size": 301}),
    "mamba2-tied": ("mamba2", {"tie_word_embeddings": True}),
    "nemotron_h": ("nemotron_h", {"num_key_value_heads": 2, **NO_LIMIT}),
    "bamba": ("bamba", {"vocab_size": 301}),
    "bamba-tied": ("bamba", {"tie_word_embeddings": True, "num_key_value_heads": 2, "attn_layer_indices": [0]}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return sources_of(MODELS, tmp_path_factory.mktemp("hf"))


def _run(rank: int, world: int, init: str, layout: tuple[int, int], checks: list[Check], write: str) -> list[Any]:
    megatron.stand_in()
    from dconv.export.megatron_runtime import logits
    from dconv.export.megatron_weights import load_legacy, load_torch_dist, save_legacy, save_torch_dist

    found = []
    with parallel_world(*layout, etp=layout[0], rank=rank, world=world, init_method=init):
        for check in checks:
            args = open_source(check.path).args
            assert args is not None
            models = megatron.build_hybrid(args)
            (load_torch_dist if check.container == "torch_dist" else load_legacy)(models, check.path)
            found.append(logits(models, TOKENS))
            if write:
                save = save_torch_dist if check.container == "torch_dist" else save_legacy
                save(models, f"{write}/{check.path.name}", args)
    return found


@pytest.mark.parametrize(
    "layout",
    [(2, 2), *(pytest.param(layout, marks=pytest.mark.long) for layout in ((1, 1), (4, 1)))],
    ids=lambda layout: "tp{}pp{}".format(*layout),
)
def test_megatron_core_computes_what_transformers_does(
    layout: tuple[int, int], sources: Sources, tmp_path: Path
) -> None:
    """Loaded in both containers and both spellings; what it then saves converts back to the same bits."""
    tp, pp = layout
    checks, expected = [], []
    for name, (source, logits) in sources.items():
        for container, impl in (("torch_dist", "transformer_engine"), ("legacy", "local")):
            out = tmp_path / f"{name}-{container}"
            parallel = Parallel(tp=tp, pp=pp, etp=tp)
            convert(
                Request(source, "megatron", out, parallel=parallel, megatron_format=container, transformer_impl=impl)
            )
            checks.append(Check(out, container))
            expected.append((name, container, source, logits))
    (tmp_path / "written").mkdir()
    computed = last(spawn(_run, tp * pp, layout, checks, str(tmp_path / "written")))
    wrong = [case[:2] for case, ours in zip(expected, computed, strict=True) if not close(ours, case[3])]
    assert not wrong
    from tests.models import tensors

    for (name, container, source, _), check in zip(expected, checks, strict=True):
        back = tmp_path / f"back-{name}-{container}"
        convert(Request(tmp_path / "written" / check.path.name, "hf", back))
        assert tensors(back) == tensors(source), (name, container)
