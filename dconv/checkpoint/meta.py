"""Meta's own Llama releases: ``consolidated.{00..NN}.pth``, one file a tensor-parallel rank, and ``params.json``.

The weights are HuggingFace's under other names, with one difference: Meta rotates neighbouring rows of a query or key
head as a pair, HuggingFace rows that lie half a head apart. Every second row of a head is a strided box, so the order
costs no arithmetic, only strides. Sources: ``model.py`` of Meta's llama, llama3 and llama-models (names, which axis a
layer cuts); ``reshard_mp`` of llama-models (key and value heads that several ranks hold); ``permute`` in transformers'
``convert_llama_weights_to_hf.py`` (row order).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Final

from dconv.arch.family import TIED_HEAD, Family
from dconv.arch.layouts import Facts, size
from dconv.arch.meta import hf_config_from_meta
from dconv.checkpoint.files import read_json, stamp, stamps
from dconv.checkpoint.huggingface_target import with_dtype
from dconv.checkpoint.ranks import cut_region, read_ranks
from dconv.checkpoint.rename import AS_STORED, Renaming
from dconv.checkpoint.source import Located, Source, expected_specs, side_files
from dconv.checkpoint.tied import differ, equal
from dconv.errors import Damaged, Refused
from dconv.sharding.coords import Parallel
from dconv.sharding.dtypes import TO_TORCH
from dconv.sharding.region import Region
from dconv.sharding.tensor import Piece, Stored, TensorSpec

_SHARD: Final = re.compile(r"consolidated\.(\d+)\.pth")
_LAYER: Final = re.compile(r"layers\.(\d+)\.(.+)")
_EMBEDDING: Final = "tok_embeddings.weight"
_HEAD: Final = "output.weight"
#: Meta's name -> HuggingFace's.
_TOP: Final = {_EMBEDDING: "model.embed_tokens.weight", "norm.weight": "model.norm.weight", _HEAD: TIED_HEAD}
#: The same below ``layers.N`` and ``model.layers.N``.
_IN_LAYER: Final = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
_ROTATED: Final = re.compile(r".*\.self_attn\.[qk]_proj\.weight")
#: Cut by heads, of which a rank has at least one: with more ranks than heads, neighbours hold the same one.
_SHARED: Final = re.compile(r".*\.self_attn\.[kv]_proj\.weight")
#: Llama 2 and later store the frequencies once, Llama 1 in every layer.
_RECOMPUTED: Final = ("rope.freqs", "layers.*.attention.inner_attention.rope.freqs")
#: fp8 and int8 releases carry scales elsewhere, without which the codes mean nothing.
_PLAIN_DTYPES: Final = ("f32", "bf16", "f16")

#: One rank's file: its tensors by Meta's names.
_Shard = tuple[str, dict[str, Stored]]


def open_source(folder: Path, *, own_config: bool = True, rename: Renaming = AS_STORED) -> Source:
    """Describe a release from headers alone. Llama 3.2's output weights are compared with the embedding.

    Args:
        folder: the directory.
        own_config: translate params.json; False leaves the config to ``--hf-config``.
        rename: gives the stored tensors other names before they are looked at.

    Raises:
        Damaged: a missing or broken shard, a params.json that is not JSON or impossible.
        Refused: a params.json of another model, quantised weights.
    """
    before = stamps(folder, (".pth",))
    shards = [(file, rename(tensors, folder / file)) for file, tensors in read_ranks(folder, _SHARD)]
    if not shards:
        raise Damaged("no weights of Meta's kind", where=str(folder), expected="consolidated.00.pth and its siblings")
    _refuse_quantized(shards)
    files = {file: before[file] if file in before else stamp(folder / file) for file, _ in shards}
    names = {name: stored.spec.shape for _, tensors in shards for name, stored in tensors.items()}

    @cache
    def tied() -> bool:
        """Whether every rank's output is its embedding, or not stored."""
        return all(
            equal(folder, files, tensors[_EMBEDDING], tensors[_HEAD])
            for _, tensors in shards
            if _HEAD in tensors and _EMBEDDING in tensors
        )

    def locate(family: Family, facts: Facts) -> Located:
        if facts["tied"] and not tied():
            raise differ(_HEAD, _EMBEDDING, folder)
        return _locate(shards, family, facts)

    config = None
    if own_config and (folder / "params.json").exists():
        config = _config(folder, shards)
        config["tie_word_embeddings"] = _HEAD not in names or (config["tie_word_embeddings"] is True and tied())

    return Source(
        format="meta",
        root=folder,
        config=config,
        args=None,
        side=_side(folder),
        files=files,
        parallel=Parallel(tp=len(shards)),
        locate=locate,
        stored_bytes=sum(tensor.spec.nbytes for _, tensors in shards for tensor in tensors.values()),
        shapes=names,
        stored=lambda: (tensor for _, tensors in shards for tensor in tensors.values()),
    )


