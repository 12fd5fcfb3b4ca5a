"""Does an output compute what its source computes? The same question to both, each in its own runtime, in fp32.

Of an output in codes that is no question: rounding is what was asked for, and it moves logits as far as it likes. There
the weights are asked (`dconv.bounds`): each, decoded from the written files, has to be as near to the source's as its
scheme promises. What that does to the logits is then measured and told, and is no reason to fail.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dconv import bounds
from dconv.arch.layouts import size
from dconv.checkpoint import graphs
from dconv.errors import Damaged, Refused, ToolMissing, VerifyFailed
from dconv.export.onnx_fixed_run import Lengths
from dconv.export.prompt import prompt_for
from dconv.export.runtimes import as_run, available_memory, missing, obstacle, runtime_of, shortage
from dconv.net.device import is_here, placed
from dconv.pipeline import FORMATS, Described, Job, Request, describe_model
from dconv.request import QUANTISED
from dconv.sharding.region import Region
from dconv.targets import GRAPHS

#: Largest difference of logits, relative to the largest logit, between two fp32 runs of the same weights. Two
#: frameworks that sum in another order differ by about 1e-6 on small models and a few 1e-5 on deep ones.
BOUND: Final = 1e-4
#: The same when weights were rounded once: this many unit roundoffs of the dtype (each weight moves by at most one).
_ROUNDOFFS: Final = 16
_UNIT_ROUNDOFF: Final = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 2.0**-24}


def require(job: Job) -> None:
    """Refuse ``--verify logits`` before the first byte is written where the comparison could not be made.

    Raises:
        Refused: a runtime does not compute a model of this family, or there is too little memory.
        ToolMissing: a runtime is not installed.
    """
    request, target = job.request, FORMATS[job.request.format]
    if request.with_eagle:
        raise _refused("no runtime here runs an EAGLE head")
    if request.format == "mlx" and request.quant:
        raise _refused("weights in MLX's codes are not held to a bound")
    if job.source.format in GRAPHS:
        raise _refused("a graph once more is compared by dconv check of either")
    if target == "onnx":
        if request.quant:
            raise _refused("of weights in codes no bound of logits is known")
        if any(tensor.spec.dtype == "bf16" for tensor in job.plan.target.tensors):
            raise _refused("onnxruntime multiplies no bf16 on a CPU")
    if request.format in QUANTISED:
        _require_transformers(request)
        return
    if target in graphs.FILES and not is_here(placed(request.device)[0]):
        raise _refused(f"it is written for {request.device}, which is not here")
    for side in _compared(request):
        model = side.model
        own = (side.container, model.family, model.config, model.source.args)
        written = (target, job.family, job.config, None) if request.mup2llama else (target, *own[1:3], None)
        for container, family, config, args in (own, written):
            _require_installed(container)
            if why := obstacle(container, family, config, args) or shortage(_parameters(side.model), container):
                raise _refused(why)


def _require_transformers(request: Request) -> None:
    """The same for an output in codes: both sides are run by transformers, layer by layer, whatever they lie in."""
    from dconv.export import layerwise

    _require_installed("huggingface")
    for side in _compared(request):
        if why := layerwise.obstacle(side.model):
            raise _refused(why)


def _require_installed(container: str) -> None:
    if module := missing(container):
        raise ToolMissing(
            "--verify logits needs a runtime that is not installed, nothing was written",
            found=f"no module {module}",
            do=f"pip install 'dconv[{'onnx' if container == 'onnx' else 'megatron'}]'; --verify digest needs none",
        )


def _refused(why: str) -> Refused:
    return Refused(
        "the logits could not be compared, nothing was written",
        where="--verify logits",
        found=why,
        do="--verify digest needs no runtime and no memory",
    )


@dataclass(frozen=True)
class _Side:
    """A model of the source, and how it is found there and in the output.

    Attributes:
        options: as for `describe_model`.
        within: the same for the output.
    """

    path: Path
    model: Described
    options: dict[str, Any]
    within: dict[str, Any]

    @property
    def container(self) -> str:
        return as_run(self.model.source.format, self.options.get("rename"), self.options.get("submodel"))


def _compared(request: Request) -> Iterator[_Side]:
    """The models of a request: one, or a student and its teacher."""
    options: dict[str, Any] = {
        "source_format": request.source_format,
        "model_type": request.model_type,
        "hf_config": request.hf_config,
        "drop": request.drop,
        "rename": request.rename,
        "submodel": request.submodel,
    }
    if not request.teacher_only:
        within = {"submodel": "student"} if request.teacher else {}
        yield _Side(request.model, describe_model(request.model, **options), options, within)
    if request.teacher is not None:
        yield _Side(request.teacher, describe_model(request.teacher), {}, {"submodel": "teacher"})


def _parameters(model: Described) -> int:
    return sum(Region.whole(spec.shape).volume for spec in model.logical.specs.values())


def compare(job: Job, out: Path) -> dict[str, object]:
    """Compare what a conversion's source and output compute, each in its own runtime, in fp32.

    Of an encoder also its second head is compared; of a student and a teacher in one output, each with its source.

    Returns:
        difference: the largest, relative to the largest logit of the source; bound: what it had to keep;
        why: what the bound rests on. Of an output in codes see `_coded`.

    Raises:
        VerifyFailed: the difference is past the bound, or the comparison could not be made; of an output in codes, a
            weight is farther from the source's than it may be.
        ToolMissing: a runtime is not installed or failed.
    """
    if job.request.format in QUANTISED:
        return _coded(job, out)
    bound, why = _bound(job)
    worst = 0.0
    for side in _compared(job.request):
        difference, scale = _difference(job, out, side)
        if not difference <= bound:  # also when either side is NaN
            raise VerifyFailed(
                "the output does not compute what the source computes",
                where=f"{out}{''.join(f', the {name}' for name in side.within.values())}",
                expected=f"logits within {bound:.1e} of the largest logit ({why})",
                found=f"{difference:.3e} of {scale:.4g}",
                do="keep the source; dconv diff shows whether the weights differ",
            )
        worst = max(worst, difference)
    return {"difference": worst, "bound": bound, "why": why}


def _difference(job: Job, out: Path, side: _Side) -> tuple[float, float]:
    """The largest difference of any head relative to that head's largest answer, and this of the worst head."""
    model, target = side.model, FORMATS[job.request.format]
    short = next(filter(None, (shortage(_parameters(model), kind) for kind in (side.container, target))), "")
    if short:
        raise VerifyFailed(
            "the logits were not compared",
            where=str(out),
            found=short,
            do="--verify digest needs no memory; or compare on a larger machine",
        )
    if job.request.ports is not None:
        raise VerifyFailed("the logits were not compared", where=str(out), do="--verify digest",
                           found=f"a graph with the inputs of {job.request.ports}")  # fmt: skip
    prompt = prompt_for(model.family, model.facts, model.config)
    if job.request.lengths is not None:
        prompt = Lengths(*job.request.lengths).cut(prompt)
    try:
        if model.source.coded:  # what its codes are worth: runtimes of codes round activations, or are not there
            from dconv.export import layerwise

            references = layerwise.answers_of(_widened(model), prompt, max(available_memory() // 2, 1))
        else:
            where = side.path if side.path.is_file() else model.source.root
            references = runtime_of(side.container).answers_of(where, prompt, **side.options)
        named = {"model_type": job.family.name} if side.options.get("model_type") else {}
        results = runtime_of(as_run(target, *side.within)).answers_of(out, prompt, **named, **side.within)
    except (Refused, Damaged) as error:
        raise VerifyFailed("the logits could not be compared", where=str(out), found=str(error)) from error
    found: list[tuple[float, float]] = []
    for i, (reference, result) in enumerate(zip(references, results, strict=True)):
        if i == 0:  # of words, behind which there may be padding
            vocabulary = size(model.facts, "vocab")
            reference, result = reference[..., :vocabulary], result[..., :vocabulary]
        scale = float(np.abs(reference).max()) or 1.0
        found.append((float(np.abs(reference - result).max()) / scale, scale))
    return next((one for one in found if math.isnan(one[0])), max(found))


def _coded(job: Job, out: Path) -> dict[str, object]:
    """Hold every weight of an output in codes to its bound, and measure what they compute.

    Returns:
        weights: `dconv.bounds.Found`; difference, mean: the largest and the mean difference of logits, relative to the
        largest logit of the source; divergence: of the distributions of the next token, Kullback-Leibler's from the
        source's to the output's in nats, the mean over places.
    """
    from dconv.export import layerwise

    (side,) = _compared(job.request)
    model = side.model
    prompt = prompt_for(model.family, model.facts, model.config)
    try:
        written = describe_model(out, model_type=job.family.name)
        found = bounds.compare(job, written, out)
        budget = max(available_memory() // 2, 1)
        before, after = (layerwise.answers_of(_widened(one), prompt, budget)[0] for one in (model, written))
    except (Refused, Damaged) as error:
        raise VerifyFailed("the logits could not be compared", where=str(out), found=str(error)) from error
    vocabulary = size(model.facts, "vocab")
    before, after = (answer[..., :vocabulary].astype(np.float64) for answer in (before, after))
    scale, apart = float(np.abs(before).max()) or 1.0, np.abs(after - before)
    sure, left = _logarithms(before), _logarithms(after)
    return {
        "weights": found.to_dict(),
        "difference": float(apart.max()) / scale,
        "mean": float(apart.mean()) / scale,
        "divergence": float((np.exp(sure) * (sure - left)).sum(-1).mean()),
    }


def _widened(model: Described) -> Described:
    """The model with its decoded weights in fp32, where they are not rounded once more."""
    logical = model.logical
    specs, pieces = dict(logical.specs), dict(logical.pieces)
    for name in model.source.coded:
        if name in specs:
            specs[name] = replace(specs[name], dtype="f32")
            pieces[name] = tuple(replace(piece, dtype="f32") for piece in pieces[name])
    return replace(model, logical=replace(logical, specs=specs, pieces=pieces))


def _logarithms(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log softmax along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _bound(job: Job) -> tuple[float, str]:
    if FORMATS[job.request.format] in GRAPHS:
        computed = {tensor.spec.dtype for tensor in job.plan.target.tensors} & {"bf16", "f16"}
        if computed:
            worst = max(computed, key=lambda dtype: _UNIT_ROUNDOFF[dtype])
            return _ROUNDOFFS * _UNIT_ROUNDOFF[worst], f"computed in {worst}, {_ROUNDOFFS} unit roundoffs"
    rounded = {
        tensor.spec.dtype
        for tensor, copies in zip(job.plan.target.tensors, job.plan.copies, strict=True)
        if not all(copy.op.exact for copy in copies)
    }
    if not rounded:
        return BOUND, "the same weights"
    if codes := rounded - _UNIT_ROUNDOFF.keys():
        raise VerifyFailed(
            "the logits were not compared",
            found=f"weights rounded to blocks ({', '.join(sorted(codes))}), of which no bound of logits is known",
            do="--verify digest reads the output back",
        )
    worst = max(rounded, key=lambda dtype: _UNIT_ROUNDOFF[dtype])
    return max(BOUND, _ROUNDOFFS * _UNIT_ROUNDOFF[worst]), f"weights rounded to {worst}, {_ROUNDOFFS} unit roundoffs"
