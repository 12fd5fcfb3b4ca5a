"""Targets that read small files beside checkpoints: tokenizers, options, samples, and what an earlier run left."""

from __future__ import annotations

import functools
import io
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from dconv.errors import DconvError
from fuzz import folders
from fuzz.mutators import in_json, in_protobuf
from fuzz.target import as_text, items, mapping, part, target

# tokenizers -----------------------------------------------------------------------------------------------------------


@target("checkpoint/gguf_*.py", form=in_json, most=16384)
def tokenizer_json(data: bytes) -> None:
    """tokenizer.json and what is beside it, as a GGUF's vocabulary: ``{file name: JSON or text}``."""
    from dconv.checkpoint.gguf_vocabulary import vocabulary

    vocabulary(_beside(data), {"bos_token_id": 1}, 64, "llama", None, "tokenizer")


_TOKENIZER: Final = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja", "added_tokens.json",
)  # fmt: skip


@target("checkpoint/gguf_pieces.py", form=lambda _: in_protobuf)
def sentencepiece(data: bytes) -> None:
    """tokenizer.model, as a GGUF's vocabulary."""
    from dconv.checkpoint.gguf_vocabulary import vocabulary

    vocabulary({"tokenizer.model": folders.put("pieces/tokenizer.model", data)}, {}, 64, "llama", None, "pieces")


@target("checkpoint/gguf_*.py", form=in_json)
def sentencepiece_beside(data: bytes) -> None:
    """What lies beside a good tokenizer.model: ``{file name: JSON or text}``."""
    from dconv.checkpoint.gguf_vocabulary import vocabulary

    model = b"".join(b"\n\x07\n\x05" + b"p%04d" % number for number in range(6))
    vocabulary(
        {**_beside(data), "tokenizer.model": folders.put("pieces/tokenizer.model", model)}, {}, 64, "llama", None, "m"
    )


def _beside(data: bytes) -> dict[str, Path]:
    shutil.rmtree(folders.scratch() / "tokenizer", ignore_errors=True)
    return {name: folders.put(f"tokenizer/{name}", as_text(value).encode("utf-8", "surrogatepass"))
            for name, value in mapping(data).items() if name in _TOKENIZER}  # fmt: skip


# what a person writes, or passes on -----------------------------------------------------------------------------------


@target("launch/options.py", "launch/run_*.py", "launch/config_file.py", "request.py", most=4096)
def run_yaml(data: bytes) -> None:
    """The file of ``--config``, up to a request; and changed, as ``dconv config set`` does it."""
    from dconv.launch.config_file import read_config
    from dconv.launch.options import to_request
    from dconv.launch.run_file import change

    with suppress(DconvError):
        change(folders.put("changed.yaml", data), "tp", ["2"])
    path, parser = folders.put("run.yaml", data), _parser()
    parser.set_defaults(model="m", format="hf")
    parser.set_defaults(**read_config(path, parser, parser))
    to_request(parser.parse_args([]))


def _parser() -> Any:
    from dconv.launch.options import every_option

    return every_option()


@target("launch/options.py", "launch/batch.py", most=4096)
def batch_yaml(data: bytes) -> None:
    """The file of ``dconv batch``."""
    from dconv.launch.batch import read

    read(folders.put("batch.yaml", data))


@target("checkpoint/rename.py", "checkpoint/small_config.py", most=4096)
def rename_yaml(data: bytes) -> None:
    """The file of ``--rename``, laid over a model's names."""
    from dconv.checkpoint.rename import renaming_of

    for suffix in ("yaml", "json"):
        with suppress(DconvError):
            rename = renaming_of(folders.put(f"rename.{suffix}", data))
            rename(
                {f"model.layers.{layer}.mlp.{part}_proj.weight": 0 for layer in (0, 1) for part in ("up", "down")}, "m"
            )
            rename.check_used("m")


@target("checkpoint/fake_config.py", most=4096)
def fake_yaml(data: bytes) -> None:
    """The file of ``--fake-weight-config``, laid over a model's config."""
    from dconv.checkpoint.fake_config import read_wishes

    wishes = read_wishes(folders.put("fake.yaml", data))
    wishes.changed({"num_hidden_layers": 2, "rope_scaling": {"factor": 2.0}, "layer_types": ["a", "b"]})
    wishes.fill_of("model.layers.0.mlp.up_proj.weight")


@target("quant/*.py", most=4096)
def quantization_yaml(data: bytes) -> None:
    """The file of ``--quantization-config``, and what it makes of a model's layers."""
    from dconv.quant.parse import quantization_of

    path = folders.put("quantization.yaml", data)
    for method in ("gptq", "awq"):
        with suppress(DconvError):
            quantization_of(str(path), method)


