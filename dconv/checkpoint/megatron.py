"""What Megatron's two containers share: names, pipeline numbering, and laying a family's table over their shards.

A stored tensor is known by its *global* name (global layer number, no chunk prefix) and by which stretch of the fused
tensor it holds: one tensor-parallel shard (legacy), or the whole in global coordinates (torch_dist).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dconv.arch.family import Entry, Family
from dconv.arch.layouts import Facts
from dconv.checkpoint import pickling
from dconv.checkpoint.files import read_json, read_small
from dconv.checkpoint.pickled import DTypeRef, Record
from dconv.checkpoint.source import Located, seal, shape_error, side_bytes, side_files
from dconv.errors import Damaged, Refused
from dconv.sharding.coords import Parallel
from dconv.sharding.dtypes import TO_TORCH
from dconv.sharding.layout import pieces
from dconv.sharding.tensor import Piece, Stored

LATEST: Final = "latest_checkpointed_iteration.txt"
#: The directory of a converted checkpoint: Megatron-LM takes it as iteration 0, without optimizer and RNG state.
RELEASE: Final = "release"
#: Where the HuggingFace side files wait inside a Megatron checkpoint.
SIDE_FOLDER: Final = "huggingface"

#: TransformerEngine's name -> the local layer spec's name, per layer. Source: ``sharded_state_dict_keys_map`` in
#: ``megatron/core/models/gpt/gpt_layer_specs.py``.
LOCAL_SPEC: Final = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}

#: The output layer; a tied model's last stage keeps its copy of the embedding under this name.
HEAD: Final = "output_layer.weight"

_LAYER: Final = re.compile(r"(decoder\.layers\.)(\d{1,9})(\..+)")


@dataclass(frozen=True, slots=True)
class Shard:
    """A stored tensor and what part of the fused tensor it is: shard ``index`` of ``count``, or all (count 0)."""

    index: int
    count: int
    stored: Stored


Shards = dict[str, list[Shard]]


def local_name(name: str) -> str:
    """The local layer spec's spelling of a global name."""
    match = _LAYER.fullmatch(name)
    if match is None or match[3][1:] not in LOCAL_SPEC:
        return name
    return f"{match[1]}{match[2]}.{LOCAL_SPEC[match[3][1:]]}"


def renumber(name: str, layers: range) -> str:
    """A chunk's local layer number made global.

    Raises:
        Damaged: the chunk has more layers than its stage holds.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    local = int(match[2])
    if local >= len(layers):
        raise Damaged("a layer number is outside its pipeline stage", where=name, expected=f"below {len(layers)}")
    return f"{match[1]}{layers[local]}{match[3]}"


def local_layers(names: Iterable[str]) -> int:
    """How many layers a chunk holds.

    Raises:
        Damaged: the numbers have a gap.
    """
    numbers = {int(match[2]) for name in names if (match := _LAYER.fullmatch(name))}
    if numbers != set(range(len(numbers))):
        expected = f"layers 0 to {max(numbers)}"
        raise Damaged("a pipeline stage lacks layers", expected=expected, found=str(sorted(numbers)))
    return len(numbers)


def is_state(name: str) -> bool:
    """TransformerEngine's extra state: FP8 bookkeeping that carries no weights."""
    return name.endswith("_extra_state") or "._extra_state" in name


def locate(shards: Shards, family: Family, facts: Facts) -> Located:
    """Pieces of the logical tensors from Megatron's shards."""
    located = Located({}, {}, {})
    used: set[str] = set()
    for entry in family.entries(facts):
        name = entry.fused.name
        names = [name if name in shards else local_name(name)]
        if facts["tied"] and _is_embedding(entry):
            names.append(HEAD)
        for shard in (shard for name in names for shard in shards.get(name, ())):
            for piece in _pieces(entry, shard):
                located.pieces.setdefault(piece.tensor, []).append(piece)
            if (length := _length(entry, shard)) > entry.fused.length:
                rows = f"{name}, rows {entry.fused.length} to {length - 1}"
                located.left_out[rows] = "padding of the vocabulary"
        used.update(names)
    for name, held in shards.items():
        if name not in used:
            located.unknown[name] = held[0].stored.extents[0].file if held[0].stored.extents else "?"
    return located


