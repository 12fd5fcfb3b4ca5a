"""Sentences become commands that the real parser takes, and of a model that is there, that ``plan`` accepts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from dconv.arch.registry import families
from dconv.assist.choose import likeliest
from dconv.assist.sentence import read
from dconv.commands.table import parser_of
from dconv.errors import Damaged, UsageError
from dconv.launch.options import parse
from dconv.launch.run_options import check_launch
from tests.cli.conftest import Dconv, listing
from tests.models import config_of, write_random

#: A sentence, and what follows ``dconv convert MODEL``.
SENTENCES = [
    ("my 8B llama for vllm in 4 bit on 2 gpus", "gptq --nproc 2"),
    ("llama for ollama", "gguf"),
    ("qwen3 for lm studio, q4_k_m", "gguf --quant q4_k_m"),
    ("llama.cpp, 8 bit", "gguf --quant q8_0"),
    ("gguf for my mac", "gguf"),
    ("GGUF in bf16", "gguf --quant bf16"),
    ("q5_k_m", "gguf --quant q5_k_m"),
    ("a 13b for koboldcpp with iq4_xs", "gguf --quant iq4_xs"),
    ("8B llama on my MacBook in 4 bit", "mlx --quant 4bit"),
    ("mlx int8", "mlx --quant 8bit"),
    ("my megatron run for apple silicon", "mlx"),
    ("serve it with sglang in fp8", "fp8"),
    ("tgi, awq", "awq"),
    ("for vllm", "hf"),
    ("nvfp4 for vllm", "mx --quant nvfp4"),
    ("w4a16 compressed-tensors for vllm", "gptq --quant pack-quantized"),
    ("fp8 for vllm as compressed-tensors", "fp8 --quant-config compressed-tensors"),
    ("for hf transformers in 4 bit", "gptq"),
    ("quantise it to four bits", "gptq"),
    ("gptq 8 bit", """gptq --quantization-config '{"bits": 8}'"""),
    ("for a dimensity 9400 phone", "mtk --platform MT6991"),
    ("android", "mtk --platform CHIP"),
    ("an android phone with snapdragon 8 elite", "qnn --platform SM8750"),
    ("qualcomm sm8650, w8a16", "qnn --platform SM8650 --quant w8a16"),
    ("rk3588", "rk --platform RK3588"),
    ("rockchip rk3576 in 4 bit", "rk --platform RK3576 --quant w4a16"),
    ("axera ax650 in int4", "ax --platform AX650 --quant s4"),
    ("trainium2, fp8", "neuron --platform trn2 --quant fp8"),
    ("inferentia, bundle", "neuron --platform inf2 --bundle"),
    ("run it in the browser", "onnx"),
    ("a c# app on windows, int4", "onnx --quant int4"),
    ("executorch", "torch_export"),
    ("TorchScript", "torchscript"),
    ("pretrain in megatron on 8 gpus", "megatron --tp 8"),
    ("megatron tp 8 pp 4", "megatron --tp 8 --pp 4"),
    ("megatron, tensor parallel 8", "megatron --tp 8"),
    ("8-way tensor parallel mcore", "megatron --tp 8"),
    ("continue training in Megatron on two nodes of 8", "megatron --tp 8 --pp 2"),
    ("finetune my moe in megatron with tp 2, ep 8, 16 gpus", "megatron --tp 2 --ep 8"),
    ("megatron legacy by slurm on 2 nodes of 8 gpus",
     "megatron --megatron-format legacy --launcher slurm --tp 8 --pp 2 --nodes 2 --nproc 8"),
    ("gptq by ray on 4 gpus", "gptq --launcher ray --nproc 4"),
    ("torchrun with 8 gpus to awq", "awq --launcher torchrun --nproc 8"),
    ("back to huggingface, make sure nothing changed", "hf --verify digest"),
    ("convert the megatron checkpoint to hf, same logits", "hf --verify logits"),
    ("from megatron to gguf", "gguf"),
    ("minicpm as llama", "hf --mup2llama"),
    ("minicpm to llama for ollama", "gguf --mup2llama"),
    ("bmtrain", "bmtrain"),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "expected"), SENTENCES, ids=[sentence for sentence, _ in SENTENCES])
def test_a_sentence_and_its_command(
    sentence: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = read(sentence)
    assert found is not None
    assert sorted(found.words) == sorted(["convert", "MODEL", *shlex.split(expected)])
    assert found.words[2] == shlex.split(expected)[0]
    assert found.against == ()
    assert found.heard and ("MODEL" in dict(found.left))
    check_launch(parse(parser_of("convert"), found.words[1:]))


@pytest.mark.parametrize(
    ("sentence", "format", "said"),
    [
        ("gguf for vllm", "gguf", "vLLM does not read gguf"),
        ("megatron in 4 bit", "megatron", "megatron has no such numbers"),
        ("gguf or mlx", "gguf", "mlx: another FORMAT"),
        ("gguf, tp 8", "gguf", "--tp 8: gguf has no use for it"),
        ("gguf q4_k_m with the same logits", "gguf", "--verify digest instead"),
        ("megatron tp 4 tp 8", "megatron", "--tp 4 was said before"),
        ("megatron, tp 3, on 8 gpus", "megatron", "do not divide"),
        ("gptq on 2 nodes of 8 gpus", "gptq", "--launcher slurm or ray"),
        ("megatron tp 0 on 8 gpus and 0 ranks, tp 3", "megatron", "do not divide"),
        ("check it for the rk3588", "rk", "--verify digest: rk has no use for it"),
    ],
)
def test_words_that_contradict_each_other(
    sentence: str, format: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = read(sentence)
    assert found is not None and found.words[2] == format
    assert any(said in line for line in found.against), found.against
    parse(parser_of("convert"), found.words[1:])


def _bytes_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={one: i for i, one in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small llama in it, called ``tiny``."""
    family = families()["llama"]
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 256}
    write_random(tmp_path / "tiny", family, config_of(family, **sizes))
    _bytes_tokenizer(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "sentence",
    [
        "tiny for vllm in 4 bit on 2 gpus",
        "tiny for vllm in fp8",
        "tiny for vllm, mxfp4",
        "./tiny for my mac, 4 bit",
        "pretrain tiny in megatron, tp 2, pp 2",
        "pretrain tiny in megatron on two nodes of 4",
        "tiny to megatron, legacy, pp 4, make sure",
        "tiny back to huggingface in f32",
        "tiny as bmtrain",
    ],
)
def test_of_a_model_that_is_there_the_plan_is_accepted(here: Path, dconv: Dconv, sentence: str) -> None:
    before = listing(here)
    said = dconv("suggest", sentence, "--json").json
    assert listing(here) == before
    assert said["words"][1].removeprefix("./") == "tiny" and said["left"] == []
    assert said["against"] == []
    launch = ("--nproc", "--verify", "--launcher", "--nodes")
    words, skip = [], False
    for word in said["words"][1:]:
        if not skip and word not in launch:
            words.append(word)
        skip = word in launch
    ran = dconv("plan", *words)
    assert ran.code == 0, ran.err


