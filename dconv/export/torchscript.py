"""TorchScript (``.pt``): torch.export's graph, traced by ``torch.jit``, and around it the archive that torch reads.

``torch.jit.trace`` alone would keep lengths as the numbers that they were: transformers' models compute with them as
Python's. torch.export's graph has them as operations, so that a trace of that graph has, too, and a number that would be
kept is an error. Parameters have no storage while all this runs; a plan fills their places in the archive.

Source of the archive's records: ``torch/csrc/jit/serialization/export_module.cpp``.
"""

from __future__ import annotations

import io
import operator
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dconv.checkpoint.pickling import Global, NewObj, dumps
from dconv.checkpoint.source import seal, side_bytes
from dconv.checkpoint.torchframe import Tensor, ZipWriter, lower, tensor
from dconv.describe import Described
from dconv.errors import Refused, ToolMissing
from dconv.export.traced import PORTS, Weightless, exported, ports_json, weightless
from dconv.net.skeleton import quiet
from dconv.request import Request
from dconv.sharding.plan import Target, TargetFile, TargetTensor

FILE: Final = "model.pt"
_ROOT: Final = "model"
#: Under this name TorchScript has the module.
_CLASS: Final = Global("__torch__.dconv", "Traced")
_CODE: Final = "code/__torch__/dconv.py"
#: A second trace in one process is called otherwise, which is nothing to write.
_MANGLED: Final = re.compile(rb"___torch_mangle_\d+\.")
_SHORT: Final = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "bool": "bool"}


def lay_out(request: Request, model: Described) -> Target:
    """The archive, config and tokenizer to be written.

    Raises:
        Refused, ToolMissing: see `dconv.export.traced.weightless` and ``exported``; torch.jit traces it otherwise.
    """
    found = weightless(model, request.dtype)
    return _framed(found, _traced(found, exported(found)), model)


@dataclass(frozen=True)
class Script:
    """A model in TorchScript.

    Attributes:
        records: of the archive: code, and the numbers in it.
        constants: tensors that have values, by the module's attribute.
        names: the attribute of a parameter -> its number among those of the model.
    """

    records: Mapping[str, bytes]
    constants: Mapping[str, Any]
    names: Mapping[str, int]


def _traced(found: Weightless, program: Any) -> Script:
    """A program of torch.export in TorchScript, on the CPU.

    Raises:
        Refused: torch.jit does not trace it.
        ToolMissing: torch writes another archive.
    """
    import torch

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
        module.register_buffer(plain, torch.empty_like(value, device="meta"))
    inputs = tuple(value.to("meta") for value in program.example_inputs[0])
    held = io.BytesIO()
    try:
        with quiet(), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("error", category=torch.jit.TracerWarning)
            torch.jit.save(torch.jit.trace(module, inputs, check_trace=False, strict=False), held)
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
        numbers = {key: archive.read(name) for key, name in sorted(record.items()) if key.startswith("constants")}
        if len(code) != 1 or b"meta" in numbers["constants.pkl"]:
            raise ToolMissing(
                "this torch writes another archive than is known here, nothing was written",
                where=f"torch {torch.__version__}",
                found=", ".join(sorted(record))[:300],
            )
        source = _MANGLED.sub(b"", archive.read(record[code[0]])).replace(b'torch.device("meta")', b'torch.device("cpu")')
    return Script({_CODE: source, **numbers}, constants, names)


def attribute(name: str) -> str:
    """How a parameter is called in TorchScript, whose names have no dots."""
    return name.replace(".", "__")


def _module(graph: Any) -> Any:
    """A module that runs a graph of torch.export, operation by operation, as ``torch.jit.trace`` can follow."""
    import torch

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.homes: dict[str, str] = {}

        def forward(self, *inputs: torch.Tensor) -> Any:
            values: dict[Any, Any] = {}
            given = iter(inputs)
            made: Any = ()

            def load(node: Any) -> Any:
                return torch.fx.node.map_arg(node, values.__getitem__)

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

    if not isinstance(target, torch._ops.OpOverload):
        return target(*args, **kwargs)
    name = target._schema.name.partition("::")[2]
    if name == "_assert_tensor_metadata":
        return None
    args = tuple("meta" if isinstance(it, torch.device) else it for it in args)
    kwargs = {key: "meta" if isinstance(value, torch.device) else value for key, value in kwargs.items()}
    if special := _SPECIAL.get(name):
        return special(*args, **kwargs)
    for place in (torch, torch._C._nn, torch.Tensor):
        if hasattr(place, name):
            return getattr(place, name)(*args, **kwargs)
    raise NotImplementedError(f"{target}")


def _slice(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    return x[(slice(None),) * (dim % x.dim()) + (slice(start, end, step),)]


def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    wanted = {key: value for key, value in kwargs.items() if key in ("dtype", "device", "copy")}
    return x.to(*args, **wanted)


#: Operations that Python has under another name or form.
_SPECIAL: Final[Mapping[str, Callable[..., Any]]] = {
    "sym_size": lambda x, dim: x.size(dim),
    "slice": _slice,
    "to": _to,
    "index": lambda x, at: x[tuple(slice(None) if it is None else it for it in at)],
    "dropout": lambda x, p, train: x,
    "lift_fresh_copy": lambda x: x,
    "__and__": operator.and_,
    "__or__": operator.or_,
}


def _framed(found: Weightless, script: Script, model: Described) -> Target:
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
        "data.pkl": dumps(tree, lambda node: lower(node, sizes)),
        **script.records,
        "version": b"3\n",
        "byteorder": b"little",
        f"extra/{PORTS}": ports_json(found.graph, found.dtype),
        **{f"data/{key}": data for key, data in raw.items()},
    }
    for name, content in records.items():
        writer.add(name, content)
    tensors = []
    for number, one in enumerate(found.held):
        offset = writer.reserve(f"data/{number}", one.spec.nbytes)
        tensors.append(TargetTensor(one.spec.name, FILE, offset, one.spec, one.slots))
    size = writer.finish()
    side = {name: path for name, path in model.source.side.items() if name != "config.json"}
    return Target(
        (TargetFile(FILE, size, tuple(writer.literals)),),
        tuple(tensors),
        lambda: side_bytes(found.config, side),
        seal(found.config, side),
        left_out={**model.logical.left_out, **found.left_out},
    )


def _bytes(value: Any) -> bytes:
    import torch

    whole = value.contiguous().reshape(-1)
    return np.asarray(whole.view(torch.uint8) if whole.numel() else [], np.uint8).tobytes()
