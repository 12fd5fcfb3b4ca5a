"""Law 4 for LLaVA: megatron-core's LLaVAModel and transformers compute the same logits of an image and a text."""

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
from tests.models import tensors  # noqa: E402
from tests.oracles import hf  # noqa: E402
from tests.oracles.function import Check, close  # noqa: E402

IMAGE = 300
_DRAW = torch.Generator().manual_seed(3)
TOKENS = torch.cat([torch.tensor([[IMAGE]]), torch.randint(0, 250, (1, 12), generator=_DRAW)], 1)
PIXELS = torch.randn(1, 3, 56, 56, generator=_DRAW)


def _run(rank: int, world: int, init: str, tp: int, checks: list[Check]) -> list[Any]:
    from dconv.export.megatron_weights import load_legacy, load_torch_dist

    found = []
    with parallel_world(tp, 1, etp=tp, rank=rank, world=world, init_method=init):
        for check in checks:
            args = open_source(check.path).args
            assert args is not None
            models: Any = megatron.build_llava(args)
            (load_torch_dist if check.container == "torch_dist" else load_legacy)(models, check.path)
            found.append(megatron.llava_logits(models, TOKENS, PIXELS))
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_megatron_core_computes_what_transformers_does(tp: int, tmp_path: Path) -> None:
    _, model = hf.tiny("llava")
    source = hf.save(model, tmp_path / "hf")
    inside = torch.cat([TOKENS[:, :1].expand(1, 16), TOKENS[:, 1:]], 1)  # a place for each patch
    expected = hf.logits(model, inside, pixel_values=PIXELS)
    checks = []
    for container in ("torch_dist", "legacy"):
        out = tmp_path / container
        parallel = Parallel(tp=tp, etp=tp)
        convert(
            Request(source, "megatron", out, parallel=parallel, megatron_format=container, transformer_impl="local")
        )
        checks.append(Check(out, container))
        convert(Request(out, "hf", tmp_path / f"back-{container}"))
    for ours in spawn(_run, tp, tp, checks)[0]:
        assert close(ours, expected)
    # the published names are those of the hub, which transformers reads, too
    back = tensors(tmp_path / "back-torch_dist")
    assert back == tensors(tmp_path / "back-legacy")
    assert {key.replace("vision_tower.vision_model.", "vision_tower."): value for key, value in back.items()} == {
        key.replace("vision_tower.vision_model.", "vision_tower."): value for key, value in tensors(source).items()
    }
    again = hf.logits(tmp_path / "back-torch_dist", inside, pixel_values=PIXELS)
    assert torch.equal(again, expected)
