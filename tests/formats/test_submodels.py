"""Several models in one checkpoint: a student and its teacher, and EAGLE heads beside a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dconv import convert
from dconv.arch.registry import by_name
from dconv.cli import main
from dconv.errors import Refused, UsageError
from tests.models import config_of, tensors, tree_digest, write_random
from tests.quant.models import write_normal

CONTAINERS = ("torch_dist", "legacy")


def write(folder: Path, family: str, **keys: Any) -> Path:
    return write_random(folder, by_name(family), config_of(by_name(family), **keys), seed=len(family))


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return write(tmp_path / "in" / "student", "minicpm", tie_word_embeddings=True)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return write(tmp_path / "elsewhere" / "teacher", "qwen2", num_hidden_layers=6, vocab_size=67, hidden_size=48)


@pytest.mark.parametrize("sizes", [{}, {"tp": 2, "pp": 2}], ids=["one rank", "tp 2 x pp 2"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_student_and_teacher_go_in_and_come_out(
    container: str, sizes: dict[str, int], student: Path, teacher: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    convert(student, "megatron", both, teacher=str(teacher), megatron_format=container, **sizes)
    for which, source in (("student", student), ("teacher", teacher)):
        convert(both, "hf", tmp_path / which, submodel=which)
        assert tensors(tmp_path / which) == tensors(source)
        for file in ("config.json", "tokenizer.json"):
            assert (tmp_path / which / file).read_bytes() == (source / file).read_bytes()
        receipt = json.loads((tmp_path / which / "dconv.json").read_text())
        other = "teacher" if which == "student" else "student"
        assert receipt["left_out"][f"{other}_model.*"] == f"the {other}'s: --submodel {which}"
    # the args of both are inside, too
    shutil.rmtree(both / "huggingface")
    for which, source in (("student", student), ("teacher", teacher)):
        convert(both, "hf", tmp_path / f"{which}-args", submodel=which)
        assert tensors(tmp_path / f"{which}-args") == tensors(source)


@pytest.mark.parametrize("container", CONTAINERS)
def test_without_the_option_it_is_refused(container: str, student: Path, teacher: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    convert(student, "megatron", both, teacher=str(teacher), megatron_format=container)
    with pytest.raises(Refused) as caught:
        convert(both, "hf", tmp_path / "out")
    assert "--submodel student" in caught.value.do
    assert main(["inspect", str(both)]) == 3
    assert main(["inspect", str(both), "--submodel", "teacher"]) == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_teacher_alone(container: str, student: Path, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "teacher-only"
    convert(student, "megatron", out, teacher=str(teacher), teacher_only=True, megatron_format=container)
    convert(out, "hf", tmp_path / "back", submodel="teacher")
    assert tensors(tmp_path / "back") == tensors(teacher)
    with pytest.raises(Refused, match="no student") as caught:
        convert(out, "hf", tmp_path / "student", submodel="student")
    assert "--submodel teacher" in caught.value.do


def test_names_of_modelopt(student: Path, teacher: Path, tmp_path: Path) -> None:
    """There the student has no prefix and the teacher's has an underscore; nothing says what the teacher is."""
    torch = pytest.importorskip("torch", reason="torch is not installed: it writes the checkpoint")
    both = tmp_path / "both"
    convert(student, "megatron", both, teacher=str(teacher), megatron_format="legacy")
    shutil.rmtree(both / "huggingface")
    (file,) = both.rglob("*.pt")
    tree = torch.load(file, weights_only=False)
    renamed = {"student_model.": "", "teacher_model.": "_teacher_model."}
    tree["model"] = {
        renamed[old] + name.removeprefix(old): value
        for name, value in tree["model"].items()
        for old in renamed
        if name.startswith(old)
    }
    torch.save(tree, file)
    convert(both, "hf", tmp_path / "student", submodel="student")
    assert tensors(tmp_path / "student") == tensors(student)
    convert(both, "hf", tmp_path / "teacher", submodel="teacher", hf_config=str(teacher))
    assert tensors(tmp_path / "teacher") == tensors(teacher)