def _is_embedding(entry: Entry) -> bool:
    """Of words, that is: the one that a tied model uses twice."""
    return entry.first_stage and entry.fused.padded


def _pieces(entry: Entry, shard: Shard) -> Iterable[Piece]:
    fused, stored = entry.fused, shard.stored
    count = shard.count or 1
    shape = stored.spec.shape
    length = _length(entry, shard)
    if length < fused.length or (length > fused.length and not fused.padded):
        per_rank = fused.length // count if fused.parallel else fused.length
        raise shape_error(fused.name, _where(stored), fused.shape(per_rank), shape)
    stretches = fused.shard(shard.index, count, length)
    expected = fused.shape(sum(s.stop - s.start for s in stretches))
    if expected != shape:
        raise shape_error(fused.name, _where(stored), expected, shape)
    return pieces(fused.slots(stretches), stored.extents, stored.spec.dtype)


def _length(entry: Entry, shard: Shard) -> int:
    """Indices of the fused tensor along its axis, padding included, as a shard says; -1 for one of other axes."""
    shape = shard.stored.spec.shape
    if len(shape) != len(entry.fused.order):
        return -1
    return shape[entry.fused.axis] * (max(shard.count, 1) if entry.fused.parallel else 1)


def _where(stored: Stored) -> str:
    return stored.extents[0].file if stored.extents else "the checkpoint"


@dataclass(frozen=True, slots=True)
class Placed:
    """An entry on a pipeline stage.

    Attributes:
        chunk: the virtual chunk that holds it.
        name: its name there, with the layer's number inside the chunk.
        again: a tied embedding's second copy, on the last stage.
    """

    entry: Entry
    chunk: int
    name: str
    again: bool = False


def place(family: Family, facts: Facts, parallel: Parallel, dtypes: Mapping[str, str]) -> list[list[Placed]]:
    """What each pipeline stage holds, in the model's order.

    A tied model with several stages needs the embedding a second time on the last stage, where the loss is.
    """
    chunks = parallel.chunks(int(facts["layers"]))
    where = {
        layer: (pp, vp, at)
        for pp, stage in enumerate(chunks)
        for vp, layers in enumerate(stage)
        for at, layer in enumerate(layers)
    }
    last = parallel.vpp - 1
    stages: list[list[Placed]] = [[] for _ in range(parallel.pp)]
    for entry in family.entries(facts, dtypes):
        name = entry.row.megatron
        if entry.layer >= 0:
            pp, vp, at = where[entry.layer]
            stages[pp].append(Placed(entry, vp, name.replace("*", str(at))))
        elif entry.first_stage:
            stages[0].append(Placed(entry, 0, name))
            if facts["tied"] and parallel.pp > 1 and _is_embedding(entry):
                stages[-1].append(Placed(entry, last, HEAD, again=True))
        else:
            stages[-1].append(Placed(entry, last, name))
    return stages


