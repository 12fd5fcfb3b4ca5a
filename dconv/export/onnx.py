"""FORMAT onnx: a model's graph by torch's own exporter, its weights in a file beside it that the plan lays out.

So all ranks write, no process holds the model, and ONNX's 2 GB are no limit. A decoder takes and gives its keys and
values, an encoder-decoder is two graphs (as optimum has them: ``encoder_model.onnx`` is run once for a text,
``decoder_model.onnx`` once for each token), and state-space layers compute the whole text each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dconv.arch.layouts import size
from dconv.checkpoint.source import Source, seal, side_bytes
from dconv.coded.nbits_encode import VARIANTS, Blocks
from dconv.describe import Described
from dconv.errors import UsageError
from dconv.export import genie, onnx_again, onnx_run
from dconv.export.genai import FILE as GENAI
from dconv.export.genai import config_of as genai_config
from dconv.export.graph import fixed
from dconv.export.graph_halves import halves_of
from dconv.export.onnx_coding import Coding
from dconv.export.onnx_graph import OPSETS, require, traced
from dconv.export.onnx_run import NAME
from dconv.export.onnx_weights import Weight, lay_out, serialised, weights_of
from dconv.export.prompt import Answers, Kind, Prompt, kind_of
from dconv.export.traced import Export, weightless
from dconv.net.finite_mask import HIDDEN, HIDDEN_IN_CODES
from dconv.request import Request
from dconv.sharding.plan import Target, TargetFile
from dconv.targets import new_config


def export(request: Request, model: Described) -> Export:
    """Trace a model, and lay out its graph, weights, config and tokenizer; nothing is written yet.

    Raises:
        ToolMissing: a package that makes graphs is not installed.
        UsageError: a variant or an opset that there is not.
        Refused: a model that torch does not trace, or that needs what a graph has not.
    """
    require()
    how = _asked(request, OPSETS)
    kind = kind_of(model.family)
    _require_lengths(request, kind)
    found = weightless(model, request)
    dtype = found.dtype
    graphs = halves_of(found.net) if kind == "encoder-decoder" else {NAME: found.graph}
    if request.ports is not None:
        graphs = {NAME: genie.graph_of(found.net, found.graph)}
    if request.lengths is not None:
        graphs = {name: fixed(graph, *request.lengths) for name, graph in graphs.items()}
    made: dict[str, Any] = {}
    taken: dict[str, list[Weight]] = {}
    for name, graph in graphs.items():
        hidden = HIDDEN_IN_CODES if request.for_codes else HIDDEN
        made[name] = traced(replace(found, graph=graph), request.opset, hidden)
        taken[name] = weights_of(made[name], found.held, len(graph.inputs))
    notes = list(_notes(kind, dtype))
    logical = model.logical
    if how:
        coding = Coding(logical, how, _matrices(model))
        taken = {name: coding.of(made[name], weights) for name, weights in taken.items()}
        logical = coding.logical(taken)
        notes.append(f"{len(coding.done):,} matrices in {how.words}; embeddings, norms and routers in {dtype}")
    files, tensors = lay_out(NAME, [(made[name], taken[name]) for name in graphs], request.shard_size)
    written = {slot.tensor for tensor in tensors for slot in tensor.slots}
    idle = {name: "the graph computes nothing with it" for name in logical.specs if name not in written}
    graph_files = tuple(TargetFile(name, len(data), ((0, data),)) for name, data in serialised(made))
    config, side = new_config(request, model), dict(model.source.side)
    if kind == "decoder" and request.lengths is None:  # onnxruntime-genai asks for texts of any length
        side[GENAI] = genai_config(model, graphs[NAME], NAME)
    closing = partial(side_bytes, config, side)
    target = Target((*graph_files, *files), tensors, closing, seal(config, side),
                    left_out={**logical.left_out, **idle, **found.left_out})  # fmt: skip
    return Export(replace(model, logical=logical), target, tuple(notes), how.words if how else "")


def _require_lengths(request: Request, kind: Kind) -> None:
    """Raise for what a graph of given lengths has not.

    Raises:
        UsageError: a past of a model that has no cache, or codes that onnxruntime alone computes with.
    """
    if request.lengths is None:
        return
    sequence, past = request.lengths
    if past and kind != "decoder":
        raise UsageError(
            "this model's graph has no cache, nothing was written",
            where=f"--lengths {sequence}+{past}",
            expected=f"--lengths {sequence}",
        )
    if request.quant is not None:
        raise UsageError(
            "a graph of given lengths is for compilers, which have codes of their own, nothing was written",
            where=f"--lengths beside --quant {request.quant}",
            expected="one of the two",
            do="leave --quant out, and have the compiler quantise",
        )


def _matrices(model: Described) -> Callable[[Weight], bool]:
    """Linear layers and the output layer; a router is neither."""
    entries = model.family.entries(model.facts)
    linear = {spec.name for entry in entries if entry.row.is_linear for spec in entry.fused.specs}
    vocabulary = size(model.facts, "vocab")

    def wanted(weight: Weight) -> bool:
        inside = all(slot.tensor in linear for slot in weight.slots)
        return weight.spec.published is None and (inside or vocabulary in weight.spec.shape)

    return wanted


def _notes(kind: Kind, dtype: str) -> Iterator[str]:
    if kind == "hybrid":
        yield "state-space layers have no cache in this graph: each token computes the whole text again"
    if dtype == "bf16":
        yield "onnxruntime multiplies no bf16 on a CPU: this graph is for GPUs and NPUs"


def _asked(request: Request, opsets: range) -> Blocks | None:
    """The codes that a request asks for; None where weights are written as they are."""
    if request.opset is not None and request.opset not in opsets:
        raise UsageError(
            "no graph is written in such an opset, nothing was written",
            where=f"--opset {request.opset}",
            expected=f"{opsets[0]} to {opsets[-1]}",
            do="leave it out: torch's own choice runs everywhere",
        )
    if request.quant is None:
        return None
    if request.quant not in VARIANTS:
        raise UsageError(
            "onnx has no such variant, nothing was written",
            where=f"--quant {request.quant}",
            expected="\n".join(f"{name}  {how.words}" for name, how in VARIANTS.items()),
        )
    return VARIANTS[request.quant]


def again(request: Request, source: Source) -> onnx_again.Again:
    """The same of a graph that is one already; see `dconv.export.onnx_again.again`."""
    return onnx_again.again(request, source, _asked(request, onnx_again.OPSETS), request.opset)


def can_infer(path: Path, prompt: Prompt, **options: Any) -> dict[str, object]:
    """See `dconv.export.onnx_run.can_infer`."""
    return onnx_run.can_infer(path, prompt, **options)


def answers_of(path: Path, prompt: Prompt, **options: Any) -> Answers:
    """See `dconv.export.onnx_run.answers_of`."""
    return onnx_run.answers_of(path, prompt, **options)
