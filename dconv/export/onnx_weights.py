"""The weights of an ONNX graph: what of each the graph takes, where it lies in the file beside it, and its codes.

A graph asks for a weight turned, or for one expert out of a stack. Both are boxes to a plan, so the weight is laid out
as the graph takes it, and no runtime has to turn a model while it loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final

from dconv.export.onnx_opset import nodes
from dconv.net.places import Parameter
from dconv.sharding.plan import TargetFile, TargetTensor
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Slot, TensorSpec

#: Where large tensors begin: a page, so that a runtime can map them (ONNX's ExternalData document); small ones at a
#: cache line.
_PAGE, _LINE, _LARGE = 4096, 64, 1 << 16
#: ONNX's numbers of dtypes (``TensorProto.DataType``).
NUMBER_OF: Final = {
    "f32": 1, "u8": 2, "i8": 3, "u16": 4, "i16": 5, "i32": 6, "i64": 7, "bool": 9, "f16": 10, "f64": 11, "u32": 12,
    "u64": 13, "bf16": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight as a graph takes it.

    Attributes:
        value: the graph's (``onnx_ir.Value``).
        spec: its shape is the one that ``slots`` are in; ``published`` is the graph's where that differs.
    """

    value: Any
    spec: TensorSpec
    slots: tuple[Slot, ...]

    @property
    def name(self) -> str:
        """The parameter's, or of a row of a stack with its number behind."""
        return self.spec.name


def weights_of(model: Any, found: Iterable[Parameter], ports: int) -> list[Weight]:
    """What the graph takes of each parameter, in the graph's order; what it takes nothing of is not there.

    Args:
        model: of `dconv.export.onnx_graph.traced`; weights get the names that the model's parameters have.
        found: the model's parameters, and where they lie in the source.
        ports: how many of its inputs are its own.
    """
    named = {name: one for one in found for name in (one.spec.name, *one.alike)}
    first: dict[str, Any] = {}
    for value in list(model.graph.inputs[ports:]):
        model.graph.inputs.remove(value)
        parameter = named[value.name.removeprefix("model.")]
        name = parameter.spec.name
        if name in first:
            value.replace_all_uses_with(first[name])
            continue
        value.name = name
        first[name] = value
    weights: list[Weight] = []
    for name, value in first.items():
        weights += _taken(Weight(value, replace(named[name].spec), named[name].slots))
    return weights


def _taken(weight: Weight) -> list[Weight]:
    uses = [(use.node, use.idx) for use in weight.value.uses()]
    if not uses:
        return []
    chosen = [_chosen(node) if idx == 0 else None for node, idx in uses]
    rows = [index for index in chosen if index is not None]
    if len(rows) == len(uses) and weight.spec.file_shape[0] == weight.spec.shape[0]:
        found: list[Weight] = []
        for index in sorted(set(rows)):
            these = [node for (node, _), at in zip(uses, rows, strict=True) if at == index]
            found += _taken(_row(weight, index, these))
        return found
    turns = {tuple(node.attributes["perm"].value) if node.op_type == "Transpose" else None for node, _ in uses}
    if len(turns) == 1 and (turn := next(iter(turns))) is not None:
        return _taken(_turned(weight, turn, [node for node, _ in uses]))
    return [weight]


def _chosen(node: Any) -> int | None:
    """The index of the one row that a node takes."""
    if node.op_type != "Gather" or (node.attributes.get("axis") and node.attributes["axis"].value != 0):
        return None
    at = node.inputs[1].const_value
    return int(at.numpy()) if at is not None and not at.shape.dims else None


def _replaced(weight: Weight, these: Sequence[Any], spec: TensorSpec, slots: Iterable[Slot]) -> Weight:
    """A weight in place of what some nodes make of another one."""
    import onnx_ir as ir

    value = ir.Value(name=spec.name, shape=ir.Shape(spec.file_shape), type=weight.value.type)
    for node in these:
        node.outputs[0].replace_all_uses_with(value)
        node.graph.remove(node, safe=True)
    return Weight(value, spec, tuple(slots))


