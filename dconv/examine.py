"""Looking without converting: `inspect` reads a checkpoint's headers, `price` sums up a plan."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, get_args

from dconv import verify
from dconv.arch import registry
from dconv.arch.family import Family
from dconv.arch.layouts import Facts, size
from dconv.checkpoint.detect import open_source
from dconv.checkpoint.drop import check_used
from dconv.checkpoint.rename import renaming_of
from dconv.checkpoint.source import Source
from dconv.codec.mx import Rule
from dconv.errors import DconvError, UsageError, group_names
from dconv.pipeline import FORMATS, Described, Job, describe_model
from dconv.report import explain as explaining
from dconv.report import explained, implausible, mup, words
from dconv.report.implausible import Implausible
from dconv.report.page import page
from dconv.report.precision import Precision, precision_of
from dconv.sharding.execute import TILE_BYTES
from dconv.sharding.parsed import is_list
from dconv.sharding.precision import numeric, precision
from dconv.trace import rank_names

_WIDTH: Final = 100
_LABEL: Final = 13
#: Args of Megatron that say how a checkpoint was cut when its container does not (torch_dist).
_SIZES: Final = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
}
#: Patterns of names that are printed before the rest is counted.
MANY: Final = 12


@dataclass(frozen=True)
class Report:
    """What a checkpoint is, from its headers. Fields that cannot be known are None.

    Attributes:
        format: container.
        files: weight files with their bytes.
        family: None when no family fits (then ``names`` has what is stored).
        parallel: sizes that differ from 1, and layers by stage where known.
        parameters: elements of all logical tensors.
        stored_bytes: bytes of all stored tensors, copies for several ranks included.
        dtypes: number of logical tensors by dtype.
        padded_vocab: rows of the stored vocabulary.
        left_out: what a conversion leaves out, with the reason.
        refused: why a conversion would be refused, as printed then; empty when it would not.
        receipt: plan id of the conversion that made it.
        mup: muP scalars of the config, and what they multiply; empty where there are none.
        precision: dtypes, scales and what the config claims of them; None where only `check` asked, or where no more
            than the container's own names is known.
        explained: what ``explain`` asked for.
        implausible: what ``lint`` asked for; None where it did not, or where a conversion would be refused.
    """

    path: str
    format: str
    files: dict[str, int]
    stored_bytes: int
    family: str | None = None
    architecture: str | None = None
    config_from: str = "nothing"
    parallel: dict[str, object] = field(default_factory=dict[str, object])
    layers: int | None = None
    parameters: int | None = None
    dtypes: dict[str, int] = field(default_factory=dict[str, int])
    tied: bool | None = None
    vocab: int | None = None
    padded_vocab: int | None = None
    side: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    refused: str = ""
    names: tuple[str, ...] = ()
    receipt: str | None = None
    mup: dict[str, Any] = field(default_factory=dict[str, Any])
    precision: Precision | None = None
    explained: explaining.Explanation | None = None
    implausible: Implausible | None = None

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        parts = {key: getattr(self, key) for key in ("precision", "explained", "implausible")}
        plain = asdict(replace(self, **dict.fromkeys(parts)))
        return {**plain, **{key: part.to_dict() if part else None for key, part in parts.items()}}

    def text(self) -> str:
        """For a person, at most 100 columns; what was asked to be explained, instead of all."""
        if self.explained:
            return explained.text(Path(self.path).name or self.path, self.explained)
        return "\n".join(line for label, value in self.rows() if value for line in lines_of(label, value))

    def html(self) -> str:
        """The same as one page that needs nothing else (`dconv.report.page`)."""
        return page(Path(self.path).name or self.path, self.rows(full=False), self.to_dict(), self.precision)

    def rows(self, *, full: bool = True) -> list[tuple[str, str]]:
        """Labels and values; ``full`` has those that are parts of their own on a page, too."""
        head = self.family or "unknown family"
        if self.architecture and self.architecture != self.family:
            head += f" ({self.architecture})"
        dtypes = words.rows(self.precision, full=full) if self.precision else ()
        return [
            ("path", self.path),
            ("format", f"{self.format}, {len(self.files)} file{'s' * (len(self.files) != 1)}, "
                       f"{sum(self.files.values()):,} bytes"),
            ("family", head),
            ("config", self.config_from),
            ("parallel", " x ".join(f"{key} {value}" for key, value in self.parallel.items())),
            ("layers", said(self.layers)),
            ("parameters", said(self.parameters)),
            ("tensors", ", ".join(f"{n} {dtype}" for dtype, n in self.dtypes.items())),
            ("stored", f"{self.stored_bytes:,} bytes of tensors"),
            ("vocabulary", _vocabulary(self.vocab, self.padded_vocab)),
            ("embedding", {True: "tied to the output layer", False: "not tied", None: ""}[self.tied]),
            ("side files", ", ".join(self.side) or "none"),
            ("made by", f"dconv, plan {self.receipt}" if self.receipt else ""),
            ("left out", "\n".join(_reasons(self.left_out))),
            ("muP", mup.text(self.mup)),
            ("implausible", self.implausible.text() if self.implausible else ""),
            *dtypes,
            ("names", group_names(self.names, MANY) if self.refused else ""),
            ("refused", self.refused if full else ""),
        ]  # fmt: skip


def said(number: int | None) -> str:
    """A count with its thousands apart; empty for None."""
    return "" if number is None else f"{number:,}"


def _vocabulary(vocab: int | None, padded: int | None) -> str:
    if vocab is None or padded is None or padded == vocab:
        return said(vocab)
    return f"{vocab:,}, stored with {padded - vocab:,} rows of padding"


def _reasons(left_out: Mapping[str, str]) -> Iterable[str]:
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        yield f"{', '.join(group_names(names, MANY).splitlines())}: {reason}"


def lines_of(label: str, value: str) -> Iterable[str]:
    """A labelled value, wrapped to at most 100 columns."""
    wide = _WIDTH - _LABEL
    for i, line in enumerate(value.split("\n")):
        indent = " " * (len(line) - len(line.lstrip()))
        parts = textwrap.wrap(line, wide, subsequent_indent=indent) or [""]
        for j, part in enumerate(parts):
            yield f"{label if i == j == 0 else '':<{_LABEL}}{part}"


def inspect(
    path: str | Path,
    *,
    source_format: str | None = None,
    model_type: str | None = None,
    hf_config: str | Path | None = None,
    drop: str | Sequence[str] = (),
    rename: str | Path | None = None,
    submodel: str | None = None,
    with_eagle: bool = False,
    explain: str | bool = False,
    scale_rule: Rule | None = None,
    lint: bool = False,
) -> Report:
    """Describe a checkpoint from its headers and scales; what a conversion would refuse is reported, not raised.

    Args:
        path: a checkpoint's directory, or its file.
        source_format: its container (normally detected).
        model_type: its family (normally detected).
        hf_config: a directory whose config.json counts.
        drop: patterns of tensors that are left out.
        rename: a file of house spellings.
        submodel: which model of a distillation checkpoint is meant.
        with_eagle: keep the tensors of an EAGLE head.
        explain: the scheme that its weights are in, True or "" for whatever that is, or an encoding of plain weights,
            to be explained by a sample of its weights (`dconv.report.explain`).
        lint: read all weights, and name those that look lost (`dconv.report.implausible`).
        scale_rule: of what MX formats would cost; None as each has it by default.

    Raises:
        UsageError: there is no checkpoint at ``path``, or ``hf_config`` is no directory; ``explain`` does not fit, or
            ``scale_rule`` is without it.
        DconvError: its container cannot be read at all, or it cannot be explained.
    """
    path = Path(path)
    if scale_rule is not None and (explain is False or scale_rule not in get_args(Rule)):
        raise UsageError(
            "the rule for MX scales says nothing here" if explain is False else "there is no such rule for MX scales",
            where=f"--scale-rule {scale_rule:.80}",
            expected="it beside --explain" if explain is False else " or ".join(get_args(Rule)),
        )
    try:
        model = describe_model(
            path,
            source_format=source_format,
            model_type=model_type,
            hf_config=hf_config,
            drop=drop,
            rename=rename,
            submodel=submodel,
            with_eagle=with_eagle,
        )
    except UsageError:
        raise
    except DconvError as error:
        if explain is not False:
            raise
        source = open_source(path, source_format, rename=renaming_of(rename, submodel))
        report = in_part(path, source, str(error))
        return replace(report, precision=precision_of(source, None, source.config))
    check_used(drop, (model.source, model.logical))
    head = model.family.head.removesuffix(".weight") if model.facts["tied"] else ""
    asked = explain if isinstance(explain, str) else ""
    return replace(
        report_of(path, model, hf_config),
        mup=mup.scalars_of(model.family, model.config, model.source.shapes),
        precision=precision_of(model.source, model.logical, model.source.config or model.config, head),
        explained=None if explain is False else explaining.explain(model, asked, scale_rule),
        implausible=implausible.of_model(model) if lint else None,
    )


def report_of(path: Path, model: Described, hf_config: str | Path | None) -> Report:
    """The report of a source that has been described."""
    specs = model.logical.specs.values()
    return Report(
        **_container(path, model.source, model.family, model.facts),
        family=model.family.name,
        architecture=model.family.config.architecture,
        config_from=_config_from(model, hf_config),
        parameters=sum(math.prod(spec.shape) for spec in specs),
        dtypes=dict(Counter(spec.dtype for spec in specs).most_common()),
        left_out=model.logical.left_out,
        names=tuple(model.logical.specs),
    )


def in_part(path: Path, source: Source, refused: str) -> Report:
    """A report of what can be known about a checkpoint that would be refused."""
    family = facts = None
    with suppress(DconvError):
        family = registry.detect(source.config, source.args, source.shapes)
        config = source.config if source.config is not None else family.config.to_hf(source.args or {})
        facts = family.facts(family.borne_out(config, source.shapes)[0], source.shapes)
    named = (source.config or {}).get("architectures") or (source.config or {}).get("model_type")
    return Report(
        **_container(path, source, family, facts),
        family=family.name if family else None,
        architecture=str(named[0] if is_list(named) else named) if named else None,
        config_from=_own(source) if source.config else "Megatron's args" if source.args else "nothing",
        left_out=source.left_out,
        refused=refused,
        names=tuple(source.shapes),
    )


def _config_from(model: Described, hf_config: str | Path | None) -> str:
    if hf_config is not None:
        return f"config.json of {hf_config}"
    return "rebuilt from Megatron's args" if model.rebuilt else _own(model.source)


def _own(source: Source) -> str:
    return "the GGUF's metadata" if source.format == "gguf" else "config.json"


def _container(path: Path, source: Source, family: Family | None, facts: Facts | None) -> dict[str, Any]:
    """The fields that a container alone tells, and those that the facts add."""
    args = source.args or {}
    padded = args.get("padded_vocab_size")
    covered = verify.find_receipt(path)
    return {
        "path": str(path),
        "format": source.format,
        "files": {name: stamp.size for name, stamp in source.files.items()},
        "stored_bytes": source.stored_bytes,
        "parallel": _parallel(source),
        "layers": family.depth(facts) if family and facts else None,
        "tied": bool(facts["tied"]) if facts else None,
        "vocab": size(facts, "vocab") if facts else None,
        "padded_vocab": padded if isinstance(padded, int) else None,
        "side": tuple(source.side),
        "receipt": verify.plan_of(covered) if covered else None,
    }


def _parallel(source: Source) -> dict[str, object]:
    if source.parallel is None:
        args = source.args or {}
        found = {key: args.get(name) for key, name in _SIZES.items()}
        return {key: n for key, n in found.items() if isinstance(n, int) and (n > 1 or key in ("tp", "pp"))}
    cut = source.parallel
    sizes: dict[str, object] = {"tp": cut.tp, "pp": cut.pp}
    sizes |= {key: n for key, n in (("vpp", cut.vpp), ("ep", cut.ep)) if n > 1}
    stages = ["+".join(map(str, stage)) for stage in cut.stages or ()]
    return sizes | ({"layers": "|".join(stages)} if len(set(stages)) > 1 else {})


def price(job: Job, world: int | None = None) -> dict[str, Any]:
    """What a planned job reads and writes, in all and by each of ``world`` ranks (default: one rank a shard)."""
    plan, request = job.plan, job.request
    specs = job.logical.specs.values()
    rounded = {name for names in numeric(plan).values() for name in names}
    parallel = request.parallel if size(job.facts, "experts") else replace(request.parallel, etp=1)
    owners = {file.owner for file in plan.target.files}
    engine = FORMATS[request.format]
    world = world or plan.target.world
    return {
        "plan": plan.id,
        "family": job.family.name,
        "layers": job.family.depth(job.facts),
        "parameters": job.parameters,
        "dtypes": sorted({tensor.spec.dtype for tensor in plan.target.tensors}),
        "source": {"path": str(request.source), "format": job.source.format, "files": len(plan.source.files)},
        "target": {
            "path": str(request.output),
            "format": f"megatron {request.megatron_format}" if engine == "megatron" else engine,
            "codes": job.scheme,
            "layout": parallel.described if engine == "megatron" else f"tp {parallel.tp}" if parallel.tp > 1 else "",
            "files": len(plan.target.files),
            "shards": len(owners) if -1 not in owners else len(plan.target.files),
        },
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "largest_buffer": TILE_BYTES,
        "tensors": len(specs),
        "rounded": len(rounded),
        "precision": precision(plan),
        "notes": list(job.notes),
        "left_out": plan.target.left_out or {},
        "needs": list(job.needs),
        "world": world,
        "ranks": _shares(job, world),
        **({"trace": [one.to_dict() for one in job.trace]} if job.trace else {}),
    }


def _shares(job: Job, world: int) -> list[dict[str, Any]]:
    plan = job.plan
    names = rank_names(job.request.parallel)
    ranks: list[dict[str, Any]] = []
    for rank in range(world):
        tasks = plan.share(rank, world)
        read = 0
        for task in tasks:
            for copy in plan.copies[task.tensor] if task.tensor >= 0 else ():
                part = copy.clip(task.region)
                read += part.nbytes if part is not None else 0
        files = {task.file for task in tasks}
        owners = {plan.target.files[file].owner for file in files}
        owner = owners.pop() if len(owners) == 1 else -1
        ranks.append(
            {
                "rank": rank,
                "shard": names[owner] if owner >= 0 else f"{len(files)} file{'s' * (len(files) != 1)}",
                "read": read,
                "written": sum(task.nbytes for task in tasks),
                "tensors": len({task.tensor for task in tasks if task.tensor >= 0}),
            }
        )
    return ranks
