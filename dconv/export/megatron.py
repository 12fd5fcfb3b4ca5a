"""The real megatron-core as a judge of Megatron checkpoints: load on the CPU in fp32 and compute.

A torch_dist checkpoint is loaded at TP 1; a legacy one by as many processes as it has shards, each its own file. What
megatron-core 0.16 cannot load as it is (no args inside, too many shards, an unusual pipeline split) is first
converted to a temporary TP 1 torch_dist checkpoint.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.detect import open_source
from dconv.checkpoint.source import Source
from dconv.errors import ToolMissing
from dconv.export.huggingface import largest
from dconv.export.megatron_config import REQUIRED
from dconv.export.megatron_cpu import parallel_world, spawn
from dconv.export.prompt import Answers, Kind, Prompt
from dconv.pipeline import Request, convert

#: Processes that one machine starts to load a legacy checkpoint; each takes about 0.5 GB beside its weights.
_MOST_RANKS: Final = 8
#: Args that say how the pipeline was split unevenly.
_UNEVEN: Final = (
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Run:
    """How a checkpoint is loaded: Megatron's args, sizes of the world, and which loader."""

    path: Path
    legacy: bool
    args: Mapping[str, object]
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def world(self) -> int:
        return self.pp * max(self.tp, self.ep * self.etp)


_MODELS: Final[dict[Kind, str]] = {
    "decoder": "GPTModel",
    "hybrid": "MambaModel",
    "encoder": "BertModel",
    "encoder-decoder": "T5Model",
    "sighted": "LLaVAModel",
}


def can_infer(path: Path, prompt: Prompt, **options: Any) -> dict[str, object]:
    """Run a few tokens through megatron-core's own model.

    Args:
        path: a checkpoint's root, or the directory of an iteration.
        prompt: how the model is asked; its tokens are those that are run.
        options: as for `dconv.pipeline.describe_model`.

    Returns:
        runtime, model (with the layout that was run) and largest_logit.

    Raises:
        Damaged: megatron-core refuses the file, or the logits are not finite.
        Refused: the args ask for what megatron-core does not compute on a CPU.
        ToolMissing: megatron-core is not installed, or a process of it failed.
    """
    answers, how = _answers(Request(path, "megatron", **options), prompt)
    from importlib.metadata import version

    return {
        "runtime": f"megatron-core {version('megatron-core')}",
        "model": f"{_MODELS[prompt.kind]}, {how}",
        "largest_logit": largest(answers, path),
    }


def answers_of(path: Path, prompt: Prompt, **options: Any) -> Answers:
    """What the model answers, of its padded vocabulary; arguments and errors as for `can_infer`."""
    return _answers(Request(path, "megatron", **options), prompt)[0]


def _answers(request: Request, prompt: Prompt) -> tuple[Answers, str]:
    """Answers of the model that ``request`` would convert to TP 1, and the layout that was run."""
    _require()
    # Megatron's loaders would not hear of any of these
    said = (request.hf_config, request.drop, request.rename, request.submodel, request.with_eagle)
    run = None if any(said) else _as_it_is(open_source(request.model, request.source_format))
    if run is not None:
        how = f"tp {run.tp} x pp {run.pp}" + (f" x vpp {run.vpp}" if run.vpp > 1 else "")
        how += f", ep {run.ep} x etp {run.etp}" if run.ep > 1 else ""
        return _spawn(run, prompt), how
    with tempfile.TemporaryDirectory(prefix="dconv-run-") as scratch:
        out = Path(scratch, "tp1")
        convert(replace(request, out=out))
        return _spawn(_Run(out, False, open_source(out).args or {}), prompt), "tp 1 x pp 1 (a temporary copy)"


def _require() -> None:
    for module in ("torch", "megatron", "megatron.core"):
        if importlib.util.find_spec(module) is None:
            raise ToolMissing(
                "megatron-core is needed to run a Megatron checkpoint",
                found=f"no module {module}",
                do="pip install 'dconv[megatron]'",
            )


def _as_it_is(source: Source) -> _Run | None:
    """How megatron-core loads this checkpoint without help, or None."""
    args = source.args or {}
    if any(args.get(name) is None for name in REQUIRED):
        return None
    parallel = source.parallel
    if parallel is None:
        return _Run(source.root, False, args) if (source.root / "common.pt").exists() else None
    counts = {count for stage in parallel.stages or () for count in stage}
    layout = args.get("pipeline_model_parallel_layout")
    spelled = isinstance(layout, str) and layout.startswith("E")  # else the printed form of an unknown object
    uneven = len(counts) > 1 and not spelled and not any(args.get(name) for name in _UNEVEN)
    further = parallel.etp > parallel.tp  # of which legacy file names cannot tell the ranks apart
    if parallel.world > _MOST_RANKS or uneven or further or (layout and not spelled):
        return None
    return _Run(source.root, True, args, parallel.tp, parallel.pp, parallel.vpp, parallel.ep, parallel.etp)


def _spawn(run: _Run, prompt: Prompt) -> Answers:
    found = spawn(_rank, run.world, run, prompt)
    return next(result for result in found if result is not None)


def _rank(rank: int, world: int, init_method: str, run: _Run, prompt: Prompt) -> Answers | None:
    """One process of the world; the last stage has the answers."""
    from dconv.export import megatron_runtime as core

    if prompt.kind == "hybrid":
        core.stand_in()
    build: dict[Kind, Any] = {
        "decoder": core.build_gpt,
        "hybrid": core.build_hybrid,
        "encoder": core.build_bert,
        "encoder-decoder": core.build_t5,
        "sighted": core.build_llava,
    }
    with parallel_world(run.tp, run.pp, run.vpp, run.ep, run.etp, rank=rank, world=world, init_method=init_method):
        models = build[prompt.kind](run.args)
        (core.load_legacy if run.legacy else core.load_torch_dist)(models, run.path)
        found = _ask(models, prompt)
    return None if found is None else tuple(answer.numpy() for answer in found if answer is not None)


def _ask(models: list[Any], prompt: Prompt) -> tuple[Any, ...] | None:
    """Answers as tensors, on the last stage."""
    import torch

    from dconv.export import megatron_runtime as core

    tokens = torch.as_tensor(prompt.tokens)
    if prompt.types is not None:
        return core.bert_logits(models, tokens, token_types=torch.as_tensor(prompt.types))
    if prompt.replies is not None:
        return (core.t5_logits(models, tokens, torch.as_tensor(prompt.replies)),)
    if prompt.image is not None:
        return (core.llava_logits(models, tokens, torch.as_tensor(prompt.image)),)
    found = core.logits(models, tokens)
    return None if found is None else (found,)
