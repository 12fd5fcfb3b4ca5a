"""A graph in another opset: newer ones are onnxscript's converter's, older ones differ in little that a model needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import pi, sqrt
from typing import Any, Final

from dconv.errors import Refused


def convert(model: Any, opset: int) -> None:
    """Have a graph be one of an opset; weights may be inputs.

    Args:
        model: an ``onnx_ir.Model``, changed in place.
        opset: of ONNX's own domain.

    Raises:
        Refused: an operation has no form there.
    """
    from onnxscript import version_converter

    if opset >= model.opset_imports[""]:
        newer: Any = version_converter  # whose functions have types in part
        newer.convert_version(model, opset)
    else:
        _lower(model, opset)


def _lower(model: Any, opset: int) -> None:
    """Operations stay as they are where the older opset has them with these attributes.

    Between 18 and what torch writes all others only gained types and attributes (ONNX's Changelog document).
    """
    import onnx
    from onnx_ir.passes.common import DeduplicateInitializersPass, LiftConstantsToInitializersPass

    for node in list(nodes(model.graph)):
        if node.domain == "" and node.op_type in _WITHOUT and opset < _WITHOUT[node.op_type][0]:
            _WITHOUT[node.op_type][1](node)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    DeduplicateInitializersPass()(model)
    lacking: set[str] = set()
    for node in nodes(model.graph):
        if node.domain != "":
            continue
        try:
            known = onnx.defs.get_schema(node.op_type, opset, "")
        except onnx.defs.SchemaError:
            lacking.add(node.op_type)
            continue
        if node.op_type in _CHANGED or len(node.inputs) > known.max_input:
            lacking.add(node.op_type)
        for name in set(node.attributes) - set(known.attributes):
            if (node.op_type, name) != ("Cast", "saturate"):  # speaks of eight-bit numbers alone
                lacking.add(f"{name} of {node.op_type}")
            else:
                del node.attributes[name]
        node.version = opset
    if lacking:
        raise Refused(
            "this graph has no form in that opset, nothing was written",
            where=f"--opset {opset}",
            expected=f"{model.opset_imports['']}, as it is",
            found=", ".join(sorted(lacking)),
        )
    model.opset_imports[""] = opset
    model.graph.opset_imports[""] = opset


def nodes(graph: Any) -> Iterator[Any]:
    """All nodes of an ``onnx_ir.Graph``, those of inner graphs included."""
    from onnx_ir.traversal import RecursiveGraphIterator

    yield from RecursiveGraphIterator(graph)


def _gelu(node: Any) -> None:
    """Its definition (Hendrycks and Gimpel, arXiv:1606.08415), exactly or with tanh as the node says."""
    tape = _Tape(node)
    x = node.inputs[0]
    said = node.attributes.get("approximate")
    if said is not None and said.value == "tanh":
        cube = tape("Mul", tape("Mul", x, x), x)
        inner = tape("Mul", tape("Add", x, tape("Mul", cube, 0.044715)), sqrt(2 / pi))
        bent = tape("Tanh", inner)
    else:
        bent = tape("Erf", tape("Mul", x, sqrt(0.5)))
    tape.put(tape("Mul", tape("Mul", x, 0.5), tape("Add", bent, 1.0)))


class _Tape:
    """Operations in the place of one, in its dtype."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._made: list[Any] = []

    def __call__(self, kind: str, *inputs: Any) -> Any:
        import onnx_ir as ir

        values = [self._number(one) if isinstance(one, float) else one for one in inputs]
        made = ir.node(kind, values)
        made.outputs[0].name = f"{self._node.outputs[0].name}_lower_{len(self._made)}"
        made.outputs[0].type, made.outputs[0].shape = self._node.outputs[0].type, self._node.outputs[0].shape
        self._made.append(made)
        return made.outputs[0]

    def _number(self, number: float) -> Any:
        import numpy as np
        import onnx_ir as ir

        dtype = self._node.outputs[0].dtype
        tensor = ir.tensor(np.array(number, dtype.numpy()))
        made = ir.node("Constant", [], attributes={"value": tensor})
        made.outputs[0].name = f"{self._node.outputs[0].name}_lower_{len(self._made)}"
        made.outputs[0].const_value = tensor
        self._made.append(made)
        return made.outputs[0]

    def put(self, last: Any) -> None:
        """Put the operations in the place of the node, whose output ``last`` is then."""
        import onnx_ir as ir

        node = self._node
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], self._made, [node.outputs[0]], [last])


#: Operations that an opset brought, and what says the same without them.
_WITHOUT: Final[dict[str, tuple[int, Callable[[Any], None]]]] = {"Gelu": (20, _gelu)}
#: Those that mean something else since 18.
_CHANGED: Final = ("DFT", "GridSample", "Resize", "GroupNormalization")
