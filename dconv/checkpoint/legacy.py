"""Megatron's legacy container: one ``mp_rank_XX[_YYY[_ZZZ]]/model_optim_rng.pt`` a rank, read and written.

Source: ``megatron/training/checkpointing.py`` (file names, top-level keys). Keys are local to a pipeline stage, virtual
chunks are ``model0`` …, expert parallelism adds a third number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short  # of nested hostile values too
from typing import Any, Final

from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.checkpoint import classic, megatron, names, pickling, torchframe, torchzip
from dconv.checkpoint.files import check_link, listed, stamp
from dconv.checkpoint.pickled import TensorRef
from dconv.checkpoint.rename import AS_STORED, Renaming
from dconv.checkpoint.shards import Holder, Place, Shard, Shards, locate, staged
from dconv.checkpoint.source import Located, Source
from dconv.errors import Damaged, Refused, group_names
from dconv.sharding.coords import Coord, Parallel
from dconv.sharding.parsed import is_mapping
from dconv.sharding.plan import Target, TargetFile, TargetTensor
from dconv.sharding.region import Region
from dconv.sharding.tensor import Extent, Stored, TensorSpec

_FOLDER: Final = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_FILE: Final = "model_optim_rng.pt"
_CHUNK: Final = re.compile(r"model\d*")
#: No checkpoint was saved by more ranks of one replica; a damaged name must not size a list.
_MOST_RANKS: Final = 1 << 17
#: Missing shards that an error's text is made of.
_NAMED: Final = 10_000
#: Modules whose (empty) extra state a strict load asks for.
_WITH_STATE: Final = ("linear_", "in_proj", "out_proj", "output_layer")
_EMBEDDING: Final = "embedding.word_embeddings.weight"
#: Tensors that Megatron's model lacks: beside the model, so that its loader does not stumble over them.
_BESIDE: Final = "beside_the_model"
_NOT_WEIGHTS: Final = ("optimizer", "opt_param_scheduler", "lr_scheduler", "rng_state", "rerun_state_machine")


def open_source(iteration: Path, *, rename: Renaming = AS_STORED) -> Source:
    """Describe the shards of one iteration from their pickles and zip directories.

    Raises:
        Damaged: a rank's file is missing, torn, or its chunks do not fit together.
        Refused: a layout that no row describes (expert shards that overwrote each other).
    """
    folders, parallel = _ranks(iteration)
    files = {f"{folder.name}/{_FILE}": stamp(folder / _FILE) for folder in folders.values()}  # before what they hold
    opened = {place: _open(folder) for place, folder in folders.items()}
    chunks = {place: [rename(chunk, file.path) for chunk in _chunks(file)] for place, file in opened.items()}
    order = _order(opened)
    if order is not None:
        chunks = classic.settle(chunks)
    parallel = staged(parallel, chunks)
    layers = parallel.chunks(sum(map(sum, parallel.stages or ())))
    shards: Shards = {}
    left_out: dict[str, str] = {}
    for (t, p, e), file in opened.items():
        holder = Holder(t, parallel.tp, e, parallel.ep)
        for vp, chunk in enumerate(chunks[t, p, e]):
            for name, value in chunk.items():
                if isinstance(value, TensorRef) and not names.is_state(name):
                    at = _stored(iteration, file, value, name)
                    key = names.renumber(name, layers[p][vp])
                    shards.setdefault(key, []).append(Shard(at, holder))
        for name, value in _beside(file).items():
            shards.setdefault(name, []).append(Shard(_stored(iteration, file, value, name), holder))
        for key, value in file.tree.items():
            if key in _NOT_WEIGHTS:
                left_out[key] = "not weights"
            elif not _CHUNK.fullmatch(str(key)) and not _is_plain(value) and key not in ("args", _BESIDE):
                left_out[str(key)] = "not the model"
    config, side = megatron.sides(iteration)
    args = _args(opened[min(opened)])

    def lay(family: Family, facts: Facts) -> Located:
        return locate(shards if order is None else classic.reorder(shards, order, facts), family, facts)

    return Source(
        format="megatron legacy",
        root=iteration,
        config=config,
        args=args if order is None else classic.full_args(args),
        side=side,
        files=files,
        parallel=parallel,
        locate=lay,
        left_out=left_out,
        stored_bytes=sum(s.stored.spec.nbytes for held in shards.values() for s in held),
        shapes={name: held[0].stored.spec.shape for name, held in shards.items()},
        stored=lambda: (at for file in opened.values() for at in _as_saved(iteration, file)),
    )


def _args(file: torchzip.TorchFile) -> dict[str, object] | None:
    return megatron.plain_args(file.tree.get("args"))


def _ranks(iteration: Path) -> tuple[dict[Place, Path], Parallel]:
    """Every rank's directory, and the layout without its stages.

    Raises:
        Damaged: some are missing, or two are of one rank.
    """
    found = _folders(iteration)
    experts = _second_is_expert(found)
    folders: dict[Place, Path] = {}
    for (tp, *others), folder in found.items():
        place = (tp, 0, others[0]) if experts else (tp, others[0], others[1])
        folders[place] = folder
    tp, pp, ep = (1 + max((place[i] for place in folders), default=0) for i in range(3))
    if pp * max(tp, ep) > _MOST_RANKS:
        largest = max(folders.values(), key=lambda folder: [int(number) for number in re.findall(r"\d+", folder.name)])
        raise Damaged(
            f"shards are missing: {pp * max(tp, ep)} would have to be there, nothing was written",
            where=str(largest),
            expected=f"at most {_MOST_RANKS} ranks",
            found=f"{len(folders)} directories",
        )
    parallel = Parallel(tp=tp, pp=pp, ep=ep, etp=_expert_tensor_size(folders, tp, ep))
    absent = [place for place in _places(parallel) if place not in folders]
    if absent:
        total = len(absent) + len(folders)
        raise Damaged(
            f"{len(absent)} of {total} shards are missing, nothing was written",
            where=group_names(_folder_name(*place, parallel) for place in absent[:_NAMED]) + f"\nin {iteration}",
            expected=parallel.described,
        )
    return folders, parallel


def _places(parallel: Parallel) -> list[Place]:
    """The files of a layout: expert parallelism inside tensor parallelism does not have every pair of the two."""
    return list(dict.fromkeys((coord.tp, coord.pp, coord.ep) for coord in parallel.coords()))


def _expert_tensor_size(folders: Mapping[Place, Path], tp: int, ep: int) -> int:
    """The expert-tensor-parallel size that has just these files; else what the args say, or Megatron's default (tp)."""
    if ep == 1:
        return tp
    args = _args(_open(folders[min(folders)])) or {}
    said = args.get("expert_tensor_parallel_size") or tp
    there = {(t, e) for t, _, e in folders}
    for etp in dict.fromkeys((said, tp, *range(1, tp + 1))):
        if isinstance(etp, int) and 0 < etp <= tp and not max(tp, ep * etp) % min(tp, ep * etp):
            sizes = Parallel(tp=tp, ep=ep, etp=etp)
            if {(t, e) for t, _, e in _places(sizes)} == there:
                return etp
    return tp


def _folders(iteration: Path) -> dict[tuple[int, int, int], Path]:
    """Directories by the numbers in their names (a missing one counts as 0)."""
    found: dict[tuple[int, int, int], Path] = {}
    depth = 0
    for path in listed(iteration, "mp_rank_*"):
        match = _FOLDER.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        check_link(path)
        numbers = len([number for number in match.groups() if number])
        depth = depth or numbers
        if numbers != depth:
            raise Damaged(
                "directories of two layouts stand side by side",
                where=str(path),
                expected=f"{depth} numbers, as {next(iter(found.values())).name} has",
                found=f"{numbers} numbers",
            )
        place = int(match[1]), int(match[2] or 0), int(match[3] or 0)
        if place in found:
            raise Damaged("two directories of one rank", where=str(path), found=found[place].name)
        found[place] = path
    return found


def _second_is_expert(folders: Mapping[tuple[int, int, int], Path]) -> bool:
    """Whether names with one number after the first (``mp_rank_TT_NNN``) mean expert parallelism, not a pipeline.

    The args say so; where there are none, the embedding does: only the first stage has it, but every expert rank.
    """
    behind = [place for place in folders if place[1] > 0]
    if not behind or any(place[2] > 0 for place in folders):
        return False
    file = _open(folders[behind[0]])
    args = _args(file) or {}
    stages, experts = args.get("pipeline_model_parallel_size"), args.get("expert_model_parallel_size")
    if isinstance(stages, int) and isinstance(experts, int) and (stages > 1) != (experts > 1):
        return experts > 1
    return _EMBEDDING in _chunks(file)[0] and any(".experts." in str(name) for name in _chunks(file)[0])


