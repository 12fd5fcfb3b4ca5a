"""Calibration samples: which tokens they are follows from files, seed and tokenizer alone, and nothing is made up."""

from __future__ import annotations

import hashlib
import json
import lzma
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dconv.errors import Damaged, DconvError, Refused, ToolMissing, UsageError
from dconv.quant import documents
from dconv.quant.data import DEFAULT_WARNING, load
from dconv.quant.settings import Calibration

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).parent / "recorded" / "dataset"
TEXT = lzma.decompress(documents.DEFAULT_TEXT.read_bytes()).decode()
END = "<|end|>"
TEMPLATE = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}" + END + "{% endfor %}"
TURNS = [{"role": "user", "content": "How far is it?"}, {"role": "assistant", "content": "Two miles, to the west."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer as a checkpoint has it, with an end of text and a chat template."""
    made = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT[:50_000]], trainer)
    tokenizer.save(str(made / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": TEMPLATE}
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.fixture
def encode(folder: Path) -> Any:
    return lambda text: Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


def lines(path: Path, records: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return str(path)


def asked(data: str | None, nsamples: int, seqlen: int, seed: int = 0) -> Calibration:
    return Calibration(data, nsamples, seqlen, seed)


# ----------------------------------------------------------------------------------------------------- what is drawn

_SOURCES = st.lists(st.lists(st.integers(0, 96), max_size=30), min_size=1, max_size=8)


@given(_SOURCES, st.integers(1, 4), st.integers(1, 12), st.integers(0, 5))
def test_blocks_of_the_documents_in_some_order(
    tmp_path_factory: pytest.TempPathFactory, ids: list[list[int]], nsamples: int, seqlen: int, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "ids.jsonl"
    calibration = asked(lines(path, [{"input_ids": each} for each in ids]), nsamples, seqlen, seed)
    total = sum(map(len, ids))
    if total < nsamples * seqlen:
        with pytest.raises(Refused) as caught:
            load(calibration, None, 97)
        assert f"{total:,} tokens" in caught.value.found
        return
    made = load(calibration, None, 97)
    assert made.tokens.shape == (nsamples, seqlen)
    assert made.tokens.dtype == np.int32
    again = load(calibration, None, 97)
    assert np.array_equal(made.tokens, again.tokens)
    assert made.record == again.record
    # every block is somewhere in some order of the documents, no token is used more often than it is there
    there = np.bincount(np.concatenate([np.array(each, int) for each in ids]), minlength=97)
    assert (np.bincount(made.tokens.reshape(-1), minlength=97) <= there).all()
    assert made.record["sha256"] == hashlib.sha256(made.tokens.astype("<i4").tobytes()).hexdigest()


def test_blocks_do_not_overlap_and_keep_their_order(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(1000))
    draws = {seed: load(asked(str(tmp_path / "ids.npy"), 20, 10, seed), None, 1000).tokens for seed in range(4)}
    for tokens in draws.values():
        assert (tokens[:, 0] % 10 == 0).all()
        assert (np.diff(tokens[:, 0]) > 0).all()
        assert (tokens == tokens[:, :1] + np.arange(10)).all()
    assert len({tokens.tobytes() for tokens in draws.values()}) == 4
    firsts = [load(asked(str(tmp_path / "ids.npy"), 1, 10, seed), None, 1000).tokens[0, 0] for seed in range(40)]
    assert len(set(firsts)) > 20  # drawn from all of it, not from its beginning


def test_rows_that_are_samples_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 50, (7, 16))
    np.save(tmp_path / "rows.npy", rows)
    found = load(asked(str(tmp_path / "rows.npy"), 7, 16), None, 50).tokens
    assert sorted(map(tuple, found)) == sorted(map(tuple, rows))


def test_the_draw_is_pinned(tmp_path: Path) -> None:
    """Receipts of years ago must name the samples of today."""
    np.save(tmp_path / "ids.npy", np.arange(60).reshape(6, 10))
    assert load(asked(str(tmp_path / "ids.npy"), 3, 8, 7), None, 60).tokens[:, 0].tolist() == PINNED


#: The order of ``printf 'document:7:%s' 0 … 5 | sha256sum`` is 4, 1, …
PINNED = [40, 48, 16]


def test_no_more_documents_are_read_than_are_needed(tmp_path: Path) -> None:
    ids = [[number] * 10 for number in range(50)]
    made = load(asked(lines(tmp_path / "x.jsonl", ids), 4, 10), None, 50)
    assert made.record["documents"] == 50
    assert made.record["documents_used"] == 4
    assert made.record["tokens_read"] == 40
    other = load(asked(lines(tmp_path / "x.jsonl", ids), 4, 10, 1), None, 50)
    assert not np.array_equal(made.tokens, other.tokens)


# -------------------------------------------------------------------------------------------------------- what is read


def test_the_same_ids_in_every_form(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).integers(0, 1000, (5, 40))
    np.save(tmp_path / "x.npy", rows.astype(np.uint16))
    np.save(tmp_path / "x32.npy", rows.astype(np.int32))
    save_file({"input_ids": rows}, tmp_path / "x.safetensors")
    save_file({"anything": rows.astype(np.int32)}, tmp_path / "one.safetensors")
    (tmp_path / "x.json").write_text(json.dumps(rows.tolist()))
    (tmp_path / "records.json").write_text(json.dumps([{"input_ids": row, "label": 1} for row in rows.tolist()]))
    lines(tmp_path / "x.jsonl", rows.tolist())
    lines(tmp_path / "records.jsonl", [{"input_ids": row} for row in rows.tolist()])
    files = sorted(tmp_path.iterdir())
    found = {load(asked(str(path), 6, 30), None, 1000).record["sha256"] for path in files}
    assert len(files) == 8
    assert len(found) == 1


def test_texts_are_joined_by_the_end_of_text(tmp_path: Path, folder: Path, encode: Any) -> None:
    texts = ["The first one.", "And the second, a longer one.", "£ 3, naïve 日本"]
    path = lines(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    end = encode(END)[0]
    pieces = [encode(text) for text in texts]
    whole = sum(map(len, pieces)) + 2
    made = load(asked(path, 1, whole), folder, 600)
    orders = [
        [*pieces[a], end, *pieces[b], end, *pieces[c]]
        for a, b, c in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    ]
    assert made.tokens[0].tolist() in orders
    assert made.record["end_of_text"] == end
    assert made.record["kind"] == "text"
    assert made.warning == ""


def test_plain_text_is_one_document(tmp_path: Path, folder: Path, encode: Any) -> None:
    (tmp_path / "x.txt").write_text(TEXT[:3000], encoding="utf-8")
    ids = encode(TEXT[:3000])
    assert load(asked(str(tmp_path / "x.txt"), 1, len(ids)), folder, 600).tokens[0].tolist() == ids


def test_conversations_in_the_chat_template(tmp_path: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(TURNS, return_dict=False)
    path = lines(tmp_path / "x.jsonl", [{"messages": TURNS}])
    assert load(asked(path, 1, len(expected)), folder, 600).tokens[0].tolist() == expected


def test_a_data_set_on_disk(tmp_path: Path, folder: Path) -> None:
    """A folder that ``datasets`` 5.2.0 saved: six texts in two shards, one split."""
    pytest.importorskip("pyarrow", reason="tables are read by pyarrow")
    texts = [f"Document {n}: " + " ".join(f"word{n * k}" for k in range(1, 12)) for n in range(6)]
    same = lines(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    expected = load(asked(same, 3, 50), folder, 600)
    for path in (RECORDED, RECORDED / "train"):
        found = load(asked(str(path), 3, 50), folder, 600)
        assert np.array_equal(found.tokens, expected.tokens)
        assert len(found.record["files"]) == 2  # type: ignore[arg-type]


def test_parquet_as_the_hub_has_it(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="tables are read by pyarrow")
    import pyarrow.parquet as parquet

    rows = np.random.default_rng(2).integers(0, 90, (4, 20)).tolist()
    (tmp_path / "data").mkdir()
    for part in range(2):
        table = pa.table({"input_ids": rows[2 * part : 2 * part + 2], "text": ["a", "b"]})
        parquet.write_table(table, tmp_path / "data" / f"train-0000{part}-of-00002.parquet")
    expected = load(asked(lines(tmp_path / "x.jsonl", rows), 2, 30), None, 90).tokens
    assert np.array_equal(load(asked(str(tmp_path / "data"), 2, 30), None, 90).tokens, expected)
    parquet.write_table(pa.table({"input_ids": rows}), tmp_path / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(UsageError, match="several data sets"):
        load(asked(str(tmp_path / "data"), 2, 30), None, 90)
    parquet.write_table(pa.table({"words": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(Refused, match="without a column"):
        load(asked(str(tmp_path / "other.parquet"), 1, 1), None, 90)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" + bytes(40))
    with pytest.raises(Damaged):
        load(asked(str(tmp_path / "broken.parquet"), 1, 1), None, 90)


def test_a_table_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ToolMissing, match="pyarrow"):
        load(asked(str(RECORDED), 1, 1), None, 90)


# ------------------------------------------------------------------------------------------------ the text that ships


def test_the_text_that_ships(folder: Path) -> None:
    calibration = Calibration()
    made = load(calibration, folder, 600)
    assert made.tokens.shape == (128, 2048)
    assert made.warning == DEFAULT_WARNING
    (file,) = made.record["files"]  # type: ignore[misc]
    assert file["sha256"] == "f93493bd23ae99843dcf46025b87904ea084d3c251a41ed820e4b40420d0d4d7"
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(made.tokens[0].tolist())
    assert text.strip("�") in TEXT


def test_it_is_long_enough_for_the_default() -> None:
    """Tokenizers of 50 to 250 thousand entries make a token of 4.4 to 4.8 characters of English prose."""
    assert len(TEXT) > 4.8 * Calibration().nsamples * Calibration().seqlen


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(("ids", "found"), [([1, 2, 100], "100"), ([1, -1, 2], "-1"), ([2**40, 1, 1], str(2**40))])
def test_ids_outside_of_the_vocabulary(tmp_path: Path, ids: list[int], found: str) -> None:
    with pytest.raises(Refused, match="outside of the model's vocabulary") as caught:
        load(asked(lines(tmp_path / "x.jsonl", [ids]), 1, 2), None, 100)
    assert caught.value.found == found


def test_a_tokenizer_of_another_model(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "x.txt").write_text(TEXT[:1000])
    with pytest.raises(Refused, match="vocabulary"):
        load(asked(str(tmp_path / "x.txt"), 1, 8), folder, 256)


@pytest.mark.parametrize(
    ("name", "body", "error"),
    [
        ("x.txt", b"\xff\xfe\x00", Damaged),
        ("x.json", b"{}", Damaged),
        ("x.json", b"[", Damaged),
        ("x.json", b"[]", Refused),
        ("x.json", b"[[1, 2], [true]]", Refused),
        ("x.json", b"[[1, 2.0]]", Refused),
        ("x.json", b"[1, null]", Refused),
        ("x.json", b"[[[1]]]", Refused),
        ("x.json", b"[" * 100_000, Damaged),
        ("x.jsonl", b'{"text": "a"}\n{"text": 3}', Refused),
        ("x.jsonl", b'{"text": "a"}\n{"input_ids": [3]}', Refused),
        ("x.jsonl", b'{"words": "a"}', Refused),
        ("x.jsonl", b'{"text": "half of a pair: \\ud800"}', Damaged),
        ("x.jsonl", b'{"text": "a"}\n{', Damaged),
        ("x.jsonl", b"\n\n", Refused),
        ("x.jsonl", b'{"messages": ["hello"]}', Refused),
        ("x.npy", b"\x93NUMPY", Damaged),
        ("x.safetensors", b"\x00" * 20, Damaged),
    ],
)
def test_files_that_are_no_data(tmp_path: Path, folder: Path, name: str, body: bytes, error: type[DconvError]) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(error):
        load(asked(str(tmp_path / name), 1, 1), folder, 600)


def test_arrays_that_are_no_ids(tmp_path: Path) -> None:
    np.save(tmp_path / "floats.npy", np.ones((2, 3)))
    np.save(tmp_path / "deep.npy", np.ones((2, 3, 4), np.int64))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}, None]), allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=np.ones(3, np.int64))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    save_file({"input_ids": np.ones((2, 3), np.float32)}, tmp_path / "floats.safetensors")
    save_file({"a": np.ones(3, np.int64), "b": np.ones(3, np.int64)}, tmp_path / "two.safetensors")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(Damaged):
            load(asked(str(path), 1, 1), None, 90)


def test_no_such_path_and_empty_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.txt", tmp_path):
        with pytest.raises(UsageError):
            load(asked(str(path), 1, 1), None, 90)
    (tmp_path / "dataset_dict.json").write_text('{"splits": [".."]}')
    with pytest.raises(Damaged, match="outside"):
        load(asked(str(tmp_path), 1, 1), None, 90)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["a", "b"]}')
    with pytest.raises(UsageError, match="several data sets"):
        load(asked(str(tmp_path), 1, 1), None, 90)
    (tmp_path / "dataset_dict.json").unlink()
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "../secret.arrow"}]}')
    with pytest.raises(Damaged, match="outside"):
        load(asked(str(tmp_path), 1, 1), None, 90)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    with pytest.raises(Damaged, match="not there"):
        load(asked(str(tmp_path), 1, 1), None, 90)


def test_too_much_data(tmp_path: Path) -> None:
    with (tmp_path / "x.txt").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(Refused, match="more calibration data than is read"):
        load(asked(str(tmp_path / "x.txt"), 1, 1), None, 90)


def test_models_without_a_tokenizer(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "x.txt").write_text("words")
    with pytest.raises(Refused, match="no tokenizer"):
        load(asked(str(tmp_path / "x.txt"), 1, 1), tmp_path, 600)
    with pytest.raises(Refused, match="the model has none"):
        load(asked(str(tmp_path / "x.txt"), 1, 1), None, 600)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(Damaged, match="tokenizer"):
        load(asked(str(tmp_path / "x.txt"), 1, 1), tmp_path, 600)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("words")
    auto = {"AutoTokenizer": ["tok.Tok", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Tok", "auto_map": auto}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "tok", "auto_map": {"AutoConfig": "tok.C"}}))
    (tmp_path / "tok.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tok: ...\nclass C: ...\n")
    with pytest.raises(Refused, match="no tokenizer that is read here"):
        load(asked(str(tmp_path / "x.txt"), 1, 1), tmp_path, 600)
    assert not (tmp_path / "ran").exists()


def test_conversations_without_a_template(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    path = lines(tmp_path / "x.jsonl", [{"messages": TURNS}])
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(Refused, match="chat template"):
        load(asked(path, 1, 1), tmp_path, 600)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(Refused, match="does not take a conversation"):
        load(asked(path, 1, 1), tmp_path, 600)


# ------------------------------------------------------------------------------------------------------------ the room


def test_quick_to_import() -> None:
    code = (
        "import sys, dconv.quant.data, dconv.quant.parse, dconv.quant.readers, dconv.quant.listing;"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'yaml', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_everything_that_is_no_code_is_packed() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["dconv"]
    for path in (ROOT / "dconv").rglob("*"):
        name = path.relative_to(ROOT / "dconv").as_posix()
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            assert any(fnmatch(name, pattern) for pattern in patterns), name
