"""Law 4's two ways, for any decoder of megatron-core: it computes what transformers does, and what it saved converts.

One group of gloo processes a layout does all its work, since starting them costs more than the checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dconv.checkpoint.detect import open_source
from dconv.export.megatron_cpu import parallel_world, spawn
from dconv.pipeline import Request, convert
from dconv.sharding.coords import Parallel
from tests.oracles import hf

TOKENS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(5))
#: Container and spelling of its names.
KINDS = (("torch_dist", "local"), ("legacy", "transformer_engine"), ("legacy", "local"))
CONTAINERS = ("torch_dist", "legacy")
#: name -> directory of the model, transformers' logits.
Sources = Mapping[str, tuple[Path, Any]]


@dataclass(frozen=True)
class Check:
    """A checkpoint for real megatron-core to load. ``container`` says by which of its loaders."""

    path: Path
    container: str


def sources_of(models: Mapping[str, tuple[str, Mapping[str, Any]]], root: Path) -> Sources:
    """Every model (family, config keys) as a directory in ``root``, with transformers' logits."""
    made = {}
    for name, (family, keys) in models.items():
        _, model = hf.tiny(family, **keys)
        made[name] = (hf.save(model, root / name), hf.logits(model, TOKENS))
    return made


def close(ours: Any, theirs: Any) -> bool:
    """fp32, within 1e-4 of the logits' scale."""
    return bool((ours[..., : theirs.shape[-1]] - theirs).abs().max() <= 1e-4 * theirs.abs().max())


def last(results: list[list[Any]]) -> list[Any]:
    """The last stage's answers."""
    return next(found for found in results if found[0] is not None)


def _load(rank: int, world: int, init: str, layout: tuple[int, ...], checks: list[Check]) -> list[Any]:
    """One rank of megatron-core: the logits of every check on the last stage. Layout: tp, pp, vpp, ep, etp."""
    from dconv.export.megatron_runtime import build_gpt, logits
    from dconv.export.megatron_weights import load_legacy, load_torch_dist

    found = []
    with parallel_world(*layout, rank=rank, world=world, init_method=init):
        for check in checks:
            args = open_source(check.path).args
            assert args is not None
            models = build_gpt(args)
            (load_torch_dist if check.container == "torch_dist" else load_legacy)(models, check.path)
            found.append(logits(models, TOKENS))
    return found


def _write(
    rank: int, world: int, init: str, layout: tuple[int, ...], jobs: list[tuple[dict[str, Any], Path, tuple[str, ...]]]
) -> list[Any]:
    """One rank of megatron-core: random models of these args, saved in the containers of each."""
    from dconv.export.megatron_runtime import build_gpt, logits
    from dconv.export.megatron_weights import save_legacy, save_torch_dist, seed_weights

    found = []
    with parallel_world(*layout, rank=rank, world=world, init_method=init):
        for seed, (args, root, containers) in enumerate(jobs):
            models = build_gpt(args)
            seed_weights(models, seed)
            for container in containers:
                (save_torch_dist if container == "torch_dist" else save_legacy)(models, root / container, args)
            found.append(logits(models, TOKENS))
    return found


def loaded(layout: tuple[int, ...], checks: list[Check]) -> list[Any]:
    """megatron-core's logits of each check in this layout (tp, pp, vpp, ep, etp)."""
    return last(spawn(_load, Parallel(*layout).world, layout, checks))


def differing(sources: Sources, layout: tuple[int, ...], root: Path, turn: int | None) -> list[tuple[str, ...]]:
    """Models that megatron-core, loading what dconv wrote for ``layout``, does not compute as transformers does.

    Args:
        turn: each model in one of `KINDS`, another at the next turn; None: in all of them.
    """
    checks, expected = [], []
    for number, (name, (source, logits)) in enumerate(sources.items()):
        for kind in KINDS if turn is None else KINDS[(turn + number) % len(KINDS) :][:1]:
            container, impl = kind
            out = root / f"{name}-{container}-{impl}"
            parallel = Parallel(*layout)
            convert(
                Request(source, "megatron", out, parallel=parallel, megatron_format=container, transformer_impl=impl)
            )
            checks.append(Check(out, container))
            expected.append((name, container, impl, logits))
    computed = loaded(layout, checks)
    return [case[:3] for case, ours in zip(expected, computed, strict=True) if not close(ours, case[3])]


def unlike_what_was_saved(
    sources: Sources, layout: tuple[int, ...], root: Path, turn: int | None
) -> list[tuple[str, ...]]:
    """Models that, saved by megatron-core and converted from args alone, transformers computes otherwise."""
    jobs = []
    (root / "args").mkdir()
    for number, (name, (source, _)) in enumerate(sources.items()):
        convert(Request(source, "megatron", root / "args" / name, parallel=Parallel(*layout)))
        args = open_source(root / "args" / name).args
        assert args is not None
        containers = CONTAINERS if turn is None else CONTAINERS[(turn + number) % len(CONTAINERS) :][:1]
        jobs.append((args, root / "written" / name, containers))
    computed = last(spawn(_write, Parallel(*layout).world, layout, jobs))
    wrong = []
    (root / "hf").mkdir()
    for name, (_, written, containers), theirs in zip(sources, jobs, computed, strict=True):
        for container in containers:
            out = root / "hf" / f"{name}-{container}"
            convert(Request(written / container, "hf", out))
            if not close(theirs, hf.logits(out, TOKENS)):
                wrong.append((name, container))
    return wrong