def _side(folder: Path) -> dict[str, Path]:
    """Side files. Llama 1 and 2 keep the tokenizer of all sizes one directory up."""
    of_no_use = ("config.json", "tokenizer_checklist.chk")  # made anew; of Meta's own files
    side = {name: path for name, path in side_files(folder).items() if name not in of_no_use}
    above = folder.absolute().parent / "tokenizer.model"
    if above.name not in side and above.is_file() and above.with_name("tokenizer_checklist.chk").is_file():
        side[above.name] = above
    return side


def _config(folder: Path, shards: list[_Shard]) -> dict[str, object]:
    """The HuggingFace config: params.json, and what only the weights tell (vocabulary, dtype)."""
    params = read_json(folder / "params.json", what="params.json")
    file, first = shards[0]
    for name in (_EMBEDDING, "norm.weight"):
        if name not in first or not first[name].spec.shape:
            raise Damaged("a tensor is missing", where=f"{name} in {folder / file}", expected="a Llama model")
    embedding = first[_EMBEDDING].spec
    # Llama 1 and 2 cut it by columns, Llama 3 by rows
    by_rows = embedding.shape[-1] == first["norm.weight"].spec.shape[0]
    config = hf_config_from_meta(params, embedding.shape[0] * (len(shards) if by_rows else 1))
    return with_dtype(config, TO_TORCH[embedding.dtype])


def _refuse_quantized(shards: list[_Shard]) -> None:
    for file, tensors in shards:
        for name, tensor in tensors.items():
            if tensor.spec.dtype not in _PLAIN_DTYPES and not _recomputed(name):
                raise Refused(
                    "the source is quantised, which this version does not decode, nothing was written",
                    where=f"{name} in {file}",
                    expected="bf16, f16 or f32 weights",
                    found=tensor.spec.dtype,
                )


def _recomputed(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _RECOMPUTED)


def _rename(name: str) -> str:
    """HuggingFace's name, or Meta's own where there is none."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return _TOP.get(name, name)
    inner = _IN_LAYER.get(layer[2])
    return name if inner is None else f"model.layers.{layer[1]}.{inner}"


def _locate(shards: list[_Shard], family: Family, facts: Facts) -> Located:
    specs = expected_specs(family, facts)
    located = Located({}, {}, {})
    for rank, (file, tensors) in enumerate(shards):
        for name, tensor in tensors.items():
            hf = _rename(name)
            if hf in specs:
                pieces = _pieces(specs[hf], tensor, rank, len(shards), size(facts, "head_dim"))
                located.pieces.setdefault(hf, []).extend(pieces)
            elif _recomputed(name):
                located.left_out[name] = "recomputed from the config"
            elif reason := family.reason_to_leave_out(hf, facts):
                located.left_out[name] = reason
            else:
                located.unknown[name] = file
    return located


def _pieces(spec: TensorSpec, tensor: Stored, rank: int, count: int, head: int) -> Iterator[Piece]:
    """A rank's tensor in HuggingFace's coordinates.

    Args:
        spec: the logical tensor.
        tensor: what the rank has of it.
        rank: the file's number.
        count: how many files there are.
        head: rows of one attention head.
    """
    extent, shape = tensor.extents[0], tensor.spec.shape
    part, parts = rank, count
    if _SHARED.fullmatch(spec.name) and spec.shape[0] < count * head and shape[:1] == (head,):
        parts = spec.shape[0] // head
        part = rank * parts // count
    region = cut_region(spec, tensor, part, parts, ranked=True)
    if not _ROTATED.fullmatch(spec.name):
        yield Piece(spec.name, region, extent.file, extent.offset, extent.strides, tensor.spec.dtype)
        return
    row, column = extent.strides
    if shape[0] % head:
        raise Damaged(
            "a shard cuts through an attention head",
            where=f"{spec.name} in {extent.file}",
            expected=f"a multiple of {head} rows",
            found=str(shape[0]),
        )
    half = head // 2
    for at in range(0, shape[0], head):
        for second in (0, 1):  # Meta's row at + 2i + second is HuggingFace's row at + second * half + i
            box = Region((region.start[0] + at + second * half, 0), (half, shape[1]))
            offset = extent.offset + (at + second) * row
            yield Piece(spec.name, box, extent.file, offset, (2 * row, column), tensor.spec.dtype)
