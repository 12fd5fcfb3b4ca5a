"""Names in an index, a tracker file or a graph that lead out of the checkpoint, and links that do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from attacks.corpus import Attack, Canary, edit_json
from attacks.twins import onnx_graph

_INDEX: Final = "model.safetensors.index.json"
_OUTSIDE: Final = "a file name points outside the checkpoint's directory"
_LINK: Final = "a link leads out of the checkpoint's directory"
_FIRST: Final = "model-00001-of-00002.safetensors"


def _point(name: Callable[[Path, Canary], Any]) -> Callable[[Path, Canary], object]:
    """The index says that all tensors of the first file lie in another one."""

    def spoil(folder: Path, canary: Canary) -> None:
        said = name(folder, canary)

        def change(index: dict[str, Any]) -> None:
            weight_map = index["weight_map"]
            weight_map.update({tensor: said for tensor, file in weight_map.items() if file == _FIRST})

        edit_json(folder / _INDEX, change)

    return spoil


def _said(name: Any) -> Callable[[Path, Canary], object]:
    return _point(lambda _folder, _canary: name)


def _up(folder: Path, canary: Canary) -> str:
    return os.path.relpath(canary.outside / _FIRST, folder)


def _linked(file: str, target: Callable[[Path, Canary], Path | str]) -> Callable[[Path, Canary], object]:
    def spoil(folder: Path, canary: Canary) -> None:
        path = folder / file
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.symlink_to(target(folder, canary))

    return spoil


def _replaced(file: str, make: Callable[[Path], object]) -> Callable[[Path, Canary], object]:
    def spoil(folder: Path, _canary: Canary) -> None:
        (folder / file).unlink()
        make(folder / file)

    return spoil


def _through_inside(folder: Path, canary: Canary) -> None:
    """A link to a link in the same directory, which leads out."""
    (folder / _FIRST).unlink()
    (folder / _FIRST).symlink_to("second.safetensors")
    (folder / "second.safetensors").symlink_to(canary.outside / _FIRST)


def _blobs(folder: Path, _canary: Canary) -> None:
    """A link as in the hub's cache, but to a directory that is nobody's cache."""
    blobs = folder.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    (folder / _FIRST).rename(blobs / "x")
    (folder / _FIRST).symlink_to("../blobs/x")


def _tracker(text: str) -> Callable[[Path, Canary], object]:
    return lambda folder, _canary: (folder / "latest_checkpointed_iteration.txt").write_text(text)


def _graph(location: Callable[[Path, Canary], str | bytes], **more: Any) -> Callable[[Path, Canary], object]:
    return lambda folder, canary: (folder / "model.onnx").write_bytes(onnx_graph(location(folder, canary), **more))


def _mlx(folder: Path, canary: Canary) -> None:
    edit_json(folder / _INDEX, lambda index: index["weight_map"].update(
        dict.fromkeys(index["weight_map"], os.path.relpath(canary.outside / _FIRST, folder))))  # fmt: skip


def _bin_index(folder: Path, canary: Canary) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"model.norm.weight": "../' + canary.folder.name + '/secret"}}'
    )


_INDEXES: Final[tuple[tuple[str, str, str, Callable[[Path, Canary], object]], ...]] = (
    ("dots", "../ to a good file outside", _OUTSIDE, _point(_up)),
    ("dots-to-secret", "../ to a file that is no checkpoint's", _OUTSIDE,
     _point(lambda folder, canary: os.path.relpath(canary.secret, folder))),
    ("absolute", "an absolute path", _OUTSIDE, _point(lambda _f, canary: str(canary.outside / _FIRST))),
    ("file-url", "a file:// address", _OUTSIDE, _point(lambda _f, canary: f"file://{canary.outside / _FIRST}")),
    ("inside-and-back", "a path that goes down before it goes up", _OUTSIDE, _said(f"x/../{_FIRST}")),
    ("dot", "the directory itself", _OUTSIDE, _said(".")),
    ("dot-dot", "the directory above", _OUTSIDE, _said("..")),
    ("dot-slash", "the right file by another spelling", _OUTSIDE, _said(f"./{_FIRST}")),
    ("backslash", "Windows' separator", _OUTSIDE, _said(f"..\\{_FIRST}")),
    ("drive", "a drive's letter", _OUTSIDE, _said(f"C:{_FIRST}")),
    ("stream", "a stream of NTFS", _OUTSIDE, _said(f"{_FIRST}:x")),
    ("nul", "NUL behind a good name", _OUTSIDE, _said(f"{_FIRST}\0.safetensors")),
    ("newline", "a name of two lines", _OUTSIDE, _said(f"{_FIRST}\nx.safetensors")),
    ("surrogate", "half of a surrogate pair", "not valid JSON", _said("\ud800.safetensors")),
    ("fullwidth", "fullwidth dots and slash, which some normalise", "shards are missing",
     _said("\uff0e\uff0e\uff0f" + _FIRST)),
    ("lookalike", "a Cyrillic letter in a good name", "shards are missing", _said(_FIRST.replace("o", "\u043e"))),
    ("case", "the good name in capitals", "shards are missing", _said(_FIRST.upper())),
    ("percent", "%2e%2e%2f, for who decodes addresses", "shards are missing", _said("%2e%2e%2f" + _FIRST)),
    ("home", "~, for who expands it", "shards are missing", _said("~root.safetensors")),
    ("variable", "$HOME, for who expands it", "shards are missing", _said("$HOME.safetensors")),
    ("glob", "a pattern instead of a name", "shards are missing", _said("model-*.safetensors")),
    ("long", "a name of 5000 letters", _OUTSIDE, _said("a" * 5000 + ".safetensors")),
    ("empty", "no name", _OUTSIDE, _said("")),
    ("number", "a number, which some open as a file descriptor", _OUTSIDE, _said(0)),
    ("list", "a list", _OUTSIDE, _said([_FIRST])),
    ("index-is-list", "an index that is a list of pairs", "has no weight_map",
     lambda folder, _c: edit_json(folder / _INDEX, lambda index: {"weight_map": [*index["weight_map"].items()]})),
    ("directory", "a directory of a shard's name", "not a regular file", _replaced(_FIRST, Path.mkdir)),
    ("pipe", "a pipe that nobody writes to", "not a regular file", _replaced(_FIRST, os.mkfifo)),
    ("device", "/dev/zero by a link: no end", _LINK, _linked(_FIRST, lambda _f, _c: "/dev/zero")),
    ("standard-input", "/proc/self/fd/0 by a link", _LINK, _linked(_FIRST, lambda _f, _c: "/proc/self/fd/0")),
    ("link", "a shard that is a link to a good file outside", _LINK, _linked(_FIRST, lambda _f, c: c.outside / _FIRST)),
    ("link-by-link", "a link to a link that leads out", _LINK, _through_inside),
    ("link-to-blobs", "a link as in the hub's cache, where there is no cache", _LINK, _blobs),
    ("link-loop", "a link to itself", "a link leads nowhere", _linked(_FIRST, lambda _f, _c: _FIRST)),
    ("index-linked", "the index itself is a link to one outside", _LINK,
     _linked(_INDEX, lambda _f, c: c.outside / _INDEX)),
    ("config-linked", "config.json is a link to a secret", _LINK, _linked("config.json", lambda _f, c: c.secret)),
    ("tokenizer-linked", "tokenizer_config.json is a link to a secret, to be copied into the output", _LINK,
     _linked("tokenizer_config.json", lambda _f, c: c.secret)),
    ("readme-linked", "README.md is a link to a secret, to be published with the output", _LINK,
     _linked("README.md", lambda _f, c: c.secret)),
)  # fmt: skip

ATTACKS: Final = (
    *(
        Attack(f"places/{name}", idea, says, "huggingface", spoil, only=name in ("tokenizer-linked", "readme-linked"))
        for name, idea, says, spoil in _INDEXES
    ),
    Attack("places/bin-index", "../ in the index of pytorch_model.bin", _OUTSIDE, "bin", _bin_index),
    Attack("places/mlx-index", "../ in an index of MLX", _OUTSIDE, "mlx", _mlx),
    Attack("places/bin-linked", "pytorch_model.bin is a link outside", _LINK, "bin",
           _linked("pytorch_model.bin", lambda _f, c: c.outside / _FIRST)),
    Attack("places/pt-linked", "a state dict's file is a link to a secret", _LINK, "pt",
           _linked("model.pt", lambda _f, c: c.secret)),
    Attack("places/tracker-dots", "../.. in Megatron's latest_checkpointed_iteration.txt",
           "the tracker file names no checkpoint", "torch_dist", _tracker("../../outside")),
    Attack("places/tracker-absolute", "an absolute path there", "the tracker file names no checkpoint", "torch_dist",
           _tracker("/tmp")),  # noqa: S108
    Attack("places/tracker-digits", "a number of a million digits there", "the tracker file names no checkpoint",
           "legacy", _tracker("9" * 1_000_000)),
    Attack("places/tracker-superscript", "a superscript for a digit", "the tracker file names no checkpoint",
           "legacy", _tracker("\u00b2")),
    Attack("places/release-linked", "release/ is a link to a directory outside", _LINK, "torch_dist",
           _linked("release", lambda _f, c: c.outside)),
    Attack("places/rank-linked", "mp_rank_00/ is a link to a directory outside", _LINK, "legacy",
           _linked("release/mp_rank_00", lambda _f, c: c.outside)),
    Attack("places/side-linked", "huggingface/ is a link to a directory outside", _LINK, "legacy",
           _linked("huggingface", lambda _f, c: c.outside)),
    Attack("places/onnx-dots", "../ as the place of an ONNX weight", _OUTSIDE, "onnx",
           _graph(lambda folder, c: os.path.relpath(c.secret, folder))),
    Attack("places/onnx-absolute", "an absolute path there", _OUTSIDE, "onnx", _graph(lambda _f, c: str(c.secret))),
    Attack("places/onnx-nul", "NUL behind a good name there", _OUTSIDE, "onnx",
           _graph(lambda _f, _c: b"weights.data\0.bin")),
    Attack("places/onnx-linked", "a good name there that is a link", _LINK, "onnx",
           _linked("weights.data", lambda _f, c: c.secret)),
    Attack("places/onnx-offset", "an offset far behind the end", "does not lie where the graph says", "onnx",
           _graph(lambda _f, _c: "weights.data", offset=str(1 << 62))),
    Attack("places/onnx-negative", "an offset in front of the file", "not a graph as ONNX writes it", "onnx",
           _graph(lambda _f, _c: "weights.data", offset="-64")),
    Attack("places/onnx-digits", "an offset of 100,000 digits", "not a graph as ONNX writes it", "onnx",
           _graph(lambda _f, _c: "weights.data", offset="1" * 100_000)),
    Attack("places/onnx-shape", "a weight of 2^60 elements", "not a graph as ONNX writes it", "onnx",
           _graph(lambda _f, _c: "weights.data", dims=(1 << 60,), length="16")),
    Attack("places/onnx-twice", "two weights of one name", "two weights of one name", "onnx",
           _graph(lambda _f, _c: "weights.data", again=2)),
    Attack("places/onnx-field", "a field that reaches past its message", "not a graph as ONNX writes it", "onnx",
           _graph(lambda _f, _c: "weights.data", more=b"\x2a\xff\xff\xff\xff\x0f")),
)  # fmt: skip
