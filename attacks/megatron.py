"""Megatron's torch_dist and legacy containers with metadata that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from attacks.corpus import SECRET, Attack, Canary, edit_pickle
from attacks.pickles import call, text
from dconv.checkpoint import dcp
from dconv.checkpoint.dcp import DcpChunk, DcpMetadata, DcpTensor

_METADATA: Final = "release/.metadata"
_KEY: Final = "decoder.layers.self_attention.linear_proj.weight"
_OUTSIDE: Final = "a file name points outside the checkpoint's directory"
_YAML: Final = "release/run_config.yaml"


def _metadata(change: Callable[[DcpMetadata, Canary], DcpMetadata | None]) -> Callable[[Path, Canary], object]:
    def spoil(folder: Path, canary: Canary) -> None:
        held = dcp.read_metadata(folder / _METADATA)
        held = change(held, canary) or held
        (folder / _METADATA).write_bytes(dcp.dump_metadata(held.tensors, held.objects))

    return spoil


def _chunks(change: Callable[[tuple[DcpChunk, ...], Canary], Any]) -> Callable[[Path, Canary], object]:
    """Changes the chunks of one tensor."""

    def edit(held: DcpMetadata, canary: Canary) -> None:
        tensor = held.tensors[_KEY]
        held.tensors[_KEY] = replace(tensor, chunks=tuple(change(tensor.chunks, canary)))

    return _metadata(edit)


def _first(**changes: Any) -> Callable[[Path, Canary], object]:
    return _chunks(lambda chunks, _canary: (replace(chunks[0], **changes), *chunks[1:]))


def _tensor(**changes: Any) -> Callable[[Path, Canary], object]:
    return _metadata(lambda held, _canary: held.tensors.update({_KEY: replace(held.tensors[_KEY], **changes)}))


def _overlap(chunks: tuple[DcpChunk, ...], _canary: Canary) -> tuple[DcpChunk, ...]:
    """A second chunk of the same layer, a row lower."""
    again = replace(chunks[0], offsets=(0, 1, 0), sizes=(1, chunks[0].sizes[1] - 1, chunks[0].sizes[2]))
    return (*chunks, again)


def _elsewhere(held: DcpMetadata, _canary: Canary) -> None:
    """The chunks of one tensor in the places of another's."""
    other = next(tensor for name, tensor in held.tensors.items() if "linear_fc2" in name)
    pairs = zip(held.tensors[_KEY].chunks, other.chunks, strict=True)
    chunks = tuple(replace(own, file=there.file, offset=there.offset, length=there.length) for own, there in pairs)
    held.tensors[_KEY] = replace(held.tensors[_KEY], chunks=chunks)


def _common(folder: Path, canary: Canary) -> None:
    edit_pickle(folder / "release" / "common.pt", lambda tree: tree[:2] + call(
        "posix", "system", text(canary.command)) + b"0" + tree[2:])  # fmt: skip


def _common_text(folder: Path, _canary: Canary) -> None:
    (folder / "release" / "common.pt").write_text(SECRET[:4])


def _chunk_pickle(folder: Path, _canary: Canary) -> None:
    """The pickle of each chunk calls a name as long as the one that it had: nothing else moves."""
    path = folder / "release" / "__0_0.distcp"
    data = path.read_bytes()
    before = b"ctorch._utils\n_rebuild_tensor_v2\n"
    after = b"cposix\n" + b"system".ljust(len(before) - 8, b"m") + b"\n"
    at = 0
    while (at := data.find(b"PK\x03\x04", at)) >= 0:  # the checksums of the records, both of each, are left out
        data = data[: at + 14] + bytes(4) + data[at + 18 :]
        at += 4
    while (at := data.find(b"PK\x01\x02", max(at, 0))) >= 0:
        data = data[: at + 16] + bytes(4) + data[at + 20 :]
        at += 4
    path.write_bytes(data.replace(before, after))


def _written(file: str, content: str | bytes) -> Callable[[Path, Canary], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder, _canary: (folder / file).write_bytes(data)


def _raw(change: Callable[[bytes, Canary], bytes]) -> Callable[[Path, Canary], object]:
    def spoil(folder: Path, canary: Canary) -> None:
        path = folder / _METADATA
        path.write_bytes(change(path.read_bytes(), canary))

    return spoil


def _without_common(folder: Path) -> None:
    (folder / "release" / "common.pt").unlink()
    held = dcp.read_metadata(folder / _METADATA)
    held.objects.pop("common_state/shard_0_1", None)
    (folder / _METADATA).write_bytes(dcp.dump_metadata(held.tensors, held.objects))


def _run_config(content: Callable[[Canary], str]) -> Callable[[Path, Canary], object]:
    """Args from Megatron-Bridge's file, since there is no other source of them."""

    def spoil(folder: Path, canary: Canary) -> None:
        _without_common(folder)
        (folder / _YAML).write_text(content(canary))

    return spoil


def _far_rank(folder: Path, _canary: Canary) -> None:
    (folder / "release" / "mp_rank_99999999_99999999").mkdir()


def _rank_twice(folder: Path, _canary: Canary) -> None:
    (folder / "release" / "mp_rank_000").mkdir()


def laughs(levels: int = 40) -> str:
    """YAML whose every line is the line before it twice."""
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels))]
    return "\n".join(lines) + "\n"


