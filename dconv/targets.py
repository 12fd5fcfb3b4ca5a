"""The output of each engine, laid out: which file has which tensor where, from a request and a described model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any, Final

from dconv.arch.family import Family
from dconv.arch.layouts import Facts, check_heads, size
from dconv.arch.rope import for_older_loaders
from dconv.checkpoint import huggingface_target, megatron
from dconv.describe import Described
from dconv.errors import Refused
from dconv.request import FORMATS, Request
from dconv.sharding.coords import Parallel
from dconv.sharding.dtypes import TO_TORCH
from dconv.sharding.plan import Target
from dconv.sharding.tensor import TensorSpec

#: No vocabulary has as many rows.
_MOST_ROWS: Final = 2**31

#: Engines that trace a model: what they write is laid out by their own module, which needs the framework.
GRAPHS: Final = ("onnx", "torch_export", "torchscript")


def graph_engine(engine: str) -> Any:
    """The module of an engine of `GRAPHS`: it has ``export(request, described)``."""
    return import_module(f"dconv.export.{engine}")


#: Entry points that are engines of FORMATs: `dconv.formats`.
OUTSIDE: Final = "dconv.formats"


def engine_of(format: str) -> str:
    """The engine that a FORMAT means, in any of its spellings.

    Raises:
        Refused: there is none.
    """
    engine = FORMATS.get(format)
    if engine is None:
        import difflib  # only where a name is wrong
        from importlib.metadata import entry_points

        if entry_points(group=OUTSIDE, name=format):
            raise Refused(
                f"{format} is made by an engine from outside, by one process alone, nothing was written",
                do=f"dconv convert MODEL {format}, or dconv.engine({format!r}).convert(MODEL, OUT)",
            )
        close = difflib.get_close_matches(format, FORMATS, 1)
        raise Refused(
            f"no format is called {format}, nothing was written",
            expected="one of " + ", ".join(sorted(FORMATS)),
            do=f"did you mean {close[0]}?" if close else "",
        )
    return engine


def new_config(request: Request, model: Described) -> dict[str, object] | None:
    """config.json of the output; None when the source's own file is copied."""
    dtypes = {spec.dtype for spec in model.logical.specs.values()}
    if request.dtype and dtypes != {request.dtype}:
        return huggingface_target.with_dtype(model.config, TO_TORCH[request.dtype])
    return model.config if model.rebuilt or "config.json" not in model.source.side else None


def _specs(request: Request, model: Described) -> dict[str, TensorSpec]:
    """The logical tensors as they are to be written."""
    if not request.dtype:
        return model.logical.specs
    keeps = model.keeps
    specs = model.logical.specs.items()
    return {name: spec if name in keeps else replace(spec, dtype=request.dtype) for name, spec in specs}


def _huggingface(request: Request, model: Described) -> Target:
    config = new_config(request, model)
    return huggingface_target.lay_out(
        _specs(request, model).values(),
        config=None if config is None else for_older_loaders(config),
        side=model.source.side,
        shard_size=request.file_size,
        left_out=model.logical.left_out,
        twins=model.family.twin_names(model.facts),
    )


def _neuron(request: Request, model: Described) -> Target:
    from dconv.arch import neuron as table
    from dconv.checkpoint import neuron

    return neuron.lay_out_target(
        table.lay_out(model.family, model.facts),
        _specs(request, model),
        config=new_config(request, model),
        side=model.source.side,
        shard_size=request.file_size,
        left_out=model.logical.left_out,
    )


def _mlx(request: Request, model: Described) -> Target:
    from dconv.checkpoint import mlx

    return mlx.lay_out_target(
        _specs(request, model).values(),
        config=model.config,
        side=model.source.side,
        shard_size=request.file_size,
        left_out=model.logical.left_out,
    )


def _pt(request: Request, model: Described) -> Target:
    from dconv.checkpoint import pt

    return pt.lay_out(
        model.family,
        model.facts,
        _specs(request, model),
        tp=request.parallel.tp,
        config=new_config(request, model),
        side=model.source.side,
        left_out=model.logical.left_out,
    )


