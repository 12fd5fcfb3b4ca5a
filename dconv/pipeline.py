"""The whole way on one page: describe, plan, execute, commit."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dconv import __version__
from dconv.arch import eagle, registry
from dconv.arch.family import Family
from dconv.arch.layouts import Facts, check_heads, size
from dconv.checkpoint import huggingface, megatron
from dconv.checkpoint.detect import open_source
from dconv.checkpoint.files import read_json
from dconv.checkpoint.rename import renaming_of
from dconv.checkpoint.source import Source, describe, side_files
from dconv.codec.kernels import apply
from dconv.errors import Refused, StorageFault, UsageError
from dconv.sharding.commit import Outcome, Settings, run_rank
from dconv.sharding.coords import Parallel
from dconv.sharding.dtypes import TO_TORCH
from dconv.sharding.join import join
from dconv.sharding.plan import Plan, Target, build_plan
from dconv.sharding.receipt import check_output, partial_folder
from dconv.sharding.tensor import Logical, TensorSpec

#: Every spelling of FORMAT -> its engine.
FORMATS: Final = {
    "huggingface": "huggingface", "hf": "huggingface", "safetensors": "huggingface", "megatron2hf": "huggingface",
    "megatron": "megatron", "hf2megatron": "megatron",
    "pt": "pt", "bmtrain": "bmtrain", "modelcenter": "bmtrain",
}  # fmt: skip

#: No vocabulary has as many rows.
_MOST_ROWS: Final = 2**31
#: What to do about tensors that several shards of a source hold (`Request.replicas`).
REPLICAS: Final = ("equal", "first")


@dataclass(frozen=True)
class Request:
    """What a person asked for. Field names are the command line's.

    Attributes:
        model: path of the source.
        format: a key of `FORMATS`.
        out: output path; None is ``./<model>-<format>``.
        parallel: the target's layout (Megatron; of ``pt`` the tensor parallel size alone).
        dtype: dconv's short name, or None to keep every tensor's own.
        shard_size: bytes of one HuggingFace file.
        divisor: the vocabulary is padded to a multiple of this times tp (Megatron).
        drop: patterns of tensors to leave out; one may stand without a tuple around it.
        rename: a file of patterns for the source's tensor names.
        replicas: a tensor that several shards hold must be ``equal`` in all of them, or the ``first`` is taken.
        submodel: which model of a distillation checkpoint is meant, ``student`` or ``teacher``.
        teacher: a second checkpoint, to go into the same output (Megatron) as the model's teacher.
        teacher_only: leave the model itself out of that output.
        with_eagle: keep the tensors of an EAGLE head.
    """

    model: Path
    format: str
    out: Path | None = None
    source_format: str | None = None
    model_type: str | None = None
    hf_config: Path | None = None
    parallel: Parallel = Parallel()
    megatron_format: str = "torch_dist"
    transformer_impl: str = "transformer_engine"
    divisor: int = 128
    dtype: str | None = None
    shard_size: int = 5_000_000_000
    drop: str | Sequence[str] = ()
    replicas: str = "equal"
    rename: Path | None = None
    submodel: str | None = None
    teacher: Path | None = None
    teacher_only: bool = False
    with_eagle: bool = False

    @property
    def output(self) -> Path:
        """Where the result goes."""
        if self.out is not None:
            return self.out
        return Path(f"{self.model.resolve().name}-{FORMATS.get(self.format, self.format)}")


@dataclass(frozen=True)
class Job:
    """A request that has been planned.

    Attributes:
        needs: what mainline megatron-core would have to add to compute a Megatron target's function, in words.
    """

    request: Request
    source: Source
    family: Family
    facts: Facts
    logical: Logical
    plan: Plan
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Described:
    """A source with its family and config settled."""

    source: Source
    family: Family
    config: dict[str, object]
    rebuilt: bool
    facts: Facts
    logical: Logical


def describe_model(
    path: Path,
    *,
    source_format: str | None = None,
    model_type: str | None = None,
    hf_config: str | Path | None = None,
    drop: str | Sequence[str] = (),
    rename: str | Path | None = None,
    config_alone: bool = False,
    submodel: str | None = None,
    with_eagle: bool = False,
) -> Described:
    """Open a checkpoint, find its family, and lay the family's table over it.

    Args:
        path: a directory, a state dict's file, or a name on the hub.
        source_format: its container; None detects it.
        model_type: its family; None detects it.
        hf_config: a directory whose config.json and tokenizer are used instead of its own.
        drop: a pattern, or several, of tensors to leave out.
        rename: a file of patterns for the tensors' stored names (`dconv.checkpoint.rename`).
        config_alone: be content with a config.json, for a plan.
        submodel: ``student`` or ``teacher`` of a distillation checkpoint.
        with_eagle: keep the tensors of an EAGLE head instead of leaving them out (`dconv.arch.eagle`).

    Raises:
        UsageError: ``hf_config`` is no directory, ``rename`` no such file.
        DconvError: see `dconv.checkpoint.detect.open_source` and `dconv.checkpoint.source.describe`.
    """
    if hf_config is not None:
        _check_directory(Path(hf_config))
    renaming = renaming_of(rename, submodel)
    source = open_source(path, source_format, own_config=hf_config is None, rename=renaming, config_alone=config_alone)
    return settle(
        source,
        model_type=model_type,
        hf_config=hf_config,
        drop=drop,
        config_alone=config_alone,
        with_eagle=with_eagle,
    )


def _check_directory(hf_config: Path) -> None:
    if not hf_config.is_dir():
        raise UsageError(
            "--hf-config names no directory",
            where=str(hf_config),
            expected="a directory with a config.json",
            found="a file" if hf_config.exists() else "nothing of that name",
        )


def settle(
    source: Source,
    *,
    model_type: str | None = None,
    hf_config: str | Path | None = None,
    drop: str | Sequence[str] = (),
    config_alone: bool = False,
    with_eagle: bool = False,
) -> Described:
    """Find the family of a source that has been opened, and lay the family's table over it; see `describe_model`."""
    drop = (drop,) if isinstance(drop, str) else tuple(drop)
    if hf_config is not None:
        hf_config = Path(hf_config)
        _check_directory(hf_config)
        config = read_json(hf_config / "config.json", what="config.json")
        source = replace(source, config=config, side=side_files(hf_config))
    if source.lacks and source.config is None:
        raise registry.nothing_known(source.lacks)
    family = registry.by_name(model_type) if model_type else registry.detect(source.config, source.args, source.shapes)
    eagle.refuse_alone(source.shapes, str(source.root))
    family = eagle.kept(family) if with_eagle else eagle.left_out(family)
    rebuilt = source.config is None
    if source.config is not None:
        config = source.config
        if not config_alone or source.files:
            huggingface.refuse_quantized(config, source.root)
    elif source.args is not None:
        config = family.config.to_hf(source.args)
    else:
        raise registry.nothing_known()
    if source.config is not None and source.args is not None and hf_config is None:
        disagree = family.config.check_pair(source.config, source.args)
        if disagree:
            raise Refused(
                "the config.json inside this Megatron checkpoint is not of its weights, nothing was written",
                where=str(source.root),
                found="\n".join(disagree),
                do="--hf-config DIR supplies the right one",
            )
    settled, absent = family.borne_out(config, source.shapes)
    if absent:  # the file is then written anew, not copied
        side = {name: path for name, path in source.side.items() if name != "config.json"}
        source = replace(source, side=side, left_out={**source.left_out, **absent})
    config = dict(settled)
    facts = family.facts(config, source.shapes)
    return Described(source, family, config, rebuilt, facts, describe(source, family, facts, drop))


