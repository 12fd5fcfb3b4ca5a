"""A described model traced by torch without its weights, and the weights' places: what is common to graph formats.

Parameters are torch's fake tensors: they have shapes and no storage, so that a model of any size is traced in the
memory that its graph takes, on every rank alike. Lengths of a graph's axes are torch's symbols; where the model decides
by them, the graph would hold for some lengths alone, and is refused.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final, cast

from dconv.checkpoint.huggingface_target import with_dtype
from dconv.checkpoint.source import seal, side_bytes
from dconv.checkpoint.torchframe import ZipWriter
from dconv.describe import Described
from dconv.errors import Refused, ToolMissing, UsageError
from dconv.export.graph import LENGTHS, Graph, graph_of, sample
from dconv.export.huggingface import AUTO
from dconv.export.prompt import kind_of
from dconv.export.runtimes import missing, obstacle
from dconv.net.places import Parameter, parameters
from dconv.net.skeleton import built, fill_computed, quiet
from dconv.request import Request
from dconv.sharding.dtypes import TO_TORCH
from dconv.sharding.plan import Target, TargetFile, TargetTensor

#: What weights are computed in; the most common one of a model that has several is taken.
_FLOATING: Final = ("f32", "bf16", "f16")
#: Lengths at which what torch found out of a graph's must hold. 0 and 1 are not asked: at these torch goes the way of
#: longer ones, and the operations are the same.
_TRIED: Final = (2, 3, 16, 100, 70_000)


@dataclass(frozen=True)
class Weightless:
    """A model ready to be traced.

    Attributes:
        net: of transformers; parameters have no storage, what follows from the config has its values.
        graph: around it.
        held: its parameters, and where they lie in the source.
        left_out: tensors of the source that it does without, and why.
        dtype: dconv's name of what it computes in.
        config: config.json.
    """

    net: Any
    graph: Graph
    held: tuple[Parameter, ...]
    left_out: Mapping[str, str]
    dtype: str
    config: dict[str, object]


@dataclass(frozen=True)
class Export:
    """A model as it is written.

    Attributes:
        model: as it is read.
        target: files, and where in them each tensor lies.
        notes: what a person should know, one line each.
        words: codes that its weights are in; there are none.
    """

    model: Described
    target: Target
    notes: tuple[str, ...] = ()
    words: str = ""


def in_archive(model: Described, found: Weightless, file: str, writer: ZipWriter, record: str) -> Target:
    """An archive whose records with values are written, with places for the weights behind them, and what lies beside.

    Args:
        model: which has the tokenizer and other files beside the archive.
        found: the same, ready to be traced: its parameters are the weights.
        file: the archive's name.
        writer: which has the records; it is finished here.
        record: what a weight's record is called, before its number in ``found.held``.
    """
    tensors: list[TargetTensor] = []
    for number, one in enumerate(found.held):
        offset = writer.reserve(f"{record}{number}", one.spec.nbytes)
        tensors.append(TargetTensor(one.spec.name, file, offset, one.spec, one.slots))
    size = writer.finish()
    side = {name: path for name, path in model.source.side.items() if name != "config.json"}
    return Target(
        (TargetFile(file, size, tuple(writer.literals)),),
        tuple(tensors),
        lambda: side_bytes(found.config, side),
        seal(found.config, side),
        left_out={**model.logical.left_out, **found.left_out},
    )


def weightless(model: Described, request: Request) -> Weightless:
    """The network of a model, without its weights.

    Raises:
        UsageError: OUT has a file's name.
        ToolMissing: torch or transformers is not installed, or does not build it.
        Refused: transformers has no such model, or the model sees; see `dconv.net.places.parameters`.
    """
    if request.out is not None and request.out.suffix in (".pt", ".pt2", ".onnx"):
        raise UsageError(
            "a graph lies in a directory, with the config and the tokenizer, nothing was written",
            where=str(request.out),
            expected="a directory's name",
            do=f"-o {request.out.with_suffix('')}",
        )
    if module := missing("huggingface"):
        raise ToolMissing(
            "a graph is traced by torch, from transformers' model, nothing was written",
            found=f"no module {module}",
            do="pip install 'dconv[transformers]'",
        )
    if why := obstacle("huggingface", model.family, model.config):
        raise Refused(f"{why}, nothing was written", do="FORMAT hf, megatron or pt")
    from dconv.net import traced_experts

    short = request.dtype or _common(model)
    config = with_dtype(model.config, TO_TORCH[short])
    kind = kind_of(model.family)
    if kind == "sighted":
        raise Refused(
            "models that see are not traced, nothing was written",
            found=model.family.name,
            expected="a text model",
            do="FORMAT hf, megatron or pt",
        )
    with tempfile.TemporaryDirectory(prefix="dconv-graph-") as scratch:
        folder = Path(scratch)
        (folder / "config.json").write_text(json.dumps(config))
        net = built(
            folder,
            AUTO[kind],
            model.source.root,
            family=model.family,
            dtype=TO_TORCH[short],
            experts=traced_experts.register(),
        )
    traced_experts.use(net)
    net.eval().requires_grad_(False)
    held, left_out = parameters(model.logical, net)
    with quiet():
        graph = graph_of(net, kind)
    fill_computed(net, net)
    return Weightless(net, graph, held, left_out, short, config)


def _common(model: Described) -> str:
    found = [spec.dtype for spec in model.logical.specs.values()]
    common = max(sorted(set(found)), key=found.count)
    if common not in _FLOATING:
        raise Refused(
            "no graph computes in the dtype of these weights, nothing was written",
            where=str(model.source.root),
            expected=", ".join(_FLOATING),
            found=common,
            do="--dtype bf16",
        )
    return common


def exported(model: Weightless) -> Any:
    """The graph as a ``torch.export.ExportedProgram`` for the CPU, for lengths of any kind.

    Its parameters are fake tensors under ``model.`` and their names. Nothing in it depends on who traced it.

    Raises:
        Refused: torch does not trace the model, or what it traced holds for some lengths alone.
    """
    import torch
    from torch.export import Dim
    from torch.fx.experimental import _config as shapes

    graph, settings = model.graph, cast(Any, shapes)
    lengths = tuple(
        {i: Dim.DYNAMIC for i, axis in enumerate(port.axes) if isinstance(axis, str)} for port in graph.inputs
    )
    dtype = getattr(torch, TO_TORCH[model.dtype])
    try:
        with quiet(), silent(), torch.no_grad():
            with _fakes(model.net):
                inputs = tuple(sample(port, dtype, "cpu") for port in graph.inputs)
            with settings.patch(backed_size_oblivious=True):  # lengths of 0 and 1 are lengths as others are
                program: Any = torch.export.export(graph.module, inputs, dynamic_shapes=(lengths,), strict=False)
    except Exception as error:  # whatever a framework raises about one model
        raise Refused(
            "torch does not trace this model, nothing was written",
            where=type(model.net).__name__,
            found=f"{type(error).__name__}: {error}"[:600],
            do="FORMAT hf, gguf or mlx",
        ) from error
    _require_any_length(program, model)
    _forget_tracer(program)
    _say_lengths(program, graph)
    program._example_inputs = (tuple(sample(port, dtype, "cpu") for port in graph.inputs), {})
    return program


def ports_json(graph: Graph, dtype: str, device: str) -> bytes:
    """A graph's inputs and outputs: name, axes (a name where it may be of any length) and torch's dtype of each.

    Args:
        graph: whose ports they are.
        dtype: dconv's name of what is no whole number.
        device: where its weights are put when it is loaded.
    """
    said: dict[str, Any] = {
        side: [
            {"name": port.name, "axes": port.axes, "dtype": "int64" if port.whole else TO_TORCH[dtype]} for port in of
        ]
        for side, of in (("inputs", graph.inputs), ("outputs", graph.outputs))
    }
    return json.dumps({**said, "device": device}).encode()


@contextmanager
def _fakes(net: Any) -> Generator[None]:
    """Fake tensors on the CPU for what has no storage: a graph says of its tensors where they lie."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    made: dict[int, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in net.modules():
            for held in (module._parameters, module._buffers):
                for name, value in held.items():
                    if value is None or not value.is_meta:
                        continue
                    if id(value) not in made:
                        fake = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                        plain = not isinstance(value, torch.nn.Parameter)
                        made[id(value)] = fake if plain else torch.nn.Parameter(fake, requires_grad=False)
                    held[name] = made[id(value)]
        yield