def test_one_model_has_no_submodels(student: Path, tmp_path: Path) -> None:
    for which in ("student", "teacher"):
        with pytest.raises(Refused, match=f"no {which}"):
            convert(student, "megatron", tmp_path / "out", submodel=which)


@pytest.mark.parametrize(
    "options",
    [{"format": "hf", "teacher": "."}, {"format": "megatron", "teacher_only": True}],
    ids=["HuggingFace", "no teacher"],
)
def test_what_a_teacher_needs(options: dict[str, Any], student: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="teacher"):
        convert(student, out=tmp_path / "out", **options)


HEADS = {
    "eagle": {
        "fc.weight": (32, 64), "fc.bias": (32,), "embed_tokens.weight": (61, 32),
        **{f"layers.0.self_attn.{it}_proj.weight": (32, 32) for it in "qkvo"}, "layers.0.self_attn.q_proj.bias": (32,),
        "layers.0.mlp.gate_proj.weight": (48, 32), "layers.0.mlp.up_proj.weight": (48, 32),
        "layers.0.mlp.down_proj.weight": (32, 48), "layers.0.post_attention_layernorm.weight": (32,),
    },
    "eagle2 of MiniCPM4": {
        "fc.weight": (32, 64), "input_norm1.weight": (32,), "input_norm2.weight": (32,),
        "layers.0.input_layernorm.weight": (32,), "layers.0.self_attn.k_proj.weight": (16, 32),
    },
    "eagle3": {
        "fc.weight": (32, 96), "d2t": (20,), "norm.weight": (32,), "midlayer.hidden_norm.weight": (32,),
        "midlayer.self_attn.q_proj.weight": (32, 64), "midlayer.mlp.down_proj.weight": (32, 48),
    },
}  # fmt: skip


def with_head(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(4)
    head = {
        name: rng.integers(0, 9, shape) if name == "d2t" else rng.random(shape, np.float32)
        for name, shape in shapes.items()
    }
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(tensors(folder), "model-00001-of-00002.safetensors")
    save_file(head, folder / "model-00002-of-00002.safetensors")
    names |= dict.fromkeys(head, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_is_kept_or_left_out_by_name(kind: str, container: str, student: Path, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed: it writes the head")
    plain = tensors(student)
    source = with_head(student, HEADS[kind])
    kept, left = tmp_path / "kept", tmp_path / "left"
    for out, options in ((kept, {"with_eagle": True}), (left, {})):
        convert(source, "megatron", out, tp=2, megatron_format=container, **options)
    receipt = json.loads((left / "dconv.json").read_text())
    assert {name: receipt["left_out"][name] for name in HEADS[kind]} == dict.fromkeys(
        HEADS[kind], "of an EAGLE head: --with-eagle keeps it"
    )
    convert(kept, "hf", tmp_path / "both", with_eagle=True)
    assert tensors(tmp_path / "both") == tensors(source)
    assert len(tensors(source)) == len(plain) + len(HEADS[kind])
    for out in (kept, left):
        convert(out, "hf", tmp_path / "alone", overwrite=True)
        assert tensors(tmp_path / "alone") == plain
    assert tree_digest(kept) != tree_digest(left)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_alone_is_no_model(kind: str, tmp_path: Path) -> None:
    """As heads are published: with a config.json of the model's architecture."""
    from safetensors.numpy import save_file

    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in HEADS[kind].items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(config_of(by_name("llama"), num_hidden_layers=1)))
    for options in ({}, {"with_eagle": True}):
        with pytest.raises(Refused, match="EAGLE head without its model"):
            convert(tmp_path, "megatron", tmp_path / "out", **options)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_codes_of_either_model_are_decoded(tmp_path: Path, which: str) -> None:
    dense = write_normal(tmp_path / "dense", by_name("llama"))
    coded = tmp_path / "coded"
    convert(dense, "fp8", coded)
    student, teacher = (coded, dense) if which == "student" else (dense, coded)
    convert(student, "megatron", tmp_path / "both", teacher=teacher, tp=2)
    convert(tmp_path / "both", "hf", tmp_path / "back", submodel=which)
    convert(coded, "hf", tmp_path / "alone")
    assert tensors(tmp_path / "back") == tensors(tmp_path / "alone")
