"""GGUF files as transformers reads them itself, and the tokenizer that it makes of their vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dconv.pipeline import Request, convert, prepare
from tests.formats.gguf_files import in_blocks, recorded, rewrite

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma2"])
def test_the_same_weights_and_logits(tmp_path: Path, name: str) -> None:
    source = rewrite(recorded(tmp_path, name), tmp_path / "q8.gguf", in_blocks("Q8_0"), tokens=61)
    convert(Request(source, "hf", tmp_path / "out", dtype="f32"))
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32)
    ours: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert getattr(ours.config, key) == getattr(theirs.config, key)
    if name != "gemma2":  # of which transformers drops what scores are scaled by
        with torch.no_grad():
            assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


#: As GLM-4's tokenizer.json has it.
GLM4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = [("1", "2"), ("Ġ", "1"), ("Ġ", "a"), ("a", "b"), ("Ġa", "b"), ("12", "3")]


def with_vocabulary(path: Path, split: str) -> Path:
    """A GGUF that is a vocabulary: bytes, a few merges, one control token."""
    tokens = [*bytes_to_unicode().values(), *(a + b for a, b in MERGES), "<|end|>"]
    writer = GGUFWriter(path, "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges([f"{a} {b}" for a, b in MERGES])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "glm4"])
def test_tokenizer(tmp_path: Path, split: str) -> None:
    from dconv.checkpoint.gguf_header import read_header
    from dconv.checkpoint.gguf_tokenizer import side

    source = with_vocabulary(tmp_path / "vocabulary.gguf", split)
    files, notes = side(source, read_header(source).values)
    assert (set(files), notes) == ({"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}, ())
    (tmp_path / "out").mkdir()
    for name, made in files.items():
        (tmp_path / "out" / name).write_bytes(made.make())
    found: Any = AutoTokenizer.from_pretrained(tmp_path / "out")

    vocabulary = [*bytes_to_unicode().values(), *(a + b for a, b in MERGES), "<|end|>"]
    expected = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, MERGES))
    level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split != "glm4")
    first: dict[str, Any] = {
        "smollm": pre_tokenizers.Digits(individual_digits=True),
        "glm4": pre_tokenizers.Split(Regex(GLM4), behavior="isolated"),
    }
    expected.pre_tokenizer = pre_tokenizers.Sequence([first[split], level]) if split in first else level
    expected.decoder = decoders.ByteLevel()
    expected.add_special_tokens(["<|end|>"])
    for words in ("ab 123 ab<|end|>", "it's 12", " 1 a\n\nab"):
        assert found(words)["input_ids"] == expected.encode(words).ids, words
    assert found.eos_token_id == len(vocabulary) - 1
    assert found.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_no_tokenizer_where_it_would_split_text_in_another_way(tmp_path: Path) -> None:
    from dconv.checkpoint.gguf_header import read_header
    from dconv.checkpoint.gguf_tokenizer import side

    source = with_vocabulary(tmp_path / "vocabulary.gguf", "viking")
    files, (note,) = side(source, read_header(source).values)
    assert not files
    assert "viking" in note
    assert "--hf-config" in note


def test_it_travels_along(tmp_path: Path) -> None:
    """Into a Megatron checkpoint and out of it, as any tokenizer; the same bytes on every rank."""
    words = with_vocabulary(tmp_path / "vocabulary.gguf", "gpt-2")
    from gguf import GGUFReader

    fields = GGUFReader(words).fields
    values = {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
    source = rewrite(recorded(tmp_path, "qwen2"), tmp_path / "whole.gguf", values=values)
    assert (
        prepare(Request(source, "hf", tmp_path / "a")).plan.id == prepare(Request(source, "hf", tmp_path / "a")).plan.id
    )
    convert(Request(source, "megatron", tmp_path / "cut", dtype="bf16"))
    convert(Request(tmp_path / "cut", "hf", tmp_path / "out"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids
