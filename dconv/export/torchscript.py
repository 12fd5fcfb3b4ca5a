"""TorchScript (``.pt``): torch.export's graph, traced by ``torch.jit``, and around it the archive that torch reads.

``torch.jit.trace`` alone would keep lengths as the numbers that they were: transformers' models compute with them as
Python's. torch.export's graph has them as operations, so that a trace of that graph has, too, and a number that would
be kept is an error. Parameters have no storage while all this runs; a plan fills their places in the archive.

Source of the archive's records: ``torch/csrc/jit/serialization/export_module.cpp``.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from dconv.checkpoint.graphs import FILES, PORTS
from dconv.checkpoint.pickling import Global, NewObj, dumps
from dconv.checkpoint.torchframe import ZipWriter, lower, tensor
from dconv.describe import Described
from dconv.errors import Refused, ToolMissing
from dconv.export.graph_run import (
    Loaded,
    answers,
    archive,
    infer,
    loading,
    ports_of,
    runs_code,
)
from dconv.export.prompt import Answers, Prompt
from dconv.export.traced import Export, Weightless, exported, in_archive, ports_json, weightless
from dconv.net.device import placed
from dconv.net.skeleton import quiet
from dconv.request import Request
from dconv.sharding.plan import Target

_FORMAT: Final = "torchscript"
_ROOT: Final = "model"
_DEPRECATED: Final = "torch has deprecated TorchScript: FORMAT torch_export is what it goes on with"
#: Under this name TorchScript has the module.
_CLASS: Final = Global("__torch__.dconv", "Traced")
_CODE: Final = "code/__torch__/dconv.py"
#: A second trace in one process is called otherwise, which is nothing to write.
_MANGLED: Final = re.compile(rb"___torch_mangle_\d+\.")
_SHORT: Final = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "bool": "bool"}


def export(request: Request, model: Described) -> Export:
    """The archive, config and tokenizer to be written.

    Raises:
        Refused, ToolMissing: see `dconv.export.traced.weightless` and ``exported``; torch.jit traces it otherwise.
    """
    found = weightless(model, request)
    device, notes = placed(request.device)
    script = _traced(found, exported(found), device)
    return Export(model, _framed(found, script, model, device), (_DEPRECATED, *notes))


@dataclass(frozen=True)
class Script:
    """A model in TorchScript.

    Attributes:
        records: of the archive: code, the numbers in it, and the version of the operations that it calls.
        constants: tensors that have values, by the module's attribute.
        names: the attribute of a parameter -> its number among those of the model.
    """

    records: Mapping[str, bytes]
    constants: Mapping[str, Any]
    names: Mapping[str, int]


def _traced(found: Weightless, program: Any, device: str) -> Script:
    """A program of torch.export in TorchScript, for a device.

    Raises:
        Refused: torch.jit does not trace it.
        ToolMissing: torch writes another archive.
    """
    import torch

    tracing: Any = torch.jit  # whose functions have no types
    homes = {f"model.{name}": number for number, one in enumerate(found.held) for name in (one.spec.name, *one.alike)}
    signature = program.graph_signature
    targets = {spec.arg.name: spec.target for spec in signature.input_specs if spec.target is not None}
    module = _module(program.graph)
    names: dict[str, int] = {}
    constants: dict[str, Any] = {}
    for argument, target in targets.items():
        if target in homes:
            number = homes[target]
            plain = attribute(found.held[number].spec.name)
            names[plain] = number
            value = program.state_dict[target]
        else:
            plain, value = attribute(target), program.constants[target]
            constants[plain] = value
        module.homes[argument] = plain
        module.register_buffer(plain, torch.empty(value.shape, dtype=value.dtype, device="meta"))
    inputs = tuple(value.to("meta") for value in program.example_inputs[0])
    held = io.BytesIO()
    try:
        with quiet(), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("error", category=tracing.TracerWarning)
            tracing.save(tracing.trace(module, inputs, check_trace=False, strict=False), held)
    except Exception as error:  # whatever a framework raises about one model
        raise Refused(
            "torch.jit does not trace this model, nothing was written",
            where=type(found.net).__name__,
            found=f"{type(error).__name__}: {error}"[:600],
            do="FORMAT torch_export",
        ) from error
    with zipfile.ZipFile(held) as archive:
        record = {name.partition("/")[2]: name for name in archive.namelist()}
        code = [name for name in record if name.startswith("code/") and name.endswith(".py")]
        kept = {
            key: archive.read(name)
            for key, name in sorted(record.items())
            if key.startswith(("constants", "version", ".data/version"))
        }
        if len(code) != 1 or b"meta" in kept["constants.pkl"]:
            raise ToolMissing(
                "this torch writes another archive than is known here, nothing was written",
                where=f"torch {torch.__version__}",
                found=", ".join(sorted(record))[:300],
            )
        source = _MANGLED.sub(b"", archive.read(record[code[0]]))
        source = source.replace(b'torch.device("meta")', f'torch.device("{device}")'.encode())
    return Script({_CODE: source, **kept}, constants, names)


def attribute(name: str) -> str:
    """How a parameter is called in TorchScript, whose names have no dots."""
    return name.replace(".", "__")


def _module(graph: Any) -> Any:
    """A module that runs a graph of torch.export, operation by operation, as ``torch.jit.trace`` can follow."""
    import torch
    from torch.fx.node import map_arg

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.homes: dict[str, str] = {}

        def forward(self, *inputs: torch.Tensor) -> Any:
            values: dict[Any, Any] = {}
            given = iter(inputs)
            made: Any = ()

            def load(node: Any) -> Any:
                return map_arg(node, values.__getitem__)

            for node in graph.nodes:
                if node.op == "placeholder":
                    home = self.homes.get(node.name)
                    values[node] = next(given) if home is None else getattr(self, home)
                elif node.op == "output":
                    made = tuple(load(node.args[0]))
                else:
                    values[node] = _run(node.target, load(node.args), load(node.kwargs))
            return made

    Traced.__module__ = "dconv"
    Traced.__qualname__ = "Traced"
    return Traced().eval()


def _run(target: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """One operation, called by the name that torch.jit follows lengths through: not by that of the dispatcher."""
    import torch

    theirs: Any = torch  # of whose private names a few are what a graph calls
    if target is theirs._check:
        return None
    if target in (theirs.sym_min, theirs.sym_max):
        return _bounded(*args, least=target is theirs.sym_min)
    if not isinstance(target, theirs._ops.OpOverload):
        return target(*args, **kwargs)
    name = target._schema.name.partition("::")[2]
    if name in _ASSERTED:
        return None
    args = tuple("meta" if isinstance(it, torch.device) else it for it in args)
    kwargs = {key: "meta" if isinstance(value, torch.device) else value for key, value in kwargs.items()}
    if special := _SPECIAL.get(name):
        return special(*args, **kwargs)
    for place in (torch, theirs._C._nn, torch.Tensor):
        if hasattr(place, name):
            return getattr(place, name)(*args, **kwargs)
    raise NotImplementedError(f"{target}")


def _slice(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    return x[(slice(None),) * (dim % x.dim()) + (slice(start, end, step),)]


def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    wanted = {key: value for key, value in kwargs.items() if key in ("dtype", "device", "copy")}
    return x.to(*args, **wanted)


def _size(x: Any, dim: int) -> Any:
    return x.size(dim)


def _index(x: Any, at: Any) -> Any:
    return x[tuple(slice(None) if it is None else it for it in at)]


def _itself(x: Any, *_: Any) -> Any:
    return x


def _and(a: Any, b: Any) -> Any:
    return a & b


def _or(a: Any, b: Any) -> Any:
    return a | b


#: What computes nothing.
_ASSERTED: Final = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size")
#: Operations of TorchScript that read or write files.
_DOING: Final = ("aten::save", "aten::load", "aten::from_file", "prim::PythonOp")


def _bounded(a: Any, b: Any, *, least: bool) -> Any:
    """The smaller, or the larger, of two lengths; a length that the trace follows is a tensor."""
    import torch

    lengths, numbers = [it for it in (a, b) if torch.is_tensor(it)], [it for it in (a, b) if not torch.is_tensor(it)]
    if not lengths:
        return min(a, b) if least else max(a, b)
    if numbers:
        return lengths[0].clamp(**{"max" if least else "min": numbers[0]})
    return (torch.minimum if least else torch.maximum)(*lengths)


def _conv1d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = (1,),
    padding: Any = (0,),
    dilation: Any = (1,),
    groups: int = 1,
) -> Any:
    """The convolution of each channel by itself, as state-space layers have it, of shifted products in fp32.

    torch computes the shape of its own in Python, which a trace takes for a part of the graph.
    """
    from torch.nn import functional

    if list(stride) != [1] or list(dilation) != [1] or groups == 1:
        raise NotImplementedError(f"conv1d with stride {stride}, dilation {dilation}, {groups} groups")
    taps = weight.squeeze(1).float().unbind(-1)  # fails where a channel sees others
    wide = functional.pad(x.float(), [padding[0], padding[0]])
    length = x.size(-1) + 2 * padding[0] - (len(taps) - 1)
    made: Any = sum(wide[..., k : k + length] * tap[:, None] for k, tap in enumerate(taps))
    return (made if bias is None else made + bias.float()[:, None]).to(x.dtype)


#: Operations that Python has under another name or form.
_SPECIAL: Final[Mapping[str, Callable[..., Any]]] = {
    "sym_size": _size,
    "slice": _slice,
    "to": _to,
    "index": _index,
    "dropout": _itself,
    "lift_fresh_copy": _itself,
    "alias": _itself,
    "conv1d": _conv1d,
    "__and__": _and,
    "__or__": _or,
}


def _framed(found: Weightless, script: Script, model: Described, device: str) -> Target:
    state: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for plain, number in script.names.items():
        spec = found.held[number].spec
        state[plain] = tensor(spec.dtype, spec.file_shape, str(number))
        sizes[str(number)] = spec.nbytes
    raw: dict[str, bytes] = {}
    for plain, value in script.constants.items():
        key = str(len(found.held) + len(raw))
        raw[key] = _bytes(value)
        state[plain] = tensor(_SHORT[str(value.dtype).removeprefix("torch.")], tuple(value.shape), key)
        sizes[key] = len(raw[key])
    tree = NewObj(_CLASS, (), {**state, "training": False, "_is_full_backward_hook": None})
    writer = ZipWriter(0, _ROOT)
    records = {
        "data.pkl": dumps(tree, lambda node: lower(node, sizes, device)),
        **script.records,
        "byteorder": b"little",
        f"extra/{PORTS}": ports_json(found.graph, found.dtype, device),
        **{f"data/{key}": data for key, data in raw.items()},
    }
    for name, content in records.items():
        writer.add(name, content)
    return in_archive(model, found, FILES[_FORMAT], writer, "data/")


def _bytes(value: Any) -> bytes:
    import torch

    whole = value.contiguous().reshape(-1)
    return np.asarray(whole.view(torch.uint8) if whole.numel() else [], np.uint8).tobytes()


def load(path: Path) -> Loaded:
    """The module of an archive, ready to be run.

    Raises:
        Refused: it has operations that do more than compute.
        Damaged, ToolMissing: see `dconv.export.graph_run.archive` and ``loading``.
    """
    import torch

    found = archive(path, _FORMAT)
    for name in found.records:  # run while it is read, before it can be looked at
        if name.startswith("code/") and name.endswith(".py") and b"__setstate__" in found.read(name):
            raise runs_code(found, name)
    said: dict[str, Any] = {PORTS: ""}  # torch puts bytes there
    scripts: Any = torch.jit  # whose functions have no types
    with loading(found):
        module = scripts.load(str(found.path), _extra_files=said)
    kinds = {node.kind() for node in _nodes(module.inlined_graph)}
    if odd := sorted(kind for kind in kinds if kind in _DOING or not kind.startswith(("aten::", "prim::"))):
        raise runs_code(found, ", ".join(odd)[:200])
    text = said[PORTS]
    return Loaded(module, ports_of(found, text.decode() if isinstance(text, bytes) else text),
                  f"TorchScript of torch {torch.__version__}")  # fmt: skip


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def answers_of(path: Path, prompt: Prompt, **_: Any) -> Answers:
    """What the graph answers; errors as for `load`."""
    return answers(load(path), prompt)


def can_infer(path: Path, prompt: Prompt, **_: Any) -> dict[str, object]:
    """Run a few tokens, and continue a sentence greedily where there is a tokenizer.

    Returns:
        As `dconv.export.huggingface.can_infer`, and ``computed``: in what dtype and where.

    Raises:
        Damaged: the logits are not finite; else as `load`.
    """
    return infer(load(path), path, prompt)
