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

from dconv.api import check
from dconv.checkpoint.gguf_header import read_header
from dconv.checkpoint.gguf_tokenizer import side
from dconv.logits import compare
from dconv.pipeline import Request, convert, prepare, run
from dconv.sharding.rank import Settings
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


def with_pieces(path: Path, **said: Any) -> Path:
    """A GGUF that is a SentencePiece vocabulary."""
    pieces = ["\u2581", "a", "b", "ab", "\u2581a", "\u2581ab"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-6.0, -5.0, -4.0, -1.0, -2.0, -0.5])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 6)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key, value in said.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_pieces(tmp_path: Path) -> None:
    source = with_pieces(tmp_path / "vocabulary.gguf")
    files, notes = side(source, read_header(source).values)
    assert not notes
    (tmp_path / "out").mkdir()
    for name, made in files.items():
        (tmp_path / "out" / name).write_bytes(made.make())
    found: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    first = 3 + 256
    assert found("ab ab", add_special_tokens=False)["input_ids"] == [first + 5, first + 5]
    assert found("abc", add_special_tokens=False)["input_ids"] == [first + 5, 3 + ord("c")]
    assert found.decode(found("ab abc", add_special_tokens=False)["input_ids"]) == "ab abc"


@pytest.mark.parametrize("why", ["viking", "space"])
def test_no_tokenizer_where_it_would_split_text_in_another_way(tmp_path: Path, why: str) -> None:
    path = tmp_path / "vocabulary.gguf"
    source = with_pieces(path, add_space_prefix=False) if why == "space" else with_vocabulary(path, why)
    files, (note,) = side(source, read_header(source).values)
    assert not files
    assert why in note
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


def test_the_output_computes_what_the_source_does(tmp_path: Path) -> None:
    """Run from a copy of its own values; decoded weights are rounded once, and the bound says so."""
    source = rewrite(recorded(tmp_path, "qwen2"), tmp_path / "q8.gguf", in_blocks("Q8_0"))
    for dtype, bound in (("f32", 1e-3), ("bf16", 0.1)):
        job = prepare(Request(source, "hf", tmp_path / dtype, dtype=dtype))
        run(job, Settings())
        found = compare(job, tmp_path / dtype)
        assert found["difference"] <= found["bound"] < bound
    assert check(source).run is not None


def test_another_file_of_the_same_name_has_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    source = with_vocabulary(tmp_path / "vocabulary.gguf", "gpt-2")
    before = side(source, read_header(source).values)[0]["tokenizer.json"].make()
    other = with_vocabulary(tmp_path / "other.gguf", "gpt-2").read_bytes().replace(b"<|end|>", b"<|fin|>")
    source.unlink()
    source.write_bytes(other)
    after = side(source, read_header(source).values)[0]["tokenizer.json"].make()
    assert b"<|end|>" in before
    assert b"<|end|>" not in after
    assert b"<|fin|>" in after
