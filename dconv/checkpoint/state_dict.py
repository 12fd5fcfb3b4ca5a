"""One file of ``torch.save(state_dict)``: which file of a directory it is, whose names it has, and how one is written.

HuggingFace's names make it FORMAT ``pt``, BMTrain's ``bmtrain``, Megatron's the ``model.pt`` of ``metadata.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from reprlib import repr as short  # of nested hostile values too
from typing import Final

from dconv.checkpoint import torchframe, torchzip
from dconv.checkpoint.files import check_tensor_name, stamp
from dconv.checkpoint.pickled import TensorRef
from dconv.checkpoint.rename import AS_STORED, Renaming
from dconv.checkpoint.signs import STATE_DICTS, is_state_dict
from dconv.errors import Damaged, Refused
from dconv.sharding.parsed import is_dict
from dconv.sharding.plan import TargetFile, TargetTensor
from dconv.sharding.region import Region
from dconv.sharding.tensor import Extent, FileStamp, Stored, TensorSpec

#: What trainers write beside the weights, none of it weights.
_NOT_WEIGHTS: Final = (
    "training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*", "*optim_states*",
)  # fmt: skip
#: Names by which the weights are known among several files, BMTrain's and Megatron's own among them.
_USUAL: Final = ("model.pt", "pytorch_model.pt", "checkpoint.pt", "pytorch_model.bin", "model.pth")
_BMTRAIN: Final = ("input_embedding.*", "encoder.layers.*", "encoder.output_layernorm.*", "output_projection.*")
_MEGATRON: Final = ("embedding.word_embeddings.*", "decoder.layers.*", "decoder.final_layernorm.*", "output_layer.*")


@dataclass(frozen=True, slots=True)
class StateDict:
    """A file that has been opened; tensors by name, after ``--rename``."""

    path: Path
    stamp: FileStamp
    tensors: dict[str, Stored]

    @property
    def container(self) -> str:
        """Whose names these are: ``bmtrain``, ``model_pt`` or ``pt``."""
        for container, patterns in (("bmtrain", _BMTRAIN), ("model_pt", _MEGATRON)):
            if any(fnmatchcase(name, pattern) for name in self.tensors for pattern in patterns):
                return container
        return "pt"


def find(path: Path) -> Path | None:
    """The state dict that ``path`` is, or that lies in it: the only one, or the only one of a usual name."""
    if not path.is_dir():
        return path if is_state_dict(path) else None
    held = [entry for entry in sorted(path.iterdir()) if is_state_dict(entry) and not _beside(entry.name)]
    usual = [entry for entry in held if entry.name in _USUAL]
    return held[0] if len(held) == 1 else usual[0] if len(usual) == 1 else None


def _beside(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _NOT_WEIGHTS)


def read(path: Path, rename: Renaming = AS_STORED) -> StateDict:
    """Open the state dict of ``path``.

    Raises:
        Damaged: there is none, several, or it is torn or no plain state dict.
        Refused: ``rename`` gives two tensors one name.
    """
    file = find(path)
    if file is None:
        held = (
            [entry.name for entry in sorted(path.iterdir()) if is_state_dict(entry)] if path.is_dir() else [path.name]
        )
        raise Damaged(
            "no state dict that can be told apart",
            where=str(path),
            expected=f"one file of {', '.join(STATE_DICTS)}, or one of {', '.join(_USUAL)}",
            found=", ".join(held)[:200] or "none",
            do="name the file itself",
        )
    before = stamp(file)  # before what it holds
    tensors = rename(read_tensors(file), file)
    if not tensors:
        raise Refused("a state dict without tensors, nothing was written", where=str(file))
    return StateDict(file, before, tensors)


def read_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a plain ``torch.save(state_dict)`` file. Numbers, text, extra states are no weights.

    Raises:
        Damaged: the tensors lie deeper, or under names that are no text.
    """
    file = torchzip.read(path)
    if not is_dict(file.tree):
        raise Damaged("not a state dict", where=str(path), found=type(file.tree).__name__)
    tensors: dict[str, Stored] = {}
    for name, value in file.tree.items():
        if isinstance(name, str) and name.endswith("_extra_state"):  # TransformerEngine's, of whatever kind
            continue
        if isinstance(name, str) and isinstance(value, TensorRef):
            check_tensor_name(name, said_by=path)
            tensors[name] = _stored(file, value, name)
        elif not isinstance(name, str) or not (value is None or isinstance(value, str | int | float)):
            raise Damaged(
                "not a plain state dict",
                where=str(path),
                expected="tensors by name",
                found=f"{short(value)} under {short(name)}",
                do="save the model's state_dict alone",
            )
    return tensors


def _stored(file: torchzip.TorchFile, ref: TensorRef, name: str) -> Stored:
    """A tensor of a torch file as a stored tensor whose extent names the file by its last part."""
    at = file.locate(ref)
    spec = TensorSpec(name, at.shape, at.dtype)
    return Stored(spec, (Extent(Region.whole(at.shape), file.path.name, at.offset, at.strides),))


def lay_out_file(
    path: str, tensors: Sequence[TargetTensor], *, owner: int = -1, also: Iterable[str] = ()
) -> tuple[TargetFile, list[TargetTensor]]:
    """A state dict to be written.

    Args:
        path: the file's, relative to the output.
        tensors: what it holds, each under its spec's name; file and offset are filled in.
        owner: see `dconv.sharding.plan.TargetFile`.
        also: further keys, whose value is None.
    """
    tree: dict[str, object] = {
        tensor.spec.name: torchframe.tensor(tensor.spec.dtype, tensor.spec.file_shape, str(i))
        for i, tensor in enumerate(tensors)
    }
    tree |= dict.fromkeys(also)
    frame = torchframe.frame(tree, [(str(i), tensor.spec.nbytes) for i, tensor in enumerate(tensors)])
    placed = [replace(tensor, file=path, offset=frame.data[str(i)]) for i, tensor in enumerate(tensors)]
    return TargetFile(path, frame.size, frame.literals, owner), placed
