"""Every parameter of a transformers model lies where its boxes say: the real loader is the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from dconv.checkpoint.huggingface_target import lay_out_slots
from dconv.codec.kernels import apply
from dconv.describe import describe_model
from dconv.export.huggingface import AUTO
from dconv.export.prompt import kind_of
from dconv.net.places import parameters
from dconv.net.skeleton import built, quiet
from dconv.sharding.commit import run_rank
from dconv.sharding.plan import build_plan
from dconv.sharding.rank import Settings
from tests.oracles import hf


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", hf.FAMILIES)
def test_parameters_are_where_their_boxes_say(name: str, dtype: str, tmp_path: Path) -> None:
    hf.save(hf.tiny(name)[1], tmp_path / "hf")
    model = describe_model(tmp_path / "hf")
    auto = AUTO[kind_of(model.family)]
    torchs = {"bf16": "bfloat16", "f16": "float16"}[dtype]
    net = built(tmp_path / "hf", auto, tmp_path, family=model.family, dtype=torchs)
    found, left_out = parameters(model.logical, net)
    held = [(one.spec, one.slots) for one in found]
    target = lay_out_slots(held, config=None, side={}, shard_size=1 << 40, left_out=left_out)
    run_rank(build_plan(model.logical, target), tmp_path / "out", apply, Settings())
    written = load_file(tmp_path / "out" / "model.safetensors")
    for one in found:
        written |= dict.fromkeys(one.alike, written[one.spec.name])
    with quiet():
        loaded = getattr(transformers, auto).from_pretrained(tmp_path / "hf", dtype=getattr(torch, torchs))
    state = loaded.state_dict()
    assert written.keys() == state.keys()
    for key, value in state.items():
        assert value.dtype == written[key].dtype, key
        assert torch.equal(value, written[key]), key
