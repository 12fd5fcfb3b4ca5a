"""check and ``--verify logits`` of what is no plain decoder: asked in its own way, run by its own runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed: nothing runs Megatron's models")

from dconv import logits
from dconv.checking import check
from dconv.checkpoint import safetensors
from dconv.errors import Refused, VerifyFailed
from dconv.export import runtimes
from dconv.pipeline import Request, convert, prepare
from dconv.sharding.coords import Parallel
from tests.cli.conftest import Dconv
from tests.oracles import hf as oracle

Tiny = Callable[..., Path]
#: name -> config keys, classes of the two runtimes, and whether it writes.
FAMILIES: dict[str, tuple[dict[str, Any], str, str, bool]] = {
    "megatron-bert": ({"vocab_size": 301}, "MegatronBertForPreTraining", "BertModel", False),
    "t5": (
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "vocab_size": 301},
        "T5ForConditionalGeneration", "T5Model", True,
    ),
    "mamba2": ({"vocab_size": 301}, "Mamba2ForCausalLM", "MambaModel", True),
    "nemotron_h": ({"num_key_value_heads": 2, "time_step_min": 1e-30}, "NemotronHForCausalLM", "MambaModel", True),
    "llava": ({}, "LlavaForConditionalGeneration", "LLaVAModel", True),
    "gpt2": ({}, "GPT2LMHeadModel", "GPTModel", True),
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    """A tiny model of a family, with a tokenizer of a few words."""

    def made(family: str, **keys: Any) -> Path:
        from tokenizers import Tokenizer, models, pre_tokenizers

        _, model = oracle.tiny(family, **keys)
        folder = oracle.save(model, tmp_path / family)
        words = ["The", "capital", "of", "France", "is", *(f"word{i}" for i in range(295))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="word0"))  # noqa: S106
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        return folder

    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_runs_in_both_runtimes_and_computes_the_same(family: str, tiny: Tiny, tmp_path: Path) -> None:
    keys, theirs, cores, writes = FAMILIES[family]
    source = tiny(family, **keys)
    found = check(source).run
    assert found is not None
    assert found["model"] == theirs
    if writes:
        assert str(found["continuation"]).strip()
    else:
        assert found["no_text"] == "an encoder writes none"
    out = tmp_path / "m"
    job = prepare(Request(source, "megatron", out, megatron_format="legacy"))
    logits.require(job)
    convert(job.request)
    assert float(str(logits.compare(job, out)["difference"])) < logits.BOUND
    convert(Request(out, "megatron", tmp_path / "dist"))
    ran = check(tmp_path / "dist").run
    assert ran is not None
    assert ran["model"] == f"{cores}, tp 1 x pp 1"
    assert str(ran["runtime"]).startswith("megatron-core ")


def spoil(folder: Path, name: str) -> None:
    """Zero the first half of a tensor of a HuggingFace directory."""
    extent = safetensors.read_header(folder / "model.safetensors")[name].extents[0]
    nbytes = int(np.prod(extent.region.shape)) * 4
    with (folder / extent.file).open("r+b") as file:
        file.seek(extent.offset)
        file.write(bytes(nbytes // 2))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("megatron-bert", "bert.pooler.dense.weight"),  # of the head that says nothing about words
        ("t5", "encoder.block.2.layer.0.SelfAttention.v.weight"),
        ("llava", "multi_modal_projector.linear_1.weight"),
    ],
)
def test_the_question_reaches_every_part(family: str, name: str, tiny: Tiny, tmp_path: Path) -> None:
    """Spoilt weights of the second head, of the encoder, and behind the image are seen."""
    source = tiny(family, **FAMILIES[family][0])
    job = prepare(Request(source, "hf", tmp_path / "out"))
    convert(job.request)
    assert logits.compare(job, tmp_path / "out")["difference"] == 0.0
    spoil(tmp_path / "out", name)
    with pytest.raises(VerifyFailed, match="does not compute"):
        logits.compare(job, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "named"), [("gemma2", "attn_logit_softcapping"), ("bert", "apply_residual_connection_post_layernorm")]
)
def test_what_no_runtime_computes_is_refused_before_writing_and_run_in_the_other(
    dconv: Dconv, family: str, named: str, tiny: Tiny, tmp_path: Path
) -> None:
    """megatron-core has no such model: the comparison is refused by name; check asks transformers instead."""
    source = tiny(family)
    ran = dconv("convert", source, "megatron", "-o", tmp_path / "m", "--verify", "logits")
    assert ran.code == 3, ran.err
    assert f"megatron-core on a CPU does not compute {family}" in ran.err
    assert named in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [family]
    convert(Request(source, "megatron", tmp_path / "m", parallel=Parallel(tp=2, etp=2)))
    ran = dconv("check", tmp_path / "m", "--json")
    assert ran.code == 0, ran.out
    assert "layer by layer" in ran.json["run"]["runtime"]
    assert named in ran.json["notes"][0]
    ran = dconv("convert", tmp_path / "m", "hf", "-o", tmp_path / "back", "--verify", "logits")
    assert ran.code == 3
    assert not (tmp_path / "back").exists()


def test_a_family_without_any_runtime_is_named(dconv: Dconv, tmp_path: Path) -> None:
    from dconv.arch.registry import by_name
    from tests.models import config_of, write_random

    family = by_name("minicpm_blockffn")
    source = write_random(tmp_path / "m", family, config_of(family))
    ran = dconv("convert", source, "hf", "-o", tmp_path / "out", "--verify", "logits")
    assert ran.code == 3
    assert "minicpm_blockffn" in ran.err
    assert not (tmp_path / "out").exists()
    ran = dconv("check", source)
    assert ran.code == 7
    assert "whole        minicpm_blockffn" in ran.out
    assert "(minicpm_blockffn)" in ran.out
    assert dconv("check", source, "--no-run").code == 0


def test_a_runtime_that_is_not_installed_is_asked_for_before_writing(
    dconv: Dconv, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "missing", lambda container: "megatron.core" if container == "megatron" else "")
    monkeypatch.setattr(logits, "missing", runtimes.missing)
    ran = dconv("convert", hf, "megatron", "-o", tmp_path / "out", "--verify", "logits")
    assert ran.code == 7
    assert "nothing was written" in ran.err
    assert not (tmp_path / "out").exists()


def test_two_models_in_one_output_are_compared_each_with_its_own(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = tiny("llama", vocab_size=301), tiny("qwen2", vocab_size=301, num_hidden_layers=2)
    out = tmp_path / "both"
    job = prepare(Request(student, "megatron", out, teacher=teacher, parallel=Parallel(tp=2, etp=2)))
    logits.require(job)
    convert(job.request)
    assert float(str(logits.compare(job, out)["difference"])) < logits.BOUND
    taken = prepare(Request(out, "hf", tmp_path / "teacher", submodel="teacher"))
    logits.require(taken)
    convert(taken.request)
    ran = check(out, submodel="student").run
    assert ran is not None
    assert ran["model"] == "GPTModel, tp 1 x pp 1 (a temporary copy)"
    spoil(tmp_path / "teacher", "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(VerifyFailed):
        logits.compare(taken, tmp_path / "teacher")


def test_a_head_that_nothing_runs_is_refused_before_writing(tiny: Tiny, tmp_path: Path) -> None:
    job = prepare(Request(tiny("llama"), "hf", tmp_path / "out", with_eagle=True))
    with pytest.raises(Refused, match="nothing was written") as caught:
        logits.require(job)
    assert "EAGLE" in caught.value.found