@contextmanager
def silent() -> Generator[None]:
    """For a while, without what torch's exporter tells a person at a terminal: no logger warns."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _require_any_length(program: Any, model: Weightless) -> None:
    """Refuse a graph that holds for some lengths alone.

    What was decided while it was traced are comparisons of torch's symbols. Those of the model's code chose operations:
    they must hold at all of `_TRIED`. Those of torch's own chose how it computes shapes; the graph has nothing of them.
    """
    names: dict[Any, str] = {}
    shapes: Any = None
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"][-len(model.graph.inputs) :]
    for port, value in zip(model.graph.inputs, values, strict=True):
        for axis, length in zip(port.axes, value.shape, strict=True):
            if isinstance(axis, str):
                if isinstance(length, int):
                    raise _some_lengths(model, f"{axis} of {port.name} is {length}")
                shapes = length.node.shape_env
                names[length.node.expr] = axis
    if shapes is None:
        return
    symbols = {symbol: axis for expression, axis in names.items() for symbol in expression.free_symbols}
    free = [axis for axis in LENGTHS if axis in symbols.values() and axis != "total"]
    for guard in shapes.guards:
        if _is_torchs(guard) or _is_padding(guard.expr):
            continue
        for tried in product(_TRIED, repeat=len(free)):
            lengths: dict[str, int] = dict(zip(free, tried, strict=True))
            lengths["total"] = lengths.get("past", 0) + lengths.get("sequence", 0)
            held = guard.expr.xreplace({symbol: lengths[axis] for symbol, axis in symbols.items()})
            if not held.free_symbols and not held:
                raise _some_lengths(model, f"{guard.expr} does not hold at {lengths}")


def _is_torchs(guard: Any) -> bool:
    """Whether torch's code decided, and none that computes operations from others."""
    import torch

    here, root = getattr(guard.sloc.framework_loc, "filename", ""), Path(torch.__file__).parent
    return here.startswith(f"{root}/") and not here.startswith(f"{root}/nn/")


