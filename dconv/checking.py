"""`check`: all of a checkpoint read, and run in its own runtime or, where that cannot be, layer by layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from dconv import verify
from dconv.arch import registry
from dconv.checkpoint import crc, graphs
from dconv.checkpoint.detect import open_source
from dconv.checkpoint.drop import check_used
from dconv.checkpoint.rename import renaming_of
from dconv.checkpoint.source import Source
from dconv.codec.kernels import apply
from dconv.coded.decode import method_of
from dconv.errors import Damaged, Refused, UsageError, counted, group_names
from dconv.examine import MANY, Report, in_part, lines_of, report_of, said
from dconv.export import llama_cpp
from dconv.export.prompt import prompt_for
from dconv.export.runtimes import as_run, available_memory, missing, obstacle, runtime_of, shortage
from dconv.pipeline import Described, describe_model
from dconv.report import implausible
from dconv.report.implausible import Implausible
from dconv.request import spelled
from dconv.sharding.receipt import RECEIPT
from dconv.sharding.region import Region
from dconv.sharding.torn import torn
from dconv.targets import GRAPHS

#: ``quant_method`` of codes that transformers decodes itself.
_OWN: Final = ("fp8", "mxfp4")


@dataclass(frozen=True)
class Checked:
    """What `check` did, all of it without finding fault.

    Attributes:
        reread: tensors, files and bytes compared with the receipt; None without a receipt.
        saved: storages and bytes compared with the checksums of ``torch.save``; None with a receipt, or without such.
        run: what the runtime computed; None when it was not run.
        not_run: why it was not.
        notes: what is odd but not wrong.
        implausible: weights that look lost; None where none were looked for, and of a graph whose weights have no
            dtypes.
    """

    report: Report
    reread: verify.Reread | None
    saved: crc.Compared | None
    run: dict[str, object] | None
    not_run: str = ""
    notes: tuple[str, ...] = ()
    implausible: Implausible | None = None

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        brief = {key: getattr(self.report, key) for key in ("path", "format", "family", "layers", "parameters")}
        read = asdict(self.reread) if self.reread else None
        lint = self.implausible.to_dict() if self.implausible else None
        saved = asdict(self.saved) if self.saved else None
        said = {"receipt": read, "checksums": saved, "implausible": lint, "run": self.run, "not_run": self.not_run}
        return {**brief, **said, "notes": list(self.notes)}

    def _whole(self) -> str:
        report = self.report
        if report.parameters is None:
            return f"{report.family}, {report.layers} layers, a graph with {report.stored_bytes:,} bytes of weights"
        what = f"{report.family}, {report.layers} layers, {said(report.parameters)} parameters"
        return f"{what}: headers, shapes and names agree with the config"

    def text(self) -> str:
        """For a person, at most 100 columns."""
        read = self.reread
        lines = [
            *lines_of("whole", self._whole()),
            *lines_of("digests", f"{read.tensors} tensors and {read.files} files ({read.nbytes:,} bytes) are as dconv "
                                 f"wrote them" if read else f"no {RECEIPT} to compare with"),
        ]  # fmt: skip
        if self.saved:
            lines += lines_of("checksums", f"{self.saved.storages} storages ({self.saved.nbytes:,} bytes) are as torch "
                                           "saved them")  # fmt: skip
        if self.implausible:
            lines += lines_of("implausible", self.implausible.text())
        if self.run is None:
            lines += lines_of("not run", self.not_run)
        else:
            layers = f", each of {self.run['layers']} layers finite" if "layers" in self.run else ""
            how = self.run.get("computed", "fp32 on the CPU")
            ran = f"{self.run['model']} in {self.run['runtime']}, {how}: finite logits"
            lines += lines_of("runs", f"{ran} within ±{self.run['largest_logit']:.4g}{layers}")
            if text := self.run.get("continuation"):
                lines += lines_of("continues", repr(text))
            elif reason := self.run.get("no_text"):
                lines += lines_of("no text", str(reason))
        for note in self.notes:
            lines += lines_of("note", note)
        return "\n".join(lines)


def check(
    path: str | Path,
    *,
    source_format: str | None = None,
    model_type: str | None = None,
    hf_config: str | Path | None = None,
    drop: str | Sequence[str] = (),
    rename: str | Path | None = None,
    submodel: str | None = None,
    with_eagle: bool = False,
    run: bool = True,
    force: bool = False,
    max_memory: int | None = None,
    strict: bool = False,
    lint: bool = True,
) -> Checked:
    """Read a checkpoint back, look for weights that seem lost, then run it in its own runtime.

    Bytes are compared first: a flipped bit in a header is better said by the receipt than by what it makes the
    header mean. What its own runtime does not compute, or not in this memory, transformers runs layer by layer.

    Args:
        path: a checkpoint's directory, or its file.
        source_format: its container (normally detected).
        model_type: its family (normally detected).
        hf_config: a directory whose config.json counts.
        drop: patterns of tensors that are left out.
        rename: a file of house spellings.
        submodel: which model of a distillation checkpoint is meant.
        with_eagle: keep the tensors of an EAGLE head.
        run: run the model after reading.
        force: run it also when fp32 weights do not seem to fit into memory.
        max_memory: bytes that weights may take at a time; by default half of the memory that is free.
        strict: weights that look lost are damage, not a remark (`dconv.report.implausible`).
        lint: look for such, which reads all weights.

    Raises:
        UsageError: options about a model's weights, of a graph; ``strict`` without ``lint``.
        Damaged: bytes differ from the receipt, headers are broken, or the model computes nonsense; see ``strict``.
        Refused: names or layouts that dconv does not know.
        ToolMissing: the runtime is not installed, or failed.
    """
    if strict and not lint:
        raise UsageError("weights that look lost are not looked for", where="--strict beside --no-lint")
    path = Path(path)
    covered = verify.find_receipt(path)
    read = verify.reread(covered) if covered else None
    if covered and read and not read.whole:
        raise read.fault(Damaged, covered)
    options: dict[str, Any] = {
        "source_format": source_format,
        "model_type": model_type,
        "hf_config": None if hf_config is None else Path(hf_config),
        "drop": drop,
        "rename": rename,
        "submodel": submodel,
    }
    source = open_source(path, source_format, rename=renaming_of(rename, submodel))
    if source.format in GRAPHS:
        looked = implausible.of_graph(source) if lint else None
        _refuse_for_graphs(path, {**options, "with_eagle": with_eagle})
        _judge(looked, path, strict)
        return replace(_graph(path, source, model_type, read, run, force, max_memory), implausible=looked)
    saved = None if read else crc.compare(source)
    model = describe_model(path, **options, with_eagle=with_eagle)
    check_used(drop, (model.source, model.logical))
    if disagree := torn(model.logical, apply):
        raise Damaged(
            f"{counted(len(disagree), 'tensor is', 'tensors are')} not the same in all the shards that hold them",
            where=f"{group_names(disagree)}\nin {model.source.root}",
            expected="the same bytes in every shard",
            do="gradients that were not summed over the ranks make them drift;  dconv convert --replicas first  "
            "takes the first shard's",
        )
    looked = implausible.of_model(model) if lint else None
    _judge(looked, model.source.root, strict)
    report = report_of(path, model, hf_config)
    notes: list[str] = []
    if read and read.strangers:
        notes.append(f"not covered by the receipt: {', '.join(group_names(read.strangers, MANY).splitlines())}")
    if not run:
        return Checked(report, read, saved, None, "not asked for", tuple(notes), looked)
    found, why = _run(path, model, options, with_eagle, force, max_memory)
    if found is not None and why:
        notes.append(f"not run as it is: {why}")
    if found is not None and (unread := found.get("unread")):
        notes.append(f"not of transformers' model: {', '.join(group_names(unread, MANY).splitlines())}")
    return Checked(report, read, saved, found, "" if found else why, tuple(notes), looked)


def _judge(looked: Implausible | None, where: Path, strict: bool) -> None:
    """Raises Damaged where weights look lost and that is not to be."""
    if strict and looked and looked.found:
        raise Damaged(
            f"{len(looked.found)} of {looked.tensors} tensors look lost",
            where="\n".join([*looked.lines(), f"in {where}"]),
            expected="weights that training leaves behind",
            do="compare them with where they came from;  without --strict this is a remark",
        )


def _refuse_for_graphs(path: Path, options: dict[str, Any]) -> None:
    """Raises UsageError for options about a model's weights, which a graph has under no names of its own."""
    names = ("hf_config", "drop", "rename", "submodel", "with_eagle")
    if given := [spelled(name) for name in names if options[name]]:
        raise UsageError("a graph is checked as it is", where=", ".join(given), found=f"a graph at {path}",
                         do="leave it out")  # fmt: skip


