"""Weights into and out of megatron-core models: its own savers and loaders, and seeded values for tests.

Nothing here knows a layout or a name of a weight beyond what megatron-core itself says, save for the two spellings of
`dconv.export.megatron_spelling`.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from argparse import Namespace
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dconv.errors import Damaged, Refused, group_names
from dconv.export import megatron_spelling

if TYPE_CHECKING:
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.T5 import T5Model

    Model = GPTModel | BertModel | T5Model

Args = Mapping[str, Any] | Namespace

# saved beside the model, in a torch_dist checkpoint, by a training run, or by a converter that must lose nothing
_NOT_OF_THE_MODEL = re.compile(
    r"_extra_state|^optimizer\.|^chained_|^rng_state|^rerun_state|^common_state|^beside_the_model\."
)

# written by Megatron-LM with every torch_dist checkpoint: layers are stacked, gate and up are one tensor
_CONTENT_METADATA = {"singleton_local_shards": False}


def forget_weights(model: Model) -> None:
    """Make all that a checkpoint should fill NaN: parameters and saved buffers."""
    import torch

    model.requires_grad_(False)
    for value in model.state_dict().values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.fill_(torch.nan)


def require_filled_buffers(models: Sequence[Model]) -> None:
    """Raise for NaN in saved buffers: as a router's correction it only changes which experts are chosen, unseen.

    Raises:
        Damaged: a saved buffer has NaN. NaN in a parameter needs no such check, it reaches every logit.
    """
    import torch

    for model in models:
        parameters = {name for name, _ in model.named_parameters()}
        buffers = {
            name: value
            for name, value in model.state_dict().items()
            if isinstance(value, torch.Tensor) and name not in parameters
        }
        empty = [name for name, value in buffers.items() if value.isnan().any()]
        if empty:
            raise Damaged("buffers of the model were not loaded or are NaN", found=group_names(empty))


def seed_weights(models: Iterable[Model], seed: int) -> None:
    """Fill every parameter with values that depend only on (seed, global name, layer and expert, global index).

    So each parallel layout of one architecture gets the same model; a larger vocabulary padding only adds rows.
    Matrices are normal with standard deviation 1/sqrt(columns), biases 0.1, norms 1 + 0.1 times a normal value.
    """
    import numpy as np
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    for model in models:
        sharded = _sharded(model, _CONTENT_METADATA)
        apply_factories(sharded)  # gate and up become two pieces of one global tensor
        for piece in megatron_spelling.pieces(sharded):
            if not isinstance(piece, ShardedTensor) or piece.data is None:
                continue
            stacked = piece.prepend_axis_num  # axes that number layers and experts
            identity = f"{seed}|{piece.key}|{piece.global_offset[:stacked]}".encode()
            # numpy fills in order, so that the first rows do not depend on how many follow
            generator = np.random.default_rng(list(hashlib.sha256(identity).digest()))
            values = torch.as_tensor(generator.standard_normal(piece.global_shape[stacked:], dtype=np.float32))
            if "norm" in piece.key.removesuffix(".weight").rsplit(".", 1)[-1]:
                values = 0.1 * values + (0.0 if piece.key.endswith("bias") else 1.0)
            elif values.ndim < 2:
                values = 0.1 * values
            else:
                values = values / values.shape[-1] ** 0.5
            box = zip(piece.global_offset[stacked:], piece.local_shape, strict=True)
            with torch.no_grad():
                piece.data.copy_(values[tuple(slice(start, start + size) for start, size in box)])


def _sharded(model: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The model's sharded state dict, of whose parts megatron-core says no types."""
    return model.sharded_state_dict(metadata=dict(metadata))


def _named(models: Sequence[Model]) -> Iterator[tuple[str, Model]]:
    """Chunks under the names that Megatron-LM saves them by: ``model``, or one of ``model0``, ``model1`` and so on."""
    for index, model in enumerate(models):
        yield ("model" if len(models) == 1 else f"model{index}"), model


def _iteration_directory(path: str | Path) -> Path:
    """``path``, or where it is a checkpoint root, the iteration that its tracker file names."""
    path = Path(path)
    tracker = path / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        return path
    latest = tracker.read_text().strip()
    if latest != "release" and not latest.isdecimal():
        raise Damaged("the tracker file names no iteration", where=str(tracker), found=latest[:80])
    return path / (latest if latest == "release" else f"iter_{int(latest):07d}")