def prepare(request: Request, *, config_alone: bool = False) -> Job:
    """Describe and plan: reads headers only, writes nothing.

    Args:
        config_alone: plan for a model of which only config.json is there; such a job cannot run.

    Raises:
        Refused: an unknown format, an unsupported model, a layout that does not divide.
        Damaged: a source that is not whole.
    """
    engine = _engine(request.format)
    model = describe_model(
        request.model,
        source_format=request.source_format,
        model_type=request.model_type,
        hf_config=request.hf_config,
        drop=request.drop,
        rename=request.rename,
        config_alone=config_alone,
        submodel=request.submodel,
        with_eagle=request.with_eagle,
    )
    if request.teacher is None:
        return prepare_described(request, model)
    huggingface.refuse_fp8(model.logical.specs.values(), model.source.root)
    if engine != "megatron" or request.megatron_format == "model_pt":
        raise UsageError(
            "a teacher goes into Megatron checkpoints only, nothing was written",
            where="--teacher",
            expected="FORMAT megatron, torch_dist or legacy",
            found=request.format,
        )
    return _distillation(request, model, describe_model(request.teacher))


def prepare_described(request: Request, model: Described) -> Job:
    """Plan for a model that has been described; see `prepare`."""
    engine = _engine(request.format)
    huggingface.refuse_fp8(model.logical.specs.values(), model.source.root)
    if request.replicas == "first":
        model = replace(model, logical=_first_replicas(model.logical))
    target = _TARGETS[engine](request, model)
    plan = build_plan(model.logical, target)
    needs = tuple(model.family.config.needs(model.config)) if engine == "megatron" else ()
    return Job(request, model.source, model.family, model.facts, model.logical, plan, needs)


