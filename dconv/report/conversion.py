"""The report of a conversion: what is known once it has ended, gathered for one page (`dconv.report.conversion_page`).

It is made by the rank that commits, after the commit and after what ``--verify`` asks. Of the source and of the output
headers and scales are read, and of an output in codes a sample of its weights; what cannot be read is said there.
"""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from dconv import __version__
from dconv.arch.layouts import size as size_of
from dconv.describe import Described, describe_model, described
from dconv.errors import DconvError
from dconv.report import losses
from dconv.report.flows import Flows, flows_of, shares
from dconv.report.losses import Losses
from dconv.report.precision import Precision, precision_of
from dconv.report.rates import RankDid, ranks_of, rates_of
from dconv.report.tracks import TICK, Track, read_by
from dconv.sharding.ops import Derive
from dconv.sharding.parsed import mapping_or_empty
from dconv.sharding.precision import precision
from dconv.sharding.receipt import RECEIPT, read_receipt
from dconv.targets import GRAPHS, engine_of

if TYPE_CHECKING:
    from dconv.pipeline import Job


@dataclass(frozen=True)
class Run:
    """How a run went.

    Attributes:
        seconds: from the command to the commit; 0 of one that found the output done.
        since: when it began (seconds since the epoch): older tracks are of earlier runs.
        tracks: what ranks have noted, those of earlier runs among them.
        already: the output was there.
        verified: what ``--verify`` found (`dconv.verify.told`).
        failure: how the run ended, if not well.
    """

    world: int
    seconds: float = 0.0
    since: float = math.inf
    tracks: tuple[Track, ...] = ()
    already: bool = False
    verified: Mapping[str, Any] | None = None
    failure: DconvError | None = None


@dataclass(frozen=True)
class Side:
    """The precision of the source or of the output; ``why_not`` says why it is not known."""

    precision: Precision | None = None
    why_not: str = ""


@dataclass(frozen=True)
class Conversion:
    """Everything that the page says.

    Attributes:
        shares: of each rank by plan: bytes read, bytes written, tasks.
        did: what the ranks of this run noted; ``earlier``, those of runs before it.
        ends, rates: see `dconv.report.rates.rates_of`.
        receipt: without its lists of tensors.
    """

    job: Job
    run: Run
    flows: Flows
    shares: tuple[tuple[int, int, int], ...]
    did: tuple[RankDid, ...]
    earlier: tuple[Track, ...]
    ends: Sequence[float]
    rates: Mapping[int, Sequence[tuple[float, float]]]
    before: Side
    after: Side
    losses: Losses | None
    receipt: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def kept(self) -> int:
        """Bytes that earlier runs had done."""
        if self.run.already:
            return self.job.plan.bytes_written
        return sum(rank.kept for rank in self.did)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for a program."""
        plan = self.job.plan
        return {
            "plan": plan.id,
            "family": self.job.family.name,
            "source": {"path": str(self.job.request.source), "format": self.job.source.format},
            "target": {"path": str(self.job.request.output), "format": self.job.request.format},
            "parameters": self.job.parameters,
            "bytes_read": plan.bytes_read,
            "bytes_written": plan.bytes_written,
            "seconds": self.run.seconds,
            "already_done": self.run.already,
            "ranks": [
                {"rank": i, "read": read, "written": written, "tasks": tasks}
                for i, (read, written, tasks) in enumerate(self.shares)
            ],
            "did": [rank.to_dict() for rank in self.did],
            "kept": self.kept,
            "losses": self.losses.to_dict() if self.losses else None,
            "verified": dict(self.run.verified) if self.run.verified else None,
            "failure": self.run.failure.to_dict() if self.run.failure else None,
        }


def conversion_of(job: Job, run: Run) -> Conversion:
    """Gather what the page says of a run that has ended."""
    mine = [track for track in run.tracks if track.began >= run.since - TICK]
    earlier = tuple(track for track in run.tracks if track.began < run.since - TICK)
    ends, rates = rates_of(mine)
    source, before = _source(job)
    written, after = _written(job)
    return Conversion(
        job,
        run,
        flows_of(job, run.world),
        tuple(
            (sum(read_by(job.plan, task) for task in tasks), sum(task.nbytes for task in tasks), len(tasks))
            for tasks in shares(job, run.world)
        ),
        tuple(ranks_of(mine)),
        earlier,
        ends,
        rates,
        before,
        after,
        _losses(job, source, written),
        read_receipt(job.request.output) or {},
    )


def _source(job: Job) -> tuple[Described | None, Side]:
    """The source anew, since a job's has what will be done to it; of a student and its teacher the student."""
    try:
        if job.request.fake_weight:
            return None, Side(why_not="weights are made up: there is no source")
        request = job.request
        model = describe_model(request.source) if request.teacher_only else described(request)
        return model, _side(model)
    except (DconvError, OSError) as error:
        return None, Side(why_not=_why(error))


def _written(job: Job) -> tuple[Described | None, Side]:
    """The output; of a student and its teacher the student, where it has one."""
    request = job.request
    if engine_of(request.format) in GRAPHS:
        kinds = Counter(tensor.spec.dtype for tensor in job.plan.target.tensors).most_common()
        stored = ", ".join(f"{count:,} {dtype}" for dtype, count in kinds)
        return None, Side(why_not=f"a graph joins and turns weights as its operations take them; its tensors: {stored}")
    family = None if request.submodel else job.family.name or None
    which = None if request.teacher is None else "teacher" if request.teacher_only else "student"
    try:
        model = describe_model(request.output, model_type=family, submodel=which)
        return model, _side(model)
    except (DconvError, OSError) as error:
        return None, Side(why_not=_why(error))