def _start_iteration(root: str | Path, iteration: int) -> Path:
    directory = Path(root) / f"iter_{iteration:07d}"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _finish_iteration(root: str | Path, iteration: int) -> None:
    import torch.distributed as dist

    ranks: Any = dist
    ranks.barrier()
    if dist.get_rank() == 0:
        (Path(root) / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    ranks.barrier()


def named(args: Args) -> dict[str, Any]:
    """Arguments by name, as a dictionary of their own."""
    return dict(vars(args) if isinstance(args, Namespace) else args)


def _common_state(models: Sequence[Model], args: Args, iteration: int) -> dict[str, Any]:
    """What Megatron-LM saves beside the weights; the parallel sizes in ``args`` are those of the running world."""
    config = models[0].config
    sizes = {
        name: getattr(config, name)
        for name in (
            "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
            "expert_model_parallel_size", "expert_tensor_parallel_size", "params_dtype", "fp16", "bf16",
        )
    }  # fmt: skip
    return {
        "args": Namespace(**{**named(args), **sizes}),
        "checkpoint_version": 3.0,
        "iteration": iteration,
    }


def save_torch_dist(models: Sequence[Model], root: str | Path, args: Args, iteration: int = 1) -> Path:
    """Save as Megatron-LM does for ``--ckpt-format torch_dist`` (no optimizer); every rank of the world calls it.

    Where ``args`` say ``transformer_impl="transformer_engine"``, norms have the names that this has, else the local.

    Returns:
        The directory of the iteration, under ``root``.
    """
    from megatron.core import dist_checkpointing

    directory = _start_iteration(root, iteration)
    core: Any = dist_checkpointing  # whose functions have no types
    state = _common_state(models, args, iteration)
    for name, model in _named(models):
        state[name] = sharded = _sharded(model, _CONTENT_METADATA)
        if named(args).get("transformer_impl") == "transformer_engine":
            keys = megatron_spelling.global_names(sharded)
            megatron_spelling.rename(sharded, megatron_spelling.to_fused(keys, grouped=False))
    core.save(state, str(directory), content_metadata=dict(_CONTENT_METADATA))
    _finish_iteration(root, iteration)
    return directory


def load_torch_dist(models: Sequence[Model], path: str | Path) -> None:
    """Load a torch_dist checkpoint with megatron-core's own loader, in whatever layout the world has.

    A vocabulary padded to another size is loaded as megatron-core does: rows that the checkpoint lacks become 0.

    Args:
        models: this rank's chunks, from `build_gpt`.
        path: an ``iter_*`` or ``release`` directory, or the root above it.

    Raises:
        Refused: no common.pt, as Megatron-LM later than 0.16 writes.
        Damaged: a weight of the model is not in the checkpoint, one of the checkpoint is not in the model, or a shape
            differs. ``_extra_state`` entries and training state may be there or not.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from torch.distributed.checkpoint.api import CheckpointException

    core: Any = dist_checkpointing  # whose functions have no types
    directory = str(_iteration_directory(path))
    if Path(directory, "metadata.json").exists() and not Path(directory, "common.pt").exists():
        raise Refused(
            "megatron-core 0.16.1 cannot load a checkpoint without common.pt",
            where=directory,
            found="newer Megatron-LM saves its arguments in another place",
        )
    try:
        with _megatron_classes():
            metadata: dict[str, Any] = core.load_content_metadata(directory) or {}
            wanted = {name: _sharded(model, metadata) for name, model in _named(models)}
            saved = load_sharded_metadata(directory).keys()
            for sharded in wanted.values():
                names = megatron_spelling.as_saved(megatron_spelling.global_names(sharded), saved)
                megatron_spelling.rename(sharded, names)
            # in its words, missing: saved but not asked for; unexpected: asked for but not saved
            state, missing, unexpected = core.load(wanted, directory, strict=StrictHandling.RETURN_ALL)
    except CheckpointException as error:  # torch's: a BaseException that carries what single ranks met
        found = "\n".join(f"rank {rank}: {failure[0]!r}" for rank, failure in sorted(error.failures.items()))
        raise Damaged("megatron-core cannot read this checkpoint", where=directory, found=found) from error
    except (CheckpointingException, pickle.UnpicklingError, OSError) as error:
        raise Damaged("megatron-core cannot read this checkpoint", where=directory, found=str(error)) from error
    left = {key for key in missing if not _NOT_OF_THE_MODEL.search(key)}
    lacking = {key for key in unexpected if not _NOT_OF_THE_MODEL.search(key)}
    if left or lacking:
        raise _mismatch(directory, lacking, left)
    for name, model in _named(models):
        _fill(model, state[name], directory)


def save_legacy(models: Sequence[Model], root: str | Path, args: Args, iteration: int = 1) -> Path:
    """Save as Megatron-LM does for ``--ckpt-format torch`` (no optimizer); every rank of the world calls it.

    A rank writes if it is the first of its dense or of its expert data parallel group. Where ``args`` say
    ``transformer_impl="transformer_engine"``, norms have the names that this has, and with ``moe_grouped_gemm`` the
    experts, too; else the local ones.

    Returns:
        The directory of the iteration, under ``root``.

    Raises:
        Refused: expert tensor parallel ranks would write one file, since its name has no number for them.
    """
    import torch
    from megatron.core import parallel_state

    ranks: Any = parallel_state  # whose functions have no types
    cut = ranks.get_expert_tensor_parallel_world_size() or 1
    if cut > parallel_state.get_tensor_model_parallel_world_size():
        raise Refused(
            "legacy files cannot hold experts that are cut further than the rest of the model",
            expected="expert tensor parallel size up to the tensor parallel size",
            found=str(cut),
        )
    given = named(args)
    directory = _start_iteration(root, iteration)
    if 0 in (parallel_state.get_data_parallel_rank(), parallel_state.get_expert_data_parallel_rank()):
        state = _common_state(models, args, iteration)
        for name, model in _named(models):
            state[name] = weights = model.state_dict_for_save_checkpoint()
            if given.get("transformer_impl") == "transformer_engine":
                spelled = megatron_spelling.to_fused(weights, grouped=bool(given.get("moe_grouped_gemm")))
                state[name] = {spelled[key]: value for key, value in weights.items()}
        file = directory / _rank_directory() / "model_optim_rng.pt"
        file.parent.mkdir(exist_ok=True)
        torch.save(state, file)
    _finish_iteration(root, iteration)
    return directory


def load_legacy(models: Sequence[Model], path: str | Path) -> None:
    """Load this rank's own file of a legacy checkpoint, whose layout must be that of the world.

    Norms fused into linear layers and grouped experts, as the Transformer Engine spec names them, are renamed to the
    local spec.

    Args:
        models: this rank's chunks, from `build_gpt`.
        path: an ``iter_*`` or ``release`` directory, or the root above it.

    Raises:
        Damaged: no file for this rank, not a checkpoint, a name missing or left over, or a shape that differs.
            ``_extra_state`` entries may be there or not.
    """
    import torch

    file = _iteration_directory(path) / _rank_directory() / "model_optim_rng.pt"
    if not file.exists():
        raise Damaged(
            "this rank's file is not there",
            where=str(file),
            expected=f"a checkpoint of the running layout ({_rank_directory()})",
        )
    try:
        with _megatron_classes():
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:  # RuntimeError: not a zip archive, or cut short
        raise Damaged("torch cannot read this file", where=str(file), found=str(error)) from error
    chunks = dict(_named(models))
    saved = {name for name in state if re.fullmatch(r"model\d*", name)}
    if saved != set(chunks):
        raise _mismatch(str(file), set(chunks) - saved, saved - set(chunks))
    for name, model in chunks.items():
        renamed: dict[str, Any] = {}
        for key, value in state[name].items():
            local = megatron_spelling.to_local(key)
            if local in renamed:
                raise Damaged("one weight is there under two names", where=f"{file}: {name}", found=local)
            renamed[local] = value
        _fill(model, renamed, f"{file}: {name}")


@contextmanager
def _megatron_classes() -> Generator[None]:
    """What ``torch.load(weights_only=True)`` may build: the plain data classes that Megatron-LM saves, no others."""
    import torch
    from megatron.core.safe_globals import SAFE_GLOBALS
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    serialization: Any = torch.serialization
    known = serialization.get_safe_globals()  # the context forgets at its end also what others had allowed
    classes = [*SAFE_GLOBALS, LayerType, PipelineParallelLayerLayout]
    with torch.serialization.safe_globals([kind for kind in classes if kind not in known]):
        yield


def _rank_directory() -> str:
    """Megatron-LM's ``get_checkpoint_name``: mp_rank_TT, with _PPP where there are stages, _EEE where EP > 1."""
    from megatron.core import parallel_state

    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return name


def _fill(model: Model, state: Mapping[str, Any], where: str) -> None:
    """``load_state_dict``, strict in names and shapes but for ``_extra_state`` (None without Transformer Engine)."""
    wanted, found = _shapes(model.state_dict()), _shapes(state)
    if wanted.keys() != found.keys():
        raise _mismatch(where, wanted.keys() - found.keys(), found.keys() - wanted.keys())
    differing = [key for key, shape in wanted.items() if found[key] != shape]
    if differing:
        example = differing[0]
        raise Damaged(
            "shapes differ from those of the model",
            where=f"{where}\n{group_names(differing)}",
            expected=f"{example} {wanted[example]}",
            found=f"{found[example]}",
        )
    model.load_state_dict({key: state[key] for key in found}, strict=False)


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items() if "_extra_state" not in key}


def _mismatch(where: str, lacking: Iterable[str], left: Iterable[str]) -> Damaged:
    return Damaged(
        "the checkpoint's tensors are not those of the model",
        where=where,
        expected=group_names(sorted(lacking)) or "nothing more",
        found=f"also: {group_names(sorted(left))}" if left else "not there",
    )
