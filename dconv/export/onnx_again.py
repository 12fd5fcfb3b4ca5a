"""A graph once more: another opset, narrower or wider numbers, matrices in codes, weights in other files.

The graph's operations are read into memory, its weights are not: they go from where they lie to where they are to lie
by a plan, cast or encoded on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.onnx import initializers, stored
from dconv.checkpoint.signs import ONNX
from dconv.checkpoint.source import Source, seal, side_bytes
from dconv.coded.nbits_encode import Blocks
from dconv.errors import Refused
from dconv.export.onnx_coding import Coding
from dconv.export.onnx_graph import require, require_opset
from dconv.export.onnx_opset import nodes
from dconv.export.onnx_weights import NUMBER_OF, Weight, lay_out, serialised
from dconv.request import Request
from dconv.sharding.plan import Target, TargetFile
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical, Piece, Slot, TensorSpec

#: What ONNX's converters know a way to, from most graphs.
OPSETS: Final = range(11, 26)
#: Bytes of a weight that stays inside the graph.
_SMALL: Final = 1024
#: Fewer elements are no matrix that codes make smaller.
_FEW: Final = 4096
_NARROW: Final = ("f16", "bf16")


@dataclass(frozen=True)
class Again:
    """A graph as it is written; see `dconv.export.traced.Export`."""

    logical: Logical
    target: Target
    notes: tuple[str, ...]
    words: str


def again(request: Request, source: Source, how: Blocks | None, opset: int | None) -> Again:
    """Lay out a graph, or all of a directory.

    Args:
        request: the dtype and the size of files that are asked for.
        source: the graph, or the directory, as it lies there.
        how: the codes of its matrices; None leaves them.
        opset: one of `OPSETS`; None leaves each graph's.

    Raises:
        ToolMissing: onnx or onnxscript is not installed.
        Refused: it has no form in the opset, or in the numbers.
    """
    require(("onnx", "onnxscript", "onnx_ir"))
    path = request.model
    files = sorted(path.glob(f"*{ONNX}")) if path.is_dir() else [path]
    specs: dict[str, TensorSpec] = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    made: dict[str, Any] = {}
    taken: dict[str, list[Weight]] = {}
    notes: list[str] = []
    for file in files:
        model = _read(file)
        weights = _outside(model, file, source, specs, pieces)
        if opset is not None:
            model = _convert(model, opset, file)
        made[file.name] = model
        taken[file.name] = _bound(model, weights)
        if request.dtype:
            taken[file.name], said = _in_dtype(model, taken[file.name], request.dtype, file)
            notes += said
        taken[file.name] = [weight for weight in taken[file.name] if weight.value.uses() or _is_output(weight)]
    logical = Logical(source.root, specs, pieces, dict(source.files))
    words = ""
    if how:
        coding = Coding(logical, how, _matrix)
        taken = {name: coding.of(made[name], weights) for name, weights in taken.items()}
        if not coding.done:
            raise Refused("no matrix of this graph is one that codes are for, nothing was written", where=str(path),
                          expected="MatMul or Gemm by a constant matrix")  # fmt: skip
        logical, words = coding.logical(taken), how.words
        notes.append(f"{len(coding.done):,} matrices in {how.words}")
    placed, tensors = lay_out(files[0].name, [(made[name], taken[name]) for name in made], request.shard_size)
    written = {slot.tensor for tensor in tensors for slot in tensor.slots}
    idle = {name: "the graph computes nothing with it" for name in logical.specs if name not in written}
    graphs = tuple(TargetFile(name, len(data), ((0, data),)) for name, data in serialised(made))
    target = Target((*graphs, *placed), tensors, partial(side_bytes, None, source.side), seal(None, source.side),
                    left_out=idle)  # fmt: skip
    return Again(logical, target, tuple(dict.fromkeys(notes)), words)


def _matrix(weight: Weight) -> bool:
    return weight.spec.dtype in ("f32", *_NARROW) and Region.whole(weight.spec.shape).volume >= _FEW


def _is_output(weight: Weight) -> bool:
    return weight.value.is_graph_output()


def _read(path: Path) -> Any:
    import onnx
    import onnx_ir as ir

    library: Any = onnx  # whose functions have types in part, as the next one's
    inner: Any = ir
    return inner.from_proto(library.load(path, load_external_data=False))


def _outside(
    model: Any, path: Path, source: Source, specs: dict[str, TensorSpec], pieces: dict[str, tuple[Piece, ...]]
) -> list[Weight]:
    """Take the weights out of a graph, and say where they lie."""
    found: list[Weight] = []
    for one in initializers(path):
        value = model.graph.initializers.get(one.name)
        if value is None or (one.nbytes < _SMALL and one.file == path.name) or not one.file:
            continue
        if not one.plain:
            raise Refused("a weight of a type that nothing is written in, nothing was written",
                          where=f"{one.name} of {path}")  # fmt: skip
        held = stored(one, source.files[one.file].size, path)
        (extent,) = held.extents
        piece = Piece(one.name, extent.region, extent.file, extent.offset, extent.strides, one.dtype)
        name = one.name
        if name in pieces and replace(pieces[name][0], tensor=one.name) != piece:
            name = f"{path.stem}//{one.name}"
        spec = replace(held.spec, name=name)
        specs[name], pieces[name] = spec, (replace(piece, tensor=name),)
        value.const_value = None
        del model.graph.initializers[one.name]
        if not value.is_graph_input():  # as one, a converter leaves it alone
            model.graph.inputs.append(value)
        axes = tuple(range(len(spec.shape)))
        found.append(Weight(value, spec, (Slot(name, Region.whole(spec.shape), (0,) * len(axes), axes),)))
    return found


def _bound(model: Any, weights: list[Weight]) -> list[Weight]:
    """The weights as values of a graph, of which they are no inputs any more."""
    named = {value.name: value for value in model.graph.inputs}
    found = [replace(weight, value=named[weight.value.name]) for weight in weights]
    for weight in found:
        model.graph.inputs.remove(weight.value)
    return found


def _convert(model: Any, opset: int, path: Path) -> Any:
    import onnx
    import onnx_ir as ir
    from onnxscript import version_converter

    library: Any = onnx  # whose functions have types in part, as those of the next two
    inner: Any = ir
    newer: Any = version_converter
    try:
        newer.convert_version(model, opset)
        if model.opset_imports[""] != opset:  # older graphs, and older opsets, are ONNX's own converter's
            return inner.from_proto(library.version_converter.convert_version(inner.to_proto(model), opset))
    except Exception as error:  # whatever a converter raises about one graph
        raise Refused(
            "this graph has no form in that opset, nothing was written",
            where=f"--opset {opset}, {path}",
            found=f"{type(error).__name__}: {error}"[:300],
        ) from error
    require_opset(model, opset)
    return model


def _in_dtype(model: Any, weights: list[Weight], dtype: str, path: Path) -> tuple[list[Weight], list[str]]:
    """Weights in other numbers, and a graph that computes with them.

    Raises:
        Refused: it computes in two-byte numbers, and others of two bytes are asked for.
    """
    floating = {weight.spec.dtype for weight in weights if weight.spec.dtype in ("f32", *_NARROW)}
    if floating <= {dtype}:
        return weights, []
    if dtype == "f32":
        return _widened(model, weights), []
    if floating & set(_NARROW):
        raise Refused(
            "one narrow number is not made of another one, nothing was written",
            where=f"--dtype {dtype}",
            found=f"{', '.join(sorted(floating))} in {path}",
            do="--dtype f32 first, or convert the checkpoint that the graph was made of",
        )
    said = f"matrices multiply in {dtype}; everything else computes in f32, as the graph has it"
    return [_narrowed(model, weight, dtype) for weight in weights], [said]


def _widened(model: Any, weights: list[Weight]) -> list[Weight]:
    """All of a graph in fp32."""
    import numpy as np
    import onnx_ir as ir

    narrow = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    wide = ir.TensorType(ir.DataType.FLOAT)

    def widened(tensor: Any) -> Any:
        if tensor is None or tensor.dtype not in narrow:
            return tensor
        return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.const_value = widened(value.const_value)
        if value.dtype in narrow:
            value.type = wide
    for node in nodes(model.graph):
        for value in node.outputs:
            if value.dtype in narrow:
                value.type = wide
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in narrow:
                node.attributes[name] = ir.AttrTensor(name, widened(attribute.value))
            elif name in ("to", "dtype") and attribute.value in {int(kind) for kind in narrow}:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    return [
        replace(weight, spec=replace(weight.spec, dtype="f32")) if weight.spec.dtype in _NARROW else weight
        for weight in weights
    ]


def _narrowed(model: Any, weight: Weight, dtype: str) -> Weight:
    """A matrix in a narrow number, and casts around what multiplies by it or looks rows up in it."""
    import onnx_ir as ir

    if weight.spec.dtype != "f32" or len(weight.spec.shape) < 2:
        return weight
    narrow, wide = NUMBER_OF[dtype], NUMBER_OF["f32"]
    whole: Any = None
    for use in list(weight.value.uses()):
        node, index = use.node, use.idx
        graph = node.graph
        if (node.op_type, index) == ("MatMul", 1):
            graph.insert_before(node, inward := _cast(node.inputs[0], narrow, f"{node.outputs[0].name}_in"))
            node.replace_input_with(0, inward.outputs[0])
        elif (node.op_type, index) != ("Gather", 0):
            if whole is None:
                whole = _cast(weight.value, wide, f"{weight.value.name}_wide")
                model.graph.insert_before(model.graph[0], whole)
            node.replace_input_with(index, whole.outputs[0])
            continue
        _recast(graph, node, wide)
    weight.value.type = ir.TensorType(ir.DataType(narrow))
    return replace(weight, spec=replace(weight.spec, dtype=dtype))


def _cast(value: Any, number: int, name: str) -> Any:
    import onnx_ir as ir

    return ir.node("Cast", [value], attributes={"to": number}, name=f"{name}_cast", outputs=[ir.Value(name=name)])


def _recast(graph: Any, node: Any, number: int) -> None:
    """Give what a node makes back in another number, under its own name."""
    import onnx_ir as ir

    made = node.outputs[0]
    kept = ir.Value(name=made.name, shape=made.shape, type=made.type)
    node_uses = list(made.uses())
    made.name, made.type, made.shape = f"{made.name}_narrow", None, None
    back = ir.node("Cast", [made], attributes={"to": number}, name=f"{node.name}_wide", outputs=[kept])
    graph.insert_after(node, back)
    for use in node_uses:
        use.node.replace_input_with(use.idx, kept)
    for index, output in enumerate(graph.outputs):
        if output is made:
            graph.outputs[index] = kept
