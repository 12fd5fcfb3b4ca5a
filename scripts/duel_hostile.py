"""The rows of the duel about hostile input: paths that lead outside, pickles that run something."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import duel_inputs as inputs
import torch
from duel_inputs import FIRST, LAST
from duel_rows import DCP, MEGATRON, SAME, TO_DCP, TORCH, TRANSFORMERS, Row, Stage
from duel_stage import Ending, Seen, Tensors, judged

# ------------------------------------------------------------------------------------------------------ places outside


def _secret(stage: Stage) -> Path:
    return stage.made("secret", lambda to: inputs.llama(to, seed=7))


def _outside(how: str, stage: Stage) -> Path:
    """A directory whose second shard is another model's, somewhere else."""

    def make(to: Path) -> None:
        inputs.copied(stage.model, to)
        secret = _secret(stage) / LAST
        (to / LAST).unlink()
        if how == "link":
            (to / LAST).symlink_to(secret)
            return
        name = f"../{secret.parent.name}/{LAST}" if how == "dots" else str(secret)
        inputs.reindexed(
            to, lambda index: index.update({key: name for key, file in index.items() if file == LAST})
        )  # fmt: skip

    return stage.made(f"outside-{how}", make)


def _read_outside(stage: Stage, ending: Ending, got: Callable[[], Tensors]) -> Seen:
    seen = judged(ending, {})
    if not ending.ok:
        return seen
    name = "lm_head.weight"
    if got().get(name) == inputs.truth_of(_secret(stage))[name]:
        return Seen("runs", f"success; {name} is the other model's")
    return Seen("whole", "right")


def _outside_them(how: str, stage: Stage) -> Seen:
    ending = stage.peer("transformers_load", str(_outside(how, stage)))
    return _read_outside(stage, ending, lambda: ending.value)


def _outside_us(how: str, stage: Stage) -> Seen:
    out = stage.fresh("dconv")
    ending = stage.peer("dconv", "convert", str(_outside(how, stage)), "hf", "-o", str(out))
    return _read_outside(stage, ending, lambda: inputs.truth_of(out))


def outside(how: str, done: str) -> Row:
    us = partial(_outside_us, how)
    return Row(f"{how}, transformers", "outside", done, TRANSFORMERS, SAME, partial(_outside_them, how), us)


# -------------------------------------------------------------------------------------------------------------- pickles


def _with_canary(stage: Stage, where: str) -> tuple[Path, Path]:
    """A checkpoint with a pickle that makes a directory; the checkpoint, and that directory."""
    canary = stage.root / f"canary-{where.strip('.')}"

    def make(to: Path) -> None:
        bad = inputs.Canary(canary)
        if where == "bin":
            inputs.copied(stage.model, to)
            for name in (inputs.INDEX, FIRST, LAST):
                (to / name).unlink()
            torch.save({**inputs.tensors_of(stage.model), "more": bad}, to / "pytorch_model.bin")
            return
        release = inputs.copied(stage.release.parent, to) / "release"
        if where == "common.pt":
            common = torch.load(release / where, weights_only=False)  # this script had it written
            torch.save({**common, "more": bad}, release / where)
        else:
            metadata = pickle.loads((release / where).read_bytes())
            metadata.planner_data = bad
            (release / where).write_bytes(pickle.dumps(metadata))

    return stage.made(f"pickle-{where}", make), canary


def _flew(canary: Path, ending: Ending) -> Seen:
    """Whether the canary did."""
    if canary.exists():
        canary.rmdir()
        return Seen("runs", "it ran" + (", then success" if ending.ok else f", then {ending.error}"))
    return Seen("whole", "not run, success") if ending.ok else Seen("error", ending.error)


def _pickle_them(where: str, action: str, inside: str, stage: Stage) -> Seen:
    folder, canary = _with_canary(stage, where)
    more = [str(stage.fresh("to-dcp"))] if action == "dcp_save" else []
    return _flew(canary, stage.peer(action, str(folder / inside), *more))


def _pickle_us(where: str, stage: Stage) -> Seen:
    folder, canary = _with_canary(stage, where)
    return stage.once(f"pickle-{where}", lambda: _flew(
        canary, stage.peer("dconv", "convert", str(folder), "hf", "-o", str(stage.fresh("dconv")))))  # fmt: skip


def unpickled(where: str, done: str, *peers: tuple[str, str, str, str]) -> list[Row]:
    """``peers`` are a short name, a name, an action, and a path inside the checkpoint."""
    us = partial(_pickle_us, where)
    return [
        Row(
            f"{where}, {short}",
            "pickle",
            done,
            name,
            SAME,
            partial(_pickle_them, where, action, inside),
            us,
            fast=short in ("torch", "DCP"),
        )  # the others take long to import
        for short, name, action, inside in peers
    ]


OUTSIDE: Final = [
    outside("dots", "the index says `../other/model.safetensors`"),
    outside("absolute", "the index says `/…/other/model.safetensors`"),
    outside("link", "a shard is a symbolic link to another directory"),
]
PICKLES: Final = [
    *unpickled("bin", "in pytorch_model.bin", ("transformers", TRANSFORMERS, "transformers_load", ""),
               ("torch", TORCH, "torch_load", "pytorch_model.bin"),
               ("DCP", TO_DCP, "dcp_save", "pytorch_model.bin")),
    *unpickled(".metadata", "in .metadata of torch_dist", ("DCP", DCP, "dcp_load", "release"),
               ("megatron-core", MEGATRON, "megatron_load", "release")),
    *unpickled("common.pt", "in common.pt of torch_dist", ("megatron-core", MEGATRON, "megatron_load", "release")),
]  # fmt: skip