def test_what_a_model_does_not_permit_is_said(here: Path, dconv: Dconv) -> None:
    found = read("tiny in megatron on 8 gpus")
    assert found is not None and any("this model permits 1, 2, 4" in line for line in found.against)
    (here / "t5").mkdir()
    (here / "t5" / "config.json").write_text(json.dumps(config_of(families()["t5"])))
    found = read("t5 for ollama")
    assert found is not None and any("gguf has no form for t5" in line for line in found.against)
    (here / "broken").mkdir()
    found = read("./broken for ollama")
    assert found is not None and any(line.startswith("broken: not a checkpoint") for line in found.against)


def test_paths_as_people_write_them(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    (here / "tiny").rename(here / "my tiny")
    for sentence in ("'my tiny' for ollama", "~/'my tiny' for ollama", "for ollama: './my tiny'."):
        found = read(sentence)
        assert found is not None and Path(found.words[1]).exists(), sentence
        assert Path(shlex.split(found.command)[2]).exists()
    (here / "e\x1b[31m").mkdir()
    found = read("./e\x1b[31m for ollama")
    assert found is not None and found.words[1] == "MODEL"


def test_a_directory_that_is_called_like_a_word_is_no_model(here: Path) -> None:
    (here / "slurm").mkdir()
    (here / "for").mkdir()
    found = read("gguf for ollama by slurm")
    assert found is not None and found.words[1] == "MODEL"


@pytest.mark.parametrize("sentence", ["hello world", "make it good", "7", "?", "8B", "a" * 5000, "\x1b[31m", "'"])
def test_nothing_understood(dconv: Dconv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    ran = dconv("suggest", sentence)
    assert ran.code == 2
    assert "dconv suggest 'my 8B llama for vllm" in ran.err and "\x1b" not in ran.err


def test_for_a_person(dconv: Dconv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = dconv("suggest", "frobnicated", "llama", "for ollama in 4 bit")
    lines = ran.out.splitlines()
    assert lines[0] == "dconv convert MODEL gguf --quant q4_k_m"
    for begin in ("ollama", "4 bit", "llama", "MODEL", "not read"):
        assert any(line.startswith(begin) for line in lines[1:]), ran.out
    assert "frobnicated" in lines[-1]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random causal language model with a tokenizer of bytes."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("reader")
    _bytes_tokenizer(folder)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_chooses_among_candidates_only(
    reader: Path, dconv: Dconv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for sentence, among in (("gguf or mlx, 4 bit", {"gguf", "mlx"}), ("something for my laptop", None)):
        said = dconv("suggest", sentence, "--with", reader, "--json").json
        assert said["chosen"] == said["words"][2]
        assert among is None or said["chosen"] in among
        parse(parser_of("convert"), said["words"][1:])
    assert dconv("suggest", "ollama", "--with", reader, "--json").json["chosen"] is None, "the rules left no choice"
    assert likeliest(reader, "words", ["onnx"]) == "onnx"


def test_the_likeliest_is_the_likeliest(reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose every position prefers one letter chooses the candidate that has most of it."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    letter = AutoTokenizer.from_pretrained(reader)("x")["input_ids"][0]

    def forward(self: LlamaForCausalLM, tokens: torch.Tensor) -> object:
        logits = torch.zeros(*tokens.shape, self.config.vocab_size)
        logits[..., letter] = 9
        return type("Answer", (), {"logits": logits})

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    assert likeliest(reader, "words", ["gguf", "mlx", "mx", "onnx"]) == "mx"


def test_models_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        likeliest(tmp_path / "nowhere", "words", ["a", "b"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Damaged):
        likeliest(tmp_path, "words", ["a", "b"])