def _graph(
    path: Path, source: Source, model_type: str | None, read: verify.Reread | None, run: bool, force: bool,
    max_memory: int | None,
) -> Checked:  # fmt: skip
    """A graph, of which no table knows the weights: the family is its config's, and its runtime tells the rest."""
    archive = None if read else graphs.archive_of(path)
    saved = crc.compare_archive(archive) if archive else None
    specs = [tensor.spec for tensor in source.tensors.values()]
    report = replace(in_part(path, source, ""), dtypes=dict(Counter(spec.dtype for spec in specs).most_common()))
    strangers = read.strangers if read else ()
    notes = (f"not covered by the receipt: {', '.join(strangers)}",) if strangers else ()
    why = "" if run else "not asked for"
    if run and (module := missing(source.format)):
        why = f"no module {module}"
    elif run and source.config is None:
        why = source.lacks
    elif run and source.format == "onnx" and "bf16" in report.dtypes:
        why = "onnxruntime multiplies no bf16 on a CPU"
    elif run:
        # of torch's archives only the bytes are known, which stay as wide as they are
        parameters = sum(math.prod(spec.shape) for spec in specs) or source.stored_bytes // 4
        why = _beyond(parameters, max_memory) or ("" if force else shortage(parameters, source.format))
    if why or source.config is None:
        return Checked(report, read, saved, None, why, notes)
    family = registry.by_name(model_type) if model_type else registry.detect(source.config, None, {})
    prompt = prompt_for(family, family.facts(source.config, {}), source.config)
    return Checked(report, read, saved, runtime_of(source.format).can_infer(path, prompt), "", notes)


