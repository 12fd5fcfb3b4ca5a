"""Token predictors in Megatron's files are the module of the real megatron-core: the same names, cut the same way.

Logits cannot say it: megatron-core computes predictors while it trains, and transformers leaves them out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")
pytest.importorskip("megatron.core", reason="megatron-core is not installed: the oracle cannot run")

from dconv.arch.registry import by_name  # noqa: E402
from dconv.checkpoint.detect import open_source  # noqa: E402
from dconv.export.megatron_cpu import parallel_world, spawn  # noqa: E402
from dconv.export.megatron_gpt import _layers  # noqa: E402
from dconv.pipeline import Request, convert  # noqa: E402
from dconv.sharding.coords import Parallel  # noqa: E402
from tests.models import config_of, tensors, write_random  # noqa: E402

TP = 2
Shapes = dict[str, tuple[int, ...]]


def _predictors(rank: int, world: int, init: str, folder: str) -> tuple[Shapes, set[str]]:
    """Names and shapes of the predictors that a rank holds, and as they are saved in torch_dist."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock

    from dconv.export.megatron_config import transformer_config

    with parallel_world(TP, 1, etp=TP, rank=rank, world=world, init_method=init):
        args = dict(open_source(Path(folder)).args or {})
        config = transformer_config({**args, "mtp_num_layers": None}, torch.float32)
        config.mtp_num_layers = args["mtp_num_layers"]
        layer = _layers(config, "local", None).layer_specs[-1]
        block = MultiTokenPredictionBlock(config, get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False))
        held = {f"mtp.{name}": tuple(one.shape) for name, one in block.state_dict().items() if one is not None}
        saved: Any = block.sharded_state_dict(prefix="mtp.", metadata={"dp_cp_group": None})
        return held, {one.key for one in saved.values() if not one.key.endswith("_extra_state")}


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_a_predictor_is_cut_and_called_as_in_megatron_core(name: str, tmp_path: Path) -> None:
    family = by_name(name)
    source = write_random(tmp_path / "hf", family, config_of(family, num_nextn_predict_layers=2))
    for container in ("legacy", "torch_dist"):
        parallel, out = Parallel(tp=TP, etp=TP), tmp_path / container
        convert(
            Request(source, "megatron", out, parallel=parallel, megatron_format=container, transformer_impl="local")
        )
        convert(Request(out, "hf", tmp_path / f"back-{container}"))
        assert tensors(tmp_path / f"back-{container}") == tensors(source)
    stored = {name for name in open_source(tmp_path / "torch_dist").shapes if name.startswith("mtp.")}
    for rank, (held, saved) in enumerate(spawn(_predictors, TP, str(tmp_path / "legacy"))):
        file = next((tmp_path / "legacy").rglob(f"mp_rank_{rank:02d}/model_optim_rng.pt"))
        ours = torch.load(file, weights_only=False)["model"].items()
        assert {key: tuple(one.shape) for key, one in ours if key.startswith("mtp.") and one is not None} == held
        assert held["mtp.layers.1.eh_proj.weight"] == (16, 64)
        assert saved == stored
