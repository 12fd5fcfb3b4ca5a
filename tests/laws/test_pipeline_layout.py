"""Which layers a pipeline stage holds: the real megatron-core, asked for its own offsets, must agree."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from dconv.errors import Refused, UsageError
from dconv.launch.values import pp_layout
from dconv.sharding.coords import Parallel

CASES = [
    (8, Parallel(pp=2)),
    (8, Parallel(pp=4, vpp=2)),
    (12, Parallel(pp=2, vpp=3)),
    (7, Parallel(pp=4, count_embedding=True)),
    (7, Parallel(pp=4, count_loss=True)),
    (14, Parallel(pp=4, count_embedding=True, count_loss=True)),
    (14, Parallel(pp=4, vpp=2, count_embedding=True, count_loss=True)),
    (10, Parallel(pp=4, first=1, last=3)),
    (10, Parallel(pp=4, first=1)),
    (9, Parallel(pp=3, last=1)),
    (20, Parallel(pp=4, vpp=2, first=2, last=6)),
    (8, Parallel(pp=2, vpp=2, stages=((3, 1), (2, 2)))),
    (7, Parallel(pp=4, stages=((0,), (3,), (4,), (0,)))),
]


@pytest.mark.parametrize(("layers", "parallel"), CASES)
def test_megatron_core_puts_the_layers_there_too(
    layers: int, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed: the oracle cannot run")
    from megatron.core import parallel_state
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    text = parallel.layout_string()
    config = SimpleNamespace(
        num_layers=layers,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.first,
        num_layers_in_last_pipeline_stage=parallel.last,
        account_for_embedding_in_pipeline_split=parallel.count_embedding,
        account_for_loss_in_pipeline_split=parallel.count_loss,
        pipeline_model_parallel_layout=PipelineParallelLayerLayout(text, parallel.pp) if text else None,
    )
    ours = parallel.chunks(layers)
    for pp in range(parallel.pp):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda pp=pp: pp)
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: parallel.pp)
        virtual = parallel.vpp if parallel.vpp > 1 else None
        monkeypatch.setattr(
            parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda virtual=virtual: virtual
        )
        monkeypatch.setattr(parallel_state, "is_inside_encoder", lambda: False, raising=False)
        for vp in range(parallel.vpp):
            stage = vp if parallel.vpp > 1 else None
            offset = get_transformer_layer_offset(config, vp_stage=stage, pp_rank=pp)
            count = get_num_layers_to_build(config, vp_stage=stage, pp_rank=pp)
            assert list(ours[pp][vp]) == list(range(offset, offset + count)), (pp, vp)


def test_layouts_as_people_write_them() -> None:
    assert pp_layout("3|4|4|2") == (3, 4, 4, 2)
    assert pp_layout("Ettt|(tttt|)*2ttL") == (3, 4, 4, 2)
    assert pp_layout("E|t*3|tL") == (0, 3, 1)
    for wrong in ("", "a|b", "tt|ttL", "Ett|tEL", "3|x"):
        with pytest.raises(argparse.ArgumentTypeError):
            pp_layout(wrong)


def test_layers_that_do_not_fit_are_refused() -> None:
    for parallel in (
        Parallel(pp=3),
        Parallel(pp=2, stages=((3,), (3,))),
        Parallel(pp=2, stages=((9,), (-1,))),
        Parallel(pp=2, first=9),
        Parallel(pp=2, first=0),
        Parallel(pp=3, last=-1),
        Parallel(pp=2, first=-1, last=9),
        Parallel(pp=1, first=3, last=8),
        Parallel(pp=4, first=4, last=4),  # Megatron has no stages in the middle without layers
        Parallel(pp=10**12, first=8),
        Parallel(pp=2, vpp=10**12, last=8),
    ):
        with pytest.raises(Refused):
            parallel.chunks(8)


@pytest.mark.parametrize(
    "ways",
    [
        {"first": 1, "count_embedding": True},
        {"last": 1, "count_loss": True},
        {"stages": ((4,), (4,)), "first": 4},
        {"stages": ((4,), (4,)), "count_loss": True},
    ],
)
def test_two_ways_at_once_are_refused(ways: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Parallel(pp=2, **ways)