def _open(folder: Path) -> torchzip.TorchFile:
    file = torchzip.read(folder / _FILE)
    if not isinstance(file.tree, dict):
        raise Damaged("not a Megatron checkpoint", where=str(folder / _FILE), found=type(file.tree).__name__)
    return file


def _chunks(file: torchzip.TorchFile) -> list[Mapping[str, Any]]:
    held = {str(key): value for key, value in file.tree.items() if _CHUNK.fullmatch(str(key))}
    names = ["model"] if "model" in held else [f"model{i}" for i in range(len(held))]
    chunks: list[Mapping[str, Any]] = [value for name in names if is_mapping(value := held.get(name))]
    if not chunks or len(chunks) != len(held):
        raise Damaged(
            "no model in a Megatron checkpoint",
            where=str(file.path),
            expected="model, or model0, model1 …",
            found=", ".join(map(str, file.tree))[:200],
        )
    chunks = [classic.flat(chunk) if classic.is_classic(chunk) else chunk for chunk in chunks]
    for chunk in chunks:
        _check_chunk(file, chunk)
    return chunks


def _order(opened: Mapping[Place, torchzip.TorchFile]) -> float | None:
    """The row order of a classic model; None for megatron-core's.

    Raises:
        Damaged: some files are of the one kind, some of the other, or of another version.
    """
    found = {
        classic.version(file.tree.get("checkpoint_version"), str(file.path))
        if any(is_mapping(held) and classic.is_classic(held) for held in file.tree.values())
        else None
        for file in opened.values()
    }
    if len(found) > 1:
        raise Damaged("ranks disagree on the checkpoint's version", found=", ".join(sorted(map(str, found))))
    return found.pop()


def _as_saved(iteration: Path, file: torchzip.TorchFile) -> Iterator[Stored]:
    """The tensors of a rank's file under the names that are in it; those of one chunk of several with the chunk's."""
    chunks = [key for key in file.tree if _CHUNK.fullmatch(str(key))]
    for key in (*chunks, *(key for key in file.tree if key == _BESIDE)):
        prefix = f"{key}." if len(chunks) > 1 and key != _BESIDE else ""
        for name, value in classic.leaves(file.tree[key], prefix):
            if isinstance(value, TensorRef) and not names.is_state(name):
                yield _stored(iteration, file, value, name)


def _beside(file: torchzip.TorchFile) -> Mapping[str, TensorRef]:
    held = file.tree.get(_BESIDE, {})
    if not is_mapping(held) or not all(isinstance(value, TensorRef) for value in held.values()):
        raise Damaged("what lies beside the model is no tensor", where=f"{_BESIDE} in {file.path}", found=short(held))
    _check_chunk(file, held)
    return held


def _check_chunk(file: torchzip.TorchFile, chunk: Mapping[Any, Any]) -> None:
    """Nothing may be in a state dict that would be passed over without a word.

    Raises:
        Refused: a value that is neither a tensor, nor plain, nor an extra state.
    """
    for name, value in chunk.items():
        if not isinstance(name, str):
            raise Damaged("a tensor whose name is no text", where=str(file.path), found=short(name))
        if not isinstance(value, TensorRef) and not _is_plain(value) and not names.is_state(name):
            raise Refused(
                "a value in the model that is no tensor, nothing was written",
                where=f"{short(name)} in {file.path}",
                expected="tensors by name",
                found=short(value),
            )


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def _stored(iteration: Path, file: torchzip.TorchFile, ref: TensorRef, name: str) -> Stored:
    at = file.locate(ref)
    path = file.path.relative_to(iteration).as_posix()
    spec = TensorSpec(name, at.shape, at.dtype)
    return Stored(spec, (Extent(Region.whole(at.shape), path, at.offset, at.strides),))