def _side(model: Described) -> Side:
    head = model.family.head.removesuffix(".weight") if model.facts["tied"] else ""
    found = precision_of(model.source, model.logical, model.source.config or model.config, head)
    return Side(found, "" if found else "its tensors have no names of HuggingFace's")


def _losses(job: Job, source: Described | None, written: Described | None) -> Losses | None:
    """None where no weight of the output is in codes that this run chose."""
    if job.calibrating and job.calibrating.lines:
        return losses.of_calibration(job.calibrating.lines)
    if written is None or not written.source.coded:
        return None if not job.scheme else Losses(why_not="the output in codes cannot be read as weights")
    if source is None:
        return Losses(why_not="the source is not there to hold the written weights against")
    try:
        return losses.measured(job, source, written)
    except (DconvError, OSError) as error:
        return Losses(why_not=_why(error))


def _why(error: DconvError | OSError) -> str:
    told = error.what if isinstance(error, DconvError) else str(error)
    return told.split("\n", 1)[0].removesuffix(", nothing was written")  # something was, and this is its page


def facts(conversion: Conversion) -> Iterable[tuple[str, str]]:
    """Labels and values: what was converted."""
    job, plan = conversion.job, conversion.job.plan
    request = job.request
    parallel = request.parallel if size_of(job.facts, "experts") else replace(request.parallel, etp=1)
    layout = parallel.described if plan.target.world > 1 else ""
    files = "" if job.source.made else f", {_files(len(plan.source.files))}"
    taught = f"\nwith its teacher {request.teacher}" if request.teacher and not request.teacher_only else ""
    yield "from", f"{request.source}\n{job.source.format}{files}{taught}"
    yield "to", f"{request.output}\n{request.format}, {_files(len(plan.target.files))}" + (layout and f", {layout}")
    yield "family", job.family.name
    yield "layers", f"{layers:,}" if (layers := job.family.depth(job.facts)) else ""
    yield "parameters", f"{job.parameters:,}"
    yield "codes", job.scheme
    changed = precision(plan)
    exact = sum(all(copy.op.exact and not isinstance(copy.op, Derive) for copy in copies) for copies in plan.copies)
    yield "exact", f"{exact:,} of the output's {len(plan.copies):,} tensors have the source's values, every one"
    for kind in changed:
        names = kind["tensors"]
        yield "changed", f"{kind['op']}: {kind['count']:,} tensor{'s' * (kind['count'] != 1)}\n{_some(names)}"
    for name, reason in list((plan.target.left_out or {}).items())[:8]:
        yield "left out", f"{name}: {reason}"
    yield "folded", _folded(job.folded) if job.folded else ""
    yield "notes", "\n".join(job.notes)
    yield "lacking", "\n".join(f"megatron-core lacks: {what}" for what in job.needs)


def _files(count: int) -> str:
    return f"{count:,} file{'s' * (count != 1)}"


def _some(names: Sequence[str], most: int = 6) -> str:
    more = [f"… and {len(names) - most:,} more"] if len(names) > most else []
    return "\n".join(["  " + name for name in names[:most]] + more)


def _folded(record: Mapping[str, Any]) -> str:
    return "muP scalars went into the weights\n" + "\n".join(f"{key}: {value!s:.200}" for key, value in record.items())


def receipt_facts(conversion: Conversion) -> Iterable[tuple[str, str]]:
    """Labels and values: what the receipt says, and what made it."""
    receipt = conversion.receipt
    yield "plan", conversion.job.plan.id
    yield "receipt", f"{RECEIPT} of {conversion.job.request.output}"
    tensors, frames, closing = (receipt.get(key) for key in ("tensors", "frames", "closing"))
    counts = [len(mapping_or_empty(part)) for part in (tensors, frames, closing)]
    of = f"{counts[0]:,} tensors, {counts[1]:,} files' framing and {counts[2]:,} small files"
    yield "digests", f"{receipt.get('digest', '?')} of {of}"
    yield "all tensors", f"{_together(tensors)}, one digest over names and digests" if counts[0] else ""
    yield "own digest", str(receipt.get("own_digest", ""))
    files, out = mapping_or_empty(receipt.get("source_files")), mapping_or_empty(receipt.get("left_out"))
    yield "source files", _files(len(files)) if files else ""
    yield "left out", f"{len(out):,} tensors" if out else "nothing"
    yield "mup", "folded" if "mup" in receipt else "not folded"
    samples = mapping_or_empty(mapping_or_empty(receipt.get("calibration")).get("samples"))
    if samples:
        plain = {key: value for key, value in samples.items() if isinstance(value, int | float | str) and value != ""}
        yield "calibration", "\n".join(f"{key.replace('_', ' ')}: {value}" for key, value in plain.items())
    made = f"dconv {receipt.get('dconv', __version__)}, Python {platform.python_version()}, NumPy {np.__version__}"
    yield "versions", f"{made}, xxhash {xxhash.VERSION}"


def _together(tensors: object) -> str:
    digests = {name: one.get("digest") for name, one in mapping_or_empty(tensors).items()}
    return xxhash.xxh3_128_hexdigest(
        "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items())).encode("utf-8", "backslashreplace")
    )