_ATTACKS: Final[tuple[tuple[str, str, str, Callable[[Path, Canary], object]], ...]] = (
    ("path-dots", "../ as a chunk's relative_path", _OUTSIDE, _first(file="../../huggingface/config.json")),
    ("path-absolute", "an absolute path there", _OUTSIDE,
     _chunks(lambda chunks, canary: (replace(chunks[0], file=str(canary.secret)), *chunks[1:]))),
    ("path-nul", "NUL behind a good name there", _OUTSIDE, _first(file="__0_0.distcp\0x")),
    ("path-backslash", "Windows' separator there", _OUTSIDE, _first(file="..\\__0_0.distcp")),
    ("path-metadata", "a chunk that lies in .metadata itself", "not a file of torch.save",
     _first(file=".metadata", offset=0, length=64)),
    ("object-path", "../ as the place of an object", _OUTSIDE, _metadata(
        lambda held, canary: held.objects.update({"common_state/shard_0_1": (str(canary.secret), 0, 8)}))),
    ("chunk-overlap", "two chunks that overlap by all rows but one", "overlap", _chunks(_overlap)),
    ("chunk-gap", "a layer without a chunk", "missing", _chunks(lambda chunks, _canary: chunks[1:])),
    ("chunk-none", "a tensor without chunks", "missing", _chunks(lambda _chunks, _canary: ())),
    ("chunk-outside", "a chunk behind its tensor's end", "a chunk outside its tensor", _first(offsets=(7, 0, 0))),
    ("chunk-negative", "a chunk in front of its tensor", "a pickle that cannot be read", _first(offsets=(-1, 0, 0))),
    ("chunk-huge", "a chunk of 2^62 rows of a tensor of as many", "not what .metadata says", _metadata(
        lambda held, _canary: held.tensors.update({_KEY: DcpTensor("bf16", (1, 1 << 62, 32), (
            replace(held.tensors[_KEY].chunks[0], sizes=(1, 1 << 62, 32)),))}))),
    ("chunk-axes", "a chunk of fewer axes than its tensor", "a chunk of wrong form", _first(offsets=(0, 0), sizes=(1, 32))),
    ("chunk-past-end", "a chunk that begins behind its file's end", "a range past the end of its file",
     _first(offset=1 << 50)),
    ("chunk-2-63", "a chunk whose end wraps around", "a range past the end of its file", _first(length=(1 << 63) - 1)),
    ("chunk-negative-place", "a chunk in front of its file", "a chunk of wrong place", _first(offset=-64)),
    ("chunk-of-another", "chunks that are another tensor's", "a chunk that is not what .metadata says",
     _metadata(_elsewhere)),
    ("dtype", "another dtype than the chunks have", "a chunk that is not what .metadata says", _tensor(dtype="f16")),
    ("shape-overflow", "a tensor of 2^80 elements", "another shape than its config says",
     _tensor(shape=(2, 1 << 40, 1 << 40))),
    ("metadata-list", "a .metadata that is a list", "metadata without a Metadata", _raw(lambda _d, _c: b"\x80\x02].")),
    ("metadata-text", "a .metadata that is no pickle", "a pickle that cannot be read", _written(_METADATA, "{}")),
    ("metadata-tail", "a second pickle behind the first", "bytes after the end of a pickle",
     _raw(lambda data, canary: data + b"\x80\x02" + call("posix", "system", text(canary.command)) + b".")),
    ("metadata-system", "os.system in .metadata", "a pickle with a foreign global", _raw(
        lambda data, canary: data[:2] + call("posix", "system", text(canary.command)) + b"0" + data[2:])),
    ("common-system", "os.system in common.pt", "a pickle with a foreign global", _common),
    ("common-text", "a common.pt that is no file of torch", "not a file of torch.save", _common_text),
    ("chunk-system", "a foreign name in the pickle of each chunk", "a pickle with a foreign global", _chunk_pickle),
    ("marker-deep", "metadata.json of 100,000 levels", "is not valid JSON",
     _written("release/metadata.json", '{"sharded_backend":' * 100_000)),
    ("marker-other", "metadata.json of another backend", "an unfinished torch_dist checkpoint",
     _written("release/metadata.json", json.dumps({"sharded_backend": "zarr"}))),
    ("run-config-tag", "a YAML tag that calls os.system, in run_config.yaml", "not a YAML file",
     _run_config(lambda canary: f"model: !!python/object/apply:os.system [{canary.command!r}]\n")),
    ("run-config-laughs", "2^40 texts in forty lines of YAML", "nested without end",
     _run_config(lambda _canary: laughs() + "model: *a39\n")),
    ("run-config-merges", "maps merged into maps, which double", "no run config",
     _run_config(lambda _canary: "a: &a {x: 1}\nb: {<<: [*a, *a]}\nmodel: {}\n")),
    ("run-config-deep", "20,000 brackets", "not a YAML file", _run_config(lambda _canary: "[" * 20_000)),
)  # fmt: skip

ATTACKS: Final = (
    *(Attack(f"megatron/{name}", idea, says, "torch_dist", spoil) for name, idea, says, spoil in _ATTACKS),
    Attack(
        "megatron/rank-99999999",
        "a directory's name that promises 10^16 ranks",
        "stand side by side",
        "legacy",
        _far_rank,
    ),
    Attack("megatron/rank-twice", "two directories of one rank", "two directories of one rank", "legacy", _rank_twice),
)