def _run(
    path: Path, model: Described, options: dict[str, Any], with_eagle: bool, force: bool, max_memory: int | None
) -> tuple[dict[str, Any] | None, str]:
    """What the runtime computed, if any did, and why it was not the checkpoint's own or none."""
    container = as_run(model.source.format, options["rename"], options["submodel"])
    prompt = prompt_for(model.family, model.facts, model.config)
    if model.source.format == "gguf" and llama_cpp.installed():
        return llama_cpp.can_infer(model.source.root / next(iter(model.source.files)), prompt), ""
    why = _why_not(model, container, with_eagle, force, max_memory)
    if not why:
        where = path if path.is_file() else model.source.root
        return runtime_of(container).can_infer(where, prompt, **options), ""
    from dconv.export import layerwise

    if missing("huggingface"):
        return None, why
    if lacking := layerwise.obstacle(model):
        return None, why if why.endswith(lacking) else f"{why}; {lacking}"
    try:
        return layerwise.can_infer(model, prompt, max_memory or max(available_memory() // 2, 1)), why
    except Refused as small:  # the budget, before anything ran
        return None, f"{why}; {small.what}: {small.where} takes {small.expected}"


def _why_not(model: Described, container: str, with_eagle: bool, force: bool, max_memory: int | None) -> str:
    """Why a checkpoint is not run whole in its own runtime; empty where it is."""
    if with_eagle:
        return "no runtime runs an EAGLE head"
    if not missing(container) and (why := obstacle(container, model.family, model.config, model.source.args)):
        return why
    method = method_of(model.source.config or {})
    if container == "huggingface" and method and method not in _OWN:
        return f"transformers runs codes of {method} with other packages, and not in fp32"
    parameters = sum(Region.whole(spec.shape).volume for spec in model.logical.specs.values())
    return _beyond(parameters, max_memory) or ("" if force else shortage(parameters, container))


def _beyond(parameters: int, max_memory: int | None) -> str:
    """Why so many weights in fp32 are more than is allowed; empty where they are not."""
    if max_memory is None or parameters * 4 <= max_memory:
        return ""
    return f"fp32 needs about {parameters * 4 / 1e6:,.1f} MB of memory, {max_memory / 1e6:,.1f} MB are allowed"
