"""Files of the hub whose config.json names another class, or whose tensors have older names, are what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dconv.arch.registry import by_name
from dconv.errors import Damaged, Refused
from dconv.pipeline import Request, convert, prepare
from tests.models import config_of, tensors, write_random

pytest.importorskip("safetensors", reason="safetensors is not installed: it writes the files")
from safetensors.numpy import load_file, save_file

Name = Callable[[str], str | None]


def _old(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def _bare(name: str) -> str:
    return name.removeprefix("transformer.")


#: family -> the class that its files on the hub name, and their tensors' names
PUBLISHED: dict[str, tuple[str, Name]] = {
    "bert": ("BertForMaskedLM", _old),
    "megatron-bert": ("MegatronBertForMaskedLM", lambda name: name),
    "gpt2": ("GPT2LMHeadModel", _bare),
    "gpt2 alone": ("GPT2Model", _bare),
    "t5": ("T5WithLMHeadModel", lambda name: name),
}


def published(folder: Path, family: str, architecture: str, name: Name) -> tuple[Path, Path]:
    """The same random weights, as the table names them and as ``name`` does; None leaves one out."""
    config = {**config_of(by_name(family), tie_word_embeddings=True), "torch_dtype": "float16"}
    plain = write_random(folder / "plain", by_name(family), config)
    held = {key: np.frombuffer(data, np.uint16).reshape(shape) for key, (_, shape, data) in tensors(plain).items()}
    new = {name(key): array for key, array in held.items()}
    other = folder / "hub"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    for at, said in ((plain, held), (other, {key: array for key, array in new.items() if key is not None})):
        save_file({key: array.view(np.float16) for key, array in said.items()}, at / "model.safetensors")
    return plain, other


@pytest.mark.parametrize("which", PUBLISHED)
def test_they_convert_without_naming_the_family(which: str, tmp_path: Path) -> None:
    architecture, name = PUBLISHED[which]
    family = which.split()[0]
    plain, hub = published(tmp_path, family, architecture, name)
    if family == "gpt2":  # the mask and its constant, which OpenAI's files have
        held = load_file(hub / "model.safetensors")
        masks = {f"h.{layer}.attn.bias": np.ones((1, 1, 4, 4), np.float16) for layer in range(4)}
        held |= masks | {f"h.{layer}.attn.masked_bias": np.array(-1e4, np.float16) for layer in range(4)}
        save_file(held, hub / "model.safetensors")
    job = prepare(Request(hub, "megatron", tmp_path / "m"))
    assert job.family.name == family
    convert(job.request)
    convert(Request(tmp_path / "m", "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(plain)
    left = job.plan.target.left_out or {}
    masked = {f"h.{layer}.attn.{it}" for layer in range(4) for it in ("bias", "masked_bias")}
    assert set(left) == (masked if family == "gpt2" else set())


def test_a_tensor_under_two_of_its_older_names_is_not_lost(tmp_path: Path) -> None:
    _, hub = published(tmp_path, "bert", "BertForPreTraining", _old)
    held = load_file(hub / "model.safetensors")
    name = "bert.embeddings.LayerNorm.gamma"
    save_file({**held, name.removeprefix("bert."): held[name] + 1}, hub / "model.safetensors")
    with pytest.raises(Damaged, match="two of the names") as caught:
        prepare(Request(hub, "hf", tmp_path / "out"))
    assert caught.value.where == f"{name} and {name.removeprefix('bert.')}"


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertModel"])
def test_a_bert_without_both_heads_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    """Megatron has token types, a pooler and the second head, or none of the three."""

    def name(key: str) -> str | None:
        gone = "cls." if architecture == "BertModel" else "cls.seq_relationship."
        return None if key.startswith((gone, "bert.pooler")) else key

    _, hub = published(tmp_path, "bert", architecture, name)
    with pytest.raises(Refused, match=f"{architecture} with [0-9]+ tensors less") as caught:
        prepare(Request(hub, "megatron", tmp_path / "m"))
    assert "bert.pooler.dense" in caught.value.found and "cls.seq_relationship" in caught.value.found


@pytest.mark.parametrize(
    ("family", "copy", "of"),
    [
        ("bert", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("bert", "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("t5", "encoder.embed_tokens.weight", "shared.weight"),
        ("t5", "decoder.embed_tokens.weight", "shared.weight"),
    ],
)
def test_a_copy_is_left_out_stands_alone_or_is_refused(family: str, copy: str, of: str, tmp_path: Path) -> None:
    plain, hub = published(tmp_path, family, by_name(family).config.architecture, lambda key: key)
    held = load_file(hub / "model.safetensors")
    held.pop(copy, None)

    def converts() -> bool:
        convert(Request(hub, "hf", tmp_path / "out"))
        return tensors(tmp_path / "out") == tensors(plain)

    save_file({**held, copy: held[of]}, hub / "model.safetensors")
    job = prepare(Request(hub, "hf", tmp_path / "out"))
    assert copy in (job.plan.target.left_out or {})
    assert converts()
    (tmp_path / "out").rename(tmp_path / "first")
    save_file({**{key: array for key, array in held.items() if key != of}, copy: held[of]}, hub / "model.safetensors")
    assert converts()
    save_file({**held, copy: (held[of].view(np.uint16) ^ 1).view(np.float16)}, hub / "model.safetensors")
    with pytest.raises(Refused, match="differ"):
        prepare(Request(hub, "hf", tmp_path / "no"))