def _row(weight: Weight, index: int, these: Sequence[Any]) -> Weight:
    spec = weight.spec
    published = None if spec.published is None else spec.published[1:]
    made = TensorSpec(f"{spec.name}.{index}", spec.shape[1:], spec.dtype, published)
    slots: list[Slot] = []
    for slot in weight.slots:
        axis, at = slot.axes[0], slot.start[0]
        region = slot.region
        if axis >= 0:
            if not at <= index < at + region.shape[axis]:
                continue
            start, shape = list(region.start), list(region.shape)
            start[axis], shape[axis] = start[axis] + index - at, 1
            region = Region(tuple(start), tuple(shape))
        elif at != index:
            continue
        slots.append(Slot(slot.tensor, region, slot.start[1:], slot.axes[1:]))
    return _replaced(weight, these, made, slots)


def _turned(weight: Weight, turn: Index, these: Sequence[Any]) -> Weight:
    spec = weight.spec
    runs = _runs(spec)
    order = [axis for at in turn for axis in runs[at]]
    shape = tuple(spec.shape[axis] for axis in order)
    published = tuple(spec.file_shape[at] for at in turn)
    made = TensorSpec(spec.name, shape, spec.dtype, None if published == shape else published)
    return _replaced(weight, these, made, (in_order(slot, order) for slot in weight.slots))


def in_order(slot: Slot, order: Sequence[int]) -> Slot:
    """The same place in a tensor whose axes stand in another order: its axis ``i`` was ``order[i]``."""
    return Slot(slot.tensor, slot.region, tuple(slot.start[i] for i in order), tuple(slot.axes[i] for i in order))


def _runs(spec: TensorSpec) -> list[list[int]]:
    """For each axis of the graph's shape, the axes of the spec's that make it up."""
    runs: list[list[int]] = []
    at = 0
    for length in spec.file_shape:
        run: list[int] = []
        while at < len(spec.shape) and (not run or prod(spec.shape[i] for i in run) < length):
            run.append(at)
            at += 1
        runs.append(run)
    return runs


