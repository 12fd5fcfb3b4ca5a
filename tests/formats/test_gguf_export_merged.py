"""Vocabularies of tokenizers that lack the file that a GGUF is made of: what text becomes under each stays the same."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.vocab import LlamaHfVocab
from tokenizers import Tokenizer

from dconv.checkpoint.gguf_vocabulary import vocabulary
from dconv.checkpoint.source import side_files
from dconv.errors import Refused, ToolMissing, UsageError
from tests.formats.gguf_tokenizers import merged, merges_of

LETTERS = "abcd\u2581"


def random_pieces(seed: int) -> list[tuple[str, float, int]]:
    """A SentencePiece model: bytes, letters, and pieces joined of those that are there, each worse than the last."""
    draw = np.random.default_rng(seed)
    held = list(LETTERS)
    while len(held) < 60:
        joined = "".join(draw.choice(held, 2))
        period = re.fullmatch(r"(.+?)\1+.*", joined)  # in "aaa" two merges to one piece may overlap
        if joined not in held and period is None and len(joined) < 7:
            held.append(joined)
    first = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{n:02X}>", 0.0, 6) for n in range(256))]
    words = [(text, -float(place), 1) for place, text in enumerate(held[len(LETTERS) :])]
    return [*first, *words, *((letter, -1000.0, 1) for letter in LETTERS), ("<tool>", 0.0, 4)]


def parted(text: str, values: dict[str, Any]) -> list[int]:
    """Ids as llama.cpp finds them: the best neighbours are joined, the first of equals; bytes where none is."""
    tokens: list[str] = values["tokenizer.ggml.tokens"]
    ids = {token: number for number, token in enumerate(tokens)}
    scores = values["tokenizer.ggml.scores"]
    symbols = list(("\u2581" if values["tokenizer.ggml.add_space_prefix"] else "") + text.replace(" ", "\u2581"))
    while True:
        pairs = [(scores[ids[a + b]], -at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    octets = [[ids[symbol]] if symbol in ids else [ids[f"<0x{n:02X}>"] for n in symbol.encode()] for symbol in symbols]
    return [number for part in octets for number in part]


def made(
    folder: Path, rows: int, *, arch: str = "llama", name: str | None = None, config: Any = None
) -> dict[str, Any]:
    return vocabulary(side_files(folder), config or {}, rows, arch, name, str(folder))[0]


@pytest.mark.parametrize("space", ["prepend", "metaspace", "gemma"])
@pytest.mark.parametrize("seed", range(4))
def test_merges_as_scores(tmp_path: Path, seed: int, space: str) -> None:
    """llama.cpp's way through the scores ends where the tokenizer's through the merges does."""
    pieces = random_pieces(seed)
    folder = merged(tmp_path, pieces, space=space)
    values, notes = vocabulary(side_files(folder), {}, len(pieces) + 3, "llama", None, str(folder))
    assert any("begins with one" in note for note in notes) is (space == "metaspace")
    assert values["tokenizer.ggml.add_space_prefix"] is (space != "gemma")
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    draw = np.random.default_rng(seed)
    for _ in range(300):
        text = "".join(draw.choice([*"aabbccdd", " ", "\u00e9", "x"], int(draw.integers(1, 24))))
        text = f"a{text}" if space == "metaspace" else text
        assert parted(text, values) == ours.encode(text, add_special_tokens=False).ids, text


def test_tokens_as_llama_cpp_has_them(tmp_path: Path) -> None:
    """Texts and types of the package gguf; the scores are not, which are all alike there."""
    pieces = random_pieces(9)
    values = made(merged(tmp_path, pieces), len(pieces) + 2)
    theirs = list(LlamaHfVocab(tmp_path).all_tokens())
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert [(token.encode(), kind) for token, kind in zip(tokens[: len(pieces)], types, strict=False)] == [
        (text, int(kind) if text != b"<tool>" else 4) for text, _, kind in theirs
    ]
    assert tokens[len(pieces) :] == [f"[PAD{len(pieces) + at}]" for at in range(2)]
    assert types[len(pieces) :] == [5, 5]
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("llama", "default")
    assert (values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.unknown_token_id"]) == (1, 0)
    with pytest.raises(UsageError, match="leave it out"):
        made(tmp_path, len(pieces), name="qwen2")


@pytest.mark.parametrize("change", ["one way less", "other order", "words apart", "whole words first"])
def test_what_scores_cannot_say_is_refused(tmp_path: Path, change: str) -> None:
    pieces = random_pieces(1)
    merges = merges_of(pieces)
    twice = next(at for at in range(1, len(merges)) if "".join(merges[at]) == "".join(merges[at - 1]))
    model: dict[str, Any] = {}
    if change == "one way less":
        model["merges"] = [merge for at, merge in enumerate(merges) if at != twice]
    elif change == "other order":
        model["merges"] = [*merges[:twice], *merges[twice + 1 :], merges[twice]]
    elif change == "whole words first":
        model["ignore_merges"] = True
    folder = merged(tmp_path, pieces, space="metaspace", **model)
    if change == "words apart":
        file = json.loads((folder / "tokenizer.json").read_text())
        file["pre_tokenizer"]["split"] = True
        (folder / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(Refused, match="would part text otherwise") as caught:
        made(folder, len(pieces))
    assert "tokenizer.model" in str(caught.value)


def older(folder: Path, **said: Any) -> Path:
    """vocab.json and merges.txt alone, of all bytes and a few words."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = ["ab", "\u0120a", "\u0120ab", "12"]
    tokens = [*bytes_to_unicode().values(), *words, "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n\u0120 a\n\u0120a b\n1 2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(("kind", "name"), [("GPT2Tokenizer", "gpt-2"), ("Qwen2Tokenizer", "qwen2"), ("", "gpt-2")])
def test_older_files(tmp_path: Path, kind: str, name: str) -> None:
    """How text is split is the class's, or that of the model's type; the rest is theirs."""
    folder = older(tmp_path, **({"tokenizer_class": kind} if kind else {}))
    values = made(folder, 270, arch=name.replace("gpt-2", "llama"), config={"model_type": "gpt2"})
    assert values["tokenizer.ggml.pre"] == name
    assert values["tokenizer.ggml.model"] == "gpt2"
    assert values["tokenizer.ggml.tokens"][256:261] == ["ab", "\u0120a", "\u0120ab", "12", "<|endoftext|>"]
    assert values["tokenizer.ggml.token_type"][256:262] == [1, 1, 1, 1, 3, 5]
    assert values["tokenizer.ggml.merges"] == ["a b", "\u0120 a", "\u0120a b", "1 2"]


def test_older_files_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ToolMissing, match="pip install transformers"):
        made(older(tmp_path, tokenizer_class="GPT2Tokenizer"), 270)


def test_a_class_of_its_own_is_not_run(tmp_path: Path) -> None:
    """Nor is one that transformers lacks guessed."""
    said = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    folder = older(tmp_path, **said)
    (folder / "own.py").write_text("raise SystemExit('run')")
    with pytest.raises(Refused, match="makes no tokenizer"):
        made(folder, 270, config={"model_type": "own"})
