"""The vocabulary of a GGUF that is written: against the package gguf's own reading of the same files, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, SpecialVocab

from dconv.checkpoint.gguf_pretokenizers import NAMES
from dconv.checkpoint.gguf_vocabulary import vocabulary
from dconv.checkpoint.source import side_files
from dconv.errors import Damaged, DconvError, Refused, UsageError
from dconv.pipeline import Request, convert, prepare
from tests.formats.gguf_models import write_model
from tests.formats.gguf_tokenizers import MERGES, PIECES, byte_pairs, sentence_pieces

ROWS = 300
TEXTS = ("ab 312", " b 3<|end|>ab", "it's\n\n a\u00e9")


def made(folder: Path, *, arch: str = "qwen2", name: str | None = None, config: Any = None) -> dict[str, Any]:
    values, _ = vocabulary(side_files(folder), config or {}, ROWS, arch, name, str(folder))
    return {key.removeprefix("tokenizer."): value for key, value in values.items()}


def edit(folder: Path, **keys: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


def test_byte_pairs(tmp_path: Path) -> None:
    found = made(byte_pairs(tmp_path, bos_token={"content": "<|end|>"}, add_eos_token=True), config={"pad_token_id": 3})
    theirs = SpecialVocab(tmp_path, load_merges=True)
    assert found["ggml.merges"] == theirs.merges == [f"{a} {b}" for a, b in MERGES]
    assert theirs.special_token_ids == {"bos": 260, "eos": 260}
    assert (found["ggml.bos_token_id"], found["ggml.eos_token_id"]) == (260, 260)
    assert found["ggml.padding_token_id"] == 3  # of config.json
    assert found["ggml.add_eos_token"] is True
    assert found["chat_template"] == theirs.chat_template
    tokens, types = found["ggml.tokens"], found["ggml.token_type"]
    assert (len(tokens), len(types)) == (ROWS, ROWS)
    assert tokens[256:262] == ["ab", "\u0120a", "\u0120ab", "12", "<|end|>", "b 1"]
    assert types[256:263] == [1, 1, 1, 1, 3, 4, 5]
    assert tokens[262] == "[PAD262]"
    assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", "gpt-2")


@pytest.mark.parametrize(
    ("first", "ignore", "name"),
    [
        ({"type": "Digits", "individual_digits": True}, False, "smollm"),
        ("qwen2", False, "qwen2"),
        ("llama-bpe", True, "llama-bpe"),
        ("gpt-4o", False, "gpt-4o"),
    ],
)
def test_told_by_its_expression(tmp_path: Path, first: Any, ignore: bool, name: str) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = isinstance(first, str)
    if split:
        pattern = {"Regex": GGUF_PRE_TOKENIZER_SPLITS[first]}
        first = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not split}
    model = json.loads((byte_pairs(tmp_path) / "tokenizer.json").read_text())["model"]
    before = {"type": "Sequence", "pretokenizers": [first, level]}
    edit(tmp_path, pre_tokenizer=before, model={**model, "ignore_merges": ignore})
    assert made(tmp_path)["ggml.pre"] == name
    edit(tmp_path, model={**model, "ignore_merges": not ignore})  # llama.cpp would do otherwise under this name
    with pytest.raises(Refused, match="--gguf-pretokenizer"):
        made(tmp_path)
    assert made(tmp_path, name="tekken")["ggml.pre"] == "tekken"


def test_told_by_what_it_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its expression is looked at; as llama.cpp's converter does, by the same digest."""
    from hashlib import sha256

    from tokenizers import Tokenizer

    from dconv.checkpoint.gguf_pretokenizers import PROBE

    byte_pairs(tmp_path)
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(PROBE).ids
    assert "\U0001f999" in PROBE
    assert NAMES["855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"] == "smollm"
    monkeypatch.setitem(NAMES, sha256(str(ids).encode()).hexdigest(), "falcon")
    assert made(tmp_path)["ggml.pre"] == "falcon"


@pytest.mark.parametrize(
    ("processor", "bos"),
    [
        ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}, False),
        (
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [260], "tokens": ["<|end|>"]}},
            },
            True,
        ),
    ],
)
def test_what_is_put_around_a_text(tmp_path: Path, processor: Any, bos: bool) -> None:
    """The file that does it counts, not what tokenizer_config.json says of it."""
    edit(byte_pairs(tmp_path, bos_token="<|end|>"), post_processor=processor)  # noqa: S106
    assert SpecialVocab(tmp_path, load_merges=True).add_special_token.get("bos", False) is bos
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**said, "add_bos_token": not bos}))
    assert made(tmp_path)["ggml.add_bos_token"] is bos