def _distillation(request: Request, student: Described, teacher: Described) -> Job:
    """A student and its teacher in one Megatron checkpoint, or the teacher alone, each under its prefix."""
    held = {"student_model.": student, "teacher_model.": teacher}
    if request.teacher_only:
        del held["student_model."]
    if request.replicas == "first":
        held = {prefix: replace(one, logical=_first_replicas(one.logical)) for prefix, one in held.items()}
    logical = join({prefix: one.logical for prefix, one in held.items()})
    first, *others = (_to_write(request, one, prefix) for prefix, one in held.items())
    for other in others:
        first = replace(first, args={**first.args, megatron.TEACHER_ARGS: other.args}, teacher=other)
    target = replace(_lay_out(request, first), left_out=logical.left_out)
    of = next(iter(held.values()))
    return Job(request, of.source, of.family, of.facts, logical, build_plan(logical, target))


def _engine(format: str) -> str:
    engine = FORMATS.get(format)
    if engine is None:
        raise Refused(
            f"no format is called {format}, nothing was written",
            expected="one of " + ", ".join(sorted(FORMATS)),
        )
    return engine


def _first_replicas(logical: Logical) -> Logical:
    """Forget the replicas, and say so."""
    if not logical.replicas:
        return logical
    what = f"the other shards' copies of {len(logical.replicas)} tensors"
    return replace(logical, replicas={}, left_out={**logical.left_out, what: "--replicas first"})


def _new_config(request: Request, model: Described) -> dict[str, object] | None:
    """config.json of the output; None when the source's own file is copied."""
    dtypes = {spec.dtype for spec in model.logical.specs.values()}
    if request.dtype and dtypes != {request.dtype}:
        return huggingface.with_dtype(model.config, TO_TORCH[request.dtype])
    return model.config if model.rebuilt or "config.json" not in model.source.side else None


def _specs(request: Request, model: Described) -> dict[str, TensorSpec]:
    """The logical tensors as they are to be written."""
    if not request.dtype:
        return model.logical.specs
    keeps = _keeps(model)
    specs = model.logical.specs.items()
    return {name: spec if name in keeps else replace(spec, dtype=request.dtype) for name, spec in specs}


def _keeps(model: Described) -> set[str]:
    """Tensors that ``--dtype`` leaves as they are."""
    entries = model.family.entries(model.facts)
    return {spec.name for entry in entries if entry.row.keeps for spec in entry.fused.specs}


def _huggingface(request: Request, model: Described) -> Target:
    return huggingface.lay_out(
        _specs(request, model).values(),
        config=_new_config(request, model),
        side=model.source.side,
        shard_size=request.shard_size,
        left_out=model.logical.left_out,
        twins=model.family.twin_names(model.facts),
    )