def padded_vocab(vocab: int, divisor: int, tp: int) -> int:
    """Rows of the vocabulary after padding. Source: ``megatron/training/vocab_utils.py``."""
    multiple = divisor * tp
    return -(-vocab // multiple) * multiple


@dataclass(frozen=True)
class Model:
    """A model to be written as Megatron shards, in either container.

    Attributes:
        dtypes: dtype of each logical tensor.
        divisor: the padded vocabulary is a multiple of this times tp.
        forced_dtype: one dtype for all, or None to keep them.
        args: what Megatron's args Namespace will say.
        config, side: the HuggingFace config and side files that travel along.
    """

    family: Family
    facts: Facts
    parallel: Parallel
    dtypes: Mapping[str, str]
    divisor: int
    forced_dtype: str | None
    args: Mapping[str, object]
    config: Mapping[str, object] | None
    side: Mapping[str, Path]
    left_out: dict[str, str]

    @property
    def padded_vocab(self) -> int:
        return padded_vocab(int(self.facts["vocab"]), self.divisor, self.parallel.tp)

    @property
    def seal(self) -> str:
        """See `dconv.sharding.plan.Target`."""
        return seal(self.config, self.side, repr(sorted(self.args.items())))

    def stages(self) -> list[list[Placed]]:
        return place(self.family, self.facts, self.parallel, self.dtypes)

    def dtype(self, entry: Entry) -> str:
        """The dtype of a fused tensor.

        Raises:
            Refused: its logical tensors differ and no ``--dtype`` settles it.
        """
        if self.forced_dtype:
            return self.forced_dtype
        found = {self.dtypes[spec.name] for spec in entry.fused.specs}
        if len(found) > 1:
            raise Refused(
                f"{entry.fused.name} would join tensors of different dtypes, nothing was written",
                where=", ".join(spec.name for spec in entry.fused.specs),
                found=", ".join(sorted(found)),
                do="--dtype bf16 (or f16, f32) makes them one",
            )
        return found.pop()

    def closing(self) -> Iterable[tuple[str, bytes]]:
        """The tracker file and the side files."""
        yield LATEST, RELEASE.encode()
        for name, data in side_bytes(self.config, self.side):
            yield f"{SIDE_FOLDER}/{name}", data


def parallel_args(parallel: Parallel, vocab: int, divisor: int) -> dict[str, object]:
    """The args that say how a checkpoint is cut, and that it holds no optimizer and RNG state."""
    return {
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if parallel.vpp > 1 else None,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp,
        "decoder_first_pipeline_num_layers": parallel.first,
        "decoder_last_pipeline_num_layers": parallel.last,
        "pipeline_model_parallel_layout": parallel.layout_string(),
        "account_for_embedding_in_pipeline_split": parallel.count_embedding,
        "account_for_loss_in_pipeline_split": parallel.count_loss,
        "vocab_size": vocab,
        "padded_vocab_size": padded_vocab(vocab, divisor, parallel.tp),
        "make_vocab_size_divisible_by": divisor,
        "no_save_optim": True,
        "no_save_rng": True,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "sequence_parallel": False,
        "context_parallel_size": 1,
    }


def dtype_args(dtype: str) -> dict[str, object]:
    """The args that say in which precision the weights are."""
    return {"params_dtype": pickling.dtype(dtype), "bf16": dtype == "bf16", "fp16": dtype == "f16"}


def find_iteration(folder: Path) -> Path:
    """The directory that holds the shards, given a root, an ``iter_*``/``release`` directory, or bare shards.

    Raises:
        Damaged: the tracker file names no directory that is there.
    """
    tracker = folder / LATEST
    if not tracker.exists():
        return folder
    word = read_small(tracker, what="the tracker file").decode("utf-8", "replace").strip()
    name = RELEASE if word == RELEASE else f"iter_{int(word):07d}" if word.isdecimal() and len(word) < 10 else ""
    if not name or not (folder / name).is_dir():
        raise Damaged(
            "the tracker file names no checkpoint that is there",
            where=str(tracker),
            expected="an iteration number, or the word release",
            found=repr(word[:40]),
        )
    return folder / name


def side_folder(iteration: Path) -> Path | None:
    """Where the HuggingFace side files of a checkpoint are: inside, beside bare shards, or inside its root."""
    root = iteration.parent / SIDE_FOLDER  # of bare shards the parent is anything's
    inside = iteration.name == RELEASE or iteration.name.startswith("iter_")
    for folder in (iteration / SIDE_FOLDER, iteration, *((root,) if inside else ())):
        if (folder / "config.json").exists():
            return folder
    return None


def sides(iteration: Path) -> tuple[dict[str, object] | None, dict[str, Path]]:
    """The HuggingFace config and side files that travel inside a Megatron checkpoint."""
    folder = side_folder(iteration)
    if folder is None:
        return None, {}
    return read_json(folder / "config.json", what="config.json"), side_files(folder)


def plain_args(value: object) -> dict[str, object] | None:
    """An inert ``argparse.Namespace`` as a dict; members that are no plain data become their printed form."""
    fields = value.fields if isinstance(value, Record) else value
    if not isinstance(fields, Mapping):
        return None
    return {str(key): _plain(item) for key, item in fields.items()}


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, DTypeRef):
        return f"torch.{TO_TORCH[value.name]}"
    return str(value)
