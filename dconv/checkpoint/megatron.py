"""What Megatron's two containers share: directories, args, and which rank holds what of a model to be written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dconv.arch.family import Entry, Family
from dconv.arch.layouts import Facts, size
from dconv.checkpoint import pickling
from dconv.checkpoint.files import check_link, read_json, read_small
from dconv.checkpoint.names import head_beside
from dconv.checkpoint.pickled import DTypeRef, Record
from dconv.checkpoint.source import Side, seal, side_bytes, side_files
from dconv.errors import Damaged, Refused
from dconv.sharding.coords import Coord, Parallel
from dconv.sharding.dtypes import TO_TORCH
from dconv.sharding.layout import Fused, Stretch
from dconv.sharding.parsed import is_list_or_tuple, is_mapping
from dconv.sharding.region import Index
from dconv.sharding.tensor import Slot

LATEST: Final = "latest_checkpointed_iteration.txt"
#: The directory of a converted checkpoint: Megatron-LM takes it as iteration 0, without optimizer and RNG state.
RELEASE: Final = "release"
#: Where the HuggingFace side files wait inside a Megatron checkpoint.
SIDE_FOLDER: Final = "huggingface"
#: Where in it those of a teacher are, and the own arg that holds a teacher's args.
TEACHER: Final = "teacher"
TEACHER_ARGS: Final = "teacher_args"


@dataclass(frozen=True, slots=True)
class Placed:
    """An entry on a pipeline stage.

    Attributes:
        chunk: the virtual chunk that holds it.
        name: its name there, with the layer's number inside the chunk and the expert's inside its rank.
        again: a tied embedding's second copy, on the last stage.
    """

    entry: Entry
    chunk: int
    name: str
    again: bool = False


def place(family: Family, facts: Facts, parallel: Parallel, dtypes: Mapping[str, str]) -> list[list[list[Placed]]]:
    """What each pipeline stage holds, in the model's order: ``place(…)[pp][ep]``.

    A tied model with several stages needs the embedding a second time on the last stage, where the loss is.
    """
    chunks = parallel.chunks(size(facts, "layers"))
    where = {
        layer: (pp, vp, at)
        for pp, stage in enumerate(chunks)
        for vp, layers in enumerate(stage)
        for at, layer in enumerate(layers)
    }
    last = parallel.vpp - 1
    a_rank = size(facts, "experts") // parallel.ep
    stages: list[list[list[Placed]]] = [[[] for _ in range(parallel.ep)] for _ in range(parallel.pp)]
    for entry in family.entries(facts, dtypes):
        row = entry.row
        if row.pipelined:
            pp, vp, at = where[entry.layer]
        else:
            pp, vp, at = (0, 0, entry.layer) if row.first_stage else (parallel.pp - 1, last, entry.layer)
        name = row.megatron.replace("*", str(at))
        if entry.expert >= 0:
            ep, local = divmod(entry.expert, a_rank)
            stages[pp][ep].append(Placed(entry, vp, name.replace("#", str(local))))
            continue
        for held in stages[pp]:
            held.append(Placed(entry, vp, name))
        if facts["tied"] and parallel.pp > 1 and entry.is_embedding:
            for held in stages[-1]:
                held.append(Placed(entry, last, head_beside(name), again=True))
    return stages


def cut(entry: Entry, coord: Coord, parallel: Parallel) -> tuple[int, int]:
    """Which stretch of how many of a tensor a rank holds."""
    return (coord.tp, parallel.tp) if entry.expert < 0 else (coord.etp, parallel.etp)


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
        local_spec: whether the local layer spec will load it; else TransformerEngine's.
        args: what Megatron's args Namespace will say.
        config, side: the HuggingFace config and side files that travel along.
        prefix: stands before every name, the logical tensors' as well (``teacher_model.``).
        teacher: a model that goes into the same checkpoint.
    """

    family: Family
    facts: Facts
    parallel: Parallel
    dtypes: Mapping[str, str]
    divisor: int
    forced_dtype: str | None
    local_spec: bool
    args: Mapping[str, object]
    config: Mapping[str, object] | None
    side: Side
    left_out: dict[str, str]
    prefix: str = ""
    teacher: Model | None = None

    @property
    def models(self) -> tuple[Model, ...]:
        """All that the checkpoint holds."""
        return (self,) if self.teacher is None else (self, self.teacher)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding, padded so that they divide over tensor parallelism."""
        return padded_vocab(size(self.facts, "vocab"), self.divisor, self.parallel.tp)

    @property
    def seal(self) -> str:
        """See `dconv.sharding.plan.Target`."""
        also = "" if self.teacher is None else self.teacher.seal
        return seal(self.config, self.side, self.prefix + repr(sorted(self.args.items())) + also)

    def stages(self) -> list[list[list[Placed]]]:
        """What each pipeline stage and each expert-parallel rank in it holds."""
        return place(self.family, self.facts, self.parallel, self.dtypes)

    def is_cut(self, entry: Entry) -> bool:
        """Whether ranks hold stretches of a tensor rather than all of it."""
        return entry.fused.parallel and (self.local_spec or not entry.fused.either)

    def shard(self, entry: Entry, coord: Coord) -> tuple[Stretch, ...]:
        """What a rank holds of a tensor.

        Raises:
            Refused: it does not divide.
        """
        index, count = cut(entry, coord, self.parallel) if self.is_cut(entry) else (0, 1)
        return entry.fused.shard(index, count, self.padded_vocab)

    def slots(self, fused: Fused, stretches: Sequence[Stretch], lead: Index = ()) -> tuple[Slot, ...]:
        """See `dconv.sharding.layout.Fused.slots`."""
        slots = fused.slots(stretches, lead)
        return tuple(replace(slot, tensor=self.prefix + slot.tensor) for slot in slots) if self.prefix else slots

    def dtype(self, entry: Entry) -> str:
        """The dtype of a fused tensor.

        Raises:
            Refused: its logical tensors differ and no ``--dtype`` settles it.
        """
        if self.forced_dtype and not entry.row.keeps:
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
        if self.teacher is not None:
            for name, data in side_bytes(self.teacher.config, self.teacher.side):
                yield f"{SIDE_FOLDER}/{TEACHER}/{name}", data


def check_cuts(family: Family, facts: Facts, parallel: Parallel, divisor: int, *, local_spec: bool = False) -> None:
    """Refuse parallel sizes over which a tensor does not divide.

    Raises:
        Refused: see above.
    """
    model = Model(family, facts, parallel, {}, divisor, None, local_spec, {}, None, {}, {})
    first = next(parallel.coords())
    for entry in family.samples(facts):
        model.shard(entry, first)


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
        Damaged: the tracker file names no directory that is there, or a link out of here.
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
    check_link(folder / name)
    return folder / name


def side_folder(iteration: Path) -> Path | None:
    """Where the HuggingFace side files of a checkpoint are: inside, beside bare shards, or inside its root."""
    root = iteration.parent / SIDE_FOLDER  # of bare shards the parent is anything's
    inside = iteration.name == RELEASE or iteration.name.startswith("iter_")
    for folder in (iteration / SIDE_FOLDER, iteration, *((root,) if inside else ())):
        if (folder / "config.json").exists():
            if folder.name == SIDE_FOLDER:
                check_link(folder)
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
    if not is_mapping(fields):
        return None
    return {str(key): _plain(item) for key, item in fields.items()}


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if is_list_or_tuple(value):
        return [_plain(item) for item in value]
    if is_mapping(value):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, DTypeRef):
        return f"torch.{TO_TORCH[value.name]}"
    return str(value)