def lay_out(
    name: str, graphs: Sequence[tuple[Any, Sequence[Weight]]], shard_size: int | None
) -> tuple[tuple[TargetFile, ...], tuple[TargetTensor, ...]]:
    """Give each weight its place in the file beside the graphs, or in several, and tell the graphs.

    Args:
        name: of the files, ``<name>.data``.
        graphs: each with its weights; what several take alike is there once.
        shard_size: bytes of one file, at most (one tensor at least); None writes one.
    """
    import onnx_ir as ir

    placed: dict[tuple[str, Index, Index | None], tuple[int, int]] = {}
    parts: list[list[tuple[TargetTensor, int]]] = [[]]
    sizes = [0]
    for weight in (weight for _, weights in graphs for weight in weights):
        spec = weight.spec
        key = (spec.name, spec.shape, spec.published)
        if key in placed:
            continue
        align = _PAGE if spec.nbytes >= _LARGE else _LINE
        at = -(-sizes[-1] // align) * align
        if shard_size is not None and parts[-1] and at + spec.nbytes > shard_size:
            parts.append([])
            sizes.append(0)
            at = 0
        again = sum(other[0] == spec.name for other in placed)
        said = f"{spec.name}#{again + 1}" if again else spec.name
        placed[key] = len(parts) - 1, at
        parts[-1].append((TargetTensor(said, "", at, spec, weight.slots), at))
        sizes[-1] = at + spec.nbytes
    named = [
        f"{name}.data" if len(parts) == 1 else f"{name}.data-{number:05d}-of-{len(parts):05d}"
        for number in range(1, len(parts) + 1)
    ]
    files = [TargetFile(file, size, _gaps(part)) for file, part, size in zip(named, parts, sizes, strict=True) if part]
    tensors = [replace(tensor, file=file) for file, part in zip(named, parts, strict=True) for tensor, _ in part]
    for model, weights in graphs:
        for weight in weights:
            spec = weight.spec
            number, at = placed[spec.name, spec.shape, spec.published]
            kind, shape = ir.DataType(NUMBER_OF[spec.dtype]), ir.Shape(spec.file_shape)
            weight.value.shape, weight.value.type = shape, ir.TensorType(kind)
            weight.value.const_value = ir.ExternalTensor(
                named[number], at, spec.nbytes, kind, shape=shape, name=weight.value.name
            )
            model.graph.register_initializer(weight.value)
    return tuple(files), tuple(tensors)


def _gaps(part: Sequence[tuple[TargetTensor, int]]) -> tuple[tuple[int, bytes], ...]:
    """The zeros between tensors."""
    found: list[tuple[int, bytes]] = []
    end = 0
    for tensor, at in part:
        if at > end:
            found.append((end, bytes(at - end)))
        end = at + tensor.spec.nbytes
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Codes:
    """What stands for a weight in a graph.

    Attributes:
        values: the graph's, of codes and of scales.
        turned: whether the weight is [out, in]; else [in, out].
    """

    values: tuple[Any, Any]
    turned: bool


def in_codes(
    model: Any, weights: Sequence[Weight], wanted: Callable[[Weight], bool], bits: int, block: int
) -> dict[str, Codes]:
    """Have the graph multiply by codes: ``MatMul`` and ``Gemm`` by a wanted weight become ``MatMulNBits``.

    Args:
        model: an ``onnx_ir.Model``, changed in place.
        weights: those that it takes.
        wanted: whether a weight is to be in codes.
        bits: of a code.
        block: numbers that share a scale.

    Returns:
        By the weight's name; the weight itself may be used elsewhere, too.
    """
    import onnx_ir as ir

    made: dict[str, Codes] = {}
    by_value = {id(weight.value): weight for weight in weights}
    for node in list(nodes(model.graph)):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        found = _factor(node, by_value)
        if found is None or not wanted(found[0]):
            continue
        weight, turned = found
        shape = weight.spec.file_shape
        rows, columns = shape if turned else shape[::-1]
        if weight.name not in made:
            codes, scales = (ir.Value(name=f"{weight.name}_{end}") for end in (f"Q{bits}", "scales"))
            made[weight.name] = Codes((codes, scales), turned)
        attributes = [
            ir.AttrInt64(key, value)
            for key, value in (("K", columns), ("N", rows), ("bits", bits), ("block_size", block))
        ]
        new = ir.Node("com.microsoft", "MatMulNBits", [node.inputs[0], *made[weight.name].values], attributes,
                      name=node.name.replace(node.op_type, "MatMulNBits"))  # fmt: skip
        put = [new]
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            put.append(ir.Node("", "Add", [new.outputs[0], node.inputs[2]], name=f"{new.name}_bias"))
            new.outputs[0].name = f"{node.outputs[0].name}_plain"
        last = put[-1].outputs[0]
        last.name, last.type, last.shape = node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], put, [node.outputs[0]], [last])
    if made:
        model.graph.opset_imports["com.microsoft"] = 1
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        RemoveUnusedNodesPass()(model)  # the turns of a tied embedding
    return made


def _factor(node: Any, by_value: Mapping[int, Weight]) -> tuple[Weight, bool] | None:
    """The weight that a node multiplies by, and whether its rows are the outputs."""
    value = node.inputs[1]
    turned = False
    if node.op_type == "Gemm":
        said = {key: attribute.value for key, attribute in node.attributes.items()}
        if said.get("transA", 0) or said.get("alpha", 1.0) != 1.0 or said.get("beta", 1.0) != 1.0:
            return None
        turned = bool(said.get("transB", 0))
    producer = value.producer()
    if id(value) not in by_value and producer is not None and producer.op_type == "Transpose":
        if tuple(producer.attributes["perm"].value) != (1, 0):
            return None
        value, turned = producer.inputs[0], not turned
    weight = by_value.get(id(value))
    if weight is None or len(weight.spec.file_shape) != 2:
        return None
    return weight, turned


def serialised(graphs: Mapping[str, Any]) -> Iterable[tuple[str, bytes]]:
    """Names and contents of the files of graphs (``onnx_ir.Model``), whose weights are elsewhere."""
    import onnx_ir as ir

    library: Any = ir  # whose functions have types in part
    for name, model in graphs.items():
        yield name, library.to_proto(model).SerializeToString(deterministic=True)
