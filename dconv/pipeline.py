"""The whole way on one page: describe, plan, execute, commit."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dconv import __version__
from dconv.arch import registry
from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.checkpoint import drop, megatron, signs
from dconv.checkpoint.detect import open_source
from dconv.checkpoint.source import Source
from dconv.codec.kernels import apply
from dconv.describe import Described, describe_model, described, settle
from dconv.errors import DconvError, Refused, StorageFault, UsageError, storage_faults
from dconv.net.device import computing, placed
from dconv.request import FORMATS, REPLICAS, Request, is_in_codes, spelled
from dconv.sharding.commit import run_rank
from dconv.sharding.finish import require_parent
from dconv.sharding.join import join
from dconv.sharding.plan import Plan, build_plan
from dconv.sharding.rank import Outcome, Settings
from dconv.sharding.receipt import check_output, partial_folder
from dconv.sharding.tensor import Logical
from dconv.targets import GRAPHS, TARGETS, engine_of, graph_engine, lay_out_megatron, megatron_model

if TYPE_CHECKING:
    from dconv.calibrate import Calibrating
    from dconv.checkpoint import graphs
    from dconv.trace import Trace


@dataclass(frozen=True)
class Job:
    """A request that has been planned.

    Attributes:
        family, config, facts: of the output, whose muP scalars may have been folded into the weights.
        needs: what mainline megatron-core would have to add to compute a Megatron target's function, in words.
        notes: what a person should know beside it, one line each.
        folded: muP scalars that went into the weights, for the receipt (`dconv.checkpoint.fold.Folded`).
        parameters: of the model, whatever it is stored as.
        scheme: the codes that it is written in, in words; "" for none.
        trace: the ways of single tensors, where they were asked for.
        scales: how many of an FP8 source's scales went where, for the receipt (FORMAT neuron).
        calibrating: what chooses the codes while the job runs.
        worst: of weights in floating codes beside whole numbers, the largest error (`dconv.quantise.Variant.worst`).
    """

    request: Request
    source: Source
    family: Family
    config: Mapping[str, object]
    facts: Facts
    logical: Logical
    plan: Plan
    needs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    folded: Mapping[str, Any] | None = None
    parameters: int = 0
    scheme: str = ""
    trace: tuple[Trace, ...] = ()
    scales: Mapping[str, Any] | None = None
    calibrating: Calibrating | None = None
    worst: Mapping[str, float] = field(default_factory=dict[str, float])


#: Options that say how a model's weights are read, of which a graph has none.
_OF_A_MODEL: Final = ("drop", "rename", "hf_config", "submodel", "teacher", "mup2llama", "with_eagle")
#: Of a run's working state: the partial folder, its lock, ``.dconv``, and what lies in it.
_STATE_FILES: Final = 6


@storage_faults()
def prepare(request: Request, *, config_alone: bool = False) -> Job:
    """Describe and plan: reads headers only, writes nothing.

    Args:
        request: what is asked for.
        config_alone: plan for a model of which only config.json is there; such a job cannot run.

    Raises:
        UsageError: options that contradict each other, or that this FORMAT or this source has no use for.
        Refused: an unknown format, an unsupported model, a layout that does not divide.
        Damaged: a source that is not whole.
        StorageFault: a file cannot be read.
    """
    engine = engine_of(request.format)
    if request.fake_weight:
        return prepare_described(request, _made_up(request))
    if not request.source_format and engine in signs.ARCHIVES:
        from dconv.checkpoint import graphs

        if graph := graphs.archive_of(request.model):
            return _placed_anew(request, graph, engine)
    if engine == "onnx" and signs.is_onnx(request.model):
        return _again(request, engine)
    model = described(request, config_alone=config_alone)
    if request.teacher is None:
        return prepare_described(request, model)
    if request.mup2llama:
        raise UsageError(
            "two models at once are not folded, nothing was written",
            where="--mup2llama beside --teacher",
            do="convert each with --mup2llama hf first, then put the two together",
        )
    if engine != "megatron" or request.megatron_format == "model_pt":
        raise UsageError(
            "a teacher goes into Megatron checkpoints only, nothing was written",
            where="--teacher",
            expected="FORMAT megatron, torch_dist or legacy",
            found=request.format,
        )
    _refuse_codes(request)
    drop.check_used(request.drop, (model.source, model.logical))
    return _distillation(request, model, describe_model(request.teacher))


def _refuse_codes(request: Request) -> None:
    """Raise for options of codes where weights are written as they are, which nothing further on would look at.

    Raises:
        UsageError: there are some.
    """
    if is_in_codes(request):
        from dconv import calibrate, neuron, quantise

        quantise.scheme_of(request)
        neuron.coding_of(request)
        calibrate.check_given(request)


def prepare_described(request: Request, model: Described) -> Job:
    """Plan for a model that has been described; see `prepare`."""
    engine = engine_of(request.format)
    drop.check_used(request.drop, (model.source, model.logical))
    if request.replicas == "first":
        model = replace(model, logical=_first_replicas(model.logical))
    notes, folded = model.source.notes, None
    if request.mup2llama:
        model, said, folded = _folded(request, model)
        notes += said
    parameters = _count(model.logical)
    coded = _in_codes(request, model) if is_in_codes(request) else _Coded(model)
    model, codes = coded.model, coded.words
    notes += coded.notes
    if engine == "mlx":
        from dconv.mlx import as_mlx

        written = as_mlx(model, request)
        model, codes = written.model, written.scheme
        notes += written.notes
    if engine == "gguf":
        from dconv import gguf

        made = gguf.export(request, model)
        model, target, codes = made.model, made.target, made.words
        notes += made.notes
    elif engine in GRAPHS:
        made = graph_engine(engine).export(request, model)
        model, target, codes = made.model, made.target, made.words
        notes += made.notes
    else:
        target = TARGETS[engine](request, model)
    if coded.calibrating:
        target = replace(target, closing=coded.calibrating.closing(target.closing))
    plan = build_plan(model.logical, target)
    needs = tuple(model.family.config.needs(model.config)) if engine == "megatron" else ()
    return Job(
        request,
        model.source,
        model.family,
        model.config,
        model.facts,
        model.logical,
        plan,
        needs,
        notes,
        folded,
        parameters,
        codes,
        scales=coded.scales,
        calibrating=coded.calibrating,
        worst=coded.worst,
    )


@dataclass(frozen=True)
class _Coded:
    """A model with its weights in codes, or as it was."""

    model: Described
    notes: tuple[str, ...] = ()
    words: str = ""
    scales: Mapping[str, Any] | None = None
    calibrating: Calibrating | None = None
    worst: Mapping[str, float] = field(default_factory=dict[str, float])


def _in_codes(request: Request, model: Described) -> _Coded:
    from dconv import calibrate, neuron, quantise  # what is written as it is does not pay for them

    notes: tuple[str, ...] = ()
    words, scales = "", None
    calibrating = None
    schemes = quantise.scheme_of(request)
    if calibrate.is_asked_for(request, model):
        planned = calibrate.plan(request, model)
        model, calibrating, schemes = planned.model, planned.calibrating, planned.schemes or schemes
        notes += planned.notes
        notes += computing(request.device)[1]
    if schemes:
        model, said, words = quantise.quantised(model, schemes)
        notes += said
    if coding := neuron.coding_of(request):
        model, said, scales = neuron.as_neuron(model, coding)
        notes += said
        words = "Neuron's FP8 (e4m3 up to 240)" if scales else ""
    return _Coded(model, notes, words, scales, calibrating, schemes.worst if schemes else {})


def _again(request: Request, engine: str) -> Job:
    """A graph once more: its weights are under the graph's names, and any model's."""
    if given := [spelled(name) for name in (*_OF_A_MODEL, "lengths", "ports") if getattr(request, name)]:
        raise UsageError("a graph is written anew as it is, nothing was written", where=", ".join(given),
                         expected="--opset, --dtype, --quant, --shard-size", do="leave it out")  # fmt: skip
    _refuse_codes(request)
    source = open_source(request.model, request.source_format)
    made = graph_engine(engine).again(request, source)
    known = registry.by_name("llama")
    try:
        family = (
            registry.by_name(request.model_type) if request.model_type else registry.detect(source.config, None, {})
        )
        facts = family.facts(source.config or {}, {})
    except DconvError:  # any graph may be written anew, of a model or not
        family, facts = Family("graph", known.config, ()), {"layers": 0, "experts": 0, "vocab": 0, "tied": False}
    plan = build_plan(made.logical, made.target)
    return Job(
        request,
        source,
        family,
        source.config or {},
        facts,
        made.logical,
        plan,
        notes=made.notes,
        parameters=sum(math.prod(tensor.spec.shape) for tensor in source.tensors.values()),
        scheme=made.words,
    )


def _placed_anew(request: Request, graph: graphs.Archive, engine: str) -> Job:
    """A graph once more, for another device."""
    from dconv.checkpoint import graphs

    if graph.kind != engine:
        raise graphs.refusal(graph)
    if given := [spelled(name) for name in ("dtype", "quant", *_OF_A_MODEL) if getattr(request, name)]:
        raise Refused(
            "a graph's operations are of its dtype and its weights, nothing was written",
            where=str(graph.path),
            expected="--device alone",
            found=", ".join(given),
            do="convert from the checkpoint that it was made of",
        )
    _refuse_codes(request)
    device, notes = placed(request.device)
    source = graphs.open_source(graph)
    if source.config is None:
        raise Refused(f"{source.lacks}, nothing was written", where=str(graph.path), do="put the model's beside it")
    family = registry.by_name(request.model_type) if request.model_type else registry.detect(source.config, None, {})
    logical, target = graphs.placed_anew(graph, device)
    plan = build_plan(logical, target)
    facts = family.facts(source.config, {})
    return Job(request, source, family, source.config, facts, logical, plan, notes=notes)


def _count(logical: Logical) -> int:
    return sum(math.prod(spec.shape) for spec in logical.specs.values())


def _made_up(request: Request) -> Described:
    from dconv.checkpoint import fake  # real weights do not pay for it

    source = fake.open_source(request.model, request.fake_weight_config, request.model_type, request.hf_config)
    return settle(source, model_type=request.model_type)


def _folded(request: Request, model: Described) -> tuple[Described, tuple[str, ...], Mapping[str, Any] | None]:
    """The model without muP scalars, what to say of it, and what to record of it."""
    from dconv.checkpoint.fold import fold, nothing_to_fold

    if nothing := nothing_to_fold(model.family, model.config):
        return model, (f"--mup2llama: {nothing}",), None
    if request.with_eagle:
        raise Refused(
            "an EAGLE head reads the embedding as it was before a fold, nothing was written",
            where="--mup2llama beside --with-eagle",
            do="leave one of the two out",
        )
    made = fold(model.family, model.config, model.logical, model.source.shapes)
    plain = Described(model.source, made.family, made.config, True, made.facts, made.logical)
    return plain, made.notes, made.record


def _distillation(request: Request, student: Described, teacher: Described) -> Job:
    """A student and its teacher in one Megatron checkpoint, or the teacher alone, each under its prefix."""
    held = {"student_model.": student, "teacher_model.": teacher}
    if request.teacher_only:
        del held["student_model."]
    if request.replicas == "first":
        held = {prefix: replace(one, logical=_first_replicas(one.logical)) for prefix, one in held.items()}
    logical = join({prefix: one.logical for prefix, one in held.items()})
    first, *others = (megatron_model(request, one, prefix) for prefix, one in held.items())
    for other in others:
        first = replace(first, args={**first.args, megatron.TEACHER_ARGS: other.args}, teacher=other)
    target = replace(lay_out_megatron(request, first), left_out=logical.left_out)
    of = next(iter(held.values()))
    plan = build_plan(logical, target)
    notes = tuple(note for one in held.values() for note in one.source.notes)
    return Job(
        request, of.source, of.family, of.config, of.facts, logical, plan, notes=notes, parameters=_count(logical)
    )


def _first_replicas(logical: Logical) -> Logical:
    """Forget the replicas, and say so."""
    if not logical.replicas:
        return logical
    what = f"the other shards' copies of {len(logical.replicas)} tensors"
    return replace(logical, replicas={}, left_out={**logical.left_out, what: "--replicas first"})


@storage_faults()
def run(job: Job, settings: Settings) -> Outcome:
    """Execute one rank's share of a planned job, and commit if this rank is the last.

    Raises:
        DconvError: see `dconv.sharding.commit.run_rank`; a full disk is found before the first byte.
    """
    out = job.request.output
    done = check_output(job.plan, out, overwrite=settings.overwrite, resume=settings.resume, launched=settings.launched)
    if not done:
        check_space(job.plan, out)
    work = None
    if job.calibrating:
        from dconv import calibrate_rank

        work = calibrate_rank.work(job.calibrating, computing(job.request.device)[0], settings.world)
    return run_rank(job.plan, out, apply, replace(settings, about=about(job)), work)


def about(job: Job) -> dict[str, object]:
    """What the receipt says of a job beside its plan."""
    return {
        "dconv": __version__,
        "source": {
            "path": str(job.request.source),
            "format": job.source.format,
            **({"made": job.source.made} if job.source.made else {}),
            **({"teacher": str(job.request.teacher)} if job.request.teacher and not job.request.teacher_only else {}),
        },
        "target": {
            "format": job.request.format,
            "family": job.family.name,
            **({"codes": job.scheme} if job.scheme else {}),
        },
        **({"mup": job.folded} if job.folded else {}),
        **({"scales": job.scales} if job.scales else {}),
        **({"calibration": dict(job.calibrating.record)} if job.calibrating else {}),
    }


def check_space(plan: Plan, out: Path) -> None:
    """Refuse when the file system of ``out`` has less room than the output will take, or fewer files left.

    Holes of sparse sources stay holes, so only allocated source bytes count.

    Raises:
        StorageFault: not enough room, or no directory to write in.
    """
    require_parent(out)
    folder = out.absolute().parent
    stamps = plan.source.files.values()
    size, allocated = sum(s.size for s in stamps), sum(min(s.allocated, s.size) for s in stamps)
    share = allocated / size if size else 1.0
    room = os.statvfs(folder)
    needed = {"bytes": math.ceil(plan.bytes_written * min(1.0, share)), "files": len(plan.target.files) + _STATE_FILES}
    free = {"bytes": room.f_bavail * room.f_frsize, "files": room.f_favail if room.f_files else needed["files"]}
    if all(needed[what] <= free[what] for what in needed):
        return
    # of an earlier run; looked at last, since every rank would look at every file
    with contextlib.suppress(FileNotFoundError):  # another rank may commit meanwhile
        for path in partial_folder(out, plan).rglob("*"):
            needed["bytes"] -= path.stat().st_blocks * 512
            needed["files"] -= 1
    for what, count in needed.items():
        if count > free[what]:
            raise StorageFault(
                "not enough room for the output, nothing was written",
                where=str(folder),
                expected=f"{count:,} {what} free",
                found=f"{free[what]:,} {what} free",
                do="free some, or -o on another file system",
            )


def convert(request: Request, *, settings: Settings | None = None) -> Outcome:
    """Convert in this process, alone. See `dconv.launch` for many ranks."""
    return run(prepare(request), settings or Settings())


__all__ = [
    "FORMATS",
    "REPLICAS",
    "Described",
    "Job",
    "Request",
    "check_space",
    "convert",
    "describe_model",
    "prepare",
    "run",
    "settle",
]
