"""Experts in one matrix: megatron-core's own GroupedMLP takes the weights of a SequentialMLP, saves them in both
containers, and hands them over; all of it is the same HuggingFace model.

Its kernels are not needed to build, load and save it, only the claim that they are there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dconv
from dconv.export import megatron_runtime as megatron
from tests.models import tree_digest
from tests.oracles.test_mcore_handoff import MOE

#: (tp, pp, vpp, ep, etp) of two or four ranks.
LAYOUTS = {
    "ep 2": (1, 1, 1, 2, 1),
    "tp 2": (2, 1, 1, 1, 2),
    "pp 2, ep 2": (1, 2, 1, 2, 1),
    "tp 2, ep 2, etp 2": (2, 1, 1, 2, 2),
    "tp 2, ep 2 inside": (2, 1, 1, 2, 1),
}


def saves(rank: int, world: int, init_method: str, root: str, layout: tuple[int, ...]) -> None:
    """A model with a SequentialMLP, saved; the same one with a GroupedMLP, loaded from that, saved and handed over."""
    with megatron.parallel_world(*layout, rank=rank, world=world, init_method=init_method):
        models = megatron.build_gpt(MOE)
        megatron.seed_weights(models, seed=1)
        megatron.save_torch_dist(models, f"{root}/sequential", MOE)
        grouped = build_grouped()
        megatron.load_torch_dist(grouped, f"{root}/sequential")
        held = [name for model in grouped for name in model.state_dict() if name.endswith("mlp.experts.weight1")]
        assert len(held) == MOE["num_layers"] // layout[1]
        megatron.save_torch_dist(grouped, f"{root}/torch_dist", MOE)
        megatron.save_legacy(grouped, f"{root}/legacy", MOE)
        dconv.handoff(grouped, "hf", f"{root}/hf-of-module", args=MOE)
        dconv.handoff([m.sharded_state_dict() for m in grouped], "hf", f"{root}/hf-of-sharded", args=MOE)
        if layout[1] > 1:  # later stages' experts all get one key of 0.16.1: nothing that Megatron could load either
            return
        apart = [m.sharded_state_dict(metadata={"singleton_local_shards": True}) for m in grouped]
        dconv.handoff(apart, "hf", f"{root}/hf-of-singletons", args=MOE)


def build_grouped() -> Any:
    """The model with megatron-core's legacy GroupedMLP in the place of its SequentialMLP."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer.moe import experts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts.gg, "assert_grouped_gemm_is_available", lambda: None)
        patch.setattr(LocalSpecProvider, "grouped_mlp_modules", lambda *_: (experts.GroupedMLP, None))
        return megatron.build_gpt(MOE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_in_one_matrix_are_the_same_model(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    world = layout[1] * max(layout[0], layout[3] * layout[4])
    megatron.spawn(saves, world, str(tmp_path), layout, timeout=300)
    dconv.convert(tmp_path / "sequential", "hf", tmp_path / "expected")
    expected = tree_digest(tmp_path / "expected")
    for container in ("torch_dist", "legacy"):
        dconv.convert(tmp_path / container, "hf", tmp_path / f"hf-of-{container}")
    for made in sorted(tmp_path.glob("hf-of-*")):
        assert tree_digest(made) == expected, made.name
    assert len(list(tmp_path.glob("hf-of-*"))) == (5 if layout[1] == 1 else 4)