@target("hw/settings.py", "hw/*.py", form=in_json, most=4096)
def handoff(data: bytes) -> None:
    """The manifest of a hand-off."""
    from dconv.hw.manifest import NAME, checked

    checked(folders.put(f"handoff/{NAME}", data).parent)


@target("quant/documents.py", form=in_json)
def calibration_json(data: bytes) -> None:
    """Calibration data, as lines and as one list of JSON."""
    from dconv.quant.documents import read

    for suffix in ("jsonl", "json"):
        with suppress(DconvError):
            read(str(folders.put(f"samples.{suffix}", data)))


@target("quant/tokenizer.py", "checkpoint/gguf_*.py", form=in_json)
def calibration_tokenizer(data: bytes) -> None:
    """The tokenizer that calibration turns texts into ids with: ``{file name: JSON or text}``."""
    from dconv.quant.tokenizer import Tokenizer

    files = _beside(data)
    if "tokenizer.json" in files:
        tokenizer = Tokenizer(files["tokenizer.json"].parent)
        tokenizer.ids("a text, ab <s>")
        tokenizer.end()


@target("quant/documents.py")
def calibration_numbers(data: bytes) -> None:
    """Calibration data as token ids: the first byte says of which kind, then the file."""
    from dconv.quant.documents import read

    kinds = ("npy", "safetensors", "txt", "arrow", "parquet")
    if data:
        read(str(folders.put(f"samples.{kinds[data[0] % len(kinds)]}", data[1:])))


@target("quant/documents.py", form=in_json)
def calibration_folder(data: bytes) -> None:
    """What a data set on disk says of its tables."""
    from dconv.quant.documents import read

    said = mapping(data)
    (folders.scratch() / "set" / "train").mkdir(parents=True, exist_ok=True)
    for name in ("dataset_dict.json", "state.json", "train/state.json"):
        folders.put(f"set/{name}", json.dumps(said.get(name)).encode())
    read(str(folders.scratch() / "set"))


# what an earlier run of dconv left ------------------------------------------------------------------------------------


@target("verify.py", "sharding/receipt.py", form=in_json)
def receipt(data: bytes) -> None:
    """A receipt: read back as ``check`` and a second run do."""
    from dconv.sharding.receipt import read_receipt
    from dconv.verify import plan_of, reread

    model = folders.checkpoint("again")
    (model / "dconv.json").write_bytes(data)
    read_receipt(model)
    plan_of(model)
    reread(model)


@target("sharding/journal.py")
def journal(data: bytes) -> None:
    """Journals that other processes left: lines with a checksum of their own, or as they come."""
    from dconv.sharding.follow import Follower
    from dconv.sharding.journal import _check

    folder = _journal()[0]
    good = "\n".join(f"{line} {_check(line)}" for line in data.decode("utf-8", "replace").split("\n"))
    (folder / "00000000000000000001-1-aa").write_bytes(data)
    (folder / "00000000000000000002-1-bb").write_bytes(good.encode())
    _journal()[1].read()
    Follower(folder, "", 0).look()


@target("sharding/ends.py", "launch/progress.py", "report/tracks.py", form=in_json, most=4096)
def working_state(data: bytes) -> None:
    """What ranks note beside the journals: ``{"ends": [file name], "ranks", "tracks": {file name: JSON or text}}``."""
    from dconv.launch.display import Display
    from dconv.launch.progress import Board
    from dconv.report.rates import ranks_of, rates_of
    from dconv.report.tracks import tracks
    from dconv.sharding.ends import Ends

    said, state = mapping(data), folders.scratch() / "state"
    shutil.rmtree(state, ignore_errors=True)
    for folder, held in (
        ("ends", dict.fromkeys(map(str, items(said, "ends")), "")),
        (".dconv/ranks", part(said, "ranks")),
        ("tracks", part(said, "tracks")),
    ):
        (state / folder).mkdir(parents=True)
        for name, value in held.items():
            with suppress(OSError, ValueError):  # a name that no file has
                (state / folder / name.replace("/", "")).write_text(as_text(value))
    Ends(state, "00000000000000000001-1-aa", 0, 4, 0).missing()
    board = Board(state, 0, 0)
    Display(board, 1, 4, io.StringIO()).line(sum(note["done"] for note in board.read().values()), 1.0)
    noted = tracks(state)
    ranks_of(noted)
    rates_of(noted)


@functools.cache
def _journal() -> tuple[Path, Any]:
    from dconv.sharding.journal import Journal

    folder = folders.scratch() / "journal"
    folder.mkdir()
    return folder, Journal(folder)