def _folder_name(tp: int, pp: int, ep: int, parallel: Parallel) -> str:
    name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if parallel.pp > 1 else "")
    return name + (f"_{ep:03d}" if parallel.ep > 1 else "")


def lay_out(model: megatron.Model) -> Target:
    """A legacy checkpoint to be written, one file a rank under ``release/``.

    Raises:
        Refused: two ranks with different experts would have one file name.
    """
    files: list[TargetFile] = []
    tensors: list[TargetTensor] = []
    stages = [(one, one.stages()) for one in model.models]
    _check_names(model)
    for rank, coord in enumerate(model.parallel.coords()):
        folder = _folder_name(coord.tp, coord.pp, coord.ep, model.parallel)
        path = f"{megatron.RELEASE}/{folder}/{_FILE}"
        placed = [(one, item) for one, held in stages for item in held[coord.pp][coord.ep]]
        shard = [_tensor(one, item, coord, folder, path) for one, item in placed]
        frame = _frame(model, shard, [item for _, item in placed])
        files.append(TargetFile(path, frame.size, frame.literals, rank))
        tensors.extend(replace(tensor, offset=frame.data[str(i)]) for i, tensor in enumerate(shard))
    return Target(tuple(files), tuple(tensors), model.closing, model.seal, model.parallel.world, model.left_out)


def _check_names(model: megatron.Model) -> None:
    """Megatron's names say nothing of expert tensor parallelism: ranks that differ in it alone overwrite each other."""
    parallel = model.parallel
    if len(_places(parallel)) == parallel.world:
        return
    raise Refused(
        "the legacy format has one file name for ranks that hold different parts of the experts, nothing was written",
        where="--ep, --etp",
        expected="ranks of a stage that differ in tensor- or expert-parallel number",
        found=parallel.described,
        do="--megatron-format torch_dist, or --etp equal to --tp",
    )


def _tensor(model: megatron.Model, item: megatron.Placed, coord: Coord, folder: str, path: str) -> TargetTensor:
    """One tensor of a rank's file, its offset still to be filled in."""
    fused = item.entry.fused
    stretches = model.shard(item.entry, coord)
    slots = model.slots(fused, stretches)
    shape = fused.shape(sum(s.stop - s.start for s in stretches))
    spelled = names.sequential(names.local_name(item.name)) if model.local_spec else names.grouped(item.name)
    spelled = model.prefix + spelled
    spec = TensorSpec(spelled, shape, model.dtype(item.entry))
    padding = math.prod(shape) - sum(slot.region.volume for slot in slots)
    chunk = f"model{item.chunk}." if model.parallel.vpp > 1 else ""
    return TargetTensor(f"{folder}:{chunk}{spelled}", path, 0, spec, slots, padding)


def _frame(model: megatron.Model, shard: Sequence[TargetTensor], placed: Sequence[megatron.Placed]) -> torchframe.Frame:
    states: list[dict[str, object]] = [{} for _ in range(model.parallel.vpp)]
    beside: dict[str, object] = {}
    for i, (tensor, item) in enumerate(zip(shard, placed, strict=True)):
        name, state = tensor.spec.name, beside if item.entry.row.beside else states[item.chunk]
        state[name] = torchframe.tensor(tensor.spec.dtype, tensor.spec.shape, str(i))
        if state is not beside:
            state.update((f"{module}._extra_state", None) for module in stateful([name]))
    named = {"model": states[0]} if len(states) == 1 else {f"model{i}": state for i, state in enumerate(states)}
    tree = {"args": pickling.namespace(model.args), "checkpoint_version": 3.0, "iteration": 0, **named}
    if beside:
        tree[_BESIDE] = beside
    return torchframe.frame(tree, [(str(i), tensor.spec.nbytes) for i, tensor in enumerate(shard)])


def stateful(weights: Iterable[str]) -> Iterator[str]:
    """The modules among those of these weights whose (empty) extra state a strict load asks for."""
    for name in weights:
        module, _, parameter = name.rpartition(".")
        if parameter in ("weight", "weight0") and module.rpartition(".")[2].startswith(_WITH_STATE):
            yield module
