"""Token predictors that a config counts and no file has: what transformers saves of DeepSeek-V3 and GLM-4.5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dconv.arch.registry import families
from dconv.checkpoint.detect import open_source
from dconv.errors import Damaged
from dconv.examine import inspect
from dconv.pipeline import Request, convert, prepare
from dconv.sharding.coords import Parallel
from tests.models import config_of, tensors, write_random

KEY = "num_nextn_predict_layers"
CONTAINERS = ("torch_dist", "legacy")


def said(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def counted(folder: Path, name: str, **keys: Any) -> Path:
    """A directory without predictors whose config.json counts one."""
    family = families()[name]
    config = {**config_of(family), **keys}
    write_random(folder, family, {**config, **dict.fromkeys(("num_mtp_layers", KEY), 0)})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_none_stored_none_written(name: str, container: str, tmp_path: Path) -> None:
    source = counted(tmp_path / "hf", name)
    assert said(source)[KEY] == 1
    target = Request(source, "megatron", tmp_path / "m", parallel=Parallel(tp=2, pp=2), megatron_format=container)
    notice = prepare(target).plan.target.left_out
    assert notice is not None and KEY in notice["model.layers.4.*"]
    convert(target)
    written = open_source(tmp_path / "m")
    assert written.args is not None and written.args["mtp_num_layers"] is None
    assert written.config is not None and written.config[KEY] == 0
    convert(Request(tmp_path / "m", "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(source)
    assert said(tmp_path / "back") == {**said(source), KEY: 0}
    convert(Request(source, "hf", tmp_path / "copy"))
    assert said(tmp_path / "copy") == {**said(source), KEY: 0}
    assert f"{KEY} is 1" in " ".join(inspect(source).text().split())


def test_a_number_that_the_config_leaves_to_its_class_is_said(tmp_path: Path) -> None:
    """transformers' classes count one where config.json is silent, and some files call it otherwise."""
    silent = counted(tmp_path / "silent", "deepseek_v3")
    config = said(silent)
    del config[KEY]
    (silent / "config.json").write_text(json.dumps(config))
    convert(Request(silent, "hf", tmp_path / "a"))
    assert said(tmp_path / "a") == {**config, KEY: 0}
    other = counted(tmp_path / "other", "glm4_moe", num_mtp_layers=1)
    convert(Request(other, "hf", tmp_path / "b"))
    assert said(tmp_path / "b") == {**said(other), KEY: 0, "num_mtp_layers": 0}


@pytest.mark.parametrize("container", CONTAINERS)
def test_megatron_without_them_converts_too(container: str, tmp_path: Path) -> None:
    """Args that count one and tensors that have none: the other direction."""
    source = counted(tmp_path / "hf", "deepseek_v3")
    convert(Request(source, "megatron", tmp_path / "m", megatron_format=container, parallel=Parallel(pp=2)))
    convert(Request(tmp_path / "m", "hf", tmp_path / "back", hf_config=source))
    assert said(tmp_path / "back")[KEY] == 0
    assert tensors(tmp_path / "back") == tensors(source)


@pytest.mark.parametrize("kept", ["enorm.weight", "mlp.experts.3.down_proj.weight"])
def test_a_part_of_one_is_damage(kept: str, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    source = counted(tmp_path / "hf", "deepseek_v3")
    held = dict.fromkeys(tensors(source), "a.safetensors")
    (source / "model.safetensors").rename(source / "a.safetensors")
    shape = {"enorm.weight": (32,), "mlp.experts.3.down_proj.weight": (32, 16)}[kept]
    save_file({f"model.layers.4.{kept}": np.zeros(shape, np.float16)}, source / "b.safetensors")
    index = {"weight_map": {**held, f"model.layers.4.{kept}": "b.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Damaged, match=r"not whole[\s\S]*model\.layers\.4\."):
        prepare(Request(source, "megatron", tmp_path / "m"))


@pytest.mark.parametrize("container", CONTAINERS)
def test_those_that_are_stored_stay(container: str, tmp_path: Path) -> None:
    family = families()["deepseek_v3"]
    source = write_random(tmp_path / "hf", family, config_of(family))
    convert(Request(source, "megatron", tmp_path / "m", parallel=Parallel(tp=2, pp=2), megatron_format=container))
    written = open_source(tmp_path / "m")
    assert written.args is not None and written.args["mtp_num_layers"] == 1
    convert(Request(tmp_path / "m", "hf", tmp_path / "back"))
    assert said(tmp_path / "back")[KEY] == 1


def test_what_transformers_saves_converts(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed: transformers cannot save")
    from tests.oracles import hf

    for name in ("deepseek_v3", "glm4_moe"):
        _, model = hf.tiny(name, num_mtp_layers=1, num_nextn_predict_layers=1)
        source = hf.save(model, tmp_path / name)
        assert said(source).get(KEY, said(source).get("num_mtp_layers")) == 1
        convert(Request(source, "megatron", tmp_path / f"{name}-m", parallel=Parallel(tp=2, pp=2)))
        convert(Request(tmp_path / f"{name}-m", "hf", tmp_path / f"{name}-back"))
        assert tensors(tmp_path / f"{name}-back") == tensors(source)


def test_more_of_them_than_any_model_has_is_damage() -> None:
    family = families()["deepseek_v3"]
    with pytest.raises(Damaged, match="token predictors"):
        family.facts({**config_of(family), KEY: 10**6})