def _bmtrain(request: Request, model: Described) -> Target:
    from dconv.checkpoint import bmtrain

    return bmtrain.lay_out(
        model.family,
        model.facts,
        _specs(request, model),
        config=model.config,
        side=model.source.side,
        left_out=model.logical.left_out,
    )


def _megatron(request: Request, model: Described) -> Target:
    return lay_out_megatron(request, megatron_model(request, model))


def megatron_model(request: Request, model: Described, prefix: str = "") -> megatron.Model:
    """What a Megatron checkpoint of a model has: its config, dtypes and layout.

    Raises:
        Refused: a layout that the model does not permit.
    """
    _check_layout(request, model)
    config = new_config(request, model)
    dtypes = {name: spec.dtype for name, spec in model.logical.specs.items()}
    common = request.dtype or max(set(dtypes.values()), key=list(dtypes.values()).count)
    args = {
        **model.family.config.to_args(model.config),
        **megatron.parallel_args(request.parallel, size(model.facts, "vocab"), request.divisor),
        **megatron.dtype_args(common),
        "transformer_impl": request.transformer_impl,
        "ckpt_format": "torch_dist" if request.megatron_format == "torch_dist" else "torch",
    }
    return megatron.Model(
        family=model.family,
        facts=model.facts,
        parallel=request.parallel,
        dtypes=dtypes,
        divisor=request.divisor,
        forced_dtype=request.dtype,
        local_spec=request.transformer_impl == "local",
        args=args,
        config=config,
        side=model.source.side,
        left_out=model.logical.left_out,
        prefix=prefix,
    )


def lay_out_megatron(request: Request, described: megatron.Model) -> Target:
    """The files of a Megatron checkpoint, in the container that was asked for."""
    if request.megatron_format == "legacy":
        from dconv.checkpoint import legacy

        return legacy.lay_out(described)
    if request.megatron_format == "model_pt":
        from dconv.checkpoint import model_pt

        return model_pt.lay_out(described)
    from dconv.checkpoint import torch_dist

    return torch_dist.lay_out(described)


def _check_layout(request: Request, model: Described) -> None:
    """Refuse a Megatron layout that this model cannot be cut into, before anything is sized by it."""
    check_sizes(model.family, model.facts, request.parallel)
    if not 1 <= request.divisor < _MOST_ROWS:
        raise Refused(
            "the vocabulary cannot be padded to such a multiple, nothing was written",
            where="--make-vocab-size-divisible-by",
            expected="1 or more (Megatron's own is 128)",
            found=str(request.divisor),
        )


def check_sizes(family: Family, facts: Facts, parallel: Parallel) -> None:
    """Refuse parallel sizes that a model's experts, heads or layers do not divide over.

    Raises:
        Refused: see above.
    """
    experts, most = size(facts, "experts"), size(facts, "most_stages")
    if most and parallel.pp > most:
        raise Refused(
            f"{family.name} runs in one pipeline stage in Megatron, nothing was written",
            where="--pp",
            expected=str(most),
            found=str(parallel.pp),
        )
    if not experts and (parallel.ep > 1 or parallel.inner > parallel.tp):
        raise Refused(
            f"{family.name} has no experts to divide, nothing was written",
            where="--ep, --etp",
            expected=f"ep 1, etp at most tp {parallel.tp}",
            found=f"ep {parallel.ep}, etp {parallel.etp}",
            do="leave --ep and --etp out",
        )
    if experts % parallel.ep:
        raise Refused(
            f"{experts} experts do not divide over expert parallel {parallel.ep}, nothing was written",
            where="--ep",
            expected=f"a divisor of {experts}",
            found=str(parallel.ep),
        )
    check_heads(facts, parallel.tp)
    parallel.chunks(size(facts, "layers"))


TARGETS: Final[dict[str, Callable[[Request, Described], Target]]] = {
    "huggingface": _huggingface,
    "megatron": _megatron,
    "pt": _pt,
    "bmtrain": _bmtrain,
    "neuron": _neuron,
    "mlx": _mlx,
}