def test_pieces(tmp_path: Path) -> None:
    added = {"262": {"content": "\u2581x", "special": False}, "2": {"content": "</s>", "special": True}}
    folder = sentence_pieces(tmp_path, added_tokens_decoder=added, add_prefix_space=False)
    (folder / "added_tokens.json").write_text('{"<new>": 270}')
    found = made(folder, arch="llama", config={"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0})
    tokens, scores, types = (found[f"ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    assert {len(tokens), len(scores), len(types)} == {ROWS}
    for number, (text, score, kind) in enumerate(PIECES):
        if number not in (2, 262):
            assert (tokens[number].decode(), scores[number]) == (text, score)
            assert types[number] == (1 if kind == 4 else kind)
    assert (tokens[2], scores[2], types[2]) == ("</s>", -1000.0, 3)
    assert (tokens[262], scores[262], types[262]) == (" x", -1000.0, 4)
    assert (tokens[270], types[270]) == ("<new>", 4)
    assert (tokens[280], scores[280], types[280]) == ("[PAD280]", -10000.0, 5)
    assert (found["ggml.model"], found["ggml.pre"], found["ggml.add_space_prefix"]) == ("llama", "default", False)
    assert (found["ggml.bos_token_id"], found["ggml.eos_token_id"], found["ggml.unknown_token_id"]) == (1, 2, 0)
    assert made(folder, arch="gemma2")["ggml.add_space_prefix"] is False
    with pytest.raises(UsageError, match="leave it out"):
        made(folder, name="qwen2")


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_read_back(tmp_path: Path, kind: str) -> None:
    """By transformers, out of the file: the same ids as the tokenizer that went in."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    before = write_model(tmp_path / "before", "llama")
    config = json.loads((before / "config.json").read_text())
    rows = 262 if kind == "bytes" else len(PIECES)
    (before / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    _more_rows(before, rows)
    (byte_pairs if kind == "bytes" else sentence_pieces)(before)
    convert(Request(before, "gguf", tmp_path / "out", quant="q8_0"))
    (file,) = (tmp_path / "out").glob("*.gguf")
    convert(Request(file, "hf", tmp_path / "back"))
    found: Any = AutoTokenizer.from_pretrained(tmp_path / "back")
    if kind == "bytes":
        expected = Tokenizer.from_file(str(before / "tokenizer.json"))
        for text in TEXTS:
            assert found(text)["input_ids"] == expected.encode(text).ids, text
        assert found.eos_token_id == 260
        assert found.chat_template == "{{ messages }}"
    else:
        ids = [text for text, _, _ in PIECES].index
        assert found("a ab!", add_special_tokens=False)["input_ids"] == [
            ids("\u2581a"), ids("\u2581a"), ids("b"), ids("<0x21>"),
        ]  # fmt: skip


def _more_rows(folder: Path, rows: int) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    held = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held[name] = held[name][[row % 61 for row in range(rows)]]
    save_file(held, path)


def test_kept_from_a_gguf(tmp_path: Path) -> None:
    """Key by key and value by value, of whatever kind it is."""
    before = byte_pairs(write_model(tmp_path / "before", "qwen2"), small=True)
    convert(Request(before, "gguf", tmp_path / "a"))
    (first,) = (tmp_path / "a").glob("*.gguf")
    convert(Request(first, "gguf", tmp_path / "b", quant="q8_0"))
    (second,) = (tmp_path / "b").glob("*.gguf")
    a, b = (
        {key: b"".join(part.tobytes() for part in field.parts) for key, field in GGUFReader(path).fields.items()}
        for path in (first, second)
    )
    kept = {key for key in a if key.startswith("tokenizer.")}
    assert len(kept) > 6
    assert {key: b[key] for key in kept} == {key: a[key] for key in kept}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("none", "--hf-config"),
        ("wordpiece", "WordPiece"),
        ("fallback", "tokenizer.model"),
        ("split", "--gguf-pretokenizer NAME"),
        ("prefix", "--gguf-pretokenizer NAME"),
        ("rows", "belongs to another model"),
        ("torn", "no SentencePiece model"),
    ],
)
def test_refused_before_anything_is_read(tmp_path: Path, change: str, words: str) -> None:
    before = write_model(tmp_path / "before", "llama")
    if change != "none":
        file = json.loads((byte_pairs(before, small=True) / "tokenizer.json").read_text())
        level = file["pre_tokenizer"]
        if change == "wordpiece":
            edit(before, model={"type": "WordPiece", "vocab": {"a": 0}})
        elif change == "fallback":
            edit(before, model={**file["model"], "byte_fallback": True})
        elif change == "split":
            cut = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
            edit(before, pre_tokenizer={"type": "Sequence", "pretokenizers": [cut, level]})
        elif change == "prefix":
            edit(before, pre_tokenizer={**level, "add_prefix_space": True})
        elif change == "rows":
            byte_pairs(before)
        else:
            (before / "tokenizer.model").write_bytes(b"\x0a\x7f<unk>")
    with pytest.raises(DconvError) as caught:
        prepare(Request(before, "gguf", tmp_path / "out"))
    assert isinstance(caught.value, Damaged if change in ("rows", "torn") else Refused)
    assert words in str(caught.value)
