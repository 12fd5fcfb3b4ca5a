"""A graph whose axes are all numbers, as compilers of NPUs take it: what it computes shapes with is said in numbers.

Such compilers read little of what ONNX says about shapes: no axis to infer, no slice to an end that no tensor has.
"""

from __future__ import annotations

from math import prod
from typing import Any, Final

#: Elements of a constant that is computed when the graph is made: a mask of 4096 tokens behind as many, and no more,
#: since it is written into the graph.
FOLDED: Final = 1 << 25


def _is_filled(node: Any) -> bool | None:
    """Of ``fold_constants_ir``: True folds, None leaves it to its own judgement."""
    return True if node.op_type == "ConstantOfShape" else None


#: Of ``fold_constants_ir``, which by itself leaves what it deems long, and what is filled with one number.
FOLDING: Final[dict[str, Any]] = {
    "input_size_limit": FOLDED,
    "output_size_limit": FOLDED,
    "should_fold": _is_filled,
}
_TRUTH: Final = 9  # ONNX's number of bool


def settle(model: Any, ports: int) -> None:
    """Say shapes, and ends of slices, in numbers, and have constants stand second in sums and products.

    Args:
        model: an ``onnx_ir.Model``, changed in place; weights are inputs that have shapes.
        ports: how many inputs are its own.
    """
    from onnx_ir.passes.common import DeduplicateInitializersPass, RemoveUnusedNodesPass, ShapeInferencePass

    for value in list(model.graph.inputs)[:ports]:
        _cast_first(value)
    computed = {value for node in model.graph for value in node.outputs} | set(list(model.graph.inputs)[:ports])
    ShapeInferencePass()(model)
    made: dict[tuple[int, ...], Any] = {}
    for node in list(model.graph):
        if node.op_type == "Reshape" and node.domain == "":
            _settle_reshape(model, node, made)
        elif node.op_type == "Slice" and node.domain == "":
            _settle_slice(model, node, made)
        elif node.op_type == "ScatterND" and node.domain == "":
            _settle_rows(model, node, made)
        elif node.op_type in ("Add", "Mul") and node.inputs[0] not in computed and node.inputs[1] in computed:
            first, second = node.inputs  # Qualcomm's compiler fails at a norm whose weight is the first factor
            node.replace_input_with(0, second)
            node.replace_input_with(1, first)
    DeduplicateInitializersPass()(model)
    RemoveUnusedNodesPass()(model)


def _cast_first(value: Any) -> None:
    """Have whole numbers of an input that become fractions become so before anything else is done with them.

    A mask is asked whether it is true before: of ones and zeros that is the same number.
    """
    for node in _users(value):
        if node.op_type == "Cast" and node.attributes["to"].value == _TRUTH:
            _skip(node)
    for node in _users(value):
        casts = _users(node.outputs[0])
        if node.op_type != "Unsqueeze" or not casts or {one.op_type for one in casts} != {"Cast"}:
            continue
        if len({one.attributes["to"].value for one in casts}) > 1:
            continue
        first = casts[0]
        node.graph.remove(first)
        node.graph.insert_before(node, first)
        for cast in casts:
            cast.outputs[0].replace_all_uses_with(node.outputs[0])
            if cast is not first:
                cast.graph.remove(cast, safe=True)
        first.replace_input_with(0, value)
        node.replace_input_with(0, first.outputs[0])
        for held in (first.outputs[0], node.outputs[0]):
            held.shape = held.type = None


def _skip(cast: Any) -> None:
    """Take a cast to truth values out where they become numbers again."""
    ends = _users(cast.outputs[0])
    ends = [end for node in ends for end in (_users(node.outputs[0]) if node.op_type == "Unsqueeze" else [node])]
    if {node.op_type for node in ends} == {"Cast"}:
        cast.outputs[0].replace_all_uses_with(cast.inputs[0])
        cast.graph.remove(cast, safe=True)


def _users(value: Any) -> list[Any]:
    return [use.node for use in value.uses()]


def _settle_reshape(model: Any, node: Any, made: dict[tuple[int, ...], Any]) -> None:
    shape = _numbers(node.outputs[0])
    if shape is None or not prod(shape):
        return
    node.attributes.pop("allowzero", None)  # without a zero it says nothing
    node.replace_input_with(1, _constant(model, shape, made))


def _settle_slice(model: Any, node: Any, made: dict[tuple[int, ...], Any]) -> None:
    shape = _numbers(node.inputs[0])
    values: list[Any] = [None if value is None else value.const_value for value in node.inputs[1:]]
    if shape is None or len(values) < 3 or any(value is None for value in values):
        return
    ends: list[int] = values[1].numpy().tolist()
    axes: list[int] = values[2].numpy().tolist()
    node.replace_input_with(
        2, _constant(model, [min(end, shape[at]) for end, at in zip(ends, axes, strict=True)], made)
    )


def _settle_rows(model: Any, node: Any, made: dict[tuple[int, ...], Any]) -> None:
    """Rows put in the place of neighbouring ones: what stood before, they, and what stood behind them."""
    import numpy as np
    import onnx_ir as ir

    data, places, rows = node.inputs
    shape, said = _numbers(data), node.attributes.get("reduction")
    if (
        node.outputs[0].is_graph_output()
        or shape is None
        or places.const_value is None
        or (said is not None and said.value != "none")
    ):
        return
    at = places.const_value.numpy()
    if at.ndim != 2 or at.shape[1] != 1 or not np.array_equal(at[:, 0], np.arange(len(at)) + at[0, 0]):
        return
    begin, end = int(at[0, 0]), int(at[-1, 0]) + 1
    new: list[Any] = []

    def kept(first: int, last: int) -> list[Any]:
        if first == last:
            return []
        new.append(ir.node("Slice", [data, *(_constant(model, [number], made) for number in (first, last, 0))]))
        new[-1].outputs[0].name = f"{node.outputs[0].name}_rows_{first}"
        return [new[-1].outputs[0]]

    new.append(ir.node("Concat", [*kept(0, begin), rows, *kept(end, shape[0])], attributes={"axis": 0}))
    old, last = node.outputs[0], new[-1].outputs[0]
    last.name, last.shape, last.type = old.name, old.shape, old.type
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, [old], [last])


def _numbers(value: Any) -> list[int] | None:
    if value.shape is None or not all(isinstance(axis, int) for axis in value.shape):
        return None
    return list(value.shape)


def _constant(model: Any, numbers: list[int], made: dict[tuple[int, ...], Any]) -> Any:
    """An initializer of whole numbers, the same one for the same numbers."""
    import numpy as np
    import onnx_ir as ir

    key = tuple(numbers)
    if key not in made:
        tensor = ir.tensor(np.array(numbers, np.int64), name=f"numbers_{'_'.join(map(str, key)).replace('-', 'm')}")
        made[key] = ir.Value(
            name=tensor.name, shape=ir.Shape((len(key),)), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        model.graph.register_initializer(made[key])
    return made[key]