def _pt(request: Request, model: Described) -> Target:
    from dconv.checkpoint import pt

    return pt.lay_out(
        model.family,
        model.facts,
        _specs(request, model),
        tp=request.parallel.tp,
        config=_new_config(request, model),
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
    return _lay_out(request, _to_write(request, model))


def _to_write(request: Request, model: Described, prefix: str = "") -> megatron.Model:
    _check_layout(request, model)
    config = _new_config(request, model)
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


def _lay_out(request: Request, described: megatron.Model) -> Target:
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
    parallel = request.parallel
    experts, most = size(model.facts, "experts"), size(model.facts, "most_stages")
    if most and parallel.pp > most:
        raise Refused(
            f"{model.family.name} runs in one pipeline stage in Megatron, nothing was written",
            where="--pp",
            expected=str(most),
            found=str(parallel.pp),
        )
    if not experts and (parallel.ep > 1 or parallel.inner > parallel.tp):
        raise Refused(
            f"{model.family.name} has no experts to divide, nothing was written",
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
    if not 1 <= request.divisor < _MOST_ROWS:
        raise Refused(
            "the vocabulary cannot be padded to such a multiple, nothing was written",
            where="--make-vocab-size-divisible-by",
            expected="1 or more (Megatron's own is 128)",
            found=str(request.divisor),
        )
    check_heads(model.facts, parallel.tp)
    parallel.chunks(size(model.facts, "layers"))


_TARGETS: Final[dict[str, Callable[[Request, Described], Target]]] = {
    "huggingface": _huggingface,
    "megatron": _megatron,
    "pt": _pt,
    "bmtrain": _bmtrain,
}


def run(job: Job, settings: Settings) -> Outcome:
    """Execute one rank's share of a planned job, and commit if this rank is the last.

    Raises:
        DconvError: see `dconv.sharding.commit.run_rank`; a full disk is found before the first byte.
    """
    out = job.request.output
    done = check_output(job.plan, out, overwrite=settings.overwrite, resume=settings.resume, launched=settings.launched)
    if not done:
        check_space(job.plan, out)
    return run_rank(job.plan, out, apply, replace(settings, about=about(job)))


def about(job: Job) -> dict[str, object]:
    """What the receipt says of a job beside its plan."""
    return {
        "dconv": __version__,
        "source": {"path": str(job.request.model), "format": job.source.format},
        "target": {"format": job.request.format, "family": job.family.name},
    }


def check_space(plan: Plan, out: Path) -> None:
    """Refuse when the file system of ``out`` has less room than the output will take.

    Holes of sparse sources stay holes, so only allocated source bytes count.

    Raises:
        StorageFault: not enough room, or no directory to write in.
    """
    folder = out.absolute().parent
    if not folder.is_dir():
        raise StorageFault("the output's parent directory is not there", where=str(folder), do=f"mkdir -p {folder}")
    stamps = plan.source.files.values()
    size, allocated = sum(s.size for s in stamps), sum(min(s.allocated, s.size) for s in stamps)
    share = allocated / size if size else 1.0
    needed = math.ceil(plan.bytes_written * min(1.0, share))
    have = 0
    with contextlib.suppress(FileNotFoundError):  # another rank may commit meanwhile
        have = sum(path.stat().st_blocks * 512 for path in partial_folder(out, plan).rglob("*"))
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if needed - have > free:
        raise StorageFault(
            "not enough room for the output, nothing was written",
            where=str(folder),
            expected=f"{needed - have:,} bytes free",
            found=f"{free:,} bytes free",
            do="free some, or -o on another file system",
        )


def convert(request: Request, *, settings: Settings | None = None) -> Outcome:
    """Convert in this process, alone. See `dconv.launch` for many ranks."""
    return run(prepare(request), settings or Settings())


__all__ = ["FORMATS", "Described", "Job", "Request", "check_space", "convert", "describe_model", "prepare", "run"]