def _is_padding(expression: Any) -> bool:
    """Whether it asks if there is padding up to a whole number of chunks: where there is none, none is cut off."""
    import sympy
    from torch.utils._sympy.functions import Mod

    if not isinstance(expression, sympy.StrictGreaterThan):
        return False
    asked: Any = expression  # its sides may be anything that sympy has
    return isinstance(asked.lhs, Mod) and bool(asked.rhs == 0)


def _some_lengths(model: Weightless, found: str) -> Refused:
    return Refused(
        "torch's graph of this model would hold for some lengths alone, nothing was written",
        where=type(model.net).__name__,
        found=found,
        do="FORMAT hf, gguf or mlx",
    )


def _forget_tracer(program: Any) -> None:
    """Without where in whose files an operation was traced."""
    import torch

    for inner in program.graph_module.modules():
        if isinstance(inner, torch.fx.GraphModule):
            for node in inner.graph.nodes:
                for key in ("stack_trace", "source_fn_stack", "custom", "from_node"):
                    node.meta.pop(key, None)


def _say_lengths(program: Any, graph: Graph) -> None:
    """Lengths may be all that agree with each other, which a call then asks. What was decided by would ask for more."""
    from torch.utils._sympy import numbers
    from torch.utils._sympy.value_ranges import ValueRanges

    theirs: Any = numbers  # without types

    for symbol in program.range_constraints:
        program.range_constraints[symbol] = ValueRanges(0, theirs.int_oo)
    first: dict[str, str] = {}
    said: list[str] = []
    for i, port in enumerate(graph.inputs):
        for j, axis in enumerate(port.axes):
            if isinstance(axis, str):
                here = f"L['inputs'][{i}].size()[{j}]"
                if first.setdefault(axis, here) != here:
                    said.append(f"{first[axis]} == {here}")
    if {"past", "sequence", "total"} <= first.keys():
        said.append(f"{first['past']} + {first['sequence']} == {first['total']}")
    program._guards_code = said
