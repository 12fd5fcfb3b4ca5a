"""Grouped experts: megatron-core's own GroupedMLP (all in one matrix) and TEGroupedMLP (``weight0``, ``weight1`` …)
take the weights of a SequentialMLP, save them in both containers, and hand them over: always one HuggingFace model.

Their kernels are not needed to build, load and save them, only the claim that they are there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dconv
from dconv.export import megatron_runtime as megatron
from tests.models import tree_digest
from tests.oracles import fake_te
from tests.oracles.test_mcore_handoff import MOE

#: (tp, pp, vpp, ep, etp) of two or four ranks.
LAYOUTS = {
    "ep 2": (1, 1, 1, 2, 1),
    "tp 2": (2, 1, 1, 1, 2),
    "pp 2, ep 2": (1, 2, 1, 2, 1),
    "tp 2, ep 2, etp 2": (2, 1, 1, 2, 2),
    "tp 2, ep 2 inside": (2, 1, 1, 2, 1),
}


#: The module's name -> its first weight below ``mlp.experts``.
MODULES = {"GroupedMLP": "weight1", "TEGroupedMLP": "linear_fc1.weight0"}


def saves(rank: int, world: int, init_method: str, root: str, module: str, layout: tuple[int, ...]) -> None:
    """A model with a SequentialMLP, saved; the same one with ``module``, loaded from that, saved and handed over."""
    if module == "TEGroupedMLP":
        fake_te.install()
    with megatron.parallel_world(*layout, rank=rank, world=world, init_method=init_method):
        models = megatron.build_gpt(MOE)
        megatron.seed_weights(models, seed=1)
        megatron.save_torch_dist(models, f"{root}/sequential", MOE)
        grouped = build_grouped(module)
        megatron.load_torch_dist(grouped, f"{root}/sequential")
        held = [
            name for model in grouped for name in model.state_dict() if name.endswith(f"mlp.experts.{MODULES[module]}")
        ]
        assert len(held) == MOE["num_layers"] // layout[1]
        megatron.save_torch_dist(grouped, f"{root}/torch_dist", MOE)
        megatron.save_legacy(grouped, f"{root}/legacy", MOE)
        dconv.handoff(grouped, "hf", f"{root}/hf-of-module", args=MOE)
        dconv.handoff([m.sharded_state_dict() for m in grouped], "hf", f"{root}/hf-of-sharded", args=MOE)
        if module == "GroupedMLP" and layout[1] > 1:  # 0.16.1 gives the experts of a later stage's layer one key
            return
        apart = [m.sharded_state_dict(metadata={"singleton_local_shards": True}) for m in grouped]
        dconv.handoff(apart, "hf", f"{root}/hf-of-singletons", args=MOE)


def build_grouped(module: str) -> Any:
    """The model with such a module in the place of its SequentialMLP."""
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe import experts

    made: Any = experts.GroupedMLP, None
    if module == "TEGroupedMLP":
        linears = {"linear_fc1": te.TEColumnParallelGroupedLinear, "linear_fc2": te.TERowParallelGroupedLinear}
        made = experts.TEGroupedMLP, MLPSubmodules(**linears)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts.gg, "assert_grouped_gemm_is_available", lambda: None)
        patch.setattr(LocalSpecProvider, "grouped_mlp_modules", lambda *_: made)
        return megatron.build_gpt(MOE)


#: Each simple layout with one of the modules, with --long all with both.
CASES = [
    pytest.param(name, module, marks=[pytest.mark.long] if (i + j) % 2 or "," in name else [])
    for i, name in enumerate(LAYOUTS)
    for j, module in enumerate(MODULES)
]


@pytest.mark.parametrize(("name", "module"), CASES)
def test_grouped_experts_are_the_same_model(name: str, module: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    world = layout[1] * max(layout[0], layout[3] * layout[4])
    real = module != "TEGroupedMLP"  # Transformer Engine is stood in for before megatron-core is imported
    megatron.spawn(saves, world, str(tmp_path), module, layout, timeout=300, imported=real)
    dconv.convert(tmp_path / "sequential", "hf", tmp_path / "expected")
    expected = tree_digest(tmp_path / "expected")
    for container in ("torch_dist", "legacy"):
        dconv.convert(tmp_path / container, "hf", tmp_path / f"hf-of-{container}")
    for made in sorted(tmp_path.glob("hf-of-*")):
        assert tree_digest(made) == expected, made.name
    assert len(list(tmp_path.glob("hf-of-*"))) == (4 if module == "GroupedMLP" and layout[1] > 1 else 5)
